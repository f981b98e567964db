"""Codec ``planes``: keys of 8 bits in two planes of 4, so that a read can begin with half of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from elbowroom.core import PageFormat
from elbowroom.errors import PlanError
from elbowroom.kv.codecs.bfp import BfpRows
from elbowroom.kv.codecs.int8 import Int8Rows
from elbowroom.kv.codecs.rows import RowCodec, RowFormat, as_bytes, whole_number

_VALUE_BITS = range(4, 9, 4)
_GROUPS = range(16, 129, 16)
_LEVELS = 255
_MIDDLE = 7.5


@dataclass(frozen=True, slots=True)
class PlaneRows:
    """``x = minimum + scale * (16 * high + low)``: each group of channels has a scale and a minimum, float16.

    Both are rounded outwards, so that codes 0 .. 255 reach from the least to the greatest value and no error is above
    half a scale. In either plane two codes share a byte: element i of the first half of a group in the low bits, its
    partner in the second half in the high ones.
    """

    block: int
    bits: ClassVar[int] = 8

    def num_bytes(self, width: int) -> tuple[int, ...]:
        """Return the bytes of both planes, then of a scale and a minimum for each group.

        Raises:
            PlanError: ``width`` is no multiple of the group.
        """
        if width % self.block:
            fits = [group for group in _GROUPS if width % group == 0]
            raise PlanError(
                f"codec 'planes' cannot cut heads of {width} channels into groups of {self.block}",
                f"give a g that divides {width}, e.g. planes(g={fits[-1]})"
                if fits
                else f"use int8: no group of {_GROUPS.step} channels divides {width}",
            )
        return width // 2, width // 2, *[2] * (2 * (width // self.block))

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Round to the nearest code."""
        groups = torch.unflatten(x, -1, (-1, self.block))
        least = groups.amin(-1, keepdim=True)  # NaN where a value is
        minimum = _half_towards(least, -torch.inf)
        scale = _half_towards((groups.amax(-1, keepdim=True) - minimum.float()) / _LEVELS, torch.inf)
        divisor = scale.float().masked_fill(scale == 0, 1.0)
        codes = ((groups - minimum.float()) / divisor).round_().clamp_(0, _LEVELS).nan_to_num_(0.0).to(torch.uint8)
        planes = (_pack(codes >> 4), _pack(codes & 15))
        affine = torch.cat([scale, minimum], dim=-1).flatten(-2).unbind(-1)
        return (*planes, *[as_bytes(each[..., None]) for each in affine])

    def decode(self, parts: tuple[Tensor, ...]) -> Tensor:
        """Return what both planes say."""
        high, low, *affine = parts
        return self._decode(16.0 * self._codes(high) + self._codes(low), affine)

    def decode_high(self, parts: tuple[Tensor, ...]) -> Tensor:
        """Return what the high plane says alone: the middle of the 16 values that it leaves open."""
        high, _, *affine = parts
        return self._decode(16.0 * self._codes(high) + _MIDDLE, affine)

    def _codes(self, plane: Tensor) -> Tensor:
        packed = torch.unflatten(plane, -1, (-1, self.block // 2))
        return torch.cat([packed & 15, packed >> 4], dim=-1).float()

    def _decode(self, codes: Tensor, affine: list[Tensor]) -> Tensor:
        numbers = torch.cat([each.contiguous().view(torch.float16) for each in affine], dim=-1).float()
        scale, minimum = torch.unflatten(numbers, -1, (-1, 2)).unbind(-1)
        decoded: Tensor = minimum[..., None] + scale[..., None] * codes
        return decoded.flatten(-2)


@dataclass(frozen=True, slots=True)
class PlanesCodec(RowCodec):
    """Keys in two planes of 4 bits (SpAtten: Wang, Zhang and Han, HPCA 2021, arXiv 2012.09852): 8 + 32 / g bits each.

    All high halves of a strip's keys lie before all low ones, each head in one run. Whoever reads both has 8 bits; the
    read policy ``progressive`` looks at the high plane first. Deviation from the paper: codes are scaled for each token
    and g channels instead of for all, and what the low plane would say is taken as its middle instead of 0.

    Args:
        v: bits of a value: 8 (as codec ``int8`` has them) or 4 (as ``bfp``, in blocks of g).
        g: channels of a key that share a scale and a minimum.
    """

    v: int | str = 8
    g: int | str = 32
    name: ClassVar[str] = "planes"

    def __post_init__(self) -> None:
        """Read the parameters as numbers."""
        for field, allowed in (("v", _VALUE_BITS), ("g", _GROUPS)):
            object.__setattr__(self, field, whole_number(self.name, field, getattr(self, field), allowed))

    def formats(self) -> tuple[RowFormat, RowFormat]:
        """Return the formats of keys and values."""
        values: RowFormat = Int8Rows() if self.v == 8 else BfpRows(4, int(self.g))
        return self.rows, values

    @property
    def rows(self) -> PlaneRows:
        """The format of keys."""
        return PlaneRows(int(self.g))

    def open_high(self, strip: Tensor, fmt: PageFormat) -> Tensor:
        """Return keys as the high plane of a strip says, float32 ``[Hkv, 64, Dk]``."""
        return self.rows.decode_high(self.fields(strip, fmt)[: len(self.rows.num_bytes(fmt.head_dim))])


def _pack(codes: Tensor) -> Tensor:
    first, second = codes.chunk(2, dim=-1)
    return (first | (second << 4)).flatten(-2)


def _half_towards(x: Tensor, limit: float) -> Tensor:
    """Return the float16 next to ``x`` on the side of ``limit``."""
    near = x.half()
    short = near.float() < x if limit > 0 else near.float() > x
    return torch.where(short, torch.nextafter(near, torch.full_like(near, limit)), near)
