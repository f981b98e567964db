"""Needles: contexts with facts in them, and the very tokens that each fact is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from elbowroom.errors import RequestError
from elbowroom.evals import facts
from elbowroom.evals.distractors import Distractors
from elbowroom.models.tokenizer import Tokenizer

NUM_FACTS = 4
"""Facts in each context; every one is asked."""
SLACK_TOKENS = 2
"""New tokens beyond the answer, so that a longer number is not taken for its beginning."""


@dataclass(frozen=True, slots=True)
class Needle:
    """One fact of a context and the question that asks for it."""

    start: int
    """First token of the fact in the context."""
    token_ids: tuple[int, ...]
    """Tokens of the fact."""
    prompt_ids: tuple[int, ...]
    """Tokens of the question, behind the context."""
    answer: str
    max_new_tokens: int

    @property
    def stop(self) -> int:
        """One past the last token of the fact."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Haystack:
    """A context and the facts in it."""

    token_ids: tuple[int, ...]
    needles: tuple[Needle, ...]


def haystacks(tokenizer: Tokenizer, distractors: Distractors, lengths: Sequence[int], seed: int) -> Iterator[Haystack]:
    """Yield a context with ``NUM_FACTS`` facts for each of ``lengths``, which include questions and answers.

    Args:
        tokenizer: of the model.
        distractors: what stands around the facts.
        lengths: tokens.
        seed: of keys, values and places.

    Raises:
        RequestError: the text is shorter than the longest context.
    """
    for number, length in enumerate(lengths):
        yield _haystack(tokenizer, distractors, length, np.random.default_rng([seed, number]))


def _haystack(tokenizer: Tokenizer, distractors: Distractors, length: int, rng: np.random.Generator) -> Haystack:
    pairs = [(facts.random_key(rng), facts.random_value(rng)) for _ in range(NUM_FACTS)]
    depths = [(place + float(rng.random())) / NUM_FACTS for place in range(NUM_FACTS)]
    lines = [facts.SENTENCE.fact(*pair) for pair in pairs]
    special = len(tokenizer.encode(""))
    tail = max(distractors.count(f"\n{line}") for line in lines) + SLACK_TOKENS
    try:
        context = distractors.place(rng, lines, depths, length - tail - special).context.rstrip("\n")
    except ValueError as reason:
        raise RequestError(
            f"cannot calibrate with contexts of {length} tokens: {reason}", "give a longer --text"
        ) from reason
    encoded = tokenizer.backend.encode(context)
    needles = [_needle(tokenizer, context, encoded.offsets, encoded.ids, *pair) for pair in pairs]
    return Haystack(tuple(encoded.ids), tuple(needles))


def _needle(
    tokenizer: Tokenizer, context: str, offsets: list[tuple[int, int]], ids: list[int], key: str, value: str
) -> Needle:
    line = facts.SENTENCE.fact(key, value)
    first = context.index(line)
    last = first + len(line)
    # A token may begin with the line break before the fact, or end with the one behind it.
    inside = [index for index, (start, stop) in enumerate(offsets) if start < last and stop > first and stop > start]
    start, stop = inside[0], inside[-1] + 1
    return Needle(
        start=start,
        token_ids=tuple(ids[start:stop]),
        prompt_ids=tuple(tokenizer.encode("\n" + facts.SENTENCE.prompt.format(key=key), add_special_tokens=False)),
        answer=value,
        max_new_tokens=len(tokenizer.encode(f" {value}", add_special_tokens=False)) + SLACK_TOKENS,
    )
