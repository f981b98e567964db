"""Codec ``planes`` and read policy ``progressive``: bytes, errors, what is read and what it is worth."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from elbowroom.core import LayerSpec
from elbowroom.engine.llm import LLM
from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.errors import PlanError
from elbowroom.kernels import LayerStrips, StripStep, attention, reference
from elbowroom.kernels.base import AttentionKernels, Progress
from elbowroom.kernels.progressive import values_read
from elbowroom.kv import KVPlan
from elbowroom.kv.codecs.planes import PlaneRows, PlanesCodec
from elbowroom.kv.read_count import plane_reads

SPEC = LayerSpec(num_q_heads=6, num_kv_heads=2, head_dim=64, v_head_dim=32, scale=0.125, rope=None)
SHARP = LayerSpec(num_q_heads=14, num_kv_heads=2, head_dim=32, v_head_dim=64, scale=0.2, rope=None, softcap=20.0)
CODECS = ("planes", "planes(v=4)", "planes(g=16)")
LENGTH = 900


@pytest.fixture(params=["reference", "baseline", "avx2", "avx512", "emulated512"])
def backend(request: pytest.FixtureRequest) -> Iterator[AttentionKernels]:
    """The reference, and the native backend with each instruction set that runs here."""
    if request.param == "reference":
        yield reference.KERNELS
        return
    if importlib.util.find_spec("elbowroom._native") is None:
        pytest.skip("elbowroom._native was not built (ELBOWROOM_NATIVE=0)")
    native = importlib.import_module("elbowroom._native")
    if request.param not in native.supported_isas():
        pytest.skip(f"this CPU or build has no {request.param}")
    before = native.isa()
    native.set_isa(request.param)
    yield attention.BACKENDS.get("native")
    native.set_isa(before)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# The codec


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), power=st.integers(-8, 8), offset=st.floats(-40, 40))
def test_both_planes_are_within_half_a_step_and_one_within_eight(seed: int, power: int, offset: float) -> None:
    """Whatever the range of a group and wherever it lies; the middle is a better guess than 0."""
    rows, x = PlaneRows(16), (draw(seed, 5, 64) + offset) * 2.0**power
    parts = rows.encode(x)
    scale = torch.cat([part.view(torch.float16) for part in parts[2::2]], dim=-1).float().repeat_interleave(16, dim=-1)
    slack = 1e-6 * x.abs()
    assert ((rows.decode(parts) - x).abs() <= 0.5 * scale + slack).all()
    high = rows.decode_high(parts)
    assert ((high - x).abs() <= 8 * scale + slack).all()
    assert (high - x).square().sum() < 0.5 * (high - 7.5 * scale - x).square().sum()


def test_planes_lie_apart_and_have_their_bytes() -> None:
    fmt = PlanesCodec().page_format(SPEC, "float32")
    assert fmt.payload_bytes == 64 * 2 * (64 + 32)
    assert fmt.overhead_bytes == 64 * 2 * (2 * 4 + 2)
    assert PlanesCodec(v=4, g=16).page_format(SPEC, "float32").strip_bytes == 64 * 2 * (64 + 4 * 4 + 16 + 2)
    codec, strip = PlanesCodec(), torch.zeros(fmt.strip_bytes, dtype=torch.uint8)
    codec.store(strip, fmt, torch.arange(64), draw(1, 2, 64, 64), draw(2, 2, 64, 32))
    keys, high = codec.open(strip, fmt)[0], codec.open_high(strip, fmt)
    strip[64 * 2 * 32 : 64 * 2 * 64] = 0xFF  # the low plane
    assert torch.equal(codec.open_high(strip, fmt), high)
    assert not torch.equal(codec.open(strip, fmt)[0], keys)


def test_what_is_not_finite_is_not_hidden() -> None:
    for bad in (torch.nan, torch.inf, -torch.inf, 1e30):
        x = torch.zeros(2, 64)
        x[1, 40] = bad
        rows = PlaneRows(32)
        for decoded in (rows.decode(rows.encode(x)), rows.decode_high(rows.encode(x))):
            assert torch.equal(decoded[0], torch.zeros(64))
            assert not decoded[1, 32:].isfinite().any()


@pytest.mark.parametrize(
    ("plan", "found", "fix"),
    [
        ("planes(v=3)", "v=3", "from 4 to 8 in steps of 4"),
        ("planes(g=48)", "groups of 48", "g that divides 64"),
        ("progressive", "'plain' keeps them together", "progressive | planes"),
        ("progressive | int8", "'int8' keeps them together", "progressive | planes"),
        ("progressive(tau=-1) | planes", "tau=-1", "0 or more"),
        ("progressive(tau=nan) | planes", "tau=nan", "0 or more"),
        ("progressive(eps=1) | planes", "eps=1", "below 1"),
        ("think | progressive | planes", "'think' has changed", "leave progressive or think out"),
        ("quest | progressive | planes", "two read policies", "parts joined"),
    ],
)
def test_plans_that_cannot_work_name_the_way_out(plan: str, found: str, fix: str) -> None:
    with pytest.raises(PlanError) as caught:
        KVPlan.parse(plan).bind([SPEC], "float32")
    assert found in caught.value.message
    assert fix in str(caught.value.hint)


# Reading


class Cache:
    """A sequence in strips of one layer, with one key that stands out where ``sharp``."""

    def __init__(self, plan: str, backend: AttentionKernels, spec: LayerSpec = SPEC, sharp: float = 1.0) -> None:
        bound = KVPlan.parse(plan).bind([spec], "float32")
        self.spec, self.backend, self.fmt, self.codec = spec, backend, bound.formats[0], bound.plan.codec
        blocks = -(-LENGTH // 64)
        self.table = (np.arange(blocks, dtype=np.uint32) * (self.fmt.strip_bytes // 64))[None].astype(np.uint32)
        self.base = torch.full((blocks * self.fmt.strip_bytes,), 0x55, dtype=torch.uint8)
        self.q = draw(3, 1, spec.num_q_heads, spec.head_dim) * sharp
        self.k, self.v = draw(4, LENGTH, 2, spec.head_dim), draw(5, LENGTH, 2, spec.v_head_dim)
        for start, end in ((0, LENGTH - 1), (LENGTH - 1, LENGTH)):
            step = StripStep.of_runs([(start, end - start)])
            attention.append(self.strips(step), self.k[start:end], self.v[start:end], backend=backend)
        self.step = step

    def strips(self, step: StripStep, progress: Progress | None = None, tally: object = None) -> LayerStrips:
        counted = tally if isinstance(tally, np.ndarray) else None
        return LayerStrips(step, self.table, self.base, self.fmt, self.codec, selection=progress, tally=counted)

    def read(self, tau: float, eps: float, backend: AttentionKernels | None = None) -> tuple[Tensor, Tensor, list[int]]:
        """Return output, lse and tally."""
        tally, rows = np.zeros(5, dtype=np.int64), np.ones(1, dtype=np.uint8)
        strips = self.strips(self.step, Progress(tau, eps, rows), tally)
        out, lse = attention.attend(strips, self.spec, self.q, backend=backend or self.backend)
        return out, lse, tally.tolist()

    def whole(self) -> tuple[Tensor, Tensor]:
        return attention.attend(self.strips(self.step), self.spec, self.q, backend=self.backend)


def error(made: Tensor, expected: Tensor) -> float:
    return float((made - expected).norm() / expected.norm())


@pytest.mark.parametrize("spec", [SPEC, SHARP], ids=["plain", "softcap"])
@pytest.mark.parametrize("plan", CODECS)
@pytest.mark.parametrize(("tau", "eps"), [(0.0, 0.0), (1.0, 0.0), (0.2, 0.01)])
def test_every_backend_reads_the_same_parts(
    plan: str, spec: LayerSpec, tau: float, eps: float, backend: AttentionKernels
) -> None:
    """Bytes are those of the readable path; so is what is counted, and nearly what comes out."""
    cache, oracle = Cache(plan, backend, spec, 2.0), Cache(plan, reference.KERNELS, spec, 2.0)
    assert torch.equal(cache.base, oracle.base)
    out, lse, tally = cache.read(tau, eps)
    expected, expected_lse, expected_tally = oracle.read(tau, eps)
    assert tally == expected_tally
    assert error(out, expected) < 0.02
    assert float((lse - expected_lse).abs().max()) < 0.02


@pytest.mark.parametrize("plan", CODECS)
def test_with_the_low_plane_it_is_the_whole_read(plan: str, backend: AttentionKernels) -> None:
    """tau = 1 reads everything, tau = 0 one plane; what that leaves open shows."""
    cache = Cache(plan, backend)
    (whole, whole_lse), blocks = cache.whole(), -(-LENGTH // 64)
    out, lse, tally = cache.read(1.0, 0.0)
    assert error(out, whole) < 0.012
    assert float((lse - whole_lse).abs().max()) < 0.01
    assert tally == [2, 2, 2 * blocks, 2 * blocks, 2 * blocks]
    half, _, tally = cache.read(0.0, 0.0)
    assert 0.012 < error(half, whole) < 0.2
    assert tally == [2, 0, 2 * blocks, 0, 2 * blocks]


def test_a_dominated_softmax_needs_no_low_plane(backend: AttentionKernels) -> None:
    """Of two KV heads the one that looks at one key reads half of it, the other all; each counts its own bytes."""
    cache = Cache("planes", backend)
    cache.q[:, :3] = 12 * cache.k[400, :1] / cache.k[400, 0].norm()
    out, _, tally = cache.read(0.5, 0.0)
    blocks = -(-LENGTH // 64)
    assert tally == [2, 1, 2 * blocks, blocks, 2 * blocks]
    assert error(out, cache.whole()[0]) < 0.05
    reads = plane_reads(np.array([tally]), [cache.fmt])
    assert reads is not None
    assert reads.refetch_rate == 0.5
    assert reads.key_bytes == 2 * blocks * 64 * (32 + 2 * 4) == 2 * reads.refetch_bytes
    assert reads.value_bytes == 2 * blocks * 64 * (32 + 2)
    assert reads.dense_bytes == 2 * blocks * 64 * (64 + 32) * 2


@pytest.mark.parametrize("eps", [0.01, 0.2])
def test_values_left_out_have_at_most_eps_of_the_probability(eps: float, backend: AttentionKernels) -> None:
    """The output moves by no more than that share of the largest value, although blocks are left out."""
    cache = Cache("planes", backend, sharp=3.0)
    whole, whole_lse, all_read = cache.read(0.0, 0.0)
    out, lse, tally = cache.read(0.0, eps)
    assert tally[4] < all_read[4]
    assert float((out - whole).abs().max()) <= eps * float(cache.v.abs().max()) + 1e-3
    assert torch.equal(lse, whole_lse)


@settings(max_examples=100, deadline=None)
@given(masses=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40), eps=st.floats(0.0, 0.5))
def test_the_least_likely_blocks_are_left_out_as_long_as_they_fit(masses: list[float], eps: float) -> None:
    given_masses = torch.tensor([masses])
    read = values_read(given_masses, eps)[0]
    left, kept = given_masses[0, ~read], given_masses[0, read]
    assert float(left.sum()) <= eps * (1 + 1e-5)
    if len(left) and len(kept):
        assert left.max() <= kept.min()
    if eps > 0 and len(kept):
        assert float(left.double().sum() + kept.double().min()) > eps * (1 - 1e-5)
    if eps == 0:
        assert read.all()


@pytest.mark.parametrize("part", ["keys", "values"])
def test_what_is_not_finite_shows(part: str, backend: AttentionKernels) -> None:
    cache = Cache("planes", backend)
    bad = {"keys": cache.k[400:401].clone(), "values": cache.v[400:401].clone()}
    bad[part][0, 1, 5] = torch.nan
    row = StripStep(
        row_starts=torch.tensor([0, 1], dtype=torch.int32),
        positions=torch.tensor([400]),
        lengths=torch.tensor([LENGTH]),
        first_slots=torch.tensor([0]),
    )
    attention.append(cache.strips(row), bad["keys"], bad["values"], backend=backend)
    for tau in (0.0, 0.05, 1.0):
        out, _, _ = cache.read(tau, 0.001)
        assert out[:, :3].isfinite().all()
        assert not out[:, 3:].isfinite().all()


def test_readings_that_cannot_work_are_refused() -> None:
    cache, rows = Cache("int8", reference.KERNELS), np.ones(1, dtype=np.uint8)
    planes = Cache("planes", reference.KERNELS)
    for strips, found in (
        (cache.strips(cache.step, Progress(0.05, 0.0, rows)), "not in those of int8"),
        (planes.strips(planes.step, Progress(-0.5, 0.0, rows)), "tau is 0 or more"),
        (planes.strips(planes.step, Progress(0.05, 0.0, rows), np.zeros(4, dtype=np.int64)), "5 numbers"),
    ):
        with pytest.raises(ValueError, match=found):
            attention.attend(strips, SPEC, cache.q)


# The engine


def test_the_engine_counts_what_decoding_tokens_read() -> None:
    """Prompts read everything; requests of one batch do not disturb each other; the report says what was read."""
    greedy, made = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True), {}
    prompts = [{"prompt_token_ids": list(range(number, number + 300))} for number in (10, 400)]
    for kv in ("planes", "progressive(tau=1,eps=0) | planes", "progressive(tau=0,eps=0.5) | planes"):
        with LLM(memory="96MiB", kv=kv) as llm:
            made[kv] = [tuple(each.outputs[0].token_ids) for each in llm.generate(prompts, greedy)]
            reads = llm.engine.kv_report().reads
            assert (reads is None) == (kv == "planes")
            if reads is not None:
                layers = llm.engine.parts.plan.layers
                assert reads.num_reads == 2 * 11 * sum(layer.num_kv_heads for layer in layers)
                assert reads.refetch_rate == float("tau=1" in kv)
                assert (reads.value_elements < reads.key_elements) == ("eps=0.5" in kv)
            alone = [tuple(llm.generate([prompt], greedy)[0].outputs[0].token_ids) for prompt in prompts]
            assert alone == made[kv]
            llm.engine.check_integrity()
    dense_tokens, always, _ = made.values()
    pairs = zip(sum(dense_tokens, ()), sum(always, ()), strict=True)
    assert sum(one == other for one, other in pairs) >= 20
