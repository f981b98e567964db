"""Attention over strips: every backend and instruction set against a dense softmax, on the same vectors."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.native import ISAS, instructions
from tests.support.strip_cache import Cache, filled, make_spec
from torch import Tensor

from elbowroom.errors import PlanError
from elbowroom.kernels import LayerStrips, StripStep, append, attend, attention, backend_name
from elbowroom.kernels.base import UNIT_BYTES, AttentionKernels

HAS_NATIVE = importlib.util.find_spec("elbowroom._native") is not None


@pytest.fixture(params=["reference", *ISAS])
def backend(request: pytest.FixtureRequest) -> Iterator[AttentionKernels]:
    """The reference, and the native backend with each instruction set that runs here."""
    if request.param == "reference":
        yield attention.BACKENDS.get("reference")
        return
    with instructions(request.param):
        yield attention.BACKENDS.get("native")


MIXED = StripStep.of_runs([(199, 1), (64, 70), (0, 5), (127, 1)])
"""A decode row, a chunk that crosses strips, a short prompt, and a decode row at the end of a strip."""
MIXED_LENGTHS = [200, 134, 5, 128]


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("computed", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_of_strips_and_of_queries_equals_dense_attention(
    backend: AttentionKernels, stored: str, computed: torch.dtype
) -> None:
    filled(backend, make_spec(dim=40), stored, MIXED_LENGTHS).check(backend, MIXED, computed)


@pytest.mark.parametrize("dim", [8, 16, 24, 40, 64, 80, 96, 128])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_every_head_width_equals_dense_attention(backend: AttentionKernels, dim: int, stored: str) -> None:
    filled(backend, make_spec(dim=dim), stored, MIXED_LENGTHS).check(backend, MIXED)


def test_odd_widths_and_values_of_another_width_than_keys_work(backend: AttentionKernels) -> None:
    filled(backend, make_spec(dim=20, v_dim=12), "float16", MIXED_LENGTHS).check(backend, MIXED)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 70])
def test_query_heads_read_the_kv_head_of_their_group(backend: AttentionKernels, group: int) -> None:
    filled(backend, make_spec(group=group, kv_heads=3), "float32", MIXED_LENGTHS).check(backend, MIXED)


@pytest.mark.parametrize("window", [1, 7, 64, 65, 130, 1000])
def test_a_window_hides_what_lies_before_it(backend: AttentionKernels, window: int) -> None:
    filled(backend, make_spec(window=window), "float32", MIXED_LENGTHS).check(backend, MIXED)


@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap_bounds_the_scores(backend: AttentionKernels, softcap: float) -> None:
    filled(backend, make_spec(softcap=softcap), "float32", MIXED_LENGTHS).check(backend, MIXED)


def test_expired_strips_are_never_touched(backend: AttentionKernels) -> None:
    """Strips before first_slot, and the table entries of blocks not in use, may hold anything."""
    cache = filled(backend, make_spec(window=100), "float32", [400, 300])
    step = StripStep.of_runs([(399, 1), (290, 10)], first_slots=[256, 130])
    cache.table[0, :4] = 0xFFFFFFFF
    cache.table[1, :2] = 0xFFFFFFFF
    cache.table[1, 5:] = 0xFFFFFFFF

    cache.check(backend, step)


def test_rows_in_any_order_of_positions_read_up_to_their_own(backend: AttentionKernels) -> None:
    cache = filled(backend, make_spec(), "float32", [300])
    positions = torch.tensor([250, 3, 128, 64, 299, 63, 7])
    step = dataclasses.replace(StripStep.of_runs([(293, 7)]), positions=positions)

    cache.check(backend, step)


def test_appending_in_any_order_fills_the_same_slots(backend: AttentionKernels) -> None:
    cache = Cache(make_spec(), "bfloat16", [100])
    order = torch.randperm(100, generator=cache.random)
    cache.append(backend, dataclasses.replace(StripStep.of_runs([(0, 100)]), positions=order))

    cache.check(backend, StripStep.of_runs([(95, 5)]))


def test_appending_writes_its_own_slots_and_no_other_byte(backend: AttentionKernels) -> None:
    cache = Cache(make_spec(), "float32", [130, 10])
    before = cache.base.clone()
    cache.append(backend, StripStep.of_runs([(62, 5), (9, 1)]))

    written = int((cache.base != before).view(-1, 4).any(1).sum())

    assert written == 6 * cache.spec.num_kv_heads * (cache.spec.head_dim + cache.spec.v_head_dim)


def test_long_sequences_are_cut_into_pieces_and_merged(backend: AttentionKernels) -> None:
    """Decode, verification and small chunks over more than one piece of 1024 tokens, with and without a window."""
    for window in (None, 1500):
        cache = filled(backend, make_spec(dim=8, window=window), "float32", [5000, 1025, 2100])
        cache.check(backend, StripStep.of_runs([(4999, 1), (1024, 1), (2099, 1)]))
        cache.check(backend, StripStep.of_runs([(4980, 20), (1020, 5), (2098, 2)]))


def test_large_scores_do_not_overflow(backend: AttentionKernels) -> None:
    spec = dataclasses.replace(make_spec(), scale=200.0)
    cache = filled(backend, spec, "float32", [200])
    q = cache.draw(1, spec.num_q_heads, spec.head_dim)
    step = StripStep.of_runs([(199, 1)])
    out, lse = cache.attend(backend, step, q)
    expected, expected_lse = cache.dense(step, q)

    torch.testing.assert_close(out.double(), expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-2, rtol=1e-5)


def test_conversions_round_as_torch_does(backend: AttentionKernels) -> None:
    """Appended values, subnormals, infinities and NaN included, have the bits of ``Tensor.to``."""
    edge = [0.0, -0.0, 1.0, 1 / 3, 65504.0, 65519.0, 65520.0, 7e4, 6e-8, 3e-8, 2.9e-8, 1e-5, 6.1e-5, 1e-40, 3e38]
    values = torch.tensor([*edge, float("inf"), float("-inf"), float("nan")])
    random = torch.randn(110, generator=torch.Generator().manual_seed(1)) * torch.logspace(-9, 6, 110)
    row = torch.cat([values, random]).view(1, 1, 128)
    step = StripStep.of_runs([(0, 1)])
    for dtype in ("bfloat16", "float16"):
        cache = Cache(make_spec(group=1, kv_heads=1, dim=128), dtype, [1])
        append(LayerStrips(step, cache.table, cache.base, cache.fmt), row, row, backend=backend)
        start = int(cache.table[0, 0]) * UNIT_BYTES
        stored = cache.base[start : start + 256].view(getattr(torch, dtype))

        torch.testing.assert_close(stored, row.flatten().to(stored.dtype), atol=0, rtol=0, equal_nan=True)


def test_strided_inputs_and_a_given_output_are_used_in_place(backend: AttentionKernels) -> None:
    spec = make_spec()
    cache = Cache(spec, "float32", [70])
    step = StripStep.of_runs([(0, 70)])
    fused = torch.cat([cache.draw(70, 4, 16), cache.k[0], cache.v[0]], dim=1)
    q, k, v = fused.split([4, 2, 2], dim=1)
    append(LayerStrips(step, cache.table, cache.base, cache.fmt), k, v, backend=backend)
    place = torch.zeros(70, 8, 16)
    strips = LayerStrips(step, cache.table, cache.base, cache.fmt)
    out, _ = attend(strips, spec, q, place[:, ::2], backend=backend)

    assert out.data_ptr() == place.data_ptr()
    torch.testing.assert_close(place[:, ::2].double(), cache.dense(step, q)[0], atol=2e-5, rtol=2e-5)
    assert not place[:, 1::2].any()


def test_a_row_gives_the_same_bits_alone_and_in_a_batch(backend: AttentionKernels) -> None:
    """What a decode row computes does not depend on its neighbours or on the number of threads."""
    cache = filled(backend, make_spec(), "float32", [2500, 90, 1300])
    q = cache.draw(3, 4, 16)
    together, _ = cache.attend(backend, StripStep.of_runs([(2499, 1), (89, 1), (1299, 1)]), q)
    cache.table = cache.table[:1]
    alone, _ = cache.attend(backend, StripStep.of_runs([(2499, 1)]), q[:1])

    assert torch.equal(together[:1], alone)


def test_a_step_without_rows_does_nothing(backend: AttentionKernels) -> None:
    cache = filled(backend, make_spec(), "float32", [10])
    cache.check(backend, StripStep.of_runs([(10, 0)]))


@settings(max_examples=25, deadline=None, database=None)
@given(data=st.data())
def test_any_schedule_of_chunks_equals_dense_attention(data: st.DataObject) -> None:
    """Append in random chunks over random sequences and attend after each: always the oracle's answer."""
    chunks = st.lists(st.lists(st.integers(0, 150), min_size=1, max_size=4), min_size=1, max_size=3)
    schedule = data.draw(chunks.filter(lambda runs: any(sum(run) for run in runs)))
    spec = make_spec(
        group=data.draw(st.integers(1, 4)),
        kv_heads=data.draw(st.integers(1, 3)),
        dim=data.draw(st.sampled_from([4, 8, 20, 32])),
        window=data.draw(st.none() | st.integers(1, 200)),
        softcap=data.draw(st.none() | st.floats(1.0, 50.0)),
    )
    stored = data.draw(st.sampled_from(["float32", "bfloat16", "float16"]))
    for backend in [attention.BACKENDS.get(name) for name in ["reference", *(["native"] * HAS_NATIVE)]]:
        cache = Cache(spec, stored, [sum(run) for run in schedule], seed=3)
        done = [0] * len(schedule)
        for i in range(max(len(run) for run in schedule)):
            runs = [(start, run[i] if i < len(run) else 0) for start, run in zip(done, schedule, strict=True)]
            step = StripStep.of_runs(runs)
            cache.append(backend, step)
            cache.check(backend, step)
            done = [start + count for start, count in runs]


