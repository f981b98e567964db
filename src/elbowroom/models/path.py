"""ComputePath: which passes run native and which on torch, and the model that follows it.

A pass of few tokens is bound by the bytes of the weights, and native code reads them once. A pass of many tokens is
bound by arithmetic; there torch may win where the processor has matrix units that our kernels do not use, so the
crossover is measured once a process, for models of one width. What is timed are the products of a layer and, on torch,
the small operations between them, which native code has in one piece: for narrow models they decide.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from elbowroom.kernels import backend_name
from elbowroom.models.base import AttentionContext, Scratch, StepModel
from elbowroom.models.config import ModelConfig
from elbowroom.models.decoder import Decoder

ANY = 2**62
"""More tokens than a pass can have."""
_CANDIDATES = (16, 32, 64, 128, 256)
_MOST_WIDTH = 768
_PRODUCTS = 7
"""Of a layer: queries, keys, values, what attention gives, and three of the feed-forward network."""
_REPEATS = 5
_MARGIN = 1.15
"""Torch must be so much faster: two pools of threads and a second set of buffers cost something too."""


@dataclass(frozen=True, slots=True)
class ComputePath:
    """Passes of at most ``native_tokens`` tokens run native, longer ones on torch."""

    native_tokens: int

    @classmethod
    def choose(cls, dtype: torch.dtype, hidden_size: int) -> ComputePath:
        """Return the path for weights of ``dtype`` and a model of this width, on this machine."""
        return cls(_native_tokens(dtype, min(hidden_size, _MOST_WIDTH)) if backend_name() == "native" else 0)

    def model(self, decoder: Decoder) -> StepModel:
        """Return what runs the passes of ``decoder``."""
        if self.native_tokens == 0:
            return decoder
        from elbowroom.models.native import NativeDecoder

        native = NativeDecoder.of(decoder)
        if native is None or self.native_tokens >= ANY:
            return native or decoder
        return _Both(native, decoder, self.native_tokens)


class _Both:
    """Sends each pass to one of two equal models."""

    def __init__(self, native: StepModel, decoder: Decoder, native_tokens: int) -> None:
        self._native, self._decoder, self._native_tokens = native, decoder, native_tokens

    @property
    def config(self) -> ModelConfig:
        return self._decoder.config

    def runs_on_torch(self, num_tokens: int) -> bool:
        return num_tokens > self._native_tokens

    def step(self, tokens: Tensor, context: AttentionContext, rows: Tensor, scratch: Scratch) -> Tensor:
        return self._of(tokens.numel()).step(tokens, context, rows, scratch)

    def _of(self, num_tokens: int) -> StepModel:
        return self._native if num_tokens <= self._native_tokens else self._decoder


@functools.cache
def _native_tokens(dtype: torch.dtype, width: int) -> int:
    """Return the most tokens of a native pass: torch wins at the next longer one that is timed, and at all longer."""
    if dtype is not torch.float32 and not _has_fast_half(dtype):
        return ANY  # torch emulates the products of this dtype here
    most = ANY
    for num_tokens in reversed(_CANDIDATES):
        if _native_seconds(dtype, width, num_tokens) <= _MARGIN * _torch_seconds(dtype, width, num_tokens):
            break
        most = num_tokens - 1
    return most


def _has_fast_half(dtype: torch.dtype) -> bool:
    """Return whether the processor multiplies matrices of a 16-bit dtype in hardware."""
    capabilities = torch.cpu.get_capabilities()
    names = ("avx512_bf16", "amx_bf16") if dtype is torch.bfloat16 else ("avx512_fp16", "amx_fp16")
    return any(capabilities.get(name, False) for name in names)


def _native_seconds(dtype: torch.dtype, width: int, num_tokens: int) -> float:
    from elbowroom.kernels.native import multiply

    weight, x = torch.ones(width, width, dtype=dtype), torch.ones(num_tokens, width, dtype=torch.float32)
    return _best(lambda: [multiply(x, weight) for _ in range(_PRODUCTS)])


def _torch_seconds(dtype: torch.dtype, width: int, num_tokens: int) -> float:
    linear, norm = torch.nn.functional.linear, torch.nn.functional.rms_norm
    weight, x = torch.ones(width, width, dtype=dtype), torch.ones(num_tokens, width, dtype=dtype)
    scale = torch.ones(width, dtype=dtype)

    def layer() -> object:
        normed = norm(x, (width,), scale)
        q, k, v = (linear(normed, weight) for _ in range(3))
        rotated = [torch.cat((-half, half), dim=1) for half in (q[:, : width // 2], k[:, : width // 2])]
        normed = norm(x + linear(v, weight), (width,), scale)
        gated = torch.nn.functional.silu(linear(normed, weight)).mul_(linear(normed, weight))
        return rotated, x + linear(gated, weight)

    return _best(layer)


def _best(work: Callable[[], object]) -> float:
    work()
    best = float("inf")
    for _ in range(_REPEATS):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best
