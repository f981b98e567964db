"""ComparePlan: which KV plans are compared, on what; two comparisons with equal plans ask the same questions."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from elbowroom.errors import RequestError
from elbowroom.evals.run_plan import RunPlan, parse_tasks
from elbowroom.kv.plan import KVPlan

DENSE = "plain"
"""What everything is compared with."""
PERPLEXITY = "perplexity"
"""Name of the task that has no questions."""
_SLUG_LETTERS = 40


@dataclass(frozen=True, slots=True)
class Method:
    """One KV plan under comparison."""

    label: str
    """The plan as it was written."""
    kv: str
    """The one spelling of equal plans."""

    @classmethod
    def parse(cls, text: str) -> Method:
        """Return the method that ``text`` describes.

        Raises:
            PlanError: it is no KV plan.
        """
        return cls(text.strip(), KVPlan.parse(text).text)

    @property
    def is_dense(self) -> bool:
        """Whether this is the control."""
        return self.kv == KVPlan.parse(DENSE).text

    @property
    def folder(self) -> str:
        """Name of the method's directory, the same for all spellings of the plan."""
        words = re.sub(r"[^a-z0-9]+", "-", self.kv.lower()).strip("-")[:_SLUG_LETTERS]
        return f"{words}-{hashlib.blake2b(self.kv.encode(), digest_size=3).hexdigest()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparePlan:
    """What is measured of every method."""

    methods: tuple[Method, ...]
    """The dense control first, each plan once."""
    questions: RunPlan
    """Tasks with questions; none of them if only perplexity was asked for."""
    num_windows: int = 0
    """Windows of held-out text whose perplexity is measured; 0: it was not asked for."""
    num_contexts: int = 5
    """Contexts that are held at once while bytes and speeds are measured."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of all tasks, perplexity last."""
        return (*self.questions.tasks, PERPLEXITY) if self.num_windows else self.questions.tasks

    def to_json(self) -> dict[str, object]:
        """Return plain values but for the methods, which may grow in number without changing what is measured."""
        sizes = {"num_windows": self.num_windows, "num_contexts": self.num_contexts}
        return self.questions.to_json() | sizes


def parse_methods(texts: Sequence[str]) -> tuple[Method, ...]:
    """Return the methods that ``texts`` describe, the dense control before them.

    Raises:
        PlanError: one is no KV plan.
        RequestError: there are none beside the control, or two are the same plan.
    """
    named = [Method.parse(text) for text in texts]
    others = [method for method in named if not method.is_dense]
    if not others:
        raise RequestError(f"nothing to compare with {DENSE}", 'name KV plans, e.g. int8 "kivi(2,2,64)"')
    for number, method in enumerate(others):
        same = [other.label for other in others[:number] if other.kv == method.kv]
        if same:
            raise RequestError(f"{same[0]!r} and {method.label!r} are the same KV plan", "name each plan once")
    return Method.parse(DENSE), *others


def parse_compared_tasks(text: str) -> tuple[tuple[str, ...], bool]:
    """Return the tasks with questions in a list such as ``retrieval,perplexity``, and whether perplexity is in it.

    Raises:
        RequestError: no name, or one twice.
        PlanError: no such task.
    """
    if text.strip() == "all":
        return parse_tasks(text), True
    names = [name.strip() for name in text.split(",")]
    others = [name for name in names if name != PERPLEXITY]
    if names.count(PERPLEXITY) > 1:
        raise RequestError(f"--tasks {text!r} names a task twice", "write --tasks retrieval,perplexity")
    return parse_tasks(",".join(others)) if others else (), PERPLEXITY in names


def plan_to_json(plan: RunPlan) -> dict[str, object]:
    """Return the fields of ``plan``, for another process."""
    return asdict(plan)


def plan_from_json(fields: Mapping[str, Any]) -> RunPlan:
    """Return the plan whose fields another process sent."""
    values: dict[str, Any] = {**fields, "tasks": tuple(fields["tasks"])}
    return RunPlan(**values)
