"""Bits per byte on held-out Python text: how well a model predicts, independent of its tokenizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from elbowroom.evals.base import TextTokenizer
from elbowroom.evals.heldout import heldout_texts

LogProbs = Callable[[list[int]], Sequence[float]]
"""Takes token ids ``[T]``, returns the natural log probability of tokens 1 .. T-1 given all before, ``[T - 1]``."""


@dataclass(frozen=True, slots=True)
class BitsPerByte:
    """Result of one pass over the text."""

    bits_per_byte: float
    num_bytes: int
    num_tokens: int
    """Predicted tokens; the first of every window is given."""


def bits_per_byte(
    log_probs: LogProbs,
    tokenizer: TextTokenizer,
    window_tokens: int = 1024,
    num_windows: int = 100,
    texts: Sequence[str] | None = None,
) -> BitsPerByte:
    """Return the mean bits per byte over windows spread evenly through the text.

    Args:
        log_probs: the model.
        tokenizer: its tokenizer.
        window_tokens: tokens of a window, each read without what stands before it.
        num_windows: at most this many windows.
        texts: documents; the held-out standard library files by default.
    """
    nats, num_bytes, num_tokens = 0.0, 0, 0
    for window in text_windows(tokenizer, window_tokens, num_windows, texts):
        nats -= math.fsum(log_probs(window))
        num_bytes += len(tokenizer.decode(window[1:]).encode("utf-8"))
        num_tokens += len(window) - 1
    return BitsPerByte(nats / math.log(2) / max(1, num_bytes), num_bytes, num_tokens)


def text_windows(
    tokenizer: TextTokenizer, window_tokens: int, num_windows: int, texts: Sequence[str] | None = None
) -> Iterator[list[int]]:
    """Yield the tokens of windows spread evenly through the text; the arguments are those of ``bits_per_byte``."""
    tokens = tokenizer.encode("".join(heldout_texts() if texts is None else texts))
    starts = range(0, max(1, len(tokens) - window_tokens + 1), window_tokens)
    stride = max(1, len(starts) // num_windows)
    for start in starts[::stride][:num_windows]:
        yield tokens[start : start + window_tokens]
