"""Strips of another codec with fewer KV heads or channels of keys, or whose slots stand for several tokens.

Such strips are sealed whole, when a prompt ends or, behind it, when a block is full. Each says by itself how it is to
be read (``kernels.extras``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from elbowroom.core import LayerSpec, PageFormat
from elbowroom.errors import PlanError
from elbowroom.kernels.extras import all_heads, extra_bytes, kept_heads, key_channels
from elbowroom.kv.codecs.base import Codec

_MOST_CHANNELS = 256
_MOST_HEADS = 127


@dataclass(frozen=True, slots=True)
class ReducedCodec:
    """What ``inner`` stores, of the KV heads, the channels and the slots that policies have left.

    Args:
        inner: how numbers become bytes.
        share: of the channels of a key, those that are kept; None: all.
        counts: whether slots stand for several tokens.
        heads: KV heads that are kept; None: all.
    """

    inner: Codec
    share: float | None = None
    counts: bool = False
    heads: int | None = None
    lossless: ClassVar[bool] = False
    sorts: ClassVar[bool] = False
    order: ClassVar[None] = None
    seals: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """Name of the codec whose bytes these are."""
        return self.inner.name

    def width(self, head_dim: int) -> int:
        """Return the channels that a key keeps: a multiple of 8, at least 8."""
        if self.share is None:
            return head_dim
        return max(min(round(head_dim * self.share / 8) * 8, head_dim), min(8, head_dim))

    def page_format(self, layer: LayerSpec, dtype: str) -> PageFormat:
        """Return the layout of a strip.

        Raises:
            PlanError: the inner codec cannot store what is left of the layer's keys.
        """
        width = self.width(layer.head_dim)
        if self.share is not None and layer.head_dim > _MOST_CHANNELS:
            raise PlanError(
                f"channels of keys can be dropped of heads up to {_MOST_CHANNELS} wide, not {layer.head_dim}",
                "leave think out of the plan",
            )
        if self.heads is not None and layer.num_kv_heads > _MOST_HEADS:
            raise PlanError(
                f"KV heads can be dropped of layers that have up to {_MOST_HEADS}, not {layer.num_kv_heads}",
                "leave heads out of the plan",
            )
        kept = self.heads or layer.num_kv_heads
        fmt = self.inner.page_format(replace(layer, head_dim=width, num_kv_heads=kept), dtype)
        made = replace(
            fmt,
            head_dim=layer.head_dim,
            num_kv_heads=layer.num_kv_heads,
            key_channels=width if self.share is not None else 0,
            kept_heads=kept if kept < layer.num_kv_heads else 0,
            counts=self.counts,
            sealed=True,
        )
        return replace(made, overhead_bytes=fmt.overhead_bytes + extra_bytes(made))

    def store(self, strip: Tensor, fmt: PageFormat, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Seal a strip, in which its KV heads and channels have been written before."""
        if fmt.kept_heads:
            heads = kept_heads(strip, fmt).long()
            k, v = k[heads], v[heads]
        if fmt.key_channels:
            index = key_channels(strip, fmt).long()[:, None].expand(-1, k.shape[1], -1)
            k = k.gather(2, index)
        self.inner.store(strip, inner_format(fmt), slots, k, v)

    def open(self, strip: Tensor, fmt: PageFormat) -> tuple[Tensor, Tensor]:
        """Return keys and values; KV heads and channels that were dropped are 0."""
        k, v = self.inner.open(strip, inner_format(fmt))
        if fmt.key_channels:
            wide = torch.zeros(*k.shape[:2], fmt.head_dim, dtype=k.dtype)
            index = key_channels(strip, fmt).long()[:, None].expand(-1, k.shape[1], -1)
            k = wide.scatter_(2, index, k)
        return all_heads(strip, fmt, k), all_heads(strip, fmt, v)

    def bounds(self, strip: Tensor, fmt: PageFormat) -> tuple[Tensor, Tensor]:
        """Return the least and the greatest of each channel in the strip, as one run."""
        keys = self.open(strip, fmt)[0].float()
        return keys.amin(1, keepdim=True), keys.amax(1, keepdim=True)


def inner_format(fmt: PageFormat) -> PageFormat:
    """Return the format that the inner codec knows."""
    width = fmt.key_channels or fmt.head_dim
    return replace(
        fmt,
        head_dim=width,
        num_kv_heads=fmt.stored_heads,
        key_channels=0,
        kept_heads=0,
        counts=False,
        overhead_bytes=fmt.overhead_bytes - extra_bytes(fmt),
    )
