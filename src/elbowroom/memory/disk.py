"""DiskTier: blobs as files in a directory of this process, written and read by threads straight from memory.

Parts are checked by CRC-32: it runs at the speed of several disks (zlib's, 3.6 GB/s a core here; BLAKE2b 0.6, SHA-1
1.6) and finds what goes wrong by accident; nobody else can write the files. The page cache is not ours to fill:
written pages are handed to the disk at once and dropped when they are there, and those that were read are dropped.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from elbowroom.errors import ConfigError, IntegrityError
from elbowroom.memory.ledger import Budget, Ledger
from elbowroom.memory.objects import Completion, Part, TierUsage, Views
from elbowroom.memory.private_dir import PrivateDirectory
from elbowroom.units import format_bytes

OWNER = "swap"
_MOST_VIEWS = 512
"""Pieces of memory that one system call takes; Linux allows 1,024."""
_SETTLE_S = 0.5
"""Seconds of rest after which written pages are dropped from the page cache: they have reached the disk by then."""

_Job = tuple[int, float, Path, Callable[[], Completion]]
"""Ticket, time of its submission, file, and what is to be done."""


class DiskTier:
    """Keeps blobs on disk, charged to the owner ``swap`` of the tier ``disk``.

    Args:
        directory: a directory of this process is made in it and removed by ``close``; those that killed processes
            left there are removed now.
        capacity_bytes: most bytes of blobs.
        ledger: who pays; by default a ledger of its own.
        num_workers: threads that write and read.

    Raises:
        ConfigError: the directory cannot be written.
    """

    name = "disk"

    def __init__(
        self, directory: str | Path, capacity_bytes: int, ledger: Ledger | None = None, num_workers: int = 2
    ) -> None:
        self._ledger = Ledger(Budget({})) if ledger is None else ledger
        self._capacity_bytes = capacity_bytes
        try:
            self._directory = PrivateDirectory(Path(directory))
        except OSError as error:
            raise ConfigError(
                f"{directory} cannot hold swapped KV: {error.strerror}", "name a directory that can be written (--swap)"
            ) from error
        self._numbers: dict[str, int] = {}
        """Key -> number of its file."""
        self._sizes: dict[str, int] = {}
        self._next_number = self._next_ticket = self._under_way = 0
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Completion] = queue.SimpleQueue()
        self._workers = [threading.Thread(target=self._work, daemon=True) for _ in range(num_workers)]
        for worker in self._workers:
            worker.start()

    @property
    def path(self) -> Path:
        """Directory of the files."""
        return self._directory.path

    def submit_put(self, key: str, parts: Sequence[Views], append_at: int = 0) -> int:
        """Start to write ``parts`` one behind the other from byte ``append_at`` on; return a ticket.

        Raises:
            IntegrityError: the blob ends before ``append_at``.
        """
        held = self._sizes.get(key, 0)
        if append_at > held:
            raise IntegrityError(f"{key!r} has {held} bytes, nothing can be written from byte {append_at} on")
        size = append_at + sum(view.nbytes for views in parts for view in views)
        if not self._charge(size - held):
            free = self._capacity_bytes - self.usage().used_bytes
            return self._refuse(
                f"swap on disk is full: {format_bytes(size - held)} more are needed, "
                f"{format_bytes(max(free, 0))} of {format_bytes(self._capacity_bytes)} are free (--swap)"
            )
        if key not in self._numbers:
            self._numbers[key] = self._next_number
            self._next_number += 1
        self._sizes[key] = size
        path = self._path(key)
        return self._submit(path, lambda: _put(path, parts, append_at))

    def submit_get(self, key: str, parts: Sequence[Part]) -> int:
        """Start to read parts of a blob; return a ticket."""
        if key not in self._numbers:
            return self._refuse(f"there is no object {key!r}")
        path = self._path(key)
        return self._submit(path, lambda: _get(path, parts))

    def poll(self, timeout_s: float = 0.0) -> list[Completion]:
        """Return what has completed since the last call; wait so long for the first if anything is under way."""
        found: list[Completion] = []
        while self._under_way:
            try:
                found.append(self._done.get(timeout=timeout_s) if timeout_s and not found else self._done.get_nowait())
            except queue.Empty:
                break
            self._under_way -= 1
        return found

    def contains(self, key: str) -> bool:
        """Return whether there is such a blob."""
        return key in self._numbers

    def delete(self, key: str) -> int:
        """Delete a blob that is not in transfer, if there is one; return its bytes."""
        if key not in self._numbers:
            return 0
        self._path(key).unlink(missing_ok=True)
        del self._numbers[key]
        size = self._sizes.pop(key)
        self._ledger.release(OWNER, self.name, size)
        return size

    def usage(self) -> TierUsage:
        """Return what is held."""
        return TierUsage(len(self._sizes), sum(self._sizes.values()), self._capacity_bytes)

    def close(self) -> None:
        """Wait for what is under way, delete everything and end the threads. A second close does nothing."""
        for _ in self._workers:
            self._jobs.put(None)
        for worker in self._workers:
            worker.join()
        self._workers.clear()
        for key in list(self._numbers):
            self.delete(key)
        self._directory.close()

    def _path(self, key: str) -> Path:
        return self._directory.path / f"{self._numbers[key]}.kv"

    def _charge(self, num_bytes: int) -> bool:
        """Charge what a blob grows by, or give back what it shrinks by; False: it does not fit."""
        if num_bytes <= 0:
            self._ledger.release(OWNER, self.name, -num_bytes)
            return True
        if self.usage().used_bytes + num_bytes > self._capacity_bytes:
            return False
        return self._ledger.try_charge(OWNER, self.name, num_bytes)

    def _submit(self, path: Path, job: Callable[[], Completion]) -> int:
        self._next_ticket += 1
        self._under_way += 1
        self._jobs.put((self._next_ticket, time.perf_counter(), path, job))
        return self._next_ticket

    def _refuse(self, error: str) -> int:
        self._next_ticket += 1
        self._under_way += 1
        self._done.put(Completion(self._next_ticket, 0.0, 0, error=error))
        return self._next_ticket

    def _work(self) -> None:
        """Run jobs until told to end, and see that what they wrote leaves the page cache."""
        written: set[Path] = set()
        while True:
            try:
                job = self._jobs.get(timeout=_SETTLE_S) if written else self._jobs.get()
            except queue.Empty:
                for path in written:
                    _drop_cached(path)
                written.clear()
                continue
            if job is None:
                return
            done = _timed(job)
            if done.checksums:
                written.add(job[2])
            self._done.put(done)


def _timed(job: _Job) -> Completion:
    """Run a job; whatever the disk says becomes the error of its completion."""
    ticket, started, path, run = job
    try:
        done = run()
    except OSError as error:
        reason = f"the disk of {path.parent} is full" if error.errno == errno.ENOSPC else str(error)
        done = Completion(0, 0.0, 0, error=f"{reason} (name another directory: --swap)")
    except IntegrityError as error:
        done = Completion(0, 0.0, 0, error=str(error))
    return Completion(ticket, time.perf_counter() - started, done.num_bytes, done.checksums, done.error)


def _put(path: Path, parts: Sequence[Views], offset: int) -> Completion:
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        end = _transfer(os.pwritev, handle, [view for views in parts for view in views], offset)
        os.ftruncate(handle, end)
        os.posix_fadvise(handle, offset, end - offset, os.POSIX_FADV_DONTNEED)  # begins to write it to the disk
    finally:
        os.close(handle)
    return Completion(0, 0.0, end - offset, tuple([checksum(views) for views in parts]))


def _get(path: Path, parts: Sequence[Part]) -> Completion:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for offset, views in _stretches(parts):
            end = _transfer(os.preadv, handle, views, offset)
            os.posix_fadvise(handle, offset, end - offset, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)
    for part in parts:
        if checksum(part.views) != part.checksum:
            raise IntegrityError("the swapped KV fails its checksum")
    return Completion(0, 0.0, sum(view.nbytes for part in parts for view in part.views))


def _drop_cached(path: Path) -> None:
    """Drop the pages of a file, if it is still there, from the page cache."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def checksum(views: Views) -> int:
    """Return the CRC-32 of some bytes."""
    value = 0
    for view in views:
        value = zlib.crc32(view, value)
    return value


def _stretches(parts: Sequence[Part]) -> Iterator[tuple[int, list[memoryview]]]:
    """Yield offset and views of parts that follow each other in the file, together."""
    begin = end = -1
    views: list[memoryview] = []
    for part in sorted(parts, key=lambda part: part.offset):
        if part.offset != end and views:
            yield begin, views
            views = []
        if not views:
            begin = end = part.offset
        views.extend(part.views)
        end += sum(view.nbytes for view in part.views)
    if views:
        yield begin, views


def _transfer(
    call: Callable[[int, list[memoryview], int], int], handle: int, views: Sequence[memoryview], offset: int
) -> int:
    """Write or read all of ``views`` from ``offset`` on; return where that ends.

    Raises:
        IntegrityError: the file ends before.
    """
    pending = iter(views)
    while batch := list(islice(pending, _MOST_VIEWS)):
        while batch:
            moved = call(handle, batch, offset)
            if moved == 0:
                raise IntegrityError("the swapped KV was cut off")
            offset += moved
            while batch and moved >= batch[0].nbytes:
                moved -= batch.pop(0).nbytes
            if moved:
                batch[0] = batch[0][moved:]
    return offset
