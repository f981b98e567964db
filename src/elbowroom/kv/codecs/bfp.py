"""Codec ``bfp``: block floating point, integer mantissas that share an 8-bit exponent along the channels of a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from elbowroom.errors import PlanError
from elbowroom.kv.codecs.rows import RowCodec, RowFormat, whole_number

_BITS = range(4, 9, 4)
_BLOCKS = range(16, 129, 16)
_SWITCH = ("on", "off")
_POISON = -128
"""Exponent of a block with a value that is not finite: it reads back as NaN, so that the error is not hidden."""


@dataclass(frozen=True, slots=True)
class BfpRows:
    """BFP(w, n): of a block x of n elements, ``e = floor(log2(max|x|))`` and ``x = m * 2^(e - (w - 2))``.

    Mantissas m of w bits lie in ``-(2^(w-1) - 1) .. 2^(w-1) - 1``, rounded to nearest even and saturated (as in
    Trukhanov and Soloveychik, arXiv 2403.20137). Four-bit ones are stored as m + 8, two a byte: element i of the first
    half of a block in the low bits, its partner i + n / 2 in the high ones, so that a block unpacks in order.
    """

    bits: int
    block: int

    def num_bytes(self, width: int) -> tuple[int, ...]:
        """Return the bytes of mantissas and exponents.

        Raises:
            PlanError: ``width`` is no multiple of the block.
        """
        if width % self.block:
            raise PlanError(
                f"codec 'bfp' cannot cut heads of {width} channels into blocks of {self.block}",
                f"give an n that divides {width}, e.g. bfp(n=16)",
            )
        return width * self.bits // 8, width // self.block

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Round to the nearest mantissa."""
        blocks = torch.unflatten(x, -1, (-1, self.block))
        # frexp gives max = f * 2^e with f in [0.5, 1): one more than floor(log2(max)). Zeros get the least exponent.
        top = blocks.abs().amax(-1, keepdim=True)
        exponent = torch.where(top > 0, torch.frexp(top).exponent - 1, -127).clamp_(-127, 127)
        exponent = torch.where(top.isfinite(), exponent, _POISON)
        most = 2 ** (self.bits - 1) - 1
        mantissa = torch.ldexp(blocks, self.bits - 2 - exponent).round_().clamp_(-most, most).to(torch.int8)
        exponents = exponent.squeeze(-1).to(torch.int8).view(torch.uint8)
        if self.bits == 8:
            return mantissa.flatten(-2).view(torch.uint8), exponents
        low, high = (mantissa + 8).view(torch.uint8).chunk(2, dim=-1)
        return (low | (high << 4)).flatten(-2), exponents

    def decode(self, parts: tuple[Tensor, ...]) -> Tensor:
        """Shift mantissas by their exponents."""
        codes, exponents = parts
        if self.bits == 8:
            mantissa = torch.unflatten(codes.view(torch.int8), -1, (-1, self.block)).float()
        else:
            packed = torch.unflatten(codes, -1, (-1, self.block // 2))
            mantissa = torch.cat([packed & 15, packed >> 4], dim=-1).float() - 8
        exponent = exponents.view(torch.int8).unsqueeze(-1).int()
        mantissa.masked_fill_(exponent == _POISON, torch.nan)
        return torch.ldexp(mantissa, exponent - (self.bits - 2)).flatten(-2)


@dataclass(frozen=True, slots=True)
class BfpCodec(RowCodec):
    """Block floating point for keys and values: w + 8 / n bits an element.

    Args:
        k: bits of a key's mantissa, 4 or 8.
        v: bits of a value's mantissa, 4 or 8.
        n: channels that share an exponent.
        sort: ``on``: keys lie with their channels sorted by magnitude, so that large ones share blocks with each other
            (K-sort of the same paper); needs the magnitudes that calibration measures. No gain where n is the head.
    """

    k: int | str = 4
    v: int | str = 4
    n: int | str = 32
    sort: str = "off"
    name: ClassVar[str] = "bfp"

    def __post_init__(self) -> None:
        """Read the parameters as numbers."""
        for field, allowed in (("k", _BITS), ("v", _BITS), ("n", _BLOCKS)):
            object.__setattr__(self, field, whole_number(self.name, field, getattr(self, field), allowed))
        if self.sort not in _SWITCH:
            raise PlanError(f"codec 'bfp' cannot take sort={self.sort}", "give sort=on or sort=off")

    @property
    def sorts(self) -> bool:
        """Whether the channels of keys are sorted by magnitude."""
        return self.sort == "on"

    def formats(self) -> tuple[RowFormat, RowFormat]:
        """Return the formats of keys and values."""
        return BfpRows(int(self.k), int(self.n)), BfpRows(int(self.v), int(self.n))
