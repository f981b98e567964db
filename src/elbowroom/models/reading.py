"""Reading weights: a few threads take pieces of files and fill tensors, converting the dtype where it differs.

Equal dtypes are read straight into their final memory. Others go through a staging buffer that stays in the
processor's cache, one for each thread, so that conversion overlaps with the reads of the other threads.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from elbowroom.errors import CheckpointError

PIECE_BYTES = 512 * 1024
"""Most file bytes of one read, and the size of a staging buffer: measured fastest with two threads."""
MAX_THREADS = 4
"""Bounds the buffers; on two cores, four readers were no faster than two, from page cache or disk."""
_CONVERT_ELEMENTS = 2**15
"""torch splits larger copies among threads of its own, which would compete with the readers."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive elements of one tensor: where they lie on disk, and where they go."""

    path: Path
    offset: int
    """Bytes from the start of the file."""
    dtype: torch.dtype
    """Of the elements on disk."""
    target: Tensor
    """One-dimensional and contiguous; of any dtype and device."""

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        return self.target.numel() * self.dtype.itemsize


@dataclass(slots=True)
class ReadTimes:
    """Seconds that reading took; of several threads the mean, so that the parts add up to what passed."""

    read_s: float = 0.0
    """In the operating system: from disk or page cache into memory, page faults included."""
    convert_s: float = 0.0
    num_threads: int = 1


def cut(path: Path, offset: int, dtype: torch.dtype, target: Tensor) -> Iterator[Piece]:
    """Yield the pieces of one tensor in file order, none above ``PIECE_BYTES``.

    Args:
        path: of the file.
        offset: bytes from its start.
        dtype: of the elements on disk.
        target: of the tensor's shape; may have strides.
    """
    if not target.is_contiguous():
        row_bytes = target[0].numel() * dtype.itemsize
        for index, row in enumerate(target.unbind(0)):
            yield from cut(path, offset + index * row_bytes, dtype, row)
        return
    flat = target.detach().view(-1)
    step = PIECE_BYTES // dtype.itemsize
    for begin in range(0, flat.numel(), step):
        yield Piece(path, offset + begin * dtype.itemsize, dtype, flat[begin : begin + step])


def default_threads() -> int:
    """Return how many threads read: one for each core that this process may use, up to ``MAX_THREADS``."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_THREADS)


def read_pieces(
    pieces: Iterable[Piece],
    files: dict[Path, int],
    progress: Callable[[int], None] | None = None,
    num_threads: int | None = None,
) -> ReadTimes:
    """Fill the target of every piece; needs ``PIECE_BYTES`` a thread beside them, and that only to convert.

    The calling thread reads too. When this returns or raises, Ctrl-C included, no thread writes any more.

    Args:
        pieces: best in the order in which they lie on disk.
        files: an open file descriptor for each path.
        progress: called from the calling thread with the bytes read so far, which only grow.
        num_threads: by default ``default_threads()``.

    Raises:
        CheckpointError: a file cannot be read or became shorter; what was read by then is in the targets.
    """
    threads = default_threads() if num_threads is None else num_threads
    return _Reading(pieces, files, progress or (lambda _: None)).run(threads)


class _Reading:
    """What the threads of one ``read_pieces`` share; counters and the list of pieces change under the lock only."""

    def __init__(self, pieces: Iterable[Piece], files: dict[Path, int], progress: Callable[[int], None]) -> None:
        self._pieces, self._files, self._progress = iter(pieces), files, progress
        self._lock = threading.Lock()
        self._stopped = False
        self._error: Exception | None = None
        self._done_bytes = self._shown_bytes = 0
        self._read_s = self._convert_s = 0.0

    def run(self, num_threads: int) -> ReadTimes:
        helpers = [
            threading.Thread(target=self._help, name=f"elbowroom-reader-{index}", daemon=True)
            for index in range(1, num_threads)
        ]
        started: list[threading.Thread] = []
        try:
            for helper in helpers:
                helper.start()
                started.append(helper)
            self._work(self._show)
        finally:
            self._stopped = True
            _join(started)
        if self._error is not None:
            raise self._error
        self._show()
        return ReadTimes(self._read_s / num_threads, self._convert_s / num_threads, num_threads)

    def _help(self) -> None:
        try:
            self._work(lambda: None)
        except Exception as error:  # noqa: BLE001  run() raises it again, in the thread that asked
            with self._lock:
                self._error = self._error or error
            self._stopped = True

    @torch.inference_mode()  # a mode of the thread: the tensors may be those of a caller in inference mode
    def _work(self, after_each: Callable[[], None]) -> None:
        staging = torch.empty(0, dtype=torch.uint8)
        while (piece := self._next()) is not None:
            direct = piece.dtype == piece.target.dtype and piece.target.device.type == "cpu"
            if not direct and staging.numel() < piece.num_bytes:
                staging = torch.empty(max(PIECE_BYTES, piece.num_bytes), dtype=torch.uint8)
            source = piece.target if direct else staging[: piece.num_bytes].view(piece.dtype)
            begin = time.perf_counter()
            _pread(piece.path, self._files[piece.path], piece.offset, source)
            read = time.perf_counter()
            if not direct:
                _convert(source, piece.target)
            self._count(piece.num_bytes, read - begin, time.perf_counter() - read)
            after_each()

    def _next(self) -> Piece | None:
        with self._lock:
            return None if self._stopped else next(self._pieces, None)

    def _count(self, num_bytes: int, read_s: float, convert_s: float) -> None:
        with self._lock:
            self._done_bytes += num_bytes
            self._read_s += read_s
            self._convert_s += convert_s

    def _show(self) -> None:
        done = self._done_bytes
        if done > self._shown_bytes:
            self._shown_bytes = done
            self._progress(done)


def _join(threads: Sequence[threading.Thread]) -> None:
    """Wait for all threads, even if the wait is interrupted once; each has one piece to finish at most."""
    try:
        for thread in threads:
            thread.join()
    except BaseException:
        for thread in threads:
            thread.join()
        raise


def _convert(source: Tensor, target: Tensor) -> None:
    """Copy ``source`` to ``target``, rounded to nearest even where bits are lost."""
    if target.device.type != "cpu":
        target.copy_(source)
        return
    for begin in range(0, source.numel(), _CONVERT_ELEMENTS):
        part = slice(begin, begin + _CONVERT_ELEMENTS)
        target[part].copy_(source[part])


def _pread(path: Path, file: int, offset: int, target: Tensor) -> None:
    """Fill the contiguous CPU tensor ``target`` from ``offset`` of the file."""
    view = target.view(torch.uint8).numpy().data
    done = 0
    try:
        while done < len(view):
            count = os.preadv(file, [view[done:]], offset + done)
            if count == 0:
                raise CheckpointError(f"{path} became shorter while it was read", "leave the file in place")
            done += count
    except OSError as reason:
        raise CheckpointError(f"{path} cannot be read: {reason.strerror}", "check the disk") from reason
