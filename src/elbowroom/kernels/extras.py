"""What strips say about themselves behind their codes: channels of keys, tokens of slots, and the KV heads they hold.

All lie behind payload and scales, where the format has them, for each KV head that is stored (``Hs``): the channels
that its keys have kept, uint8 ``[Hs, key_channels]``, ascending; how many tokens each slot stands for, uint8
``[Hs, 64]``; and, where a policy has dropped KV heads, which one of the layer it is, uint8 ``[Hs]``, ascending.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from elbowroom.core import STRIP_TOKENS, PageFormat
from elbowroom.errors import IntegrityError


def extras_at(fmt: PageFormat) -> int:
    """Return the byte of a strip at which they begin."""
    return fmt.payload_bytes + fmt.overhead_bytes - extra_bytes(fmt)


def extra_bytes(fmt: PageFormat) -> int:
    """Return the bytes that they take."""
    return fmt.stored_heads * (fmt.key_channels + STRIP_TOKENS * fmt.counts) + fmt.kept_heads


def counts_at(fmt: PageFormat) -> int:
    """Return the byte of a strip at which the tokens of its slots begin."""
    return extras_at(fmt) + fmt.stored_heads * fmt.key_channels


def heads_at(fmt: PageFormat) -> int:
    """Return the byte of a strip at which its KV heads begin."""
    return counts_at(fmt) + fmt.stored_heads * STRIP_TOKENS * fmt.counts


def key_channels(strip: Tensor, fmt: PageFormat) -> Tensor:
    """Return a view uint8 ``[Hs, key_channels]`` of the channels that the keys of a strip have."""
    return strip[extras_at(fmt) : counts_at(fmt)].view(fmt.stored_heads, fmt.key_channels)


def slot_tokens(strip: Tensor, fmt: PageFormat) -> Tensor:
    """Return a view uint8 ``[Hs, 64]``: how many tokens each slot of a strip stands for."""
    return strip[counts_at(fmt) : heads_at(fmt)].view(fmt.stored_heads, STRIP_TOKENS)


def kept_heads(strip: Tensor, fmt: PageFormat) -> Tensor:
    """Return a view uint8 ``[Hs]`` of the KV heads that a strip of a format with ``kept_heads`` holds."""
    return strip[heads_at(fmt) : heads_at(fmt) + fmt.kept_heads]


def slot_bias(strip: Tensor, fmt: PageFormat) -> Tensor | None:
    """Return what is added to the scores of each slot, float32 ``[Hkv, 64]``: the log of its tokens; None: nothing."""
    if not fmt.counts:
        return None
    return all_heads(strip, fmt, slot_tokens(strip, fmt).float().log())


def all_heads(strip: Tensor, fmt: PageFormat, rows: Tensor) -> Tensor:
    """Return ``rows [Hs, ...]`` of a strip as ``[Hkv, ...]``, 0 for KV heads that it does not hold."""
    if not fmt.kept_heads:
        return rows
    wide = torch.zeros(fmt.num_kv_heads, *rows.shape[1:], dtype=rows.dtype)
    wide[kept_heads(strip, fmt).long()] = rows
    return wide


def check_extras(strip: npt.NDArray[np.uint8], fmt: PageFormat) -> None:
    """Refuse the bytes of a strip that name channels or KV heads out of order, or slots that stand for no token.

    Raises:
        IntegrityError: it was not written by a store.
    """
    start, middle, end = extras_at(fmt), counts_at(fmt), heads_at(fmt)
    if fmt.key_channels:
        channels = strip[start:middle].reshape(fmt.stored_heads, -1).astype(np.int64)
        if (np.diff(channels, axis=1) < 1).any() or channels.max() >= fmt.head_dim:
            raise IntegrityError(f"a strip names channels that keys of {fmt.head_dim} do not have")
    if fmt.counts and strip[middle:end].min() < 1:
        raise IntegrityError("a strip has slots that stand for no token")
    heads = strip[end : end + fmt.kept_heads].astype(np.int64)
    if fmt.kept_heads and ((np.diff(heads) < 1).any() or heads.max() >= fmt.num_kv_heads):
        raise IntegrityError(f"a strip names KV heads that a layer of {fmt.num_kv_heads} does not have")
