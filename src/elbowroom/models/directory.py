"""Model directories: where a model is, and a start on reading it. Imports no torch, so that it can run before that."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from elbowroom.errors import ConfigError, ModelError

BUILTIN = Path(__file__).parent / "builtin"
THINKING = Path(__file__).parent / "builtin_thinking"
"""A second, very small model: it adds digits and thinks before it answers, the longer the more there are."""
SHIPPED = {"builtin": BUILTIN, "builtin-thinking": THINKING}
"""Names of the models that come with Elbowroom; a directory of the same name comes first."""
READ_AHEAD_BYTES = 4 * 2**30
"""Two seconds of a fast disk; the readers go on from there, and a large model is not pushed out by its own end."""
_ADVICE_BYTES = 128 * 1024
"""Linux may cut one piece of advice down to the device's read-ahead window, and this is the usual one."""


def model_path(model: str | None) -> Path:
    """Return where ``model`` would be, unchecked; None is the built-in model, and a shipped one has a name."""
    if model is None:
        return BUILTIN
    directory = Path(model).expanduser()
    return SHIPPED.get(model, directory) if not directory.is_dir() else directory


def find_model(model: str | None) -> Path:
    """Return the directory of ``model``; None is the model that comes with Elbowroom.

    Raises:
        ModelError: there is no such directory.
        ConfigError: the directory has no config.json.
    """
    directory = model_path(model)
    if not directory.is_dir():
        if model is None:
            raise ModelError(f"the built-in model is not installed ({directory})", "name a model directory")
        found = "a file" if directory.exists() else "nothing"
        raise ModelError(
            f"model {model!r}: expected a directory, found {found} at {directory.absolute()}",
            "give a directory with config.json and safetensors files; models are never downloaded",
        )
    if not (directory / "config.json").is_file():
        raise ConfigError(f"{directory} has no config.json", "give the directory that holds config.json")
    return directory


def read_ahead(directory: Path) -> threading.Thread | None:
    """Start to bring the weights of ``directory`` into the page cache, which is no memory of this process.

    Worth calling as early as possible: the disk works while Python imports. Fails silently, as it is only advice;
    whoever reads the files will find out.

    Returns:
        the thread that asks the operating system; None where there is no such advice.
    """
    if not hasattr(os, "posix_fadvise"):
        return None
    thread = threading.Thread(target=_advise, args=(directory,), name="elbowroom-read-ahead", daemon=True)
    thread.start()
    return thread


def _advise(directory: Path) -> None:
    left = READ_AHEAD_BYTES
    for path in sorted(directory.glob("*.safetensors")):
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            size = min(os.fstat(file).st_size, left)
            for offset in range(0, size, _ADVICE_BYTES):
                os.posix_fadvise(file, offset, _ADVICE_BYTES, os.POSIX_FADV_WILLNEED)
        except OSError:
            continue
        finally:
            os.close(file)
        left -= size
