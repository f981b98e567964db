"""The input of a batch: lines by number, read when they are needed."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

from elbowroom.errors import RequestError

_CHUNK = 2**20


class BatchInput:
    """A file of lines; numbers begin with 1.

    Args:
        path: a regular file, as it is read more than once.
        most_bytes: longer lines are skipped over and never in memory.

    Raises:
        RequestError: there is no such file, or it cannot be read.
    """

    def __init__(self, path: Path, most_bytes: int) -> None:
        self.path, self.most_bytes = path, most_bytes
        if path.exists() and not path.is_file():
            raise RequestError(f"{path} is no regular file", "a batch reads its input more than once: give a file")
        try:
            self._file: BufferedReader = path.open("rb")
        except OSError as reason:
            raise RequestError(f"cannot read {path}: {reason.strerror}", "give a JSONL file of requests") from reason
        self._offsets = array("q", [0])
        """Where each line begins; as far as lines were read."""

    def digest(self) -> str:
        """Return a hash of the whole content."""
        self._file.seek(0)
        return hashlib.file_digest(self._file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()

    def lines(self) -> Iterator[tuple[int, bytes | None]]:
        """Yield number and content of every line that is not blank; None for one that is too long."""
        del self._offsets[1:]
        number = 0
        while True:
            self._file.seek(self._offsets[number])
            data, end = self._next()
            if end == self._offsets[number]:
                return
            number += 1
            self._offsets.append(end)
            if data is None or data.strip():
                yield number, data

    def read(self, number: int) -> bytes | None:
        """Return a line that ``lines`` has passed."""
        self._file.seek(self._offsets[number - 1])
        return self._next()[0]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _next(self) -> tuple[bytes | None, int]:
        """Return the line from here on, None if it is too long, and where it ends."""
        data = self._file.readline(self.most_bytes + 1)
        if len(data) <= self.most_bytes:
            return data, self._file.tell()
        while data and not data.endswith(b"\n"):
            data = self._file.readline(_CHUNK)
        return None, self._file.tell()
