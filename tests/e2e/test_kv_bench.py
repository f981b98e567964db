"""The benchmarks of KV plans in their quick form, with the rival's quantized cache where it is installed."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from typing import Any

import pytest

from elbowroom.bench import BENCHES, BenchOptions
from elbowroom.bench.kv_matrix import bfp_gain, defaults, kivi_axes, scbench_turns
from elbowroom.bench.kv_matrix.joined import PARTS

HAS_QUANTO = all(importlib.util.find_spec(name) for name in ("transformers", "optimum")) and bool(
    importlib.util.find_spec("optimum.quanto")
)


def measured(name: str) -> dict[str, Any]:
    result = BENCHES.get(name)(BenchOptions(quick=True))
    made: dict[str, Any] = json.loads(json.dumps(result.to_json(), allow_nan=False))
    return made


def test_capacity_counts_tokens_inside_the_arena():
    """What a store holds does not depend on the machine: the quick form keeps the claims too."""
    made = measured("kv-capacity")
    assert {claim["id"] for claim in made["claims"]} == {"capacity.kivi2", "capacity.peak"}
    assert all(claim["holds"] for claim in made["claims"]), made["claims"]
    ours = {row["kv"]: row for row in made["rows"] if row["side"] == "ours"}
    for row in ours.values():
        held = row["live_bytes"] + row["free_bytes"] + row["table_bytes"]
        assert 0.8 * row["arena_bytes"] < held <= row["arena_bytes"]
        # The interpreter's own allocations are not under our control to the byte.
        assert abs(row["rss_grew_bytes"] - held) < 2 * 2**20
        assert row["num_decode_steps"] > 0
    rival = [row for row in made["rows"] if row["side"] == "transformers-quanto4"]
    if HAS_QUANTO:
        rest, decode, flush = rival
        assert 0 < flush["num_tokens"] <= decode["num_tokens"] < rest["num_tokens"]
    else:
        assert [row["num_tokens"] for row in rival] == [None]
        assert "make bench" in rival[0]["reason"]


def test_shared_prefixes_are_read_together_and_apart():
    made = measured("shared-prefix")
    assert [claim["id"] for claim in made["claims"]] == ["prefix.attention"]
    assert made["claims"][0]["num_runs"] == 2
    attention = [row for row in made["rows"] if row["part"] == "attention"]
    assert {row["read"] for row in attention} == {"together", "apart"}
    assert all(row["seconds"] > 0 and row["floor_share"] > 0 for row in attention)
    decoding = [row for row in made["rows"] if row["part"] == "decode"]
    assert [row["members"] for row in decoding] == [1, 1, 4, 4]
    assert all(row["tokens_per_s"] > 0 for row in decoding)


def test_speed_compares_plans_and_streams():
    made = measured("kv-speed")
    assert [claim["id"] for claim in made["claims"]] == ["speed.kivi2_8k", "speed.kivi2_32k"]
    for claim in made["claims"]:
        assert 0 < claim["low"] <= claim["value"] <= claim["high"]
        assert claim["num_runs"] == 2
    plans = {row["kv"]: row for row in made["rows"] if "kv" in row}
    assert plans["kivi(2,2,64)"]["bytes_read"] * 6 < plans["plain(bf16)"]["bytes_read"]
    assert all(row["seconds"] > 0 and row["read_share"] > 0 for row in plans.values())
    sides = {row["side"]: row for row in made["rows"] if "side" in row}
    assert sides["ours"]["tokens_per_s"] > 0
    assert sides["ours-kivi2"]["tokens_per_s"] > 0
    assert sides["ours-kivi2"]["attention_s"].keys() == {"plain(bf16)", "kivi(2,2,64)"}
    quanto = sides["transformers-quanto4"]
    assert (quanto["tokens_per_s"] is not None) == HAS_QUANTO, quanto


@pytest.mark.parametrize(
    "part", [kivi_axes, bfp_gain, scbench_turns, defaults], ids=["kivi_axes", "bfp_gain", "scbench_turns", "defaults"]
)
def test_parts_of_the_matrix_measure_what_they_claim(part: Any, monkeypatch: pytest.MonkeyPatch):
    """The quick form of each, with its processes; the other parts are run by the unit tests."""
    monkeypatch.setattr(defaults, "QUICK_PLANS", ("plain", "snapkv", "snapkv | int8"))
    monkeypatch.setattr(defaults, "QUICK", replace(defaults.QUICK, num_queries=2))
    made, claimed = part.measure(BenchOptions(quick=True)), dict(PARTS)[part.measure]
    assert [replace(claim, value=None, num_runs=0, low=None, high=None, reason="") for claim in made.claims] == [
        *claimed
    ]
    assert all(claim.value is not None and claim.num_runs > 0 for claim in made.claims), made.claims
    assert made.rows
    json.dumps(made.rows, allow_nan=False)
