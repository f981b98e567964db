"""kill -9 at random points of a batch, and the same command again, until every request is answered."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from elbowroom.bench.batch_loads import prompts, read_answers, write_lines

_MEMORY = "192MiB"
_SPREAD = 40
"""Answers of different lengths end one by one, not all at once."""


@dataclass(frozen=True, slots=True)
class KillResult:
    """What was left of a batch that was killed again and again."""

    num_kills: int
    num_while_answering: int
    """Kills between the first answer of a run and its end."""
    num_requests: int
    num_wrong: int
    """Requests that were not answered exactly once."""
    num_differing: int
    """Answers that differ from those of a run that nobody killed."""


def kill_again_and_again(directory: Path, vocab_size: int, num_kills: int, seed: int, shrink: int) -> KillResult:
    """Run a batch of documents, killed ``num_kills`` times, and compare it with one that was not."""
    source, quiet, killed = (directory / name for name in ("in.jsonl", "quiet.jsonl", "killed.jsonl"))
    load = prompts("documents", vocab_size, seed, shrink)
    write_lines(source, load, _SPREAD)
    started = time.perf_counter()
    done = subprocess.run(_command(source, quiet), check=True, capture_output=True, timeout=600)
    start_s = time.perf_counter() - started - json.loads(done.stdout)["seconds"]
    # A kill while it answers comes behind some bytes more, so few that the last one still finds it at work.
    most_bytes = _size(quiet) // num_kills
    rng, while_answering = random.Random(seed), 0
    for number in range(num_kills):
        before = _size(killed)
        process = subprocess.Popen(_command(source, killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if number % 2:  # while it starts, loads and plans
            _wait(process, rng.uniform(0, start_s))
        else:
            enough = before + rng.randint(1, most_bytes)
            while _size(killed) < enough and process.poll() is None:
                _wait(process, 0.002)
            _wait(process, rng.uniform(0, 0.02))
        process.kill()
        while_answering += process.wait() != 0 and _size(killed) > before
    subprocess.run(_command(source, killed), check=True, capture_output=True, timeout=600)
    expected, answers = dict(read_answers(quiet)), read_answers(killed)
    counts = Counter(name for name, _ in answers)
    wrong = sum(counts[name] != 1 for name in expected.keys() | counts.keys())
    differing = sum(expected.get(name) != text for name, text in answers)
    return KillResult(num_kills, while_answering, len(load), wrong, differing)


def _command(source: Path, target: Path) -> list[str]:
    options = ["--memory", _MEMORY, "--json", "--no-progress"]
    return [sys.executable, "-m", "elbowroom.commands", "batch", str(source), str(target), *options]


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
