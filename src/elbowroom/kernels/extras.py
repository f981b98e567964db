"""What strips say about themselves behind their codes: the channels of their keys, and the tokens of their slots.

Both lie behind payload and scales, where the format has them: the channels that the keys of each KV head have kept,
uint8 ``[Hkv, key_channels]``, ascending; then how many tokens each slot stands for, uint8 ``[Hkv, 64]``.
"""

from __future__ import annotations

from torch import Tensor

from elbowroom.core import STRIP_TOKENS, PageFormat


def extras_at(fmt: PageFormat) -> int:
    """Return the byte of a strip at which they begin."""
    extra = fmt.num_kv_heads * (fmt.key_channels + STRIP_TOKENS * fmt.counts)
    return fmt.payload_bytes + fmt.overhead_bytes - extra


def key_channels(strip: Tensor, fmt: PageFormat) -> Tensor:
    """Return a view uint8 ``[Hkv, key_channels]`` of the channels that the keys of a strip have."""
    start = extras_at(fmt)
    return strip[start : start + fmt.num_kv_heads * fmt.key_channels].view(fmt.num_kv_heads, fmt.key_channels)


def slot_tokens(strip: Tensor, fmt: PageFormat) -> Tensor:
    """Return a view uint8 ``[Hkv, 64]``: how many tokens each slot of a strip stands for."""
    start = extras_at(fmt) + fmt.num_kv_heads * fmt.key_channels
    return strip[start : start + fmt.num_kv_heads * STRIP_TOKENS].view(fmt.num_kv_heads, STRIP_TOKENS)


def slot_bias(strip: Tensor, fmt: PageFormat) -> Tensor | None:
    """Return what is added to the scores of each slot, float32 ``[Hkv, 64]``: the log of its tokens; None: nothing."""
    return slot_tokens(strip, fmt).float().log() if fmt.counts else None
