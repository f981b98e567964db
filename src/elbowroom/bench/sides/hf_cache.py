"""transformers' QuantizedCache as a side: what the process grows by when it holds keys and values, and in a step."""

from __future__ import annotations

import ctypes
import gc
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_WARM_TOKENS = 256
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _THRESHOLD_BYTES = -1, -3, 2**20
"""Of the C library: two names of settings, and from how many bytes on freed memory goes back."""
_STEPS = 2
"""Decode steps that are measured; the second one fills what the cache keeps unquantized."""


class Side:
    """Commands on one shape."""

    def __init__(self, transformers: Any, config: Any, num_bits: int) -> None:
        self._transformers, self._config, self._num_bits = transformers, config, num_bits

    @torch.inference_mode()
    def hold(self, num_tokens: int, num_streams: int, seed: int) -> dict[str, Any]:
        """Hold random tokens; return by how many bytes the process grew: at rest, and at the peak of two steps."""
        generator = torch.Generator().manual_seed(seed)
        self._step(self._filled(_WARM_TOKENS, num_streams, generator), num_streams, generator)
        _trim()
        before = _status_bytes("VmRSS")
        cache = self._filled(num_tokens, num_streams, generator)
        _trim()
        rest = _status_bytes("VmRSS") - before
        peaks = [self._step(cache, num_streams, generator) - before for _ in range(_STEPS)]
        return {"rest": rest, "decode": peaks[0], "flush": peaks[1], "version": self._transformers.__version__}

    def _filled(self, num_tokens: int, num_streams: int, generator: torch.Generator) -> Any:
        """Return a cache of a prompt and of as many tokens behind it as it keeps unquantized, less two steps."""
        cache = self._transformers.QuantizedCache("quanto", self._config, nbits=self._num_bits)
        behind = cache.layers[0].residual_length - _STEPS
        for count in (num_tokens - behind, behind):
            k, v = self._random(count, num_streams, generator), self._random(count, num_streams, generator)
            for layer in range(self._config.num_hidden_layers):
                cache.update(k, v, layer)
        return cache

    def _step(self, cache: Any, num_streams: int, generator: torch.Generator) -> int:
        """Attend from one new token of each stream; return the peak of the process."""
        k, v = self._random(1, num_streams, generator), self._random(1, num_streams, generator)
        q = k.repeat_interleave(self._config.num_attention_heads // self._config.num_key_value_heads, 1)
        Path("/proc/self/clear_refs").write_text("5")
        for layer in range(self._config.num_hidden_layers):
            keys, values = cache.update(k, v, layer)
            functional.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
            del keys, values  # a model does not keep them while the next layer runs
        return _status_bytes("VmHWM")

    def _random(self, num_tokens: int, num_streams: int, generator: torch.Generator) -> Tensor:
        width = self._config.hidden_size // self._config.num_attention_heads
        shape = (num_streams, self._config.num_key_value_heads, num_tokens, width)
        return torch.empty(shape, dtype=torch.bfloat16).normal_(generator=generator)


def load(
    num_layers: int, num_q_heads: int, num_kv_heads: int, head_dim: int, num_bits: int, num_threads: int
) -> dict[str, Callable[..., dict[str, Any]]]:
    """Prepare caches of ``num_bits`` for layers of one shape."""
    transformers: Any = importlib.import_module("transformers")
    try:
        importlib.import_module("optimum.quanto")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(str(error), name="optimum-quanto") from error
    torch.set_num_threads(num_threads)
    _keep_nothing()
    config = transformers.LlamaConfig(
        hidden_size=num_q_heads * head_dim,
        num_hidden_layers=num_layers,
        num_attention_heads=num_q_heads,
        num_key_value_heads=num_kv_heads,
    )
    return {"hold": Side(transformers, config, num_bits).hold}


def _status_bytes(field: str) -> int:
    """Return a field of this process's status, which the system gives in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _trim() -> None:
    """Give free memory back, so that what is resident is held."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _keep_nothing() -> None:
    """Let the C library give freed memory back, as it does in our own processes: its peaks are lower then."""
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES)
    ctypes.CDLL(None).mallopt(_M_TRIM_THRESHOLD, 2 * _THRESHOLD_BYTES)