def bad(**changes: object) -> dict[str, object]:
    """Arguments of attend for one good step, with changes."""
    cache = Cache(make_spec(), "float32", [10])
    arguments: dict[str, object] = {
        "step": StripStep.of_runs([(9, 1)]),
        "table": cache.table,
        "base": cache.base,
        "fmt": cache.fmt,
        "spec": cache.spec,
        "q": torch.zeros(1, 4, 16),
    }
    return {**arguments, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 4, 16)}, "q must have shape"),
        ({"q": torch.zeros(1, 4, 16, dtype=torch.float64)}, "float32, bfloat16 or float16"),
        ({"q": torch.zeros(1, 16, 4).transpose(1, 2)}, "stride of 1"),
        ({"out": torch.zeros(1, 4, 16, dtype=torch.bfloat16)}, "dtype of q"),
        ({"out": torch.zeros(1, 4, 8)}, "out must have shape"),
        ({"table": np.zeros((1, 1), dtype=np.int64)}, "uint32"),
        ({"table": np.zeros((2, 1), dtype=np.uint32)}, "2 rows for 1 sequences"),
        ({"table": np.zeros((1, 0), dtype=np.uint32)}, "longer than the 0 blocks"),
        ({"base": torch.zeros(10)}, "uint8"),
        ({"spec": make_spec(kv_heads=3)}, "its strips"),
        ({"spec": make_spec(window=0)}, "window >= 1"),
    ],
)
def test_wrong_arguments_are_refused_before_any_kernel(changes: dict[str, object], message: str) -> None:
    arguments: dict[str, Any] = bad(**changes)
    strips = LayerStrips(*[arguments.pop(name) for name in ("step", "table", "base", "fmt")])
    with pytest.raises(ValueError, match=message):
        attend(strips, **arguments)


