"""RULER's variable tracking: all variables that a chain of assignments gives the same number.

Template, worked example in front, chain of four hops, names of five letters and the 30 new tokens are RULER's
(arXiv 2404.06654), the spelling of its answer prefix included.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import numpy as np

from elbowroom.evals.base import Sample, TextTokenizer, Turn
from elbowroom.evals.haystack import MOST_UNITS, NOISE, hide
from elbowroom.evals.samples import TaskSpec
from elbowroom.evals.sizing import Draft, Sizer, generators
from elbowroom.evals.tasks.base import Task

HEAD = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
QUESTION = (
    "\nQuestion: Find all variables that are assigned the value {value} in the text above."
    " Answer: According to the chain(s) of variable assignment in the text above,"
    " {count} variables are assgined the value {value}, they are: "
)
NUM_HOPS = 4
NEW_TOKENS = 30
EXAMPLE_LINES = 5
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def samples(tokenizer: TextTokenizer, spec: TaskSpec) -> Iterator[Sample]:
    """Yield noise with ``spec.num_facts`` chains, each asked once."""
    sizer = Sizer(tokenizer, spec)
    for number, rng in generators(spec, spec.num_facts):
        example = _example(rng)
        chains = _variables(rng, spec.num_facts, letters=5)
        lines, depths = _mix(rng, [_statements(names, value) for names, value in chains])
        turns = tuple(
            sizer.turn(_question(names, value), tuple(names), " ".join(names), "share", NEW_TOKENS)
            for names, value in chains
        )
        draft = partial(_draft, example + HEAD, lines, depths, turns)
        yield sizer.fit(f"vt-{number}", draft, MOST_UNITS)


def _draft(head: str, lines: list[str], depths: list[float], turns: tuple[Turn, ...], size: int) -> Draft:
    return Draft(head + hide([NOISE] * size, lines, depths)[0], turns)


def _variables(rng: np.random.Generator, count: int, letters: int) -> list[tuple[list[str], str]]:
    """Return names and number of ``count`` chains; no name and no number twice."""
    names = dict[str, None]()
    while len(names) < count * (NUM_HOPS + 1):
        names["".join(LETTERS[index] for index in rng.integers(len(LETTERS), size=letters))] = None
    ordered = list(names)
    values = rng.choice(np.arange(10_000, 99_999), size=count, replace=False).tolist()
    size = NUM_HOPS + 1
    return [(ordered[number * size : (number + 1) * size], str(value)) for number, value in enumerate(values)]


def _statements(names: list[str], value: str) -> list[str]:
    followers = [f"VAR {name} = VAR {before} " for before, name in pairwise(names)]
    return [f"VAR {names[0]} = {value}", *followers]


def _mix(rng: np.random.Generator, chains: list[list[str]]) -> tuple[list[str], list[float]]:
    """Return the statements of all chains, mixed but each chain in its order, with rising random depths."""
    order = rng.permutation(np.repeat(np.arange(len(chains)), NUM_HOPS + 1)).tolist()
    pending = [iter(chain) for chain in chains]
    return [next(pending[chain]) for chain in order], sorted(rng.random(len(order)).tolist())


def _question(names: list[str], value: str) -> str:
    return QUESTION.format(value=value, count=len(names))


def _example(rng: np.random.Generator) -> str:
    """Return a short solved chain, its names of three letters, as it stands in front of every context."""
    [(names, value)] = _variables(rng, 1, letters=3)
    lines, depths = _mix(rng, [_statements(names, value)])
    text = hide([NOISE] * EXAMPLE_LINES, lines, depths)[0]
    return f"{HEAD}{text}{_question(names, value)}{' '.join(names)}\n\n"


VT = Task(asks="all variables that a chain of four assignments gives a number (RULER)", samples=samples)
