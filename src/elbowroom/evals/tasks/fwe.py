"""RULER's frequent words: which three coded words of a text with Zipf's frequencies appear most often.

Template, exponent 2, vocabulary of a fiftieth of the tokens, dots as the most frequent word and the 50 new tokens are
RULER's (arXiv 2404.06654).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import numpy as np

from elbowroom.evals.base import Sample, TextTokenizer, Turn
from elbowroom.evals.facts import random_key
from elbowroom.evals.samples import TaskSpec
from elbowroom.evals.sizing import Draft, Sizer, generators
from elbowroom.evals.tasks.base import Task, just_one

HEAD = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. "
)
QUESTION = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
    " Answer: According to the coded text above, the three most frequently appeared words are:"
)
DOTS = "..."
NUM_ASKED = 3
NEW_TOKENS = 50
TOKENS_PER_WORD = 50
LEAST_WORDS = 128
"""With fewer words the third and the fourth may appear equally often."""
MOST_WORDS = 2**24
ZETA = math.pi**2 / 6
"""Sum of all 1/k^2."""


def samples(tokenizer: TextTokenizer, spec: TaskSpec) -> Iterator[Sample]:
    """Yield coded texts with one question each."""
    sizer = Sizer(tokenizer, spec)
    num_words = max(NUM_ASKED + 2, spec.context_tokens // TOKENS_PER_WORD)
    for number, rng in generators(spec, 1):
        words = list(dict.fromkeys(random_key(rng) for _ in range(num_words)))
        answers = tuple(words[:NUM_ASKED])
        turn = sizer.turn(QUESTION, answers, f" {' '.join(answers)}", "share", NEW_TOKENS)
        draft = partial(_draft, [DOTS, *words], turn, int(rng.integers(2**31)))
        yield sizer.fit(f"fwe-{number}", draft, MOST_WORDS)


def _draft(words: list[str], turn: Turn, seed: int, size: int) -> Draft:
    counts = [int((size + LEAST_WORDS) / (ZETA * rank**2)) for rank in range(1, len(words) + 1)]
    text = np.repeat(np.arange(len(words)), counts)
    order = np.random.default_rng(seed).permutation(text)
    return Draft(HEAD + " ".join(words[index] for index in order), (turn,))


FWE = Task(asks="the three most frequent words of a coded text (RULER)", samples=samples, num_questions=just_one)
