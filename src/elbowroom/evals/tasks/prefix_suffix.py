"""SCBench's prefix and suffix: the string of a list that begins and ends as given.

For each answer the list also holds a string that only begins like it and one that only ends like it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from elbowroom.evals.base import Sample, TextTokenizer, Turn
from elbowroom.evals.facts import random_key
from elbowroom.evals.haystack import MOST_UNITS, hide
from elbowroom.evals.samples import NUM_DECILES, TaskSpec
from elbowroom.evals.sizing import Draft, Sizer, Units, generators, stratum
from elbowroom.evals.tasks.base import Task

HEAD = "Below is a list of strings. Memorize them, and find the one with the given beginning and end.\n\n"
QUESTION = '\nThe string that begins with "{prefix}" and ends with "{suffix}" is:'
NUM_PARTS = 3


def samples(tokenizer: TextTokenizer, spec: TaskSpec) -> Iterator[Sample]:
    """Yield lists of which ``spec.num_facts`` strings are asked."""
    sizer = Sizer(tokenizer, spec)
    for number, rng in generators(spec, spec.num_facts):
        asked = [[random_key(rng) for _ in range(NUM_PARTS)] for _ in range(spec.num_facts)]
        places = range(number * spec.num_facts, (number + 1) * spec.num_facts)
        depths = [(stratum(spec, place, NUM_DECILES) + float(rng.random())) / NUM_DECILES for place in places]
        alike = [text for parts in asked for text in _alike(rng, parts)]
        lines = ["".join(parts) for parts in asked] + alike
        depths += rng.random(len(alike)).tolist()
        turns = tuple(_turn(sizer, parts) for parts in asked)
        draft = partial(_draft, Units(_strings(rng)), lines, depths, turns)
        yield sizer.fit(f"prefix_suffix-{number}", draft, MOST_UNITS)


def _strings(rng: np.random.Generator) -> Iterator[str]:
    while True:
        yield "".join(random_key(rng) for _ in range(NUM_PARTS))


def _alike(rng: np.random.Generator, parts: list[str]) -> tuple[str, str]:
    prefix, _, suffix = parts
    return prefix + random_key(rng) + random_key(rng), random_key(rng) + random_key(rng) + suffix


def _turn(sizer: Sizer, parts: list[str]) -> Turn:
    text = "".join(parts)
    return sizer.turn(QUESTION.format(prefix=parts[0], suffix=parts[2]), (text,), f" {text}", "share")


def _draft(units: Units[str], lines: list[str], depths: list[float], turns: tuple[Turn, ...], size: int) -> Draft:
    text, starts = hide(units.first(size), lines, depths)
    return Draft(HEAD + text, turns, tuple(len(HEAD) + starts[turn] for turn in range(len(turns))))


PREFIX_SUFFIX = Task(asks="the string with a given beginning and end in a list (SCBench)", samples=samples)
