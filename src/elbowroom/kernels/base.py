"""The seam of attention over strips: what a backend gets (StripStep, a strip table, the range) and must do.

A strip holds 64 consecutive tokens of all KV heads of one layer: plain ones K as ``[Hkv, 64, Dk]``, then V as
``[Hkv, 64, Dv]``, contiguous, in the dtype of the PageFormat; others what their StripLayout says. All strips live in
one 1-D uint8 tensor ``base`` that is only partly resident: a backend touches the strips that a step needs and no other
byte. A strip table is a numpy uint32 array ``[R, num_blocks]``; entry ``[r, b]`` is the place of tokens
``64 b .. 64 b + 63`` of sequence r, in units of 64 bytes. Entries of blocks that a sequence does not store may hold
anything.

Shape letters: N token rows of the step, R sequences, Hq/Hkv query/KV heads, Dk/Dv widths of keys/values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from elbowroom.core import DTYPE_BYTES, STRIP_TOKENS, LayerSpec, PageFormat
from elbowroom.kernels.digest import read_digest

StripTable = npt.NDArray[np.uint32]

_UINT32 = np.dtype(np.uint32)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
UNIT_BYTES = 64
"""Bytes of one unit of a strip table."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StripStep:
    """Which token rows of a step belong to which sequence, and what each row may read.

    Made once a step and used for every layer. Rows of a sequence are adjacent; their positions may come in any order.

    Raises:
        ValueError: a field has a wrong dtype, shape or device, or the fields contradict each other.
    """

    row_starts: Tensor
    """int32 ``[R + 1]``: rows ``row_starts[r] .. row_starts[r + 1] - 1`` belong to sequence r."""
    positions: Tensor
    """int64 ``[N]``: position of each row in its sequence, which is also its slot; block = position // 64."""
    lengths: Tensor
    """int64 ``[R]``: tokens of each sequence once this step is appended; no row reads a slot at or past it."""
    first_slots: Tensor
    """int64 ``[R]``: first slot that is still stored (sliding windows let whole strips expire)."""
    num_rows: int = field(init=False)
    """Token rows N."""
    num_sequences: int = field(init=False)
    """Sequences R."""
    max_length: int = field(init=False)
    """The greatest of ``lengths``; 0 without sequences."""
    addresses: tuple[int, int, int, int] = field(init=False)
    """Where the four tensors lie, in the order above: asked for once a step rather than in every layer."""

    def __post_init__(self) -> None:
        """Check the fields against each other and note what every layer asks."""
        self._check_vectors()
        self._check_values()
        lengths = self.lengths.numpy()
        tensors = (self.row_starts, self.positions, self.lengths, self.first_slots)
        object.__setattr__(self, "num_rows", self.positions.numel())
        object.__setattr__(self, "num_sequences", lengths.size)
        object.__setattr__(self, "max_length", int(lengths.max(initial=0)))
        object.__setattr__(self, "addresses", tuple([tensor.data_ptr() for tensor in tensors]))

    def _check_vectors(self) -> None:
        _check_vector("row_starts", self.row_starts, torch.int32)
        for name in ("positions", "lengths", "first_slots"):
            _check_vector(name, getattr(self, name), torch.int64)
        sequences = self.lengths.numel()
        if self.row_starts.numel() != sequences + 1 or self.first_slots.numel() != sequences:
            raise ValueError(f"row_starts, lengths and first_slots disagree on the number of sequences ({sequences})")

    def _check_values(self) -> None:
        starts, positions = self.row_starts.numpy(), self.positions.numpy()
        lengths, first_slots = self.lengths.numpy(), self.first_slots.numpy()
        counts = starts[1:] - starts[:-1]
        fewest = counts.min(initial=1)
        if starts[0] != 0 or starts[-1] != positions.size or fewest < 0:
            raise ValueError(f"row_starts must rise from 0 to the number of rows ({positions.size})")
        if first_slots.min(initial=0) < 0 or (first_slots > lengths).any():
            raise ValueError("first_slots must lie in 0 .. lengths")
        low, high = first_slots, lengths
        if fewest != 1 or positions.size != lengths.size:  # else one row a sequence, as in every decoding step
            low, high = np.repeat(first_slots, counts), np.repeat(lengths, counts)
        if (positions < low).any() or (positions >= high).any():
            raise ValueError("positions must lie in first_slots .. lengths - 1 of their sequence")

    @classmethod
    def of_runs(cls, runs: Sequence[tuple[int, int]], first_slots: Sequence[int] | None = None) -> StripStep:
        """Return the step in which sequence r appends ``runs[r] = (first position, tokens)`` at its end.

        Args:
            runs: first position and number of tokens of each sequence; the length becomes their sum.
            first_slots: first stored slot of each sequence; 0 when left out.
        """
        counts = [count for _, count in runs]
        pieces = [np.arange(start, start + count) for start, count in runs]
        return cls(
            row_starts=torch.tensor(np.cumsum([0, *counts]), dtype=torch.int32),
            positions=torch.tensor(np.concatenate([np.empty(0), *pieces]), dtype=torch.int64),
            lengths=torch.tensor([start + count for start, count in runs], dtype=torch.int64),
            first_slots=torch.tensor(first_slots or [0] * len(runs), dtype=torch.int64),
        )


