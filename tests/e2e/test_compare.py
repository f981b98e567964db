"""``elbowroom compare`` with the built-in model and real processes: interrupted, resumed, reported."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from tests.support.cli import COMMAND, started

from elbowroom.commands import INTERRUPTED, invoke
from elbowroom.models.directory import BUILTIN

pytestmark = pytest.mark.skipif(not (BUILTIN / "config.json").is_file(), reason="the built-in model is not there")


def test_a_comparison_is_interrupted_and_goes_on(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    out = tmp_path / "compared"
    arguments = ["compare", "int8", "--tasks", "retrieval,mf,perplexity", "--length", "320", "--keys", "2"]
    arguments += ["--num-queries", "6", "--windows", "2", "--contexts", "2", "--memory", "96MiB", "--out", str(out)]
    process = started([*COMMAND, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(out.glob("methods/*/footprint.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == INTERRUPTED
    assert not (out / "compare.json").exists()
    [measured] = out.glob("methods/*/footprint.json")
    before = measured.read_bytes()

    assert invoke([*arguments, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert json.loads((out / "compare.json").read_text()) == said
    assert measured.read_bytes() == before
    plain, int8 = said["methods"]
    assert (plain["method"], int8["method"]) == ("plain", "int8")
    assert 0.5 < int8["kv_ratio"] < 0.55
    assert int8["read_bytes_per_token"] < 0.55 * plain["read_bytes_per_token"]
    assert 0 < int8["peak_over_baseline_bytes"] < 96 * 2**20
    assert int8["tasks"]["retrieval"]["num_items"] == 6
    assert plain["tasks"]["retrieval"]["score"] == 1.0
    assert abs(int8["tasks"]["perplexity"]["difference"]) < 0.05
    assert "mf" not in int8["tasks"]
    assert "dense too weak" in said["tasks"]["mf"]["reason"]
    assert (out / "quality-bytes.svg").is_file()

    assert invoke(arguments) == 0
    text = capsys.readouterr().out
    assert "mf: dense too weak" in text
    assert "quality-bytes.svg" in text
