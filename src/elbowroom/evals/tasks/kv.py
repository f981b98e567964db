"""SCBench's key-value retrieval: the value of a UUID in a JSON object of random UUIDs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from elbowroom.evals.base import Sample, TextTokenizer, Turn
from elbowroom.evals.haystack import MOST_UNITS, hide
from elbowroom.evals.samples import NUM_DECILES, TaskSpec
from elbowroom.evals.sizing import Draft, Sizer, Units, generators, stratum
from elbowroom.evals.tasks.base import Task
from elbowroom.evals.words import uuids

HEAD = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n{\n"
QUESTION = '\nKey: "{key}"\nThe value associated with the specified key is:'


def samples(tokenizer: TextTokenizer, spec: TaskSpec) -> Iterator[Sample]:
    """Yield JSON objects of which ``spec.num_facts`` keys are asked."""
    sizer = Sizer(tokenizer, spec)
    for number, rng in generators(spec, spec.num_facts):
        stream = uuids(rng)
        asked = [(next(stream), next(stream)) for _ in range(spec.num_facts)]
        places = range(number * spec.num_facts, (number + 1) * spec.num_facts)
        depths = [(stratum(spec, place, NUM_DECILES) + float(rng.random())) / NUM_DECILES for place in places]
        turns = tuple(question(sizer, key, value) for key, value in asked)
        units = Units(pair(key, value) for key, value in zip(stream, stream, strict=False))
        draft = partial(_draft, units, [pair(*each) for each in asked], depths, turns)
        yield sizer.fit(f"kv-{number}", draft, MOST_UNITS)


def pair(key: str, value: str) -> str:
    """Return a pair as it stands in the object."""
    return f'"{key}": "{value}",'


def question(sizer: Sizer, key: str, value: str) -> Turn:
    """Return the question for the value of ``key``."""
    return sizer.turn(QUESTION.format(key=key), (value,), f' "{value}"', "share")


def _draft(units: Units[str], lines: list[str], depths: list[float], turns: tuple[Turn, ...], size: int) -> Draft:
    text, starts = hide(units.first(size), lines, depths)
    return Draft(f"{HEAD}{text.removesuffix(',')}\n}}", turns, tuple(len(HEAD) + start for start in starts))


KV = Task(asks="the value of a UUID in a JSON object of UUIDs (SCBench)", samples=samples)
