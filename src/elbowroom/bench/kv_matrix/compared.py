"""Runs ``elbowroom compare`` in a process of its own and reads what it left: rows, and every single score."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elbowroom.errors import ElbowroomError
from elbowroom.evals.comparison.plan import Method
from elbowroom.evals.comparison.quality import Scores, TaskRun, read_runs
from elbowroom.evals.comparison.rows import method_directory

MEMORY = "512MiB"


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """What every plan is asked; the options of ``compare``."""

    length: int
    tasks: tuple[str, ...]
    keys: int
    num_queries: int
    num_windows: int = 2
    num_contexts: int = 3
    seed: int = 0
    model: Path | None = None
    """None: the built-in one."""


@dataclass(frozen=True, slots=True)
class Compared:
    """A finished comparison."""

    rows: Mapping[str, Mapping[str, Any]]
    """By plan as it was asked for: the method's row of ``compare --json``."""
    runs: Mapping[str, Mapping[str, TaskRun]]
    """By plan and task: every score."""
    weak: Mapping[str, str]
    """Tasks that were too hard for dense attention, and why."""

    def scores(self, text: str, task: str, turns: range | None = None) -> Scores:
        """Return the scores of a plan in a task, of some turns only if ``turns`` says so; none if it has none."""
        run = self.runs.get(text, {}).get(task)
        if run is None or run.num_errors:
            return {}
        return {key: value for key, value in run.scores.items() if turns is None or key[1] in turns}


def compare_plans(texts: Sequence[str], questions: Questions, root: Path) -> Compared:
    """Compare plans, the dense one with them; progress goes to stderr.

    Raises:
        ElbowroomError: the comparison failed; the message ends with what it said.
    """
    command = [sys.executable, "-m", "elbowroom.commands", "compare", *texts, *_options(questions), "--json"]
    done = subprocess.run([*command, "--out", str(root)], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise ElbowroomError(f"elbowroom compare ended with code {done.returncode}", "what it said is on stderr")
    result: dict[str, Any] = json.loads(done.stdout)
    weak = {name: task["reason"] for name, task in result["tasks"].items() if not task["compared"]}
    by_plan = {row["kv"]: row for row in result["methods"]}
    methods = {text: Method.parse(text) for text in ("plain", *texts)}
    rows = {text: by_plan[method.kv] for text, method in methods.items()}
    runs = {text: read_runs(method_directory(root, method)) for text, method in methods.items()}
    return Compared(rows, runs, weak)


def _options(questions: Questions) -> list[str]:
    model = [] if questions.model is None else ["--model", str(questions.model)]
    numbers = {
        "--length": questions.length,
        "--keys": questions.keys,
        "--num-queries": questions.num_queries,
        "--windows": questions.num_windows,
        "--contexts": questions.num_contexts,
        "--seed": questions.seed,
    }
    named = [str(part) for pair in numbers.items() for part in pair]
    return [*model, *named, "--tasks", ",".join(questions.tasks), "--memory", MEMORY]
