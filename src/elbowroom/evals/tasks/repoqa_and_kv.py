"""SCBench's mixed task: functions by description and values by key, in turn, about one context of both."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import chain

from elbowroom.evals.base import Sample, TextTokenizer, Turn
from elbowroom.evals.functions import Function
from elbowroom.evals.samples import TaskSpec
from elbowroom.evals.sizing import Draft, Sizer, Units, generators
from elbowroom.evals.tasks.base import Task
from elbowroom.evals.tasks.kv import pair
from elbowroom.evals.tasks.kv import question as ask_value
from elbowroom.evals.tasks.repoqa import HEAD, TAIL, arrange, asked_depths, choose, with_rivals
from elbowroom.evals.tasks.repoqa import question as ask_function
from elbowroom.evals.words import uuids


def num_questions(spec: TaskSpec) -> int:
    """Return the questions about a context: a function and a value for each fact."""
    return 2 * spec.num_facts


def samples(tokenizer: TextTokenizer, spec: TaskSpec) -> Iterator[Sample]:
    """Yield code with pairs in between."""
    sizer = Sizer(tokenizer, spec)
    for number, rng in generators(spec, num_questions(spec)):
        functions, others = choose(sizer, rng)
        stream = uuids(rng)
        pairs = [(next(stream), next(stream)) for _ in functions]
        depths = asked_depths(spec, rng, number * spec.num_facts) + rng.random(len(pairs)).tolist()
        turns = tuple(
            chain.from_iterable(
                (ask_function(sizer, function), ask_value(sizer, *each))
                for function, each in zip(functions, pairs, strict=True)
            )
        )
        units = Units(pair(key, value) for key, value in zip(stream, stream, strict=False))
        lines = [pair(*each) for each in pairs]
        draft = partial(_draft, functions, others, lines, units, depths, turns)
        yield sizer.fit(f"repoqa_and_kv-{number}", draft, len(others))


def _draft(
    functions: list[Function],
    others: list[Function],
    lines: list[str],
    units: Units[str],
    depths: list[float],
    turns: tuple[Turn, ...],
    size: int,
) -> Draft:
    """Return a context of the asked functions and pairs and ``size`` more of each."""
    fillers = chain.from_iterable(zip((each.code for each in others[:size]), units.first(size), strict=True))
    text, starts = arrange([each.code for each in functions] + lines, list(fillers), depths)
    half = len(functions)
    offsets = chain.from_iterable(zip(starts[:half], starts[half:], strict=True))
    rivals = with_rivals(turns, functions + others[:size])
    return Draft(HEAD + text + TAIL, rivals, tuple(len(HEAD) + offset for offset in offsets))


REPOQA_AND_KV = Task(
    asks="functions by description and values by key, in turn (SCBench)", samples=samples, num_questions=num_questions
)
