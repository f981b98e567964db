"""RULER's needles in a haystack: "magic" numbers of keys, amid noise, source text or other needles.

Prompts, needle, key and value types, the 40 depths and the 128 new tokens are RULER's (arXiv 2404.06654). Where RULER
takes essays as haystack, these tasks take the held-out source text; keys are pairs of words out of the same text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np

from elbowroom.evals.base import Sample, TextTokenizer, Turn
from elbowroom.evals.distractors import heldout_lines
from elbowroom.evals.haystack import MOST_UNITS, NOISE, hide
from elbowroom.evals.samples import TaskSpec
from elbowroom.evals.sizing import Draft, Sizer, Units, generators, stratum
from elbowroom.evals.tasks.base import Task
from elbowroom.evals.words import numbers, uuids, word_pairs

NEW_TOKENS = 128
NUM_DEPTHS = 40
Strings = Iterator[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Needles:
    """One variant; the fields are RULER's."""

    name: str
    haystack: Literal["noise", "source", "needles"] = "source"
    keys: Literal["words", "uuids"] = "words"
    values: Literal["numbers", "uuids"] = "numbers"
    num_keys: int = 1
    """Keys in a context with one question."""
    num_values: int = 1
    """Values of each key."""
    num_asked: int = 1
    """Keys in one question."""

    def samples(self, tokenizer: TextTokenizer, spec: TaskSpec) -> Iterator[Sample]:
        """Yield contexts of ``spec.num_facts`` questions."""
        sizer = Sizer(tokenizer, spec)
        most = len(heldout_lines()) if self.haystack == "source" else MOST_UNITS
        for number, rng in generators(spec, spec.num_facts):
            yield sizer.fit(f"{self.name}-{number}", self._drafts(sizer, number, rng), most)

    def _drafts(self, sizer: Sizer, number: int, rng: np.random.Generator) -> Callable[[int], Draft]:
        spec = sizer.spec
        num_asked = self.num_asked * spec.num_facts
        num_answers = num_asked * self.num_values
        keys, values = self._keys(rng), self._values(rng)
        chosen = islice(keys, max(self.num_keys, num_asked))
        pairs = [(key, list(islice(values, self.num_values))) for key in chosen]
        needles = [self._needle(key, value) for key, each in pairs for value in each]
        # Answers lie at all depths equally often; what is never asked lies anywhere.
        asked = [stratum(spec, number * num_answers + place, NUM_DEPTHS) for place in range(num_answers)]
        others = rng.integers(NUM_DEPTHS, size=len(needles) - num_answers).tolist()
        depths = [depth / (NUM_DEPTHS - 1) for depth in asked + others]
        units = Units(self._hay(rng, keys, values))
        turns = tuple(
            self._turn(sizer, pairs[start : start + self.num_asked]) for start in range(0, num_asked, self.num_asked)
        )
        head = self._head(plural=num_answers > 1)

        def draft(size: int) -> Draft:
            text, starts = hide(units.first(size), needles, depths)
            alone = self.num_asked * self.num_values == 1
            offsets = tuple(len(head) + starts[turn] for turn in range(len(turns))) if alone else ()
            return Draft(head + text, turns, offsets)

        return draft

    def _keys(self, rng: np.random.Generator) -> Strings:
        return word_pairs(rng) if self.keys == "words" else uuids(rng)

    def _values(self, rng: np.random.Generator) -> Strings:
        return numbers(rng, 7) if self.values == "numbers" else uuids(rng)

    def _hay(self, rng: np.random.Generator, keys: Strings, values: Strings) -> Strings:
        if self.haystack == "source":
            lines, start = heldout_lines(), int(rng.integers(len(heldout_lines())))
            for number in range(len(lines)):
                yield lines[(start + number) % len(lines)].rstrip("\n")
        while self.haystack == "noise":
            yield NOISE
        while self.haystack == "needles":
            yield self._needle(next(keys), next(values))

    def _needle(self, key: str, value: str) -> str:
        return f"One of the special magic {self.values} for {key} is: {value}."

    def _head(self, plural: bool) -> str:
        opening = f"Some special magic {self.values} are" if plural else f"A special magic {self.values[:-1]} is"
        asked = self.values if plural else self.values[:-1]
        return (
            f"{opening} hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the {asked} afterwards.\n"
        )

    def _turn(self, sizer: Sizer, pairs: list[tuple[str, list[str]]]) -> Turn:
        names = [key for key, _ in pairs]
        query = names[0] if len(names) == 1 else f"{', '.join(names[:-1])}, and {names[-1]}"
        answers = tuple(value for _, values in pairs for value in values)
        asked = self.values if len(answers) > 1 else self.values[:-1]
        ask, answer = ("are all", "are") if len(answers) > 1 else ("is", "is")
        prompt = (
            f"\nWhat {ask} the special magic {asked} for {query} mentioned in the provided text?"
            f" The special magic {asked} for {query} mentioned in the provided text {answer}"
        )
        return sizer.turn(prompt, answers, f" {', '.join(answers)}.", "share", NEW_TOKENS)


def _task(asks: str, needles: Needles) -> Task:
    return Task(asks=f"{asks} (RULER)", samples=needles.samples)


SINGLE_1 = _task("a magic number in repeated noise", Needles(name="niah_single_1", haystack="noise"))
SINGLE_2 = _task("a magic number in source text", Needles(name="niah_single_2"))
SINGLE_3 = _task("a magic UUID in source text", Needles(name="niah_single_3", values="uuids"))
MULTIKEY_1 = _task("a magic number among those of four keys", Needles(name="niah_multikey_1", num_keys=4))
MULTIKEY_2 = _task("a magic number in a text of magic numbers", Needles(name="niah_multikey_2", haystack="needles"))
MULTIKEY_3 = _task(
    "a magic UUID of a UUID in a text of those",
    Needles(name="niah_multikey_3", haystack="needles", keys="uuids", values="uuids"),
)
MULTIVALUE = _task("all four magic numbers of a key", Needles(name="niah_multivalue", num_values=4))
MULTIQUERY = _task("the magic numbers of four keys in one answer", Needles(name="niah_multiquery", num_asked=4))
