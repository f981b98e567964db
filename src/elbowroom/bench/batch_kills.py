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
    write_lines(source, load)
    started = time.perf_counter()
    done = subprocess.run(_command(source, quiet), check=True, capture_output=True, timeout=600)
    whole_s = time.perf_counter() - started
    answering_s = json.loads(done.stdout)["seconds"]
    rng, while_answering = random.Random(seed), 0
    for number in range(num_kills):
        # Half of them while it starts, loads and plans; half while it answers.
        start_s = whole_s - answering_s
        delay = rng.uniform(0, start_s) if number % 2 else start_s + rng.uniform(0, 2 * answering_s / num_kills)
        before = _size(killed)
        _run_and_kill(_command(source, killed), delay)
        while_answering += _size(killed) > before
    subprocess.run(_command(source, killed), check=True, capture_output=True, timeout=600)
    expected, answers = dict(read_answers(quiet)), read_answers(killed)
    counts = Counter(name for name, _ in answers)
    wrong = sum(counts[name] != 1 for name in expected.keys() | counts.keys())
    differing = sum(expected.get(name) != text for name, text in answers)
    return KillResult(num_kills, while_answering, len(load), wrong, differing)


def _command(source: Path, target: Path) -> list[str]:
    options = ["--memory", _MEMORY, "--json", "--no-progress"]
    return [sys.executable, "-m", "elbowroom.commands", "batch", str(source), str(target), *options]


def _run_and_kill(command: list[str], delay: float) -> None:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(delay)
    process.kill()
    process.wait()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
