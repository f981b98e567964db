"""Plans with a read policy: what is refused, how they are spelled and what their bounds cost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.support.kv_world import make_spec

from elbowroom.core import LayerSpec
from elbowroom.errors import PlanError
from elbowroom.kv import KVPlan

SPEC = LayerSpec(num_q_heads=6, num_kv_heads=2, head_dim=32, v_head_dim=48, scale=0.2, rope=None)


@pytest.mark.parametrize(
    ("text", "found", "fix"),
    [
        ("quest(128)", "tokens=128", "192 or more"),
        ("quest(1024,skip=-1)", "skip=-1", "0 or more"),
        ("quest(run=8)", "run=8", "16, 32 or 64"),
        ("quest(many)", "tokens=many", "192 or more"),
        ("quest | quest", "two read policies", "parts joined"),
        ("quest(pages=3)", "does not take", "parts joined"),
    ],
)
def test_plans_that_cannot_work_name_the_way_out(text: str, found: str, fix: str) -> None:
    with pytest.raises(PlanError) as caught:
        KVPlan.parse(text)
    assert found in caught.value.message
    assert fix in str(caught.value.hint)


def test_a_model_without_layers_to_choose_in_is_refused() -> None:
    for layers in ([make_spec()] * 2, [make_spec(window=9)] * 5):
        with pytest.raises(PlanError, match="nothing to choose from") as caught:
            KVPlan.parse("quest").bind(layers, "float32")
        assert "lower skip" in str(caught.value.hint)


def test_plans_have_one_spelling_and_price_their_bounds() -> None:
    plan = KVPlan.parse("int8 | quest( 512 )|snapkv(256)")
    assert plan.text == "snapkv(tokens=256,w=32,kernel=5,every=0) | quest(tokens=512,skip=2,run=16) | int8()"
    assert KVPlan.parse(plan.text) == plan
    layers, total = [SPEC] * 5, np.array([640])
    prices: dict[str, Any] = {
        text: int(KVPlan.parse(text).bind(layers, "bfloat16").curve(0, total).resident_bytes[0])
        for text in ("int8", "quest|int8", "kivi", "quest|kivi")
    }
    assert prices["quest|int8"] - prices["int8"] == 10 * 3 * (4 * 2 * 2 * 32 * 2)
    assert prices["quest|kivi"] == prices["kivi"]
