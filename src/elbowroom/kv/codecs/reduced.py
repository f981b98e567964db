"""Strips of another codec whose keys have fewer channels, or whose slots stand for several tokens.

Such strips are sealed whole, when a prompt ends or, behind it, when a block is full. Each says by itself how it is to
be read (``kernels.extras``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from elbowroom.core import STRIP_TOKENS, LayerSpec, PageFormat
from elbowroom.errors import PlanError
from elbowroom.kernels.extras import extras_at, key_channels
from elbowroom.kv.codecs.base import Codec

_MOST_CHANNELS = 256


@dataclass(frozen=True, slots=True)
class ReducedCodec:
    """What ``inner`` stores, of the channels and the slots that policies have left.

    Args:
        inner: how numbers become bytes.
        share: of the channels of a key, those that are kept; None: all.
        counts: whether slots stand for several tokens.
    """

    inner: Codec
    share: float | None = None
    counts: bool = False
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
        fmt = self.inner.page_format(replace(layer, head_dim=width), dtype)
        channels = width if self.share is not None else 0
        extra = layer.num_kv_heads * (channels + STRIP_TOKENS * self.counts)
        return replace(
            fmt,
            head_dim=layer.head_dim,
            key_channels=channels,
            counts=self.counts,
            sealed=True,
            overhead_bytes=fmt.overhead_bytes + extra,
        )

    def store(self, strip: Tensor, fmt: PageFormat, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Seal a strip, in which its channels have been written before."""
        if fmt.key_channels:
            index = key_channels(strip, fmt).long()[:, None].expand(-1, k.shape[1], -1)
            k = k.gather(2, index)
        self.inner.store(strip, inner_format(fmt), slots, k, v)

    def open(self, strip: Tensor, fmt: PageFormat) -> tuple[Tensor, Tensor]:
        """Return keys and values; channels that were dropped are 0."""
        k, v = self.inner.open(strip, inner_format(fmt))
        if not fmt.key_channels:
            return k, v
        wide = torch.zeros(*k.shape[:2], fmt.head_dim, dtype=k.dtype)
        index = key_channels(strip, fmt).long()[:, None].expand(-1, k.shape[1], -1)
        return wide.scatter_(2, index, k), v

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
        key_channels=0,
        counts=False,
        overhead_bytes=extras_at(fmt) - fmt.payload_bytes,
    )
