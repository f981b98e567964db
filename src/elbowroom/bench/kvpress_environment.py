"""Makes the environment of kvpress: ``python -m elbowroom.bench.kvpress_environment DIR``.

Its releases need an older transformers than ours, so it gets a virtual environment of its own, with the torch that this
one has; pip's own configuration says where packages come from. The benchmark ``kvpress`` finds it by
``ELBOWROOM_KVPRESS=DIR``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import torch

from elbowroom.errors import RequestError

VARIABLE = "ELBOWROOM_KVPRESS"
PACKAGES = ("kvpress==0.5.5", "transformers<5.3")


def make(directory: Path) -> Path:
    """Make the environment and return its interpreter.

    Raises:
        RequestError: the directory holds something already, or pip fails.
    """
    if directory.exists() and any(directory.iterdir()):
        raise RequestError(f"{directory} is not empty", "give a directory that is not there yet")
    venv.create(directory, with_pip=True)
    python = interpreter(directory)
    command = [str(python), "-m", "pip", "install", "--quiet", f"torch=={torch.__version__}", *PACKAGES]
    if subprocess.run(command, check=False).returncode != 0:
        raise RequestError("pip could not install kvpress", f"remove {directory} and try again with a network")
    return python


def interpreter(directory: Path) -> Path:
    """Return the interpreter of an environment."""
    return directory / "bin" / "python"


def found() -> Path | None:
    """Return the interpreter of the environment that ``ELBOWROOM_KVPRESS`` names, if it is there."""
    directory = os.environ.get(VARIABLE)
    python = None if directory is None else interpreter(Path(directory))
    return python if python is not None and python.is_file() else None


if __name__ == "__main__":
    sys.stderr.write(f"export {VARIABLE}={make(Path(sys.argv[1]).absolute()).parents[1]}\n")
