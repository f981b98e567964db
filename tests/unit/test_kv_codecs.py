"""Codecs: bytes and errors of each, exact values, and stores that read back what they encoded."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.native import instructions, supported_isas
from torch import Tensor

from elbowroom.bench.random_model import random_calibration
from elbowroom.core import LayerSpec
from elbowroom.errors import PlanError
from elbowroom.kernels import attention, reference
from elbowroom.kernels.base import LayerStrips, StripStep
from elbowroom.kv.codecs.bfp import BfpRows
from elbowroom.kv.codecs.fp8 import Fp8Rows
from elbowroom.kv.codecs.int8 import Int8Rows
from elbowroom.kv.codecs.ordered import in_order
from elbowroom.kv.codecs.planes import PlaneRows
from elbowroom.kv.codecs.rows import RowFormat
from elbowroom.kv.plan import KVPlan

ROWS: list[tuple[RowFormat, float]] = [
    (Int8Rows(), 0.5 / 127 * 1.01),
    (Fp8Rows(), 1 / 16),
    (BfpRows(4, 32), 2**-2),
    (BfpRows(4, 16), 2**-2),
    (BfpRows(8, 32), 2**-6),
    (PlaneRows(32), 1 / 255 * 1.01),
]
"""Formats with their worst error as a share of the largest value of a vector (or block)."""
SPEC = LayerSpec(num_q_heads=4, num_kv_heads=2, head_dim=64, v_head_dim=64, scale=0.125, rope=None)


def values(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rows", "error"), ROWS, ids=str)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), power=st.integers(-8, 5))
def test_rounding_is_bounded(rows: RowFormat, error: float, seed: int, power: int) -> None:
    """A decoded vector is near the original; where scales are powers of two, encoding it again changes nothing."""
    x = values(seed, 3, 64) * 2.0**power
    parts = rows.encode(x)
    assert tuple(part.shape[-1] for part in parts) == rows.num_bytes(64)
    assert all(part.dtype == torch.uint8 for part in parts)
    decoded = rows.decode(parts)
    assert ((decoded - x).abs() <= error * x.abs().amax(-1, keepdim=True) + 2.0**-10).all()
    again = rows.decode(rows.encode(decoded))
    assert isinstance(rows, Int8Rows | PlaneRows) or torch.equal(again, decoded)


@pytest.mark.parametrize(("rows", "_"), ROWS, ids=str)
def test_zeros_stay_zeros_and_what_is_not_finite_is_not_hidden(rows: RowFormat, _: float) -> None:
    x = torch.zeros(3, 64)
    assert torch.equal(rows.decode(rows.encode(x)), x)
    for bad in (torch.nan, torch.inf):
        x[1, 5] = bad
        decoded = rows.decode(rows.encode(x))
        assert torch.equal(decoded[[0, 2]], torch.zeros(2, 64))
        assert isinstance(rows, Fp8Rows) or not decoded[1].isfinite().all()


def test_bfp_gives_the_values_of_the_format() -> None:
    """w = 4, blocks of one value in effect: 1.0, 1.125, 1.25 and 1.375 become 1.0, 1.0, 1.25 and 1.5."""
    x = torch.zeros(4, 16)
    x[:, 0] = torch.tensor([1.0, 1.125, 1.25, 1.375])
    assert BfpRows(4, 16).decode(BfpRows(4, 16).encode(x))[:, 0].tolist() == [1.0, 1.0, 1.25, 1.5]
    x[:, 0] = torch.tensor([1.99, -1.99, 0.01, -3.5])  # saturated at 7 quanta of 2^(e - 2)
    assert BfpRows(4, 16).decode(BfpRows(4, 16).encode(x))[:, 0].tolist() == pytest.approx(
        [1.75, -1.75, 0.01, -3.5], 0.1
    )


def test_fp8_saturates() -> None:
    assert Fp8Rows().decode(Fp8Rows().encode(torch.tensor([1e6, -1e6, 3.0]))).tolist() == [448.0, -448.0, 3.0]


@pytest.mark.parametrize(
    ("plan", "bits"),
    [
        ("fp8", 8),
        ("int8", 8.25),
        ("bfp", 4.25),
        ("bfp(n=16)", 4.5),
        ("bfp(k=8,v=4)", 6.25),
        ("bfp(8,8,64)", 8.125),
        ("planes", 8.625),
    ],
)
def test_a_strip_has_the_bits_that_the_codec_names(plan: str, bits: float) -> None:
    bound = KVPlan.parse(plan).bind([SPEC], "bfloat16")
    assert bound.block_bytes == 64 * 2 * 128 * bits / 8
    assert KVPlan.parse(bound.plan.text) == bound.plan


@pytest.mark.parametrize(
    ("plan", "found", "fix"),
    [
        ("bfp(k=3)", "k=3", "from 4 to 8 in steps of 4"),
        ("bfp(n=many)", "n=many", "from 16 to 128"),
        ("bfp(n=48)", "blocks of 48", "n that divides 64"),
        ("int8(4)", "does not take", "a plan is parts"),
        ("fp8|int8", "two codecs", "a plan is parts"),
    ],
)
def test_errors_name_the_fix(plan: str, found: str, fix: str) -> None:
    with pytest.raises(PlanError) as caught:
        KVPlan.parse(plan).bind([SPEC], "bfloat16")
    assert found in str(caught.value)
    assert fix in str(caught.value)


# --- native code against the readable path ---------------------------------------------------------------------------

TOLERANCE = {
    "int8": 0.002,
    "fp8": 1e-5,
    "bfp": 0.02,
    "bfp(n=16)": 0.02,
    "bfp(n=16,sort=on)": 0.02,
    "bfp(k=8,v=4)": 0.02,
    "bfp(4,8)": 0.01,
    "bfp(8,8,64)": 0.002,
    "planes": 0.002,
    "planes(v=4,g=64)": 0.02,
}
"""Plans, and how far native attention may lie from that over decoded strips, as a share of its norm.

