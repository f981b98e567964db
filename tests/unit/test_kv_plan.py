"""KVPlan: text, errors that name the fix, fingerprints, and a curve that agrees with the bytes a store holds."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elbowroom.core import LayerSpec
from elbowroom.errors import ConfigError, PlanError
from elbowroom.kv import KVPlan, KVStep, PagedStore, Want
from elbowroom.memory import Arena, Budget, HostTier, Ledger

# One head of 16 + 16 float32 makes a strip of 8 KiB: two whole pages, so that bytes can be compared exactly.
SPEC = LayerSpec(num_q_heads=1, num_kv_heads=1, head_dim=16, v_head_dim=16, scale=0.25, rope=None)
STRIP = 64 * 32 * 4


def with_window(window: int | None, spec: LayerSpec = SPEC) -> LayerSpec:
    return dataclasses.replace(spec, window=window)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        (None, "plain(dtype=auto)"),
        ("", "plain(dtype=auto)"),
        ("plain", "plain(dtype=auto)"),
        ("plain()", "plain(dtype=auto)"),
        (" plain ( bf16 ) ", "plain(dtype=bf16)"),
        ("plain(bfloat16)", "plain(dtype=bf16)"),
        ("plain(dtype=float32)", "plain(dtype=fp32)"),
        ("plain(dtype = fp16)", "plain(dtype=fp16)"),
    ],
)
def test_equal_plans_have_one_spelling(text: str | None, canonical: str):
    """Every way to write a plan gives the same text, which parses back to an equal plan."""
    plan = KVPlan.parse(text)
    assert plan.text == str(plan) == canonical
    assert KVPlan.parse(canonical) == plan
    assert hash(KVPlan.parse(canonical)) == hash(plan)
    assert KVPlan.parse(plan) is plan


@pytest.mark.parametrize(
    ("text", "found", "fix"),
    [
        ("zip", "unknown KV codec 'zip'", "choose one of: bfp"),
        ("plain(int3)", "stored as 'int3'", "plain(bf16)"),
        ("plain(bf16", "cannot read", "plain(bf16)"),
        ("Plain", "cannot read", "a plan is parts"),
        ("plain|", "cannot read ''", "a plan is parts"),
        ("plain|plain(bf16)", "two codecs", "a plan is parts"),
        ("plain(bits=4)", "does not take (bits=4)", "a plan is parts"),
        ("plain(bf16,fp16)", "does not take", "a plan is parts"),
        ("plain(bf16,dtype=fp16)", "does not take", "a plan is parts"),
        ("plain(dtype=bf16,dtype=fp16)", "given 'dtype' twice", "a plan is parts"),
    ],
)
def test_unreadable_plans_are_refused_with_the_fix(text: str, found: str, fix: str):
    """A plan that cannot be read says what is wrong with it and what can be written instead."""
    with pytest.raises(PlanError) as caught:
        KVPlan.parse(text)
    assert found in caught.value.message
    assert fix in str(caught.value.hint)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from(["plain", "(", ")", "bf16", "dtype", "=", ",", "|", " ", "x", "\x00"]), max_size=7).map(
        "".join
    )
)
def test_any_text_is_a_plan_or_a_plan_error(text: str):
    """No text crashes the parser."""
    try:
        plan = KVPlan.parse(text)
    except PlanError as error:
        hint = error.hint
    else:
        hint = "none is needed"
        assert KVPlan.parse(plan.text) == plan
    assert hint


def test_format_follows_plan_then_model():
    """auto stores in the model's dtype, a named dtype wins over it, and only what keeps all bits is lossless."""
    assert KVPlan.parse("plain").bind([SPEC], "bfloat16").formats[0].dtype == "bfloat16"
    assert KVPlan.parse("plain(fp32)").bind([SPEC], "bfloat16").formats[0].dtype == "float32"
    lossless = {
        name: KVPlan.parse(name).codec.lossless for name in ("plain", "plain(fp32)", "plain(bf16)", "plain(fp16)")
    }
    assert lossless == {"plain": True, "plain(fp32)": True, "plain(bf16)": False, "plain(fp16)": False}
    assert KVPlan.parse("plain").bind([SPEC], "float32").block_bytes == STRIP
    with pytest.raises(PlanError, match="float64"):
        KVPlan.parse("plain").bind([SPEC], "float64")


