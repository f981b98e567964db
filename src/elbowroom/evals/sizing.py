"""Sizes of samples: the largest context that, with its questions and answers, stays inside the wanted tokens.

Nothing is ever cut off: a task says what its text is made of, and units are added until the next would not fit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

import numpy as np

from elbowroom.errors import RequestError
from elbowroom.evals.base import Sample, TextTokenizer, Turn
from elbowroom.evals.samples import TaskSpec

T = TypeVar("T")
FIRST_PROBE = 64
"""Units by whose tokens the size of the rest is guessed."""
SLACK_TOKENS = 2
"""New tokens beyond the reference, so that a longer number is not taken for its beginning."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A context of some size and its questions."""

    context: str
    turns: tuple[Turn, ...]
    offsets: tuple[int, ...] = ()
    """Per turn: characters before the asked fact; empty where a question is about the whole context."""


class Units(Generic[T]):
    """The beginning of an endless stream: ``first(n)`` is always the beginning of ``first(n + 1)``."""

    def __init__(self, stream: Iterator[T]) -> None:
        self._stream, self._made = stream, list[T]()

    def first(self, count: int) -> list[T]:
        """Return the first ``count`` units."""
        self._made += islice(self._stream, max(0, count - len(self._made)))
        return self._made[:count]


class Sizer:
    """Counts tokens as the model under test will, text by text, and makes samples of the wanted size.

    Args:
        tokenizer: of the model.
        spec: says how many tokens context, prompts and answers may have together.
    """

    def __init__(self, tokenizer: TextTokenizer, spec: TaskSpec) -> None:
        self._tokenizer, self.spec = tokenizer, spec

    def count(self, text: str) -> int:
        """Return the number of tokens of ``text``."""
        return len(self._tokenizer.encode(text))

    def turn(
        self, prompt: str, targets: tuple[str, ...], reference: str, scorer: str, new_tokens: int | None = None
    ) -> Turn:
        """Return a question whose answer may have ``new_tokens`` tokens, or what the reference needs if that is more.

        Args:
            prompt: text in front of the answer.
            targets: answers.
            reference: what a perfect model writes.
            scorer: name of the scorer.
            new_tokens: by default a little more than the reference has.
        """
        needed = self.count(reference)
        most = needed + SLACK_TOKENS if new_tokens is None else max(needed, new_tokens)
        return Turn(
            prompt=prompt,
            target=targets[0],
            more_targets=targets[1:],
            reference=reference,
            max_new_tokens=most,
            scorer=scorer,
        )

    def fit(self, name: str, draft: Callable[[int], Draft], most: int) -> Sample:
        """Return the sample with the most units that fits.

        Args:
            name: id of the sample.
            draft: makes a context of a number of units; more units have more tokens.
            most: units that there are.

        Raises:
            RequestError: not even a context without units fits, or all units together are too few tokens.
        """
        spec = self.spec
        num_units = self._largest(draft, most)
        chosen = draft(num_units)
        length = self.count(chosen.context)
        depths = [self.count(chosen.context[:offset]) / length for offset in chosen.offsets]
        turns = (dataclasses.replace(turn, depth=depth) for turn, depth in zip(chosen.turns, depths, strict=True))
        return Sample(
            id=name,
            context=chosen.context,
            turns=tuple(turns) if depths else chosen.turns,
            num_tokens=self._tokens(chosen),
            follow_up=spec.follow_up(),
            meta={"context_tokens": spec.context_tokens, "num_facts": spec.num_facts, "seed": spec.seed},
        )

    def _tokens(self, draft: Draft) -> int:
        tails = [self.count(turn.prompt) + turn.max_new_tokens for turn in draft.turns]
        return self.count(draft.context) + (sum(tails) if self.spec.follow_up() else max(tails))

    def _largest(self, draft: Callable[[int], Draft], most: int) -> int:
        """Return the largest number of units that fits; every probe takes units to be as long as those so far."""
        budget = self.spec.context_tokens
        smallest = self._tokens(draft(0))
        if smallest > budget:
            raise RequestError(
                f"questions, answers and what every context needs have {smallest} tokens, {budget} were asked for",
                "ask for longer contexts or fewer questions in each (--length, --keys)",
            )
        low, high = 0, most + 1
        probe, num_probes = min(FIRST_PROBE, most), 0
        while high - low > 1:
            tokens = self._tokens(draft(probe))
            low, high = (probe, high) if tokens <= budget else (low, probe)
            num_probes += 1
            guess = probe + round((budget - tokens) * probe / max(1, tokens - smallest))
            if num_probes % 3 == 0 and high <= most:
                guess = (low + high) // 2
            probe = min(max(guess, low + 1), high - 1)
        if low == most:
            raise RequestError(
                f"there is not enough text for a context of {budget} tokens", "ask for shorter contexts (--length)"
            )
        return low


def generators(spec: TaskSpec, num_questions: int) -> Iterator[tuple[int, np.random.Generator]]:
    """Yield number and random generator of each sample until ``spec.num_queries`` questions are asked."""
    for number in range(-(-spec.num_queries // num_questions)):
        yield number, np.random.default_rng([spec.seed, number])


def stratum(spec: TaskSpec, question: int, num_strata: int) -> int:
    """Return which of ``num_strata`` parts of the depth a question is about; all are asked equally often.

    Args:
        spec: its seed orders the parts.
        question: number of the question, over all samples.
        num_strata: parts.
    """
    round_, place = divmod(question, num_strata)
    return int(np.random.default_rng([spec.seed, round_, num_strata]).permutation(num_strata)[place])
