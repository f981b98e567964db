"""The held-out text of all evaluations: standard library files that no recipe trains on."""

from __future__ import annotations

import hashlib
import sysconfig
from functools import cache
from importlib import resources
from pathlib import Path


@cache
def heldout_names() -> tuple[str, ...]:
    """Return the held-out files, relative to the standard library, with forward slashes."""
    text = resources.files("elbowroom.evals").joinpath("heldout.txt").read_text(encoding="utf-8")
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def stdlib_root() -> Path:
    """Return the folder of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


@cache
def heldout_texts() -> tuple[str, ...]:
    """Return the text of every held-out file that the running interpreter has."""
    paths = [stdlib_root() / name for name in heldout_names()]
    return tuple(path.read_text(encoding="utf-8") for path in paths if path.is_file())


@cache
def heldout_fingerprint() -> str:
    """Return what tells the held-out texts of one version of Python from those of another."""
    digest = hashlib.blake2b(digest_size=8)
    for text in heldout_texts():
        digest.update(text.encode())
    return digest.hexdigest()
