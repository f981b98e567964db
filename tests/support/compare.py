"""Comparisons without processes: footprints, run directories and rows made by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from elbowroom.evals import bits_per_byte, distractors
from elbowroom.evals.comparison.plan import Method
from elbowroom.evals.comparison.quality import TaskRun, quality
from elbowroom.evals.comparison.table import Comparison, Footprint, MethodRow
from elbowroom.evals.heldout import heldout_texts


def use_little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make all tasks from 40,000 letters of held-out text: a tokenizer of bytes would take its time over all of it."""
    texts = ("".join(heldout_texts())[:40_000],)
    monkeypatch.setattr(bits_per_byte, "heldout_texts", lambda: texts)
    monkeypatch.setattr(distractors, "heldout_lines", lambda: distractors.split_lines(texts))


def footprint(num_bytes: int, num_contexts: int = 2) -> Footprint:
    """Return one whose contexts take ``num_bytes`` each."""
    return Footprint(
        length=256,
        num_contexts=num_contexts,
        kv_bytes=num_bytes * num_contexts,
        kv_peak_bytes=num_bytes * num_contexts,
        peak_over_baseline_bytes=2**24,
        baseline_bytes=2**28,
        read_bytes_per_token=num_bytes,
        prefill_tokens_per_s=5000.0,
        decode_tokens_per_s=500.0,
        prefill_range=(4000.0, 6000.0),
        decode_range=(400.0, 600.0),
        foreign_cpu_share=0.0,
    )


def task_run(*values: float) -> TaskRun:
    """Return a run whose n-th question scored ``values[n]``."""
    return TaskRun({("s", number): value for number, value in enumerate(values)})


def row(text: str, num_bytes: int, runs: Mapping[str, TaskRun], dense: Mapping[str, TaskRun] | None) -> MethodRow:
    """Return the row of a method that answered as in ``runs``."""
    qualities = {task: quality(task, run, None if dense is None else dense[task]) for task, run in runs.items()}
    return MethodRow(Method.parse(text), footprint(num_bytes), qualities)


def comparison(others: Mapping[str, tuple[int, float, float]], weak: Mapping[str, str] | None = None) -> Comparison:
    """Return dense at 1,000 bytes with a perfect score and 1 bit a byte, and others as (bytes, score, bits)."""
    dense = {"kv": task_run(*[1.0] * 40), "perplexity": task_run(*[1.0] * 40)}
    rows = [row("plain", 1000, dense, None)]
    for text, (num_bytes, score, bits) in others.items():
        right = round(score * 40)
        runs = {
            "kv": task_run(*[1.0] * right, *[0.0] * (40 - right)),
            # Windows differ, so that the interval has a width.
            "perplexity": task_run(*[bits + 0.001 * (number % 3 - 1) for number in range(40)]),
        }
        rows.append(row(text, num_bytes, runs, dense))
    return Comparison(tuple(rows), ("kv", *(weak or {}), "perplexity"), weak or {})


def write_run(directory: Path, values: Mapping[str, list[float | str]], bits: list[float] | None = None) -> None:
    """Write what a method's process leaves: a number is a score, a text an error."""
    directory.mkdir(parents=True)
    lines = [
        {
            "task": task,
            "sample_id": f"{task}-{number}",
            "turn": 0,
            "value": 0.0 if isinstance(value, str) else value,
            "error": value if isinstance(value, str) else None,
        }
        for task, found in values.items()
        for number, value in enumerate(found)
    ]
    (directory / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (directory / "footprint.json").write_text(json.dumps(footprint(1000).to_json()))
    windows = [
        {"window": number, "nats": value * 100 * 0.6931471805599453, "num_bytes": 100, "num_tokens": 10}
        for number, value in enumerate(bits or [])
    ]
    (directory / "perplexity.jsonl").write_text("".join(json.dumps(each) + "\n" for each in windows))
