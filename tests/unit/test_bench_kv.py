"""Arithmetic of the benchmarks of KV plans: bytes of tables, growth until a refusal, lines between lengths, ratios."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from elbowroom.bench import kvpress
from elbowroom.bench.array_bytes import array_bytes
from elbowroom.bench.kv_capacity import HEADS, Load, _peak_claim, _ratio_claim, _rival_rows, ratio_of, tokens_at
from elbowroom.bench.kv_capacity_child import PROMPT_TOKENS, Growing
from elbowroom.bench.kv_shapes import BF16, KIVI2, PLANS, QUICK_PLANS, equal_layers, layers_of
from elbowroom.bench.kv_speed import _claim, attention_turns, ceiling, ceiling_of
from elbowroom.bench.kv_speed_child import FilledStore
from elbowroom.core import STRIP_TOKENS
from elbowroom.kernels import attention
from elbowroom.kv.plan import KVPlan
from elbowroom.memory.meter import reset_peak

MIB = 2**20


class Holder:
    def __init__(self) -> None:
        self.table = np.zeros((4, 8), dtype=np.uint32)
        self.view = self.table[:2]
        self.inner = {"refs": [np.zeros(3, dtype=np.int64)], "self": self}
        self.tensor = torch.zeros(1000)


def test_arrays_count_once_with_views_and_without_tensors():
    assert array_bytes(Holder()) == 4 * 8 * 4 + 3 * 8


def test_a_view_counts_as_the_array_that_it_keeps_alive():
    assert array_bytes([np.zeros(100, dtype=np.int8)[:3]]) == 100


@pytest.fixture
def growing(request):
    """Return a store of two small layers in 2 MiB for three sequences."""
    plan = KVPlan.parse(request.param).bind(equal_layers(2, 4, 2, 64), "bfloat16")
    made = Growing(plan, 2 * MIB, 3, 0)
    yield made
    made.store.close_all()


@pytest.mark.parametrize("growing", [BF16, "int8", KIVI2], indirect=True)
def test_sequences_grow_together_until_strips_and_tables_fill_the_arena(growing):
    while growing.read(PROMPT_TOKENS):
        assert growing.held_bytes <= 2 * MIB
    growing.cut(growing.length - STRIP_TOKENS)
    before = growing.length
    report = growing.store.report()
    assert report.num_tokens == 3 * before > 0
    steps = 0
    while growing.decode() is not None:
        steps += 1
        assert growing.held_bytes <= 2 * MIB
    growing.cut(growing.length)
    growing.store.check_integrity()
    assert growing.length == before + steps
    assert 0 < growing.table_bytes < MIB / 4
    # What is left would not hold another block of all sequences and the tails that they keep open meanwhile.
    block = 2 * 2 * 64 * 2 * 2 * STRIP_TOKENS
    assert growing.held_bytes > 2 * MIB - 2 * 3 * block


@pytest.mark.parametrize("growing", [BF16], indirect=True)
def test_growth_in_a_decode_step_is_measured(growing):
    if not reset_peak():
        pytest.skip("the system does not reset a peak")
    growing.read(PROMPT_TOKENS)
    grew = growing.decode()
    assert grew is not None
    assert 0 <= grew < 64 * MIB


def test_tokens_lie_on_lines_between_the_lengths_measured():
    points = [(100.0, 50.0), (200.0, 100.0), (300.0, 300.0)]
    assert tokens_at(points, 25) == 50
    assert tokens_at(points, 75) == 150
    assert tokens_at(points, 200) == 250
    assert tokens_at(points, 300) == 300
    assert tokens_at(points, 301) is None
    assert tokens_at([(100.0, -3.0), (200.0, 50.0)], 25) == 150


def test_the_claims_of_capacity_name_what_decides_them():
    held = {BF16: 1000, "kivi(2,2,32)": 5100, KIVI2: 6000}
    rows = [
        {"kv": kv, "num_tokens": tokens, "decode_peak_bytes": (2 + number) * MIB, **ratio_of(kv, tokens, 1000)}
        for number, (kv, tokens) in enumerate(held.items())
    ]
    ratio, peak = _ratio_claim(rows), _peak_claim(rows)
    assert (ratio.id, ratio.value, ratio.holds) == ("capacity.kivi2", 6.0, True)
    assert "with g=32 5.10 x" in ratio.reason
    assert (peak.id, peak.value, peak.low, peak.high, peak.num_runs) == ("capacity.peak", 4.0, 2.0, 4.0, 3)
    assert KIVI2 in peak.reason
    assert peak.holds


def test_without_the_rivals_package_its_row_says_so(tmp_path: Path, monkeypatch):
    (tmp_path / "transformers.py").write_text("")
    (tmp_path / "optimum.py").write_text("raise ModuleNotFoundError('optimum', name='optimum')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (row,) = _rival_rows(4, 1000, Load())
    assert (row["side"], row["num_tokens"]) == ("transformers-quanto4", None)
    assert row["reason"] == "the package optimum-quanto is not installed: `make bench` installs it"


def test_the_shape_of_the_arena_has_the_bytes_of_the_paper():
    plan = KVPlan.parse(BF16).bind(equal_layers(24, **HEADS), "bfloat16")
    assert plan.block_bytes == 12_288 * STRIP_TOKENS


@pytest.mark.parametrize("kv", PLANS)
def test_plans_are_written_as_they_are_named(kv):
    assert KVPlan.parse(kv).bind(layers_of("20M"), "bfloat16").block_bytes > 0
    assert set(QUICK_PLANS) <= set(PLANS)


@pytest.mark.parametrize("kv", QUICK_PLANS)
def test_a_filled_store_attends_to_all_its_bytes(kv, monkeypatch):
    calls = []
    plan = KVPlan.parse(kv).bind(equal_layers(2, 4, 2, 64), "bfloat16")
    store = FilledStore(plan, 4 * STRIP_TOKENS, 0)
    assert store.num_bytes == 4 * plan.block_bytes
    attend = attention.attend
    monkeypatch.setattr(attention, "attend", lambda *arguments: calls.append(attend(*arguments)) or calls[-1])
    assert store.attend() > 0
    assert len(calls) == 2
    # exp(lse) sums 257 terms of mean exp(1/2): the sequence and the row itself.
    assert all(abs(float(lse.mean()) - np.log(257) - 0.5) < 0.75 for _, lse in calls)
    store.store.close_all()


def measured(context: int, **seconds: list[float]) -> list[dict[str, object]]:
    names = {"plain": BF16, "kivi": KIVI2}
    return [{"context_tokens": context, "kv": names[kv], "seconds": each} for kv, each in seconds.items()]


def test_claims_of_speed_are_ratios_of_one_round_at_their_context():
    turns = attention_turns(
        [
            *measured(8192, plain=[2.0, 4.0, 6.0], kivi=[1.0, 4.0, 4.0]),
            *measured(32_768, plain=[8.0, 8.0, 8.0], kivi=[4.0, 5.0, 2.0]),
        ]
    )
    near, far = (_claim(name, turns, (8192, 32_768)) for name in ("speed.kivi2_8k", "speed.kivi2_32k"))
    assert (near.value, near.low, near.high, near.target) == (pytest.approx(1.5), 1.0, 2.0, 1.0)
    assert (far.value, far.low, far.high, far.target) == (2.0, pytest.approx(1.6), 4.0, 1.5)
    assert "32768 tokens" in far.unit


def test_a_quick_claim_is_of_the_context_that_was_measured():
    turns = attention_turns(measured(512, plain=[2.0], kivi=[1.0]))
    claim = _claim("speed.kivi2_32k", turns, (512,))
    assert (claim.value, claim.num_runs) == (2.0, 1)
    assert "512 tokens" in claim.unit


def test_the_ceiling_replaces_attention_and_nothing_else():
    assert ceiling(10.0, 0.06, 0.02) == pytest.approx(1 / 0.06)
    assert ceiling(10.0, 0.06, 0.06) == pytest.approx(10.0)
    assert ceiling(10.0, 0.11, 0.02) is None


def test_the_measured_rate_stands_beside_its_ceiling():
    (turns,) = attention_turns(measured(8192, plain=[0.05], kivi=[0.01])).values()
    found = {"ours": {"tokens_per_s": 10.0}, "ours-kivi2": {"tokens_per_s": 12.5}}
    row = ceiling_of(found, turns)
    assert row["ceiling_tokens_per_s"] == pytest.approx(1 / 0.06)
    assert row["share_of_ceiling"] == pytest.approx(12.5 * 0.06)
    assert ceiling_of(found | {"ours": {"tokens_per_s": None}}, turns) == {}


def test_without_its_environment_kvpress_has_a_row_that_says_how_to_make_it(tmp_path: Path, monkeypatch):
    for directory in (None, tmp_path):
        if directory is not None:
            monkeypatch.setenv("ELBOWROOM_KVPRESS", str(directory))
        else:
            monkeypatch.delenv("ELBOWROOM_KVPRESS", raising=False)
        (row,) = kvpress._their_rows(kvpress.Load([[1], [2]]))
        assert row["reported"] is None
        assert "python -m elbowroom.bench.kvpress_environment DIR" in str(row["reason"])


def test_savings_are_shares_of_the_same_sides_dense_cache():
    dense = {"reported_ratio": 0.0, "tensor_bytes": 100, "rest_bytes": 200, "peak_bytes": 400}
    masked = dense | {"reported_ratio": 0.75, "peak_bytes": 300}
    row = kvpress._saved(masked, dense)
    assert (row["reported"], row["saved_tensors"], row["saved_process"], row["saved_peak"]) == (0.75, 0.0, 0.0, 0.25)
