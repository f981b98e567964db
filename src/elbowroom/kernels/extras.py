"""What strips say about themselves behind their codes: the channels of their keys, and the tokens of their slots.

Both lie behind payload and scales, where the format has them: the channels that the keys of each KV head have kept,
uint8 ``[Hkv, key_channels]``, ascending; then how many tokens each slot stands for, uint8 ``[Hkv, 64]``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch import Tensor

from elbowroom.core import STRIP_TOKENS, PageFormat
from elbowroom.errors import IntegrityError


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


def check_extras(strip: npt.NDArray[np.uint8], fmt: PageFormat) -> None:
    """Refuse the bytes of a strip whose channels do not rise within a key, or whose slots stand for no token.

    Raises:
        IntegrityError: it was not written by a store.
    """
    middle = extras_at(fmt) + fmt.num_kv_heads * fmt.key_channels
    if fmt.key_channels:
        channels = strip[extras_at(fmt) : middle].reshape(fmt.num_kv_heads, -1).astype(np.int64)
        if (np.diff(channels, axis=1) < 1).any() or channels.max() >= fmt.head_dim:
            raise IntegrityError(f"a strip names channels that keys of {fmt.head_dim} do not have")
    if fmt.counts and strip[middle : middle + fmt.num_kv_heads * STRIP_TOKENS].min() < 1:
        raise IntegrityError("a strip has slots that stand for no token")
