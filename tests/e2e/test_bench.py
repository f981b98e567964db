"""The memory benchmarks run in their quick form and say what they must."""

from __future__ import annotations

import json

import pytest

from elbowroom.bench import BENCHES, BenchOptions
from elbowroom.bench.random_model import SHAPES


@pytest.mark.parametrize(
    ("name", "claims"),
    [
        ("release", {"release.cleared", "release.interleaved"}),
        ("compose", {"compose.pairs"}),
        ("budget", {"budget.hwm", "budget.complete", "budget.refusal"}),
    ],
)
def test_a_quick_run_gives_rows_and_claims_that_hold(
    name: str, claims: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even the quick form stays inside its budget and gives its memory back."""
    if name == "compose":  # pairs of parts meet in every layer alike: three show as much as six
        monkeypatch.setitem(SHAPES["20M"], "num_hidden_layers", 3)
    result = BENCHES.get(name)(BenchOptions(quick=True))
    made = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert {claim["id"] for claim in made["claims"]} == claims
    assert all(claim["holds"] for claim in made["claims"]), made["claims"]
    assert made["rows"]
