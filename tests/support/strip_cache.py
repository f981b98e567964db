"""Strips of random keys and values, and dense attention over them: the oracle of every attention backend."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from elbowroom.core import STRIP_TOKENS, LayerSpec, PageFormat
from elbowroom.kernels import LayerStrips, StripStep, append, attend
from elbowroom.kernels.base import UNIT_BYTES, AttentionKernels

TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 3e-3}


def make_spec(
    group: int = 2,
    kv_heads: int = 2,
    dim: int = 16,
    v_dim: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> LayerSpec:
    return LayerSpec(
        num_q_heads=group * kv_heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        v_head_dim=v_dim or dim,
        scale=dim**-0.5,
        rope=None,
        window=window,
        softcap=softcap,
    )


class Cache:
    """Strips scattered over a range full of NaN bytes, and the plain tensors that they should hold."""

    def __init__(self, spec: LayerSpec, dtype: str, lengths: list[int], seed: int = 0) -> None:
        self.spec, self.random = spec, torch.Generator().manual_seed(seed)
        elements = spec.num_kv_heads * STRIP_TOKENS * (spec.head_dim + spec.v_head_dim)
        payload = elements * (4 if dtype == "float32" else 2)
        self.fmt = PageFormat(
            codec="plain",
            dtype=dtype,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            v_head_dim=spec.v_head_dim,
            payload_bytes=payload,
        )
        blocks = -(-max(lengths) // STRIP_TOKENS)
        places = np.random.default_rng(seed).permutation(len(lengths) * blocks + 3)[: len(lengths) * blocks]
        self.table = (places.reshape(len(lengths), blocks) * (self.fmt.strip_bytes // UNIT_BYTES)).astype(np.uint32)
        self.base = torch.full(((len(lengths) * blocks + 3) * self.fmt.strip_bytes,), 255, dtype=torch.uint8)
        self.k = [self.draw(length, spec.num_kv_heads, spec.head_dim) for length in lengths]
        self.v = [self.draw(length, spec.num_kv_heads, spec.v_head_dim) for length in lengths]

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random)

    def append(self, backend: AttentionKernels, step: StripStep) -> None:
        """Append the tokens that the step's rows name."""
        k, v = (self.rows(step, cached) for cached in (self.k, self.v))
        append(LayerStrips(step, self.table, self.base, self.fmt), k, v, backend=backend)

    def share(self, reader: int, holder: int, num_blocks: int) -> None:
        """Let a sequence read the first blocks of another one, as after a fork there."""
        self.table[reader, :num_blocks] = self.table[holder, :num_blocks]
        for cached in (self.k, self.v):
            cached[reader][: num_blocks * STRIP_TOKENS] = cached[holder][: num_blocks * STRIP_TOKENS]

    def attend(
        self, backend: AttentionKernels, step: StripStep, q: Tensor, shares: bool = True
    ) -> tuple[Tensor, Tensor]:
        strips = LayerStrips(step, self.table, self.base, self.fmt, shares=shares)
        return attend(strips, self.spec, q, backend=backend)

    def rows(self, step: StripStep, cached: list[Tensor]) -> Tensor:
        return torch.cat([cached[s][positions] for s, positions in enumerate(split(step))])

    def dense(self, step: StripStep, q: Tensor) -> tuple[Tensor, Tensor]:
        """The oracle: one softmax over all slots of the sequence, in float64."""
        outs, lses = [], []
        for s, (positions, rows) in enumerate(zip(split(step), q.split(counts(step)), strict=True)):
            k, v = (
                cached[s].to(getattr(torch, self.fmt.dtype)).double().repeat_interleave(self.spec.group_size, dim=1)
                for cached in (self.k, self.v)
            )
            scores = torch.einsum("nhd,shd->hns", rows.double(), k) * self.spec.scale
            if self.spec.softcap is not None:
                scores = torch.tanh(scores / self.spec.softcap) * self.spec.softcap
            slots = torch.arange(len(k))
            visible = (slots <= positions[:, None]) & (slots >= step.first_slots[s]) & (slots < step.lengths[s])
            if self.spec.window is not None:
                visible &= slots > positions[:, None] - self.spec.window
            scores = scores.masked_fill(~visible, float("-inf"))
            outs.append(torch.einsum("hns,shd->nhd", scores.softmax(-1), v))
            lses.append(scores.logsumexp(-1).T)
        return torch.cat(outs), torch.cat(lses)

    def check(self, backend: AttentionKernels, step: StripStep, dtype: torch.dtype = torch.float32) -> None:
        """Attention of random queries equals the oracle."""
        q = self.draw(step.num_rows, self.spec.num_q_heads, self.spec.head_dim).to(dtype)
        out, lse = self.attend(backend, step, q)
        expected, expected_lse = self.dense(step, q)

        assert out.dtype == dtype
        tolerance = TOLERANCE[str(dtype).removeprefix("torch.")]
        torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(lse.double(), expected_lse, atol=2e-5, rtol=2e-5)


def counts(step: StripStep) -> list[int]:
    return step.row_starts.diff().tolist()


def split(step: StripStep) -> tuple[Tensor, ...]:
    return step.positions.split(counts(step))


def filled(backend: AttentionKernels, spec: LayerSpec, dtype: str, lengths: list[int], seed: int = 0) -> Cache:
    cache = Cache(spec, dtype, lengths, seed)
    cache.append(backend, StripStep.of_runs([(0, length) for length in lengths]))
    return cache
