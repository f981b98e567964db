"""RunPlan: which tasks are run, of what size and how; two runs with equal plans ask the same questions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from elbowroom.errors import RequestError
from elbowroom.evals.base import History, Mode, Sample, TextTokenizer
from elbowroom.evals.heldout import heldout_fingerprint
from elbowroom.evals.samples import TaskSpec
from elbowroom.evals.tasks import TASKS


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """The questions of a run."""

    tasks: tuple[str, ...]
    """Names in ``TASKS``, each once."""
    context_tokens: int
    """Most tokens of a context with its questions and answers."""
    num_queries: int = 400
    """At least this many questions are asked in each task."""
    num_facts: int = 1
    hops: int = 1
    seed: int = 0
    mode: Mode | None = None
    """None: each task's own."""
    history: History = "gold"

    def spec(self) -> TaskSpec:
        """Return the size of every task."""
        return TaskSpec(
            context_tokens=self.context_tokens,
            num_queries=self.num_queries,
            num_facts=self.num_facts,
            hops=self.hops,
            seed=self.seed,
            mode=self.mode,
        )

    def samples(self, task: str, tokenizer: TextTokenizer) -> Iterator[Sample]:
        """Yield the samples of ``task``.

        Raises:
            RequestError: they cannot be made in this size.
        """
        try:
            yield from TASKS.get(task).samples(tokenizer, self.spec())
        except ValueError as reason:
            raise RequestError(f"{task}: {reason}", "change --length or --keys") from reason
        except RequestError as reason:
            raise RequestError(f"{task}: {reason.message}", reason.hint) from reason

    def num_questions(self, task: str) -> int:
        """Return how many questions ``task`` asks."""
        spec = self.spec()
        each = TASKS.get(task).num_questions(spec)
        return -(-spec.num_queries // each) * each

    def to_json(self) -> dict[str, object]:
        """Return plain values, with the version of each task and of the text that tasks are made from."""
        versions = {name: TASKS.get(name).version for name in self.tasks}
        return asdict(self) | {"tasks": versions, "text": heldout_fingerprint()}


def parse_tasks(text: str) -> tuple[str, ...]:
    """Return the names in a list such as ``retrieval,kv``; ``all`` means every task.

    Raises:
        RequestError: no name, or one twice.
        PlanError: no such task.
    """
    names = tuple(TASKS.names()) if text.strip() == "all" else tuple(name.strip() for name in text.split(","))
    if len(set(names)) < len(names) or not all(names):
        raise RequestError(f"--tasks {text!r} names nothing, or a task twice", "write --tasks retrieval,kv")
    for name in names:
        TASKS.get(name)
    return names
