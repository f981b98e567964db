"""The reasoning benchmark in its quick form: a real server, clients, and a model that thinks."""

from __future__ import annotations

import json

from elbowroom.bench import BENCHES, BenchOptions


def test_a_quick_run_has_all_parts_and_counts_alike() -> None:
    result = BENCHES.get("reasoning")(BenchOptions(quick=True))
    made = json.loads(json.dumps(result.to_json(), allow_nan=False))

    holds = {claim["id"]: claim["holds"] for claim in made["claims"]}
    assert holds["reasoning.budget"]
    assert holds["reasoning.answered"]
    assert holds["reasoning.counters"]
    assert {"reasoning.accuracy", "reasoning.prefix_cost"} <= set(holds), "six questions prove nothing of these"
    parts = {row["part"] for row in made["rows"]}
    assert parts == {"pace", "matrix", "budget", "reserve", "prefix", "counters"}
    matrix = [row for row in made["rows"] if row["part"] == "matrix"]
    assert {row["kv"] for row in matrix} == {"plain", "kivi(2,2,32)"}
    for row in matrix:
        assert row["ttft_p50_s"]["mean"] <= row["ttfvt_p50_s"]["mean"] <= row["e2e_p50_s"]["mean"]
