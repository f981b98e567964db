"""OrderedCodec: the channels of keys in an order of their own, so that those of like magnitude share blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from torch import Tensor

from elbowroom.core import LayerSpec, PageFormat
from elbowroom.errors import PlanError
from elbowroom.kv.calibration import Calibration
from elbowroom.kv.codecs.base import Codec, TokenCodec

Order: TypeAlias = tuple[tuple[int, ...], ...]
"""Channels of each KV head in the order in which they lie."""


@dataclass(frozen=True, slots=True, eq=False)
class OrderedCodec:
    """Another codec behind a permutation of the channels of keys.

    Keys are permuted behind RoPE, where they enter the cache, and so are queries: ``q . k`` stays what it was, for any
    RoPE and without a change to weights (K-sort of Trukhanov and Soloveychik, arXiv 2403.20137, who fold it into
    weights). Values stay as they are; who opens a strip gets channels in their own order.
    """

    codec: TokenCodec
    order: Tensor
    """int16 ``[Hkv, Dk]``."""

    @property
    def name(self) -> str:
        """Name of the codec."""
        return self.codec.name

    @property
    def lossless(self) -> bool:
        """Whether the codec is."""
        return self.codec.lossless

    @property
    def seals(self) -> bool:
        """Whether the codec does."""
        return self.codec.seals

    @property
    def sorts(self) -> bool:
        """Return True."""
        return True

    def page_format(self, layer: LayerSpec, dtype: str) -> PageFormat:
        """Return the format of the codec."""
        return self.codec.page_format(layer, dtype)

    def fields(self, strip: Tensor, fmt: PageFormat) -> tuple[Tensor, ...]:
        """Return the bytes of the codec."""
        return self.codec.fields(strip, fmt)

    def store(self, strip: Tensor, fmt: PageFormat, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Encode rows with the channels of keys in their order."""
        self.codec.store(strip, fmt, slots, k.gather(2, self._places(k)), v)

    def open(self, strip: Tensor, fmt: PageFormat) -> tuple[Tensor, Tensor]:
        """Return keys, with their channels where the model has them, and values."""
        k, v = self.codec.open(strip, fmt)
        return torch.empty_like(k).scatter_(2, self._places(k), k), v

    def bounds(self, strip: Tensor, fmt: PageFormat) -> tuple[Tensor, Tensor]:
        """Return the bounds of the codec, which are of channels where the model has them."""
        return self.codec.bounds(strip, fmt)

    def _places(self, k: Tensor) -> Tensor:
        return self.order.long()[:, None].expand_as(k)


def channel_orders(codec: Codec, layers: Sequence[LayerSpec], calibration: Calibration | None) -> tuple[Order, ...]:
    """Return the order of the channels in each layer, largest first; empty where ``codec`` does not sort.

    Raises:
        PlanError: it sorts, and nobody measured the channels of these layers.
    """
    if not codec.sorts:
        return ()
    if calibration is None:
        raise PlanError(
            f"codec {codec.name!r} cannot sort channels of keys whose magnitudes nobody measured",
            "run `elbowroom calibrate MODEL` first, or leave out sort=on",
        )
    calibration.check(layers)
    return tuple(tuple(map(_descending, heads)) for heads in calibration.key_rms)


def in_order(codec: Codec, orders: Sequence[Order], layer: int) -> Codec:
    """Return ``codec`` for ``layer``, behind its order where there are orders."""
    if not orders:
        return codec
    return OrderedCodec(cast("TokenCodec", codec), torch.tensor(orders[layer], dtype=torch.int16))


def _descending(head: Sequence[float]) -> tuple[int, ...]:
    return tuple(sorted(range(len(head)), key=lambda channel: -head[channel]))
