"""SCBench's math find: the largest, the smallest, the median and their neighbours in a long list of numbers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from elbowroom.evals.base import Sample, TextTokenizer, Turn
from elbowroom.evals.samples import TaskSpec
from elbowroom.evals.sizing import Draft, Sizer, Units, generators
from elbowroom.evals.tasks.base import Task
from elbowroom.evals.words import numbers

HEAD = "Below is a list of numbers, each of which appears once.\n\n["
QUESTION = "\nThe {kind} number in the list is:"
KINDS = ("largest", "smallest", "median", "second largest", "second smallest", "third largest")
DIGITS = 6
LEAST = 5
"""Numbers of the shortest list."""
MOST = 200_000
"""Pairs of numbers; half of all numbers of six digits, so that fresh ones are found at once."""


def num_questions(spec: TaskSpec) -> int:
    """Return the questions about a list: at most one of each kind."""
    return min(spec.num_facts, len(KINDS))


def samples(tokenizer: TextTokenizer, spec: TaskSpec) -> Iterator[Sample]:
    """Yield lists with up to six questions each."""
    sizer = Sizer(tokenizer, spec)
    for number, rng in generators(spec, num_questions(spec)):
        units = Units(numbers(rng, DIGITS))
        kinds = [KINDS[index] for index in rng.permutation(len(KINDS))[: num_questions(spec)]]
        yield sizer.fit(f"mf-{number}", partial(_draft, sizer, units, kinds), MOST)


def _draft(sizer: Sizer, units: Units[str], kinds: list[str], size: int) -> Draft:
    listed = units.first(LEAST + 2 * size)  # an odd count has a median that is in the list
    ordered = sorted(listed, key=int)
    answers = dict(
        zip(KINDS, (ordered[place] for place in (-1, 0, len(ordered) // 2, -2, 1, -3)), strict=True),
    )
    turns = tuple(_turn(sizer, kind, answers[kind]) for kind in kinds)
    return Draft(f"{HEAD}{', '.join(listed)}]", turns)


def _turn(sizer: Sizer, kind: str, answer: str) -> Turn:
    return sizer.turn(QUESTION.format(kind=kind), (answer,), f" {answer}", "number")


MF = Task(asks="the largest, smallest, median, ... of a list (SCBench)", samples=samples, num_questions=num_questions)
