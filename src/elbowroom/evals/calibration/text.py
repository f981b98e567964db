"""The text of calibrations: standard library files that no evaluation uses, or a file of the user's."""

from __future__ import annotations

import hashlib
from pathlib import Path

from elbowroom.errors import RequestError
from elbowroom.evals.heldout import stdlib_root

FILES = ("doctest.py", "optparse.py", "subprocess.py", "typing.py")
"""Python source, none of it among the held-out files."""

MAX_CHARS = 2**20
"""Characters of a file that are used."""


def calibration_text(path: Path | None) -> str:
    """Return the text of ``path``, or of the standard library files of the running interpreter.

    Raises:
        RequestError: the file cannot be read as text.
    """
    if path is None:
        return "\n".join((stdlib_root() / name).read_text(encoding="utf-8") for name in FILES)
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(MAX_CHARS)
    except (OSError, UnicodeDecodeError) as reason:
        raise RequestError(f"--text {path} cannot be read: {reason}", "give a file of UTF-8 text") from reason


def text_fingerprint(text: str) -> str:
    """Return what tells texts apart."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