class StripLayout(Protocol):
    """How tokens lie in the strips of a format: the readable path, and the oracle of backends that know the format."""

    @property
    def order(self) -> Tensor | None:
        """Channel that lies at each place of an encoded key, int16 ``[Hkv, Dk]``; None: as they come.

        ``store`` and ``open`` follow it; a backend gathers keys before it encodes them, and queries once a step.
        """

    def store(self, strip: Tensor, fmt: PageFormat, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Write ``k [Hkv, n, Dk]`` and ``v [Hkv, n, Dv]`` to ``slots``, int64 ``[n]``, of a strip (uint8).

        Strips that are sealed whole take all 64 slots in their order.
        """

    def open(self, strip: Tensor, fmt: PageFormat) -> tuple[Tensor, Tensor]:
        """Return ``k [Hkv, 64, Dk]`` and ``v [Hkv, 64, Dv]`` of a strip; slots never written hold anything."""

    def bounds(self, strip: Tensor, fmt: PageFormat) -> tuple[Tensor, Tensor]:
        """Return the least and the greatest that the keys of each run of a strip can be, float32 ``[Hkv, runs, Dk]``.

        Only of formats with digests, or whose strips are sealed.
        """


class PlainLayout:
    """K then V as they are, in the dtype of the format."""

    order: ClassVar[None] = None

    def store(self, strip: Tensor, fmt: PageFormat, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Copy rows to their slots, rounded to the dtype of the format."""
        for stored, rows in zip(self.open(strip, fmt), (k, v), strict=True):
            stored[:, slots] = rows.to(stored.dtype)

    def open(self, strip: Tensor, fmt: PageFormat) -> tuple[Tensor, Tensor]:
        """Return views of the strip."""
        split = fmt.num_kv_heads * STRIP_TOKENS * fmt.head_dim
        flat = strip[: fmt.num_kv_heads * STRIP_TOKENS * head_bytes(fmt)].view(dtype_of(fmt))
        k, v = flat[:split], flat[split:]
        return k.view(fmt.num_kv_heads, STRIP_TOKENS, -1), v.view(fmt.num_kv_heads, STRIP_TOKENS, -1)

    def bounds(self, strip: Tensor, fmt: PageFormat) -> tuple[Tensor, Tensor]:
        """Return what the digest says."""
        return read_digest(strip, fmt)


PLAIN = PlainLayout()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tail:
    """Plain strips of the tokens whose block is not full yet, beside strips that are sealed whole.

    A row reads the block of its own position here, and earlier blocks sealed: what it reads depends on its position
    alone. So a step that fills blocks finds those here too, as long as it runs. Where ``open_from`` says so, blocks
    stay here although they are full (until a prompt ends and a policy chooses among its tokens).
    """

    table: StripTable
    """uint32 ``[R, blocks]``: entry ``[r, b]`` is the place of block ``first_blocks[r] + b`` of sequence r."""
    first_blocks: npt.NDArray[np.int64]
    """int64 ``[R]``."""
    base: Tensor
    fmt: PageFormat
    """A plain format."""
    full: StripTable
    """uint32 ``[S]``: places of strips that the step fills, here."""
    sealed: StripTable
    """uint32 ``[S]``: places of the same strips where they are sealed."""
    open_from: npt.NDArray[np.int64] | None = None
    """int64 ``[R]``: blocks of sequence r from here on are read in the tail; None: nothing stays open."""
    places: npt.NDArray[np.int8] | None = None
    """int8 ``[R, Hkv]``: place of each KV head of sequence r in sealed strips; -1: it is gone, and its query heads read
    nothing, here neither; None: all heads are there."""

    @property
    def seals(self) -> int:
        """Strips to be sealed S."""
        return int(self.full.size)


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """Rows that read a part of their sequence: the blocks whose keys can score highest with the query.

    Each KV head of such a row reads ``num_blocks`` blocks, or all where there are no more: the first one that is
    stored, the newest, and of the others those with the greatest ``max_hr sum_d max(q_hd * low_rd, q_hd * high_rd)``
    over its query heads h and runs r, with the bounds of ``StripLayout.bounds``. Of equals the earlier is read.
    Where full blocks wait to be sealed, everything is read.
    """

    num_blocks: int
    """At least 2."""
    rows: npt.NDArray[np.uint8]
    """uint8 ``[R]``: 1 for sequences whose row, the only one, selects."""


@dataclass(frozen=True, slots=True, eq=False)
class Progress:
    """Rows that read keys plane by plane, and values where they matter; strips are those of codec ``planes``.

    All keys are scored by their high plane. A KV head one of whose query heads has no probability of at least ``tau``
    reads the low plane too: what that says is added to its scores. Then values: blocks whose probabilities together
    are at most ``eps`` are left out and count as 0, the least likely first, where a block's probability is the
    greatest among the query heads. Nothing is left out where a score is not finite.
    """

    tau: float
    """0: the low plane is never read; 1 or more: always."""
    eps: float
    """0: all values are read."""
    rows: npt.NDArray[np.uint8]
    """uint8 ``[R]``: 1 for sequences whose row, the only one, reads so."""


Reading: TypeAlias = Selection | Progress
TALLY = ("heads", "refetches", "high strips", "low strips", "value strips")
"""What rows that read by ``Progress`` count: KV heads; those that read the low plane; and heads' parts of strips."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerStrips:
    """Where the tokens of a step lie in one layer: all that a backend needs to append them and to attend."""

    step: StripStep
    table: StripTable
    base: Tensor
    fmt: PageFormat
    layout: StripLayout = PLAIN
    """How tokens lie in strips of ``fmt``."""
    tail: Tail | None = None
    """Strips are sealed whole, and this is where new tokens go; None: they are written one by one."""
    selection: Reading | None = None
    """Rows that read what matters to them; None: all rows read everything."""
    tally: npt.NDArray[np.int64] | None = None
    """int64 ``[5]``, in the order of ``TALLY``: what such rows read is added here, where they count it."""
    shares: bool = True
    """Strips that several sequences hold at the same blocks may be read once for all of them (a hint to backends)."""

    @property
    def open_fmt(self) -> PageFormat:
        """Format of the strips that take new tokens."""
        return self.fmt if self.tail is None else self.tail.fmt


class AttentionKernels(Protocol):
    """A backend; arguments were checked by ``kernels.attention``, so it only refuses strips outside their range."""

    def append(self, strips: LayerStrips, k: Tensor, v: Tensor) -> None:
        """Write rows ``k [N, Hkv, Dk]`` and ``v [N, Hkv, Dv]`` to their slots, and seal the strips that are full."""

    def attend(self, strips: LayerStrips, spec: LayerSpec, q: Tensor, out: Tensor) -> Tensor:
        """Write attention of ``q [N, Hq, Dk]`` to ``out [N, Hq, Dv]`` and return lse, float32 ``[N, Hq]``."""


def strip_at(base: Tensor, fmt: PageFormat, unit: int) -> Tensor:
    """Return the bytes of the strip at ``unit``.

    Raises:
        ValueError: it lies outside ``base``.
    """
    start = unit * UNIT_BYTES
    if start + fmt.strip_bytes > base.numel():
        raise ValueError(f"strip at byte {start} ends after the {base.numel()} bytes of its range")
    return base[start : start + fmt.strip_bytes]


def head_bytes(fmt: PageFormat) -> int:
    """Return the bytes of one slot of one KV head, K and V together, in a plain strip."""
    return (fmt.head_dim + fmt.v_head_dim) * DTYPE_BYTES[fmt.dtype]


def dtype_of(fmt: PageFormat) -> torch.dtype:
    """Return the torch dtype of plain strips of ``fmt``."""
    dtype: torch.dtype = getattr(torch, fmt.dtype)
    return dtype


def check_strips(strips: LayerStrips) -> None:
    """Refuse tables, ranges or formats that do not fit the step.

    Raises:
        ValueError: names the argument and what was expected.
    """
    step, tail = strips.step, strips.tail
    if strips.selection is not None:
        _check_selection(strips, strips.selection)
    _check_table(strips.table, strips.base, strips.fmt, step)
    if strips.fmt.sealed != (tail is not None):
        needs = "is sealed whole: its new tokens need a tail" if tail is None else "takes tokens itself: it has no tail"
        raise ValueError(f"a strip of format {strips.fmt.codec} {needs}")
    if tail is None:
        if step.max_length > strips.table.shape[1] * STRIP_TOKENS:
            raise ValueError(f"a sequence is longer than the {strips.table.shape[1]} blocks of the table")
        return
    _check_table(tail.table, tail.base, tail.fmt, step)
    if tail.fmt.codec != "plain" or tail.first_blocks.shape != (step.num_sequences,):
        raise ValueError(f"a tail has plain strips and {step.num_sequences} first blocks, not {tail.fmt.codec}")
    if tail.full.shape != tail.sealed.shape or tail.full.dtype != _UINT32 or tail.sealed.dtype != _UINT32:
        raise ValueError("strips to be sealed need a place in the tail and a place where they are sealed, both uint32")
    if tail.open_from is not None and tail.open_from.shape != (step.num_sequences,):
        raise ValueError(f"a tail needs the first open block of {step.num_sequences} sequences")
    _check_places(strips, tail)


def _check_places(strips: LayerStrips, tail: Tail) -> None:
    if tail.places is None:
        if strips.fmt.kept_heads and strips.step.num_rows:
            raise ValueError(f"strips hold {strips.fmt.kept_heads} KV heads of {strips.fmt.num_kv_heads}: which ones?")
        return
    shape = strips.step.num_sequences, tail.fmt.num_kv_heads
    if tail.places.dtype != np.int8 or tail.places.shape != shape or not tail.places.flags.c_contiguous:
        raise ValueError(f"places of KV heads must be a contiguous int8 array {list(shape)}, got {tail.places.shape}")
    if strips.selection is not None:
        raise ValueError("rows cannot select what they read of a layer whose KV heads are partly gone")


def _check_selection(strips: LayerStrips, selection: Reading) -> None:
    rows, step = selection.rows, strips.step
    if rows.dtype != np.uint8 or rows.shape != (step.num_sequences,):
        raise ValueError(f"a selection has a flag uint8 for each of {step.num_sequences} sequences")
    counts = np.diff(step.row_starts.numpy())
    if (counts[rows != 0] != 1).any():
        raise ValueError("only sequences with one row in the step can select what it reads")
    if isinstance(selection, Progress):
        _check_progress(strips, selection)
        return
    if selection.num_blocks < 2:
        raise ValueError(f"a selection has 2 blocks or more, not {selection.num_blocks}")
    if strips.tail is None and not strips.fmt.digest_bytes:
        raise ValueError(f"a row selects strips by their digests; those of format {strips.fmt.codec} have none")


def _check_progress(strips: LayerStrips, progress: Progress) -> None:
    tally = strips.tally
    if strips.fmt.codec != "planes" or strips.fmt.sealed:
        raise ValueError(f"keys are read plane by plane in strips of codec planes, not in those of {strips.fmt.codec}")
    if not (progress.tau >= 0 and 0 <= progress.eps < 1):
        raise ValueError(f"tau is 0 or more and eps a share from 0 to below 1, not {progress.tau} and {progress.eps}")
    if tally is not None and (tally.dtype != np.int64 or tally.shape != (len(TALLY),) or not tally.flags.c_contiguous):
        raise ValueError(f"what is read is counted in {len(TALLY)} numbers int64, not in {tally.dtype} {tally.shape}")


def _check_table(table: StripTable, base: Tensor, fmt: PageFormat, step: StripStep) -> None:
    if table.dtype != _UINT32 or table.ndim != 2 or not table.flags.c_contiguous:
        raise ValueError(f"table must be a contiguous uint32 array [R, blocks], got {table.dtype} {table.shape}")
    if table.shape[0] != step.num_sequences:
        raise ValueError(f"table has {table.shape[0]} rows for {step.num_sequences} sequences")
    if base.dtype != torch.uint8 or base.dim() != 1 or not base.is_contiguous():
        raise ValueError(f"base must be a contiguous 1-D uint8 tensor, got {base.dtype} {tuple(base.shape)}")
    if fmt.num_slots != STRIP_TOKENS:
        raise ValueError(f"strips hold {STRIP_TOKENS} slots, the format says {fmt.num_slots}")


def check_rows(name: str, x: Tensor, shape: tuple[int, int, int], device: torch.device) -> None:
    """Refuse rows that are not a float tensor of ``shape`` on ``device`` with adjacent elements in each head.

    Raises:
        ValueError: names the tensor, its shape and dtype, and what was expected.
    """
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(x.shape)}")
    if x.dtype not in _FLOATS:
        raise ValueError(f"{name} must be float32, bfloat16 or float16, got {x.dtype}")
    if x.device != device or (x.stride(2) != 1 and x.shape[2] > 1):
        raise ValueError(f"{name} must lie on {device}, as the strips do, with a stride of 1 in its last dimension")


def _check_vector(name: str, x: Tensor, dtype: torch.dtype) -> None:
    if x.dtype != dtype or x.dim() != 1 or not x.is_contiguous() or x.device.type != "cpu":
        raise ValueError(f"{name} must be a contiguous 1-D {dtype} CPU tensor, got {x.dtype} {tuple(x.shape)}")
