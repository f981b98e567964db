"""``elbowroom bench`` over a registry of one fake benchmark."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest

from elbowroom.bench import BenchOptions, BenchResult, Claim
from elbowroom.commands import invoke
from elbowroom.registry import Registry


def speed(options: BenchOptions) -> BenchResult:
    ratio = Claim(id="speed.ratio", value=2.5, op=">=", target=1.0, unit="x", reason="measured")
    rival = Claim(id="speed.rival", value=None, op=">=", target=1.0, unit="x", reason="the rival is not installed")
    rows = [{"row": "ours", "count": 3 if options.quick else 30, "seed": options.seed}]
    return BenchResult(name="speed", machine={}, rows=rows, claims=[ratio, rival])


def broken(options: BenchOptions) -> BenchResult:
    lost = Claim(id="broken.part", value=None, op=">=", target=1.0, unit="x", reason="failed: RuntimeError: bad")
    return BenchResult(name="broken", machine={}, rows=[], claims=[lost], failures=["broken.part"])


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """Replace the benchmarks by a fake one."""
    this = types.ModuleType("fake_benches")
    this.speed, this.broken = speed, broken
    monkeypatch.setitem(sys.modules, "fake_benches", this)
    monkeypatch.setattr("elbowroom.bench.BENCHES", Registry("benchmark", {"speed": "fake_benches:speed"}))


def test_json_is_exactly_one_object(capsys):
    assert invoke(["bench", "speed", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == speed(BenchOptions()).to_json()


def test_without_a_name_all_run(capsys):
    assert invoke(["bench", "--json", "--quick"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["rows"][0]["count"] for line in lines] == [3]


def test_the_list_runs_nothing(capsys):
    assert invoke(["bench", "--list"]) == 0
    assert capsys.readouterr().out.split() == ["speed"]


def test_the_seed_is_passed_on(capsys):
    assert invoke(["bench", "speed", "--json", "--seed", "5"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["seed"] == 5


def test_text_shows_figures_and_claims_that_hold_or_not(capsys):
    assert invoke(["bench", "speed"]) == 0
    text = capsys.readouterr().out
    for word in ("count 30", "holds  speed.ratio 2.5 >= 1 x", "FAILS  speed.rival None", "the rival is not installed"):
        assert word in text


def test_results_are_kept_in_dated_files(tmp_path: Path, capsys):
    assert invoke(["bench", "speed", "--json", "--output", str(tmp_path)]) == 0
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("speed_20")
    kept = json.loads(file.read_text())
    assert kept.pop("date") in file.name
    assert kept == json.loads(capsys.readouterr().out)


def test_an_unknown_name_lists_the_known_ones(capsys):
    assert invoke(["bench", "sped"]) == 2
    assert "choose one of: speed" in capsys.readouterr().err


def test_a_missing_folder_is_refused_before_anything_runs(tmp_path: Path, capsys):
    assert invoke(["bench", "--output", str(tmp_path / "none")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "--output" in captured.err


def test_what_failed_is_shown_kept_and_said_at_the_end(monkeypatch, tmp_path: Path, capsys):
    known = Registry("benchmark", {name: f"fake_benches:{name}" for name in ("broken", "speed")})
    monkeypatch.setattr("elbowroom.bench.BENCHES", known)
    assert invoke(["bench", "--json", "--output", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert [json.loads(line)["name"] for line in captured.out.splitlines()] == ["broken", "speed"]
    assert len(list(tmp_path.iterdir())) == 2
    assert "error: could not be measured: broken: broken.part" in captured.err
