"""What a comparison looks like: tables, remarks, pictures with and without matplotlib."""

from __future__ import annotations

import json
import sys
import types
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from tests.support.compare import comparison

from elbowroom.commands.compare_chart import draw, panels
from elbowroom.commands.compare_report import comparison_to_json, print_comparison
from elbowroom.commands.compare_svg import svg
from elbowroom.evals.comparison.plan import ComparePlan, Method, parse_methods
from elbowroom.evals.comparison.table import Comparison, MethodRow
from elbowroom.evals.run_plan import RunPlan

PLAN = ComparePlan(
    methods=parse_methods(["int8", "fp8"]), questions=RunPlan(tasks=("kv",), context_tokens=256), num_windows=40
)
WEAK = {"mf": "dense too weak (0.10): no comparison"}


def made(weak: dict[str, str] | None = None) -> Comparison:
    return comparison({"int8": (500, 0.9, 1.1), "fp8": (515, 1.0, 1.2), "plain(bf16)": (1000, 1.0, 1.0)}, weak)


def printed(capsys: pytest.CaptureFixture[str], found: Comparison, equal: Any = None) -> str:
    print_comparison(PLAN, found, equal)
    return capsys.readouterr().out


def test_tables_show_bytes_speeds_and_paired_scores(capsys):
    text = printed(capsys, made())
    assert "int8" in text
    assert "0.50" in text
    assert "16.0 MiB" in text
    assert "5,000" in text
    assert "-0.100" in text
    assert "inactive, holds 98% of dense's bytes or more" in text
    assert "less is better" in text
    assert all(len(line) <= 80 for line in text.splitlines() if "─" in line)


def test_a_weak_task_has_a_reason_and_no_numbers(capsys):
    text = printed(capsys, made(WEAK))
    assert "mf: dense too weak (0.10): no comparison" in text
    assert "mf:\n" not in text


def test_a_method_that_failed_is_a_row_with_its_reason(capsys):
    found = made()
    failed = MethodRow(Method.parse("bfp"), error="bfp: the process was killed (SIGKILL)")
    text = printed(capsys, Comparison((*found.rows, failed), found.tasks, found.weak))
    assert "failed" in text
    assert "bfp: the process was killed (SIGKILL)" in text


def test_rankings_are_printed_on_request(capsys):
    assert "kv, 500 B to 515 B, best first: fp8 (1.000), int8 (0.900)" in printed(capsys, made(), "bytes")
    text = printed(capsys, made(), "quality")
    assert (
        "perplexity, not worse than dense, fewest bytes first: plain (1.000), plain(bf16) (1.000); worse: int8, fp8"
        in text
    )
    alone = comparison({"int8": (500, 1.0, 1.0)})
    assert "nothing to rank" in printed(capsys, alone, "bytes")


def test_the_object_is_json_without_nan():
    said = json.loads(json.dumps(comparison_to_json(PLAN, made(WEAK), "bytes"), allow_nan=False))
    assert set(said) == {"plan", "tasks", "methods", "equal"}
    assert said["methods"][1]["kv_ratio"] == 0.5
    assert said["methods"][3]["inactive"] is True
    assert "equal" not in comparison_to_json(PLAN, made(), None)


def test_the_picture_has_a_panel_for_each_task():
    root = ET.fromstring(svg(panels(made({"mf <&>": "too weak"}))))
    text = " ".join(each.text or "" for each in root.iter() if each.tag.endswith("text"))
    assert sum(each.tag.endswith("circle") for each in root.iter()) == 8
    for words in ("kv", "mf <&>", "too weak", "perplexity", "int8", "plain(bf16)", "less is better"):
        assert words in text
    for each in root.iter():
        if each.tag.endswith("circle"):
            assert 0 < float(each.get("cx", "")) < 380
            assert 0 < float(each.get("cy", "")) < 300


def test_without_matplotlib_there_is_a_picture_and_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "elbowroom.commands.compare_png", raising=False)
    paths, missing = draw(made(), tmp_path)
    assert [path.name for path in paths] == ["quality-bytes.svg"]
    assert "elbowroom[plot]" in (missing or "")
    assert paths[0].is_file()


class Anything:
    """Takes every call of a plotting library and remembers those that draw."""

    calls: list[tuple[str, tuple[Any, ...]]]

    def __init__(self, calls: list[tuple[str, tuple[Any, ...]]], **_: Any) -> None:
        self.calls = calls

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **_: Any) -> Any:
            self.calls.append((name, arguments))
            if name == "subplots":
                return [[Anything(self.calls) for _ in range(arguments[1])]]
            if name == "savefig":
                Path(arguments[0]).write_bytes(b"picture")
            return None

        return call


def test_with_matplotlib_there_is_a_png_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[tuple[str, tuple[Any, ...]]] = []
    figure = types.ModuleType("matplotlib.figure")
    figure.Figure = lambda **options: Anything(calls, **options)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "matplotlib", types.ModuleType("matplotlib"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", figure)
    monkeypatch.delitem(sys.modules, "elbowroom.commands.compare_png", raising=False)
    paths, missing = draw(made(WEAK), tmp_path)
    assert missing is None
    assert [path.name for path in paths] == ["quality-bytes.svg", "quality-bytes.png"]
    assert paths[1].read_bytes() == b"picture"
    assert sum(name == "errorbar" for name, _ in calls) == 8
    assert [arguments[0] for name, arguments in calls if name == "set_title"] == ["kv", "mf", "perplexity"]
    monkeypatch.delitem(sys.modules, "elbowroom.commands.compare_png")