Codes of 8 bits are multiplied with queries and weights rounded to 16 bits, codes of 4 bits with ones of 8.
"""
PLANS = tuple(TOLERANCE)
native = pytest.mark.skipif(
    importlib.util.find_spec("elbowroom._native") is None, reason="elbowroom._native was not built (ELBOWROOM_NATIVE=0)"
)


class Strips:
    """Two sequences in strips of one layer, for native code (with each of some instruction sets) and, last, readable.

    Without ``isas`` native code takes the instruction set that is chosen now.
    """

    def __init__(self, plan: str, spec: LayerSpec, isas: Sequence[str] = ()) -> None:
        bound = KVPlan.parse(plan).bind([spec], "float32", random_calibration([dataclasses.replace(spec, window=None)]))
        self.spec, self.fmt, self.codec = spec, bound.formats[0], in_order(bound.plan.codec, bound.orders, 0)
        self.lengths = [0, 0]
        units = self.fmt.strip_bytes // 64
        self.table = (np.arange(12, dtype=np.uint32).reshape(2, 6) * units).astype(np.uint32)
        self.bases = [
            torch.full((12 * self.fmt.strip_bytes,), 0x55, dtype=torch.uint8) for _ in range(max(len(isas), 1) + 1)
        ]
        self.isas = isas

    def run(self, counts: tuple[int, int], seed: int, scale: float = 1.0) -> list[Tensor]:
        """Append tokens, values ``scale`` times as large, to both sequences; return the attention of all paths."""
        step = StripStep.of_runs(list(zip(self.lengths, counts, strict=True)))
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        spec, rows = self.spec, sum(counts)
        q = values(seed, rows, spec.num_q_heads, spec.head_dim)
        k = values(seed + 1, rows, spec.num_kv_heads, spec.head_dim)
        v = values(seed + 2, rows, spec.num_kv_heads, spec.v_head_dim) * scale
        out = []
        for place, base in enumerate(self.bases):
            strips = LayerStrips(step, self.table, base, self.fmt, self.codec)
            backend = reference.KERNELS if place == len(self.bases) - 1 else None
            with instructions(self.isas[place]) if place < len(self.isas) else contextlib.nullcontext():
                attention.append(strips, k, v, backend=backend)
                made, _ = attention.attend(strips, spec, q, backend=backend)
            out.append(made)
        return out


@native
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    ("group", "dim", "v_dim", "window", "softcap"),
    [(1, 64, 128, None, None), (4, 128, 64, 100, None), (12, 64, 192, None, 3.0), (7, 192, 64, 70, None)],
)
def test_native_code_writes_the_same_bytes_and_reads_nearly_the_same_values(
    plan: str, group: int, dim: int, v_dim: int, window: int | None, softcap: float | None
) -> None:
    """Decode steps, short and long chunks; what lies in slots that nobody wrote does not matter."""
    spec = dataclasses.replace(
        SPEC, num_q_heads=2 * group, head_dim=dim, v_head_dim=v_dim, window=window, softcap=softcap
    )
    strips = Strips(plan, spec, supported_isas())  # in one test: reading in torch is what takes time
    for seed, counts in enumerate([(1, 70), (1, 1), (130, 3), (1, 1), (2, 2)]):
        *outs, expected = strips.run(counts, 10 * seed, 3.0**seed)
        for isa, base, made in zip(strips.isas, strips.bases, outs, strict=False):
            assert torch.equal(base, strips.bases[-1]), isa
            assert float((made - expected).norm()) < TOLERANCE[plan] * float(expected.norm()), isa


@native
@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(
    ("plan", "dim", "v_dim"), [("int8", 20, 12), ("int8", 6, 80), ("bfp(n=16)", 80, 48), ("bfp(8,8,16)", 48, 80)]
)
def test_widths_that_fill_no_vectors_work(plan: str, dim: int, v_dim: int) -> None:
    strips = Strips(plan, dataclasses.replace(SPEC, num_q_heads=10, head_dim=dim, v_head_dim=v_dim))
    for seed, counts in enumerate([(66, 20), (1, 1)]):
        made, expected = strips.run(counts, seed)
        assert float((made - expected).norm()) < TOLERANCE.get(plan, 0.002) * float(expected.norm())


@native
@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("plan", ["int8", "bfp(n=16)", "bfp(k=8,v=4)"])
@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_what_is_not_finite_is_not_hidden_by_integer_products(plan: str, bad: float) -> None:
    """Rows that read it show it, rows before it and heads beside it do not."""
    for part in range(2):
        strips = Strips(plan, SPEC)
        rows = [values(1, 70, 2, 64), values(2, 70, 2, 64)]
        rows[part][40, 1, 4] = bad
        step = StripStep.of_runs([(0, 70), (0, 0)])
        where = LayerStrips(step, strips.table, strips.bases[0], strips.fmt, strips.codec)
        attention.append(where, *rows)
        out, _ = attention.attend(where, SPEC, values(3, 70, 4, 64))
        assert out[:, :2].isfinite().all()
        assert out[:40].isfinite().all()
        assert not out[40:, 2:, 4].isfinite().any()


@native
@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("plan", ["int8", "bfp", "bfp(k=8,v=4)"])
@pytest.mark.parametrize("group", [4, 7])
def test_a_row_gives_the_same_bits_beside_any_others(plan: str, group: int) -> None:
    """Alone, in a chunk and behind a prompt: integers are exact, and factors are rounded for each row by itself."""
    strips = Strips(plan, dataclasses.replace(SPEC, num_q_heads=2 * group))
    q, k, v = values(1, 300, 2 * group, 64), values(2, 300, 2, 64), values(3, 300, 2, 64)
    outs = []
    for start in (0, 200, 297, 299):
        step = StripStep.of_runs([(start, 300 - start), (0, 0)])
        where = LayerStrips(step, strips.table, strips.bases[0], strips.fmt, strips.codec)
        attention.append(where, k[start:], v[start:])
        out, _ = attention.attend(where, strips.spec, q[start:])
        outs.append(out[-1])
    for out in outs[1:]:
        assert torch.equal(out, outs[0])


@native
@pytest.mark.parametrize("plan", PLANS)
def test_native_code_encodes_the_edges_alike(plan: str) -> None:
    """Zeros, subnormals, halves between two codes, saturation, and what is not finite."""
    edges = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 2.0**-126, 0.5, 1.5, 2.5, -2.5, 1e30, -1e30, 448.0, 465.0, 2.0**-9])
    rows = [edges.roll(i).repeat(10)[:128] * 10.0**power for i, power in ((0, 0), (1, -3), (2, 2), (3, -30))]
    rows += [torch.zeros(128), torch.full((128,), torch.inf), torch.full((128,), torch.nan)]
    x = torch.stack(rows).view(len(rows), 2, 64)
    strips = Strips(plan, SPEC)
    step = StripStep.of_runs([(0, len(rows)), (0, 0)])
    for base, backend in zip(strips.bases, (None, reference.KERNELS), strict=True):
        attention.append(LayerStrips(step, strips.table, base, strips.fmt, strips.codec), x, x, backend=backend)
    decoded = [strips.codec.open(base[: strips.fmt.strip_bytes], strips.fmt) for base in strips.bases]
    for made, expected in zip(*decoded, strict=True):
        slots = slice(0, len(rows))
        torch.testing.assert_close(made[:, slots], expected[:, slots], rtol=0, atol=0, equal_nan=True)
