"""RowCodec: what is common to codecs that encode each head of each token by itself.

Such a codec needs no full-precision tail: a token can be written, moved, dropped or shared alone. What differs is a
``RowFormat`` for keys and one for values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from elbowroom.core import STRIP_TOKENS, LayerSpec, PageFormat
from elbowroom.errors import PlanError
from elbowroom.kernels.digest import read_digest


class RowFormat(Protocol):
    """How a vector of D floats becomes bytes."""

    @property
    def bits(self) -> int:
        """Bits of a code."""

    @property
    def block(self) -> int:
        """Elements that share a scale; 0: all."""

    def num_bytes(self, width: int) -> tuple[int, ...]:
        """Return the bytes of each part (codes, which may lie in planes, then scales) of a vector of ``width``.

        Raises:
            PlanError: vectors of that width cannot be encoded.
        """

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the parts, uint8 ``[..., bytes]``, of float32 ``x [..., D]``."""

    def decode(self, parts: tuple[Tensor, ...]) -> Tensor:
        """Return float32 ``[..., D]``."""


class RowCodec(ABC):
    """Strips of arrays ``[Hkv, 64, bytes]``: all parts of the keys, then all parts of the values."""

    lossless: ClassVar[bool] = False
    seals: ClassVar[bool] = False
    order: ClassVar[None] = None
    name: ClassVar[str]

    @property
    def sorts(self) -> bool:
        """Whether the channels of keys lie in an order of their own."""
        return False

    @abstractmethod
    def formats(self) -> tuple[RowFormat, RowFormat]:
        """Return how keys and values are encoded."""

    def page_format(self, layer: LayerSpec, dtype: str) -> PageFormat:
        """Return the layout of a strip.

        Raises:
            PlanError: heads of this width cannot be encoded.
        """
        keys, values = self.formats()
        bytes_each = sum(keys.num_bytes(layer.head_dim)) + sum(values.num_bytes(layer.v_head_dim))
        codes = (layer.head_dim * keys.bits + layer.v_head_dim * values.bits) // 8
        rows = layer.num_kv_heads * STRIP_TOKENS
        return PageFormat(
            codec=self.name,
            dtype="uint8",
            num_kv_heads=layer.num_kv_heads,
            head_dim=layer.head_dim,
            v_head_dim=layer.v_head_dim,
            payload_bytes=rows * codes,
            overhead_bytes=rows * (bytes_each - codes),
            key_bits=keys.bits,
            value_bits=values.bits,
            block=keys.block,
        )

    def fields(self, strip: Tensor, fmt: PageFormat) -> tuple[Tensor, ...]:
        """Return views uint8 ``[Hkv, 64, bytes]`` of a strip."""
        keys, values = self.formats()
        widths = (*keys.num_bytes(fmt.head_dim), *values.num_bytes(fmt.v_head_dim))
        sizes = [fmt.num_kv_heads * STRIP_TOKENS * width for width in widths]
        parts = torch.split(strip[: sum(sizes)], sizes)
        return tuple(part.view(fmt.num_kv_heads, STRIP_TOKENS, -1) for part in parts)

    def store(self, strip: Tensor, fmt: PageFormat, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Encode rows into their slots."""
        keys, values = self.formats()
        parts = (*keys.encode(k.float()), *values.encode(v.float()))
        for field, part in zip(self.fields(strip, fmt), parts, strict=True):
            field[:, slots] = part

    def open(self, strip: Tensor, fmt: PageFormat) -> tuple[Tensor, Tensor]:
        """Return keys and values in float32."""
        keys, values = self.formats()
        fields, split = self.fields(strip, fmt), len(keys.num_bytes(fmt.head_dim))
        return keys.decode(fields[:split]), values.decode(fields[split:])

    def bounds(self, strip: Tensor, fmt: PageFormat) -> tuple[Tensor, Tensor]:
        """Return what the digest says."""
        return read_digest(strip, fmt)


def whole_number(codec: str, name: str, value: str | int, allowed: range) -> int:
    """Return a parameter of a plan as a number.

    Raises:
        PlanError: it is none, or not allowed.
    """
    try:
        number = int(value)
    except ValueError:
        number = allowed.start - 1
    if number not in allowed:
        steps = f" in steps of {allowed.step}" if allowed.step > 1 else ""
        raise PlanError(
            f"codec {codec!r} cannot take {name}={value}", f"give {name} from {allowed.start} to {allowed[-1]}{steps}"
        )
    return number


def as_bytes(x: Tensor) -> Tensor:
    """Return ``x [..., n]`` as uint8 ``[..., n * itemsize]``."""
    return x.contiguous().view(torch.uint8)
