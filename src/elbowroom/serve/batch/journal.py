"""Journal: the output of a batch, written so that a killed run can be taken up where it ended.

Lines are only appended, whole, and forced to disk before they count. Each names the line of the input that it answers
(``id``), so a second run knows what is left; a torn end is cut off. Beside it lies OUT.job with what the output is of:
input, model and settings; a run with others is refused. A lock keeps two runs apart.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from elbowroom.errors import ElbowroomError, IntegrityError, RequestError

_RESTART = "answer everything anew with --restart (restart=True), or choose another output"


class OutputFailed(ElbowroomError):
    """An answer could not be written; what was written before is kept."""

    code = "output_failed"


class Journal:
    """Opened, it knows what was answered; closed at the end.

    Args:
        path: the output.
        job: what tells this batch from others; plain values.
        restart: forget what is there.

    Raises:
        RequestError: the output is of another batch, another run is writing it, or its directory cannot be used.
        OutputFailed: the disk is full or failed; nothing that was written before is lost.
        IntegrityError: lines of the output are broken, other than its end.
    """

    def __init__(self, path: Path, job: Mapping[str, Any], restart: bool = False) -> None:
        self.path, self._beside = path, path.with_name(path.name + ".job")
        self._sorted = path.with_name(path.name + ".sorted")
        self._name = str(job["fingerprint"])[:8]
        self.offsets: dict[int, tuple[int, int]] = {}
        """Input line -> where its answer begins in the output, and its bytes."""
        self.num_failed = 0
        """Lines of the output that are no answers."""
        self._refuse_others(restart)
        with contextlib.ExitStack() as opened:
            self._lock = _open(self._beside)
            opened.callback(os.close, self._lock)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RequestError(f"another run is writing {path}", "wait for its end, or end it first") from None
            self._file = _open(path)
            opened.callback(os.close, self._file)
            try:
                self._take_up(dict(job), restart)
            except OSError as reason:
                raise self._failed(path, reason) from reason
            self._opened = opened.pop_all()

    def line_id(self, number: int) -> str:
        """Return the id of the output line that answers line ``number`` of the input."""
        return f"batch_req_{self._name}_{number}"

    def append(self, lines: Sequence[tuple[int, bytes, bool]]) -> None:
        """Write lines and force them to disk: number of the input's line, content with newline, whether it failed.

        Raises:
            OutputFailed: the disk is full or failed; the output ends behind its last whole line.
        """
        data = b"".join([content for _, content, _ in lines])
        try:
            _write(self._file, data, self._size)
            os.fdatasync(self._file)
        except OSError as reason:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)
            raise self._failed(self.path, reason) from reason
        for number, content, failed in lines:
            self.offsets[number] = self._size, len(content)
            self._size += len(content)
            self.num_failed += failed

    def sort(self) -> None:
        """Put all lines into the order of the input, at once or not at all.

        Raises:
            OutputFailed: as in ``append``; the output stays as it was.
        """
        if sorted(self.offsets.values()) == [place for _, place in sorted(self.offsets.items())]:
            return
        beside = self._sorted
        try:
            made = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            try:
                at = 0
                for _, (start, size) in sorted(self.offsets.items()):
                    _write(made, os.pread(self._file, size, start), at)
                    at += size
                os.fsync(made)
            finally:
                os.close(made)
            beside.replace(self.path)
            _sync_directory(self.path.parent)
        except OSError as reason:
            with contextlib.suppress(OSError):
                beside.unlink()
            hint = "all lines are there, in the order of completion; free space for a second copy and run it again"
            raise OutputFailed(f"cannot sort {self.path}: {reason.strerror}", hint) from reason

    def close(self) -> None:
        """Close both files."""
        self._opened.close()

    def __enter__(self) -> Self:
        """Return itself; ``close`` runs at the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def _failed(self, path: Path, reason: OSError) -> OutputFailed:
        again = "run the same command again: it goes on from here"
        hint = f"free some space and {again}" if reason.errno == errno.ENOSPC else again
        return OutputFailed(f"cannot write {path}: {reason.strerror}; {len(self.offsets)} lines are safe", hint)

    def _refuse_others(self, restart: bool) -> None:
        """Refuse what no batch wrote before anything is laid beside it."""
        if self.path.is_dir():
            raise RequestError(f"{self.path} is a directory", "name a file for the answers")
        if not restart and not self._beside.exists() and self.path.exists() and self.path.stat().st_size:
            raise RequestError(f"{self.path} is there already, and no output of this batch", _RESTART)

    def _take_up(self, job: dict[str, Any], restart: bool) -> None:
        """Compare with what is there, and read it; or begin."""
        with contextlib.suppress(OSError):  # of a run that was killed while it sorted
            self._sorted.unlink()
        self._size = os.fstat(self._file).st_size
        known = _parse(os.pread(self._lock, 2**20, 0))
        if self._size and not restart:
            if known is None:
                raise RequestError(f"{self.path} is there already, and no output of this batch", _RESTART)
            differing = sorted(key for key in job.keys() | known.keys() if job.get(key) != known.get(key))
            differing = [key for key in differing if key != "fingerprint"]
            if differing:
                shown = ", ".join(f"{key} ({known.get(key)} then, {job.get(key)} now)" for key in differing)
                raise RequestError(f"{self.path} is of another batch: {shown} differs", _RESTART)
            self._read()
            return
        if self._size:
            os.ftruncate(self._file, 0)
            os.fsync(self._file)  # before its description changes: old lines must not seem to be of this job
            self._size = 0
        os.ftruncate(self._lock, 0)
        _write(self._lock, json.dumps(job, indent=1).encode() + b"\n", 0)
        os.fsync(self._lock)
        _sync_directory(self.path.parent)

    def _read(self) -> None:
        """Note what every line answers; cut a torn end off."""
        at = 0
        with open(self._file, "rb", closefd=False) as lines:
            for line in lines:
                number = self._number(line)
                if number is None and at + len(line) == self._size:
                    break
                if number is None or number in self.offsets:
                    where = f"{self.path}, byte {at}: {line[:60]!r}"
                    raise IntegrityError(f"{where} is no line that this batch wrote, or a second one", _RESTART)
                self.offsets[number] = at, len(line)
                at += len(line)
        if at < self._size:
            os.ftruncate(self._file, at)
            os.fsync(self._file)
            self._size = at

    def _number(self, line: bytes) -> int | None:
        """Return the input's line that a line answers; None if it is none of ours, or torn."""
        fields = _parse(line) if line.endswith(b"\n") else None
        head, _, number = str((fields or {}).get("id", "")).rpartition("_")
        if fields is None or head != f"batch_req_{self._name}" or not number.isdecimal():
            return None
        response = fields.get("response")
        self.num_failed += not (isinstance(response, dict) and response.get("status_code") == 200)
        return int(number)


def job_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return what tells one batch from another, with a fingerprint of it all."""
    digest = hashlib.blake2b(json.dumps(fields, sort_keys=True).encode(), digest_size=16).hexdigest()
    return {"fingerprint": digest, **fields}


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as reason:
        raise RequestError(
            f"cannot write {path}: {reason.strerror}", "make its directory, or choose another"
        ) from reason


def _write(file: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, at)
        at, view = at + written, view[written:]


def _parse(data: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(data)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
