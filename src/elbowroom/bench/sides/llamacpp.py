"""llama.cpp as a side, through the C interface that llama-cpp-python wraps: greedy, all sequences in one batch."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

_BATCH_TOKENS = 512
_PAD_TOKENS = 256
"""llama.cpp rounds the context of a sequence up to this."""


class Side:
    """Commands on one loaded model."""

    def __init__(self, lib: Any, model: Any, num_streams: int, stream_tokens: int, num_threads: int) -> None:
        self._lib = lib
        self._vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        settings = lib.llama_context_default_params()
        settings.n_ctx = num_streams * -(-stream_tokens // _PAD_TOKENS) * _PAD_TOKENS
        settings.n_batch = settings.n_ubatch = _BATCH_TOKENS
        settings.n_seq_max = num_streams
        settings.n_threads = settings.n_threads_batch = num_threads
        self._context = lib.llama_init_from_model(model, settings)
        if not self._context:
            raise RuntimeError("llama.cpp refused the context")
        self._last: list[int] = []
        self._lengths: list[int] = []
        """Tokens of each held prompt."""
        self._batch = lib.llama_batch_init(_BATCH_TOKENS, 0, 1)

    def read(self, prompts: list[list[int]]) -> dict[str, Any]:
        """Read one prompt a sequence and hold their cache."""
        self._last = self._read(prompts)
        self._lengths = [len(prompt) for prompt in prompts]
        return {}

    def fill(self, num_tokens: int, num_streams: int, seed: int) -> dict[str, Any]:
        """Hold a cache of ``num_tokens`` for each stream: of random prompts, since reading is all there is."""
        rng = np.random.default_rng(seed)
        return self.read(rng.integers(self._vocab_size, size=(num_streams, num_tokens)).tolist())

    def extend(self, new_tokens: int) -> dict[str, Any]:
        """Decode behind the held cache and time the tokens behind the first of each sequence; then rewind."""
        last = self._next(self._last, 0)
        made = [last]
        started = time.perf_counter()
        for number in range(1, new_tokens):
            last = self._next(last, number)
            made.append(last)
        seconds = time.perf_counter() - started
        memory = self._lib.llama_get_memory(self._context)
        for seq, length in enumerate(self._lengths):
            self._lib.llama_memory_seq_rm(memory, seq, length, -1)
        token_ids = [list(stream) for stream in zip(*made, strict=True)]
        return {"tokens": len(token_ids) * (new_tokens - 1), "seconds": seconds, "token_ids": token_ids}

    def prefill(self, prompt: list[int]) -> dict[str, Any]:
        """Read a prompt and choose one token."""
        started = time.perf_counter()
        self._read([prompt])
        return {"tokens": len(prompt), "seconds": time.perf_counter() - started}

    def score(self, prompt: list[int], ids: list[int]) -> dict[str, Any]:
        """Return the log-probabilities of ``ids`` behind ``prompt``."""
        logits = self._prompt_logits(0, prompt).astype(np.float64)
        highest = logits.max()
        normaliser = highest + np.log(np.exp(logits - highest).sum())
        return {"logprobs": (logits[ids] - normaliser).tolist()}

    def about(self) -> dict[str, Any]:
        """Return the version and which instruction sets the library was built for."""
        return {"version": self._lib.__version__, "system": self._lib.llama_print_system_info().decode().strip()}

    def _next(self, last: list[int], number: int) -> list[int]:
        """Compute the ``number``-th token behind each prompt and return the most likely ones behind it."""
        rows = [(token, self._lengths[seq] + number, seq, True) for seq, token in enumerate(last)]
        chosen: list[int] = self._step(rows).argmax(-1).tolist()
        return chosen

    def _read(self, prompts: list[list[int]]) -> list[int]:
        """Empty the cache, read all prompts and return the most likely token behind each."""
        return [int(self._prompt_logits(seq, prompt).argmax()) for seq, prompt in enumerate(prompts)]

    def _prompt_logits(self, seq: int, prompt: list[int]) -> npt.NDArray[np.float32]:
        """Return a copy of the logits ``[V]`` behind ``prompt``; the first sequence clears what was read before."""
        if seq == 0:
            self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), False)
        last = len(prompt) - 1
        logits = np.empty((1, 0), dtype=np.float32)
        for start in range(0, len(prompt), _BATCH_TOKENS):
            piece = prompt[start : start + _BATCH_TOKENS]
            logits = self._step([(token, at, seq, at == last) for at, token in enumerate(piece, start)])
        return logits.reshape(-1)

    def _step(self, rows: list[tuple[int, int, int, bool]]) -> npt.NDArray[np.float32]:
        """Compute rows of (token, position, sequence, logits wanted); return a copy of the logits ``[wanted, V]``."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for row, (token, position, seq, wanted) in enumerate(rows):
            batch.token[row], batch.pos[row], batch.logits[row] = token, position, wanted
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, seq
        code = self._lib.llama_decode(self._context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code}")
        shape = (sum(row[3] for row in rows), self._vocab_size)
        if shape[0] == 0:
            return np.empty(shape, dtype=np.float32)
        logits: npt.NDArray[np.float32] = np.ctypeslib.as_array(self._lib.llama_get_logits(self._context), shape)
        return logits.copy()  # the next step overwrites them


def load(file: str, num_streams: int, stream_tokens: int, num_threads: int) -> dict[str, Callable[..., dict[str, Any]]]:
    """Load a GGUF file for ``num_streams`` sequences of up to ``stream_tokens`` tokens."""
    lib: Any = importlib.import_module("llama_cpp")
    lib.llama_backend_init()
    settings = lib.llama_model_default_params()
    settings.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(file.encode(), settings)
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {file}")
    side = Side(lib, model, num_streams, stream_tokens, num_threads)
    return {
        "read": side.read,
        "fill": side.fill,
        "extend": side.extend,
        "prefill": side.prefill,
        "score": side.score,
        "about": side.about,
    }
