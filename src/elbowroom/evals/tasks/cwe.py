"""RULER's common words: which ten words of a numbered list appear most often.

Template, worked example, counts (30 and 3; below 4,096 tokens 6 and 1) and the 120 new tokens are RULER's
(arXiv 2404.06654); the words are those of the held-out text.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from elbowroom.evals.base import Sample, TextTokenizer, Turn
from elbowroom.evals.samples import TaskSpec
from elbowroom.evals.sizing import Draft, Sizer, generators
from elbowroom.evals.tasks.base import Task, just_one
from elbowroom.evals.words import heldout_words

HEAD = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
QUESTION = (
    "\nQuestion: What are the 10 most common words in the above list?"
    " Answer: The top 10 words that appear most often in the list are:"
)
NUM_COMMON = 10
NEW_TOKENS = 120
SHORT_TOKENS = 4096


def samples(tokenizer: TextTokenizer, spec: TaskSpec) -> Iterator[Sample]:
    """Yield lists of words with one question each."""
    sizer = Sizer(tokenizer, spec)
    # Words, and how often the common and the other ones appear: in the example, then in the list itself.
    shown, counts = ((20, 3, 1), (6, 1)) if spec.context_tokens < SHORT_TOKENS else ((40, 10, 3), (30, 3))
    for number, rng in generators(spec, 1):
        words = [heldout_words()[index] for index in rng.permutation(len(heldout_words()))]
        solved, words = words[: shown[0]], words[shown[0] :]
        common, others = words[:NUM_COMMON], words[NUM_COMMON:]
        example = _list(solved[:NUM_COMMON], solved[NUM_COMMON:], shown[1:], 0) + QUESTION
        head = f"{HEAD}{example} {_numbered(solved[:NUM_COMMON])}\n{HEAD}"
        turn = sizer.turn(QUESTION, tuple(common), f" {_numbered(common)}", "share", NEW_TOKENS)
        draft = partial(_draft, head, common, others, counts, turn, int(rng.integers(2**31)))
        yield sizer.fit(f"cwe-{number}", draft, len(others))


def _draft(
    head: str, common: list[str], others: list[str], counts: tuple[int, int], turn: Turn, seed: int, size: int
) -> Draft:
    return Draft(head + _list(common, others[:size], counts, seed), (turn,))


def _list(common: list[str], others: list[str], counts: tuple[int, ...], seed: int) -> str:
    words = common * counts[0] + others * counts[1]
    order = np.random.default_rng(seed).permutation(len(words))
    return _numbered([words[index] for index in order])


def _numbered(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))


CWE = Task(asks="the ten most frequent words of a list (RULER)", samples=samples, num_questions=just_one)