@pytest.mark.parametrize(
    ("source", "changes", "match"),
    [
        (SPEC, {"kv_source": 1}, "no earlier layer"),
        (SPEC, {"kv_source": -1}, "no earlier layer"),
        (SPEC, {"kv_source": 0, "head_dim": 32}, "cannot read"),
        (with_window(128), {"kv_source": 0}, "cannot read"),
        (with_window(128), {"kv_source": 0, "window": 129}, "cannot read"),
    ],
)
def test_layers_that_read_what_is_not_kept_are_refused(source: LayerSpec, changes: dict[str, int], match: str):
    """A shared layer needs an earlier owner of its shape, with a window no shorter than its own."""
    with pytest.raises(ConfigError, match=match):
        KVPlan.parse("plain").bind([source, dataclasses.replace(SPEC, **changes)], "float32")


def test_shared_layers_cost_nothing_and_may_read_less():
    """A layer that reads another one's keys adds no bytes; its window may be shorter than the owner's."""
    shared = dataclasses.replace(SPEC, kv_source=0, window=64)
    bound = KVPlan.parse("plain").bind([with_window(128), shared], "float32")
    assert bound.block_bytes == STRIP
    assert bound.curve(0, np.array([64])).resident_bytes.tolist() == [STRIP]


def test_fingerprint_differs_exactly_when_strips_do():
    """Model shape, stored dtype and plan change the fingerprint; spelling of the plan does not."""
    bind = KVPlan.parse("plain(bf16)").bind
    base = bind([SPEC, SPEC], "float32").fingerprint()
    assert len(base) == 16
    assert KVPlan.parse("plain(dtype=bfloat16)").bind([SPEC, SPEC], "float32").fingerprint() == base
    others = [
        KVPlan.parse("plain(fp16)").bind([SPEC, SPEC], "float32"),
        KVPlan.parse("plain").bind([SPEC, SPEC], "float32"),
        bind([SPEC], "float32"),
        bind([SPEC, with_window(128)], "float32"),
        bind([SPEC, dataclasses.replace(SPEC, head_dim=32)], "float32"),
        bind([SPEC, dataclasses.replace(SPEC, kv_source=0)], "float32"),
    ]
    prints = [bound.fingerprint() for bound in others]
    assert len({base, *prints}) == 7


def held_bytes(layers: list[LayerSpec], chunks: list[int]) -> tuple[list[int], int]:
    """Append chunks to a sequence of a real store; return the bytes held after each, and the most during one."""
    bound = KVPlan.parse("plain").bind(layers, "float32")
    ledger = Ledger(Budget({}))
    store = PagedStore(bound, Arena(HostTier(), ledger), 64 * 2**20)
    handle, held, top = store.open(), [], 0
    for chunk in chunks:
        start = store.num_tokens(handle)
        step = KVStep((handle,), np.array([0, chunk], dtype=np.int32), np.arange(start, start + chunk))
        assert store.reserve(step) is None
        top = max(top, ledger.held("kv", "host"))
        for index in range(len(layers)):
            x = torch.zeros(chunk, 1, 16)
            store.attend(index, x, x, x, step, Want())
        store.end_step(step)
        held.append(ledger.held("kv", "host"))
    store.close_all()
    return held, top


@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 200, 449])
def test_curve_of_full_layers_is_what_a_store_holds(length: int):
    """Without windows, the curve is exact at every length and nothing is transient."""
    layers = [SPEC, SPEC, dataclasses.replace(SPEC, kv_source=0)]
    curve = KVPlan.parse("plain").bind(layers, "float32").curve(length, np.array([length]), step_tokens=length)
    held, top = held_bytes(layers, [length])
    assert curve.resident_bytes.tolist() == held == [top]
    assert curve.transient_bytes == 0


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([1, 40, 64, 65, 128, 150]), st.lists(st.integers(1, 200), min_size=1, max_size=8))
def test_curve_with_windows_is_a_close_upper_bound(window: int, chunks: list[int]):
    """With sliding windows, a store never holds more than the curve, and at most two strips a layer less."""
    layers = [SPEC, with_window(window), with_window(window)]
    bound = KVPlan.parse("plain").bind(layers, "float32")
    lengths = np.cumsum(chunks)
    curve = bound.curve(0, lengths, step_tokens=max(chunks))
    held, top = held_bytes(layers, chunks)
    assert (np.array(held) <= curve.resident_bytes).all()
    assert (np.array(held) >= curve.resident_bytes - 2 * 2 * STRIP).all()
    assert top <= int(curve.resident_bytes[-1]) + curve.transient_bytes


def test_curve_of_windows_stops_growing():
    """Behind the window a windowed layer costs the same at any length, and the curve never falls."""
    bound = KVPlan.parse("plain").bind([with_window(128)], "float32")
    bytes_at = bound.curve(0, np.arange(0, 5000)).resident_bytes
    assert bytes_at[0] == 0
    assert (np.diff(bytes_at) >= 0).all()
    assert bytes_at[-1] == bytes_at[400] == 4 * STRIP
