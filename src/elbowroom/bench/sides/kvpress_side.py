"""kvpress as a side: what it says that it saves of a cache, and caches that it made, for the parent to weigh.

Runs in an environment of its own (``python -m elbowroom.bench.kvpress_environment DIR``), on a Hugging Face directory.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch

_WINDOW = 32
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _THRESHOLD_BYTES = -1, -3, 2**20
"""Of the C library: two names of settings, and from how many bytes on freed memory goes back."""


class Side:
    """Commands on one model."""

    def __init__(self, kvpress: Any, transformers: Any, model: Any) -> None:
        self._kvpress, self._transformers, self._model = kvpress, transformers, model
        self._caches: list[Any] = []

    @torch.inference_mode()
    def hold(self, press: str, ratio: float, prompts: list[list[int]], keep: bool) -> dict[str, Any]:
        """Prefill each prompt under a press (``none``: without one), and keep the caches or drop them.

        Returns:
            ``reported_ratio``, and ``tensor_bytes``, what the caches' tensors take.
        """
        made = self._press(press, ratio)
        self._caches = [self._prefill(made, prompt) for prompt in prompts]
        held = sum(_tensor_bytes(cache) for cache in self._caches)
        if not keep:
            self._caches = []
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        return {
            "reported_ratio": 0.0 if made is None else float(made.compression_ratio),
            "tensor_bytes": held,
            "version": importlib.metadata.version("kvpress"),
            "transformers": self._transformers.__version__,
        }

    def _press(self, name: str, ratio: float) -> Any:
        kvpress = self._kvpress
        makers: dict[str, Callable[[], Any]] = {
            "none": lambda: None,
            "SnapKVPress": lambda: kvpress.SnapKVPress(compression_ratio=ratio, window_size=_WINDOW),
            "StreamingLLMPress": lambda: kvpress.StreamingLLMPress(compression_ratio=ratio),
            "AdaKVPress": lambda: kvpress.AdaKVPress(kvpress.SnapKVPress(compression_ratio=ratio, window_size=_WINDOW)),
            "ThinKPress": lambda: kvpress.ThinKPress(key_channel_compression_ratio=ratio, window_size=_WINDOW),
        }
        return makers[name]()

    def _prefill(self, press: Any, prompt: list[int]) -> Any:
        cache, tokens = self._transformers.DynamicCache(), torch.tensor([prompt])
        if press is None:
            self._model(tokens, past_key_values=cache, logits_to_keep=1)
        else:
            with press(self._model):
                self._model(tokens, past_key_values=cache, logits_to_keep=1)
        return cache


def _tensor_bytes(cache: Any) -> int:
    return sum(part.untyped_storage().nbytes() for layer in cache.layers for part in (layer.keys, layer.values))


def load(model: str, num_threads: int) -> dict[str, Callable[..., dict[str, Any]]]:
    """Load a model directory; return the command ``hold``."""
    kvpress: Any = importlib.import_module("kvpress")
    transformers: Any = importlib.import_module("transformers")
    torch.set_num_threads(num_threads)
    for name in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
        ctypes.CDLL(None).mallopt(name, _THRESHOLD_BYTES)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    return {"hold": Side(kvpress, transformers, loaded.eval()).hold}
