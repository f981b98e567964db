"""transformers as a side: greedy decoding over one of its caches, without what ``generate`` adds around it."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ENOUGH_S = 40.0
"""Emulated bfloat16 takes minutes for what others do in seconds."""


class Side:
    """Commands on one loaded model.

    Args:
        transformers: the package.
        model: a causal language model.
        cache_bits: of a QuantizedCache (quanto); None takes a DynamicCache.
    """

    def __init__(self, transformers: Any, model: Any, cache_bits: int | None) -> None:
        self._transformers, self._model, self._cache_bits = transformers, model, cache_bits
        self._held: Any = None
        self._last = torch.zeros(0, dtype=torch.int64)

    @torch.inference_mode()
    def read(self, prompts: list[list[int]]) -> dict[str, Any]:
        """Read prompts of equal length in one batch and hold their cache."""
        self._held = self._cache()
        self._last = self._next(torch.tensor(prompts), self._held)
        return {}

    @torch.inference_mode()
    def prefill(self, prompt: list[int]) -> dict[str, Any]:
        """Read a prompt and choose one token."""
        started = time.perf_counter()
        self._next(torch.tensor([prompt]), self._cache()).tolist()
        return {"tokens": len(prompt), "seconds": time.perf_counter() - started}

    @torch.inference_mode()
    def score(self, prompt: list[int], ids: list[int]) -> dict[str, Any]:
        """Return the log-probabilities of ``ids`` behind ``prompt``."""
        logits = self._model(torch.tensor([prompt]), use_cache=False, logits_to_keep=1).logits[0, -1].float()
        return {"logprobs": logits.log_softmax(-1)[ids].tolist()}

    @torch.inference_mode()
    def fill(self, num_tokens: int, num_streams: int, seed: int) -> dict[str, Any]:
        """Hold a cache of ``num_tokens`` for each stream, with random keys and values."""
        self._held = None  # the old one goes before the new one comes
        self._held, self._last = self._cache(), torch.ones(num_streams, dtype=torch.int64)
        config, generator = self._model.config, torch.Generator().manual_seed(seed)
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (num_streams, config.num_key_value_heads, num_tokens, width)
        for layer in range(config.num_hidden_layers):
            k, v = (torch.empty(shape, dtype=self._model.dtype).normal_(generator=generator) for _ in range(2))
            self._held.update(k, v, layer)
        return {}

    @torch.inference_mode()
    def extend(self, new_tokens: int) -> dict[str, Any]:
        """Decode behind the held cache and time the tokens behind the first of each stream; then rewind.

        Ends early after ``ENOUGH_S``: a rate is known by then. A quantized cache cannot rewind and keeps the tokens.
        """
        token = self._next(self._last[:, None], self._held)
        made = [token.tolist()]
        started = time.perf_counter()
        while len(made) < new_tokens and time.perf_counter() - started < ENOUGH_S:
            token = self._next(token[:, None], self._held)
            made.append(token.tolist())  # a user sees each token, so it leaves torch
        seconds = time.perf_counter() - started
        if self._cache_bits is None:
            self._held.crop(-len(made))
        token_ids = [list(stream) for stream in zip(*made, strict=True)]
        return {"tokens": len(token_ids) * (len(made) - 1), "seconds": seconds, "token_ids": token_ids}

    def _cache(self) -> Any:
        if self._cache_bits is not None:
            return self._transformers.QuantizedCache("quanto", self._model.config, nbits=self._cache_bits)
        return self._transformers.DynamicCache(config=self._model.config)

    def _next(self, ids: Tensor, cache: Any) -> Tensor:
        """Return the most likely token ``[B]`` behind ``ids [B, T]``."""
        logits = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        chosen: Tensor = logits[:, -1].argmax(-1)
        return chosen


def load(
    directory: str, dtype: str, num_threads: int, cache_bits: int | None = None
) -> dict[str, Callable[..., dict[str, Any]]]:
    """Load a model directory in ``dtype``, with torch's own attention."""
    transformers: Any = importlib.import_module("transformers")
    if cache_bits is not None:
        try:
            importlib.import_module("optimum.quanto")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(str(error), name="optimum-quanto") from error
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(num_threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    )
    side = Side(transformers, model.eval(), cache_bits)
    return {
        "read": side.read,
        "prefill": side.prefill,
        "score": side.score,
        "fill": side.fill,
        "extend": side.extend,
        "about": lambda: {"version": transformers.__version__},
    }
