"""ComputePath: which passes run native and which on torch, and the model that follows it.

A pass of few tokens is bound by the bytes of the weights, and native code reads them once. A pass of many tokens is
bound by arithmetic; there torch may win where the processor has matrix units that our kernels do not use, so the
crossover is measured once a process.
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
_WIDTH = 768
_REPEATS = 3
_MARGIN = 1.15
"""Torch must be so much faster: two pools of threads and a second set of buffers cost something too."""


@dataclass(frozen=True, slots=True)
class ComputePath:
    """Passes of at most ``native_tokens`` tokens run native, longer ones on torch."""

    native_tokens: int

    @classmethod
    def choose(cls, dtype: torch.dtype) -> ComputePath:
        """Return the path for weights of ``dtype`` on this machine."""
        return cls(_native_tokens(dtype) if backend_name() == "native" else 0)

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
def _native_tokens(dtype: torch.dtype) -> int:
    if dtype is not torch.float32 and not _has_fast_half(dtype):
        return ANY  # torch emulates the products of this dtype here
    for num_tokens in _CANDIDATES:
        if _native_seconds(dtype, num_tokens) > _MARGIN * _torch_seconds(dtype, num_tokens):
            return num_tokens - 1
    return ANY


def _has_fast_half(dtype: torch.dtype) -> bool:
    """Return whether the processor multiplies matrices of a 16-bit dtype in hardware."""
    capabilities = torch.cpu.get_capabilities()
    names = ("avx512_bf16", "amx_bf16") if dtype is torch.bfloat16 else ("avx512_fp16", "amx_fp16")
    return any(capabilities.get(name, False) for name in names)


def _native_seconds(dtype: torch.dtype, num_tokens: int) -> float:
    from elbowroom.kernels.native import multiply

    weight = torch.ones(_WIDTH, _WIDTH, dtype=dtype)
    x = torch.ones(num_tokens, _WIDTH, dtype=torch.float32)
    return _best(lambda: multiply(x, weight))


def _torch_seconds(dtype: torch.dtype, num_tokens: int) -> float:
    weight, x = torch.ones(_WIDTH, _WIDTH, dtype=dtype), torch.ones(num_tokens, _WIDTH, dtype=dtype)
    return _best(lambda: torch.nn.functional.linear(x, weight))


def _best(work: Callable[[], object]) -> float:
    work()
    best = float("inf")
    for _ in range(_REPEATS):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best
