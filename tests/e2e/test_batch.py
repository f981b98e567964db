"""``elbowroom batch`` as a process: killed again and again, interrupted, and with broken lines."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from tests.support.cli import COMMAND, started

from elbowroom.bench.batch_kills import kill_again_and_again
from elbowroom.bench.batch_loads import prompts, write_lines

MEMORY = ["--memory", "192MiB", "--no-progress"]


def command(source: Path, target: Path, *options: str) -> list[str]:
    return [*COMMAND, "batch", str(source), str(target), *MEMORY, *options]


def test_killed_again_and_again_every_request_is_answered_exactly_once(tmp_path: Path) -> None:
    result = kill_again_and_again(tmp_path, 2048, num_kills=2, seed=1, shrink=20)

    assert result.num_requests == 50
    assert (result.num_wrong, result.num_differing) == (0, 0)


def test_ctrl_c_keeps_the_answers_and_says_how_to_go_on(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_lines(source, prompts("documents", 2048, 0, 10))
    process = started(command(source, target), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (target.exists() and target.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)

    assert process.returncode == 130
    assert "the same command goes on from there" in err
    assert "forecast" in out
    kept = len(target.read_text().splitlines())
    assert 0 < kept < 100
    done = subprocess.run(command(source, target, "--json"), capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert report["num_before"] >= kept
    assert report["num_answered"] == report["num_lines"] == 100


@pytest.mark.parametrize("dry", [True, False])
def test_the_exit_code_says_whether_lines_failed(tmp_path: Path, dry: bool) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_lines(source, prompts("turns", 2048, 0, 25))
    with source.open("a") as file:
        file.write("{}\n")
    done = subprocess.run(command(source, target, *["--dry-run"] * dry), capture_output=True, text=True, check=False)

    assert done.returncode == (0 if dry else 1), done.stderr
    assert target.exists() is not dry
    assert "saved by shared prefixes" in done.stdout
    assert ("1 lines cannot be answered" if dry else "8 of 9 lines are answered; 1 got errors") in done.stdout
