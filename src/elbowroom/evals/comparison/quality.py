"""What the run directories of methods say: scores with intervals, and differences to dense on the same questions."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from elbowroom.evals.comparison.perplexity import FILE as WINDOWS_FILE
from elbowroom.evals.comparison.perplexity import read_windows
from elbowroom.evals.comparison.plan import PERPLEXITY
from elbowroom.evals.stats import bootstrap_interval, mean_interval, paired_difference

WEAK = 0.95
"""A task on which dense attention scores less says nothing about methods."""

Scores = dict[tuple[str, int], float]
"""Score by sample and turn, or by window."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """One method on one task; differences are method minus dense, and absent for dense itself."""

    score: float
    """Mean score; bits per byte for perplexity, where less is better."""
    interval: tuple[float, float]
    """Of the mean, 95 %."""
    num_items: int
    """Questions, or windows."""
    difference: float | None = None
    difference_interval: tuple[float, float] | None = None
    """95 %, paired bootstrap."""
    num_better: int | None = None
    """Items on which the method is better than dense."""
    num_worse: int | None = None

    def to_json(self) -> dict[str, object]:
        """Return plain numbers."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class TaskRun:
    """What a method's directory holds about a task."""

    scores: Scores
    num_errors: int = 0
    error: str = ""
    """One of the messages."""

    @property
    def mean(self) -> float:
        """Mean score; 0 without any."""
        return math.fsum(self.scores.values()) / max(1, len(self.scores))


def read_runs(directory: Path) -> dict[str, TaskRun]:
    """Return what ``directory`` says by task."""
    scores: dict[str, Scores] = {}
    errors: dict[str, list[str]] = {}
    path = directory / "samples.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        fields = json.loads(line)
        found = scores.setdefault(fields["task"], {})
        if fields["error"] is None:
            found[fields["sample_id"], fields["turn"]] = fields["value"]
        else:
            errors.setdefault(fields["task"], []).append(fields["error"])
    runs = {
        task: TaskRun(found, len(errors.get(task, ())), min(errors.get(task, ()), default=""))
        for task, found in scores.items()
    }
    windows = {("window", each.window): each.bits_per_byte for each in read_windows(directory / WINDOWS_FILE)}
    return runs | ({PERPLEXITY: TaskRun(windows)} if windows else {})


def less_is_better(task: str) -> bool:
    """Return whether a smaller score of ``task`` is the better one."""
    return task == PERPLEXITY


def weak_tasks(dense: Mapping[str, TaskRun]) -> dict[str, str]:
    """Return the tasks that allow no comparison, with the reason."""
    reasons = {}
    for task, run in dense.items():
        if run.num_errors:
            reasons[task] = f"{run.num_errors} questions failed with dense attention: {run.error}"
        elif not less_is_better(task) and run.mean < WEAK:
            # Never rounded up to the bar that it misses.
            reasons[task] = f"dense too weak ({math.floor(run.mean * 100) / 100:.2f}): no comparison"
    return reasons


def quality(task: str, run: TaskRun, dense: TaskRun | None) -> Quality:
    """Return the scores of ``run``, and what they differ by from those of ``dense``, if it is given.

    Raises:
        RequestError: the two did not answer the same questions.
    """
    values = list(run.scores.values())
    interval = bootstrap_interval(values) if less_is_better(task) else mean_interval(values)
    if dense is None:
        return Quality(score=run.mean, interval=interval, num_items=len(values))
    paired = paired_difference(run.scores, dense.scores)
    better, worse = paired.num_better, paired.num_worse
    if less_is_better(task):
        better, worse = worse, better
    return Quality(
        score=run.mean,
        interval=interval,
        num_items=len(values),
        difference=paired.difference,
        difference_interval=paired.interval,
        num_better=better,
        num_worse=worse,
    )
