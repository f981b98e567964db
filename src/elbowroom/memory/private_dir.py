"""A directory for one process: nobody else can read it, and it does not outlive the process for long."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = "elbowroom-"
_LOCK = "owner.lock"


class PrivateDirectory:
    """A new directory of mode 0700 inside ``parent``, removed by ``close``; those of dead processes go at once.

    A process holds a file lock in its directory as long as it lives, however it ends: process numbers, which
    containers on one volume share, tell nothing.

    Args:
        parent: made if it is missing.
    """

    def __init__(self, parent: Path) -> None:
        parent.mkdir(parents=True, exist_ok=True)
        with _alone_in(parent):
            for path in parent.glob(f"{PREFIX}*"):
                if not _is_alive(path):
                    shutil.rmtree(path, ignore_errors=True)
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
            self._lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)

    def close(self) -> None:
        """Remove the directory and what is in it. A second close does nothing."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


@contextlib.contextmanager
def _alone_in(parent: Path) -> Iterator[None]:
    """Keep other processes from making or removing directories in ``parent`` meanwhile."""
    handle = os.open(parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _is_alive(path: Path) -> bool:
    """Return whether the process that made ``path`` holds its lock; what cannot be looked at is left alone."""
    try:
        handle = os.open(path / _LOCK, os.O_RDWR)
    except FileNotFoundError:
        return not path.is_dir()
    except OSError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False
