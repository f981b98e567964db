"""Codec ``fp8``: 8-bit floats (e4m3), without scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from elbowroom.kv.codecs.rows import RowCodec, RowFormat

_LARGEST = 448.0


@dataclass(frozen=True, slots=True)
class Fp8Rows:
    """4 bits of exponent, 3 of mantissa (OCP E4M3 as torch's ``float8_e4m3fn``); larger values saturate at 448."""

    bits: ClassVar[int] = 8
    block: ClassVar[int] = 0

    def num_bytes(self, width: int) -> tuple[int, ...]:
        """Return a byte for each element."""
        return (width,)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Round to nearest even."""
        return (x.clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn).view(torch.uint8),)

    def decode(self, parts: tuple[Tensor, ...]) -> Tensor:
        """Widen."""
        return parts[0].view(torch.float8_e4m3fn).float()


@dataclass(frozen=True, slots=True)
class Fp8Codec(RowCodec):
    """8 bits an element and nothing else: no calibration, no scales, about 6 % of rounding error."""

    name: ClassVar[str] = "fp8"

    def formats(self) -> tuple[RowFormat, RowFormat]:
        """Return the one format of keys and values."""
        return Fp8Rows(), Fp8Rows()