def test_a_strip_outside_the_range_is_refused(backend: AttentionKernels) -> None:
    cache = Cache(make_spec(), "float32", [10])
    cache.table[0, 0] = 0xFFFFFFFF
    step = StripStep.of_runs([(9, 1)])

    with pytest.raises(ValueError, match="bytes of its range"):
        cache.attend(backend, step, torch.zeros(1, 4, 16))
    with pytest.raises(ValueError, match="bytes of its range"):
        cache.append(backend, step)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": torch.tensor([10])}, "positions must lie in"),
        ({"positions": torch.tensor([-1])}, "positions must lie in"),
        ({"first_slots": torch.tensor([9])}, "positions must lie in"),
        ({"first_slots": torch.tensor([11])}, "first_slots must lie in"),
        ({"row_starts": torch.tensor([0, 2], dtype=torch.int32)}, "rise from 0"),
        ({"lengths": torch.tensor([10, 1])}, "disagree"),
        ({"positions": torch.tensor([8], dtype=torch.int32)}, "int64"),
    ],
)
def test_a_contradictory_step_is_refused(changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(StripStep.of_runs([(8, 1)]), **{"lengths": torch.tensor([10]), **changes})


def test_an_unknown_backend_names_the_ones_there_are() -> None:
    with pytest.raises(PlanError, match="native, reference, triton"):
        attention.BACKENDS.get("abacus")


@pytest.mark.skipif(not HAS_NATIVE, reason="elbowroom._native was not built")
def test_the_environment_chooses_instruction_set_and_threads() -> None:
    """One process for all of it, because both are read once."""
    code = (
        "from elbowroom import _native; print(_native.isa(), _native.num_threads())\n"
        "try: _native.set_isa('abacus')\n"
        "except ValueError as error: print(error)"
    )
    environment = {"ELBOWROOM_ISA": "baseline", "ELBOWROOM_THREADS": "1"}
    path = {"PYTHONPATH": ":".join(sys.path)}
    shown = subprocess.run([sys.executable, "-c", code], env=environment | path, capture_output=True, check=True)

    first, second = shown.stdout.decode().splitlines()

    assert first == "baseline 1"
    assert "baseline" in second.partition("ELBOWROOM_ISA may be one of:")[2].split()


def test_the_native_backend_is_used_when_it_was_built() -> None:
    assert backend_name() == ("native" if HAS_NATIVE else "reference")
