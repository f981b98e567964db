"""The speed benchmarks through the command line, in their quick form, with and without their rivals."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.support.cli import COMMAND

RIVALS = {"transformers": ("transformers",), "llamacpp": ("llama_cpp", "gguf")}


def measured(name: str, **environment: str) -> dict[str, Any]:
    done = subprocess.run(
        [*COMMAND, "bench", name, "--quick", "--json"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    made: dict[str, Any] = json.loads(done.stdout)
    return made


@pytest.fixture
def no_rivals(tmp_path: Path) -> str:
    """Return a PYTHONPATH on which no rival can be imported."""
    for package in ("transformers", "llama_cpp", "gguf"):
        (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError({package!r}, name={package!r})\n")
    return os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])


def test_without_rivals_claims_have_no_value_and_name_the_fix(no_rivals):
    made = measured("decode", PYTHONPATH=no_rivals)
    assert {claim["id"] for claim in made["claims"]} == {"decode.vs_transformers", "decode.vs_llamacpp"}
    for claim in made["claims"]:
        assert (claim["value"], claim["holds"]) == (None, False)
        assert "is not installed: `make bench` installs it" in claim["reason"]
    rows = {row["side"]: row for row in made["rows"] if "side" in row}
    assert rows["ours"]["tokens_per_s"] > 0
    assert rows["ours"]["read_share"] > 0
    assert rows["llamacpp-f16"]["tokens_per_s"] is None


def test_rivals_that_are_installed_are_measured():
    made = measured("decode")
    claims = {claim["id"]: claim for claim in made["claims"]}
    for rival, packages in RIVALS.items():
        claim = claims[f"decode.vs_{rival}"]
        if all(importlib.util.find_spec(package) for package in packages):
            assert claim["value"] > 0, claim["reason"]
            assert claim["low"] <= claim["value"] <= claim["high"]
            assert claim["num_runs"] == 2
        else:
            assert "make bench" in claim["reason"]
    rows = {row["side"]: row for row in made["rows"] if "side" in row}
    for name, row in rows.items():
        assert row["tokens_per_s"] is None or name == "ours" or row["max_logprob_error"] < 0.25
        assert row["tokens_per_s"] is None or len(row["rounds"]) == 2


def test_overhead_splits_steps_and_a_cold_start():
    made = measured("overhead")
    *steps, cold = made["rows"]
    assert [row["batch"] for row in steps] == [1, 8, 64]
    for row in steps:
        parts = sum(row[f"{part}_us"] for part in ("schedule", "prepare", "model", "sampling", "update", "deliver"))
        assert row["model_us"] > 0
        assert parts == pytest.approx(row["total_us"], rel=0.2)
    whole = ("first_token_s", "process_s")
    split = sum(value for name, value in cold.items() if name.endswith("_s") and name not in whole)
    assert cold["weights_s"] > 0
    assert split == pytest.approx(cold["first_token_s"], rel=0.05)
