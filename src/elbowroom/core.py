"""The vocabulary that every room shares: layer shapes, RoPE descriptions, KV page formats.

Plain frozen dataclasses; no tensors, no I/O, no other room is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RopeKind = Literal["default", "linear", "llama3", "yarn"]

STRIP_TOKENS = 64
"""Tokens in a layer strip, the unit in which the KV cache is stored, shared and freed."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of one element for each dtype that a model or a plain KV cache may use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding of one layer (half-split pairing), with its context extension.

    ``kind`` chooses the frequency rule: ``default``; ``linear`` (positions divided by ``factor``); ``llama3``
    (frequency bands by ``low_freq_factor``/``high_freq_factor``); ``yarn`` (arXiv 2309.00071).
    """

    theta: float = 10_000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_positions: int = 0
    """Context length that the frequencies were trained for (llama3, yarn), in tokens."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    """Multiplies cos and sin (yarn); None means the value that yarn derives from ``factor``."""
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    """Whether yarn rounds its correction range to whole dimensions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """Attention shape of one decoder layer: all that a KV store, a kernel or a planner needs to know."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    """Width of one query or key head; values have ``v_head_dim``."""
    v_head_dim: int
    scale: float
    """Factor on q.k before the softmax."""
    rope: RopeSpec | None
    window: int | None = None
    """Sliding window in tokens (a query reads itself and the ``window - 1`` tokens before); None reads everything."""
    softcap: float | None = None
    """Scores become ``softcap * tanh(score / softcap)`` when set."""
    kv_source: int | None = None
    """Layer whose keys and values this one reads (cross-layer sharing); None means its own."""

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.num_q_heads // self.num_kv_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class PageFormat:
    """Byte layout of one layer strip: ``num_slots`` tokens of all KV heads of one layer, contiguous.

    The plain layout is K as ``[num_kv_heads, num_slots, head_dim]`` followed by V as
    ``[num_kv_heads, num_slots, v_head_dim]``, both in ``dtype``. Other codecs describe theirs in kv/codecs.
    """

    codec: str
    dtype: str
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    num_slots: int = STRIP_TOKENS
    overhead_bytes: int = 0
    """Bytes for scales and metadata behind the payload."""
    payload_bytes: int = 0
    """Bytes of encoded K and V."""
    key_bits: int = 0
    """Bits of one element of a key; 0 in plain strips, where the dtype says it."""
    value_bits: int = 0
    block: int = 0
    """Elements that share a scale; 0: all of a head."""
    key_channels: int = 0
    """Channels of a key that are stored, where a policy has dropped some (``kv.codecs.reduced``); 0: all."""
    kept_heads: int = 0
    """KV heads that are stored, where a policy has dropped some; 0: all."""
    counts: bool = False
    """Whether a slot may stand for several tokens, which the strip counts."""
    sealed: bool = False
    """Whether a strip is encoded whole, once it is full, so that new tokens need a plain one beside it."""
    digest_bytes: int = 0
    """Bytes of bounds on the keys behind all that (``kernels.digest``); 0: there are none."""

    @property
    def stored_heads(self) -> int:
        """KV heads that a strip holds."""
        return self.kept_heads or self.num_kv_heads

    @property
    def strip_bytes(self) -> int:
        """Bytes of one strip, rounded up to the 64-byte unit of the strip tables."""
        raw = self.payload_bytes + self.overhead_bytes + self.digest_bytes
        return -(-raw // 64) * 64
