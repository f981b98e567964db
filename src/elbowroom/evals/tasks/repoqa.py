"""RepoQA's question, as SCBench asks it: repeat the function that a description describes.

Code and descriptions are functions of the held-out standard library files and their own docstrings, which are taken
out of the code. SCBench lets answers have 1,024 tokens; here it is what the function needs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial

import numpy as np

from elbowroom.errors import RequestError
from elbowroom.evals.base import Sample, TextTokenizer, Turn
from elbowroom.evals.functions import Function, heldout_functions
from elbowroom.evals.samples import NUM_DECILES, TaskSpec
from elbowroom.evals.sizing import Draft, Sizer, generators, stratum
from elbowroom.evals.tasks.base import Task

HEAD = "Below is the code of a library.\n\n```python\n"
TAIL = "\n```"
QUESTION = (
    "\n\nRepeat the function of the code above that does the following, without any change.\n"
    "Description: {description}\n```python\n"
)
ANSWER_SHARE = 4
"""Functions that are asked have at most the context's tokens over this, over the number of questions."""
NEW_TOKENS = 16
"""Beyond the function itself."""


def samples(tokenizer: TextTokenizer, spec: TaskSpec) -> Iterator[Sample]:
    """Yield code of which ``spec.num_facts`` functions are asked."""
    sizer = Sizer(tokenizer, spec)
    for number, rng in generators(spec, spec.num_facts):
        asked, others = choose(sizer, rng)
        depths = asked_depths(spec, rng, number * spec.num_facts)
        turns = tuple(question(sizer, function) for function in asked)
        yield sizer.fit(f"repoqa-{number}", partial(_draft, asked, others, depths, turns), len(others))


def choose(sizer: Sizer, rng: np.random.Generator) -> tuple[list[Function], list[Function]]:
    """Return the functions that are asked, short ones, and all others, both in random order.

    Raises:
        RequestError: there are too few functions of that length.
    """
    wanted = sizer.spec.num_facts
    longest = sizer.spec.context_tokens // (ANSWER_SHARE * wanted)
    asked, others = list[Function](), list[Function]()
    for index in rng.permutation(len(heldout_functions())):
        function = heldout_functions()[index]
        short = len(asked) < wanted and sizer.count(function.code) <= longest
        (asked if short else others).append(function)
    if len(asked) < wanted:
        raise RequestError(
            f"{wanted} functions of at most {longest} tokens are needed, there are {len(asked)}",
            "ask for longer contexts or fewer questions in each (--length, --keys)",
        )
    return asked, others


def asked_depths(spec: TaskSpec, rng: np.random.Generator, start: int) -> list[float]:
    """Return where the asked functions stand, every tenth of the depth equally often.

    Args:
        spec: of the task.
        rng: chooses the place inside a tenth.
        start: questions about the contexts before.
    """
    strata = (stratum(spec, start + place, NUM_DECILES) for place in range(spec.num_facts))
    return [(each + float(rng.random())) / NUM_DECILES for each in strata]


def question(sizer: Sizer, function: Function) -> Turn:
    """Return the question for ``function``."""
    reference = function.code + TAIL
    prompt = QUESTION.format(description=function.description)
    return sizer.turn(prompt, (function.code,), reference, "function", sizer.count(reference) + NEW_TOKENS)


def arrange(asked: list[str], others: list[str], depths: list[float]) -> tuple[str, list[int]]:
    """Return all texts with blank lines between them, and the character offset of each asked one."""
    places = [round(depth * len(others)) for depth in depths]
    keyed = [(place, 0, text) for place, text in zip(places, asked, strict=True)]
    keyed += [(place, 1, text) for place, text in enumerate(others)]
    ordered = [text for _, _, text in sorted(keyed, key=lambda item: item[:2])]
    text = "\n\n\n".join(ordered)
    return text, [text.index(each) for each in asked]


def with_rivals(turns: tuple[Turn, ...], functions: list[Function]) -> tuple[Turn, ...]:
    """Return the turns with all other functions of the context as rivals."""
    codes = [function.code for function in functions]
    return tuple(
        dataclasses.replace(turn, rivals=tuple(code for code in codes if code != turn.target)) for turn in turns
    )


def _draft(
    asked: list[Function], others: list[Function], depths: list[float], turns: tuple[Turn, ...], size: int
) -> Draft:
    text, starts = arrange([each.code for each in asked], [each.code for each in others[:size]], depths)
    rivals = with_rivals(turns, asked + others[:size])
    return Draft(HEAD + text + TAIL, rivals, tuple(len(HEAD) + start for start in starts))


REPOQA = Task(asks="the function that a docstring describes, in code without docstrings (SCBench)", samples=samples)
