"""Codec ``int8``: 8-bit integers with one scale for each head of each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from elbowroom.kv.codecs.rows import RowCodec, RowFormat, as_bytes

_LARGEST = 127


@dataclass(frozen=True, slots=True)
class Int8Rows:
    """``x = scale * code`` with codes -127 .. 127 and a bfloat16 scale, rounded up so that the largest value fits."""

    bits: ClassVar[int] = 8
    block: ClassVar[int] = 0

    def num_bytes(self, width: int) -> tuple[int, ...]:
        """Return the bytes of codes and scale."""
        return width, 2

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Round to the nearest code."""
        least = x.abs().amax(-1, keepdim=True) / _LARGEST
        scale = least.bfloat16()
        scale = torch.where(scale.float() < least, torch.nextafter(scale, torch.full_like(scale, torch.inf)), scale)
        codes = (x / scale.float().masked_fill(scale == 0, 1.0)).round_().clamp_(-_LARGEST, _LARGEST)
        return as_bytes(codes.to(torch.int8)), as_bytes(scale)

    def decode(self, parts: tuple[Tensor, ...]) -> Tensor:
        """Multiply codes with their scale."""
        codes, scale = parts
        return codes.view(torch.int8).float() * scale.view(torch.bfloat16).float()


@dataclass(frozen=True, slots=True)
class Int8Codec(RowCodec):
    """Symmetric 8-bit integers: 8 + 16 / D bits an element."""

    name: ClassVar[str] = "int8"

    def formats(self) -> tuple[RowFormat, RowFormat]:
        """Return the one format of keys and values."""
        return Int8Rows(), Int8Rows()
