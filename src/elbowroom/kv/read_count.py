"""Reads: what attention fetches of keys and values, counted in elements and bytes, beside fetching everything.

A plan may read less than it holds: keys of the tokens that are still alive, values of the likely ones, the high bits of
a key first and the low ones only where they matter (SpAtten, Wang, Zhang and Han, HPCA 2021, arXiv 2012.09852).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from elbowroom.core import STRIP_TOKENS, PageFormat
from elbowroom.errors import IntegrityError

_BF16_BYTES, _AFFINE_BYTES = 2, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadRead:
    """What one head of one layer fetches in one step."""

    step: int
    layer: int
    head: int
    num_tokens: int
    """Tokens of the sequence: what a dense head fetches."""
    width: int
    """Channels of a key, and of a value."""
    num_keys: int
    num_values: int
    key_bits: int | None = None
    """Of a key's element in the first pass; None: as a dense cache stores it."""
    refetch_bits: int = 0
    """Low bits of the same keys that a second pass fetched; 0: there was none."""
    value_bits: int | None = None

    def __post_init__(self) -> None:
        """Refuse what no head can fetch.

        Raises:
            IntegrityError: says what is wrong.
        """
        fetched = max(self.num_keys, self.num_values)
        if min(self.num_keys, self.num_values, self.num_tokens - fetched) < 0:
            raise IntegrityError(
                f"a head fetches {self.num_keys} keys and {self.num_values} values of {self.num_tokens} tokens"
            )
        bits = [each for each in (self.key_bits, self.value_bits, self.refetch_bits or None) if each is not None]
        if self.width < 1 or any(each < 1 for each in bits):
            raise IntegrityError(f"a head of {self.width} channels cannot be fetched in {bits} bits")
        if self.refetch_bits and self.key_bits is None:
            raise IntegrityError("a head fetches low bits of keys that are stored whole")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadCount:
    """What some steps fetched, and what a dense cache would have been read for."""

    dense_elements: int
    """Of keys and values: every token, in every layer and head of the model, pruned ones included."""
    key_elements: int
    value_elements: int
    dense_bytes: float
    key_bytes: float
    """First pass: all bits, or the high ones."""
    refetch_bytes: float
    """Second pass: the low bits."""
    value_bytes: float
    num_reads: int
    """Heads times steps that fetched anything."""
    num_refetches: int

    @property
    def bytes(self) -> float:
        """All bytes fetched."""
        return self.key_bytes + self.refetch_bytes + self.value_bytes

    @property
    def element_ratio(self) -> float:
        """Dense elements for each one fetched; an element that is fetched twice, in parts, counts once."""
        return self.dense_elements / (self.key_elements + self.value_elements)

    @property
    def byte_ratio(self) -> float:
        """Dense bytes for each one fetched."""
        return self.dense_bytes / self.bytes

    @property
    def refetch_rate(self) -> float:
        """Share of the reads that needed the second pass."""
        return self.num_refetches / self.num_reads


def sum_reads(counts: Sequence[ReadCount]) -> ReadCount | None:
    """Return what was fetched in all; None: nothing was counted."""
    if not counts:
        return None
    return ReadCount(**{each.name: sum(getattr(count, each.name) for count in counts) for each in fields(ReadCount)})


def plane_reads(tallies: npt.NDArray[np.int64], formats: Sequence[PageFormat]) -> ReadCount | None:
    """Return the totals of what kernels have counted; None if that is nothing.

    A block counts whole, with the scales that a pass over it reads; dense is bfloat16.

    Args:
        tallies: ``[layers, 5]``, each in the order of ``kernels.base.TALLY``.
        formats: of the layers' strips, those of codec ``planes`` where something was counted.
    """
    found = [_plane_read(row, fmt) for row, fmt in zip(tallies.tolist(), formats, strict=True) if row[0]]
    if not found:
        return None
    names = [field.name for field in fields(ReadCount)]
    return ReadCount(**{name: sum(getattr(each, name) for each in found) for name in names})


def _plane_read(tally: Sequence[int], fmt: PageFormat) -> ReadCount:
    """Return what one layer has read."""
    heads, refetches, high, low, values = tally
    scales = fmt.head_dim // fmt.block * _AFFINE_BYTES
    plane = STRIP_TOKENS * (fmt.head_dim // 2 + scales)
    whole = (fmt.payload_bytes + fmt.overhead_bytes) // fmt.num_kv_heads
    dense = STRIP_TOKENS * high * (fmt.head_dim + fmt.v_head_dim)
    return ReadCount(
        dense_elements=dense,
        key_elements=STRIP_TOKENS * high * fmt.head_dim,
        value_elements=STRIP_TOKENS * values * fmt.v_head_dim,
        dense_bytes=dense * _BF16_BYTES,
        key_bytes=high * plane,
        refetch_bytes=low * plane,
        value_bytes=values * (whole - STRIP_TOKENS * (fmt.head_dim + scales)),
        num_reads=heads,
        num_refetches=refetches,
    )


def count_reads(reads: Sequence[HeadRead], num_layers: int, num_heads: int, dense_bits: int) -> ReadCount:
    """Return the totals of ``reads``.

    Args:
        reads: at most one for each step, layer and head; where there is none, the head was pruned and fetched nothing.
        num_layers: of the model.
        num_heads: of a layer, before anything was pruned.
        dense_bits: bits of an element of the dense cache, and of what is not quantized.

    Raises:
        IntegrityError: there are none, one stands twice or outside the model, or a step has two lengths or widths.
    """
    seen = {(read.step, read.layer, read.head) for read in reads}
    if not reads or len(seen) < len(reads):
        raise IntegrityError("no reads, or two of the same step, layer and head")
    if any(not (0 <= layer < num_layers and 0 <= head < num_heads) for _, layer, head in seen):
        raise IntegrityError(f"a read is of none of {num_layers} layers and {num_heads} heads")
    dense = 2 * num_layers * num_heads * sum(_dense_head(reads).values())
    bits = [_bits(read, dense_bits) for read in reads]
    key_bits, refetch_bits, value_bits = (sum(part) for part in zip(*bits, strict=True))
    return ReadCount(
        dense_elements=dense,
        key_elements=sum(read.width * read.num_keys for read in reads),
        value_elements=sum(read.width * read.num_values for read in reads),
        dense_bytes=dense * dense_bits / 8,
        key_bytes=key_bits / 8,
        refetch_bytes=refetch_bits / 8,
        value_bytes=value_bits / 8,
        num_reads=len(reads),
        num_refetches=sum(read.refetch_bits > 0 for read in reads),
    )


def _dense_head(reads: Iterable[HeadRead]) -> dict[int, int]:
    """Return, by step, the elements of the keys that a dense head fetches."""
    found: dict[int, int] = {}
    for read in reads:
        elements = read.width * read.num_tokens
        if found.setdefault(read.step, elements) != elements:
            raise IntegrityError(f"step {read.step} has sequences of two lengths or widths")
    return found


def _bits(read: HeadRead, dense_bits: int) -> tuple[int, int, int]:
    """Return the bits of keys, of their low planes and of values."""
    key_bits = dense_bits if read.key_bits is None else read.key_bits
    value_bits = dense_bits if read.value_bits is None else read.value_bits
    keys, values = read.width * read.num_keys, read.width * read.num_values
    return keys * key_bits, keys * read.refetch_bits, values * value_bits
