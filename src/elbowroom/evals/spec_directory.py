"""SpecDirectory: a directory that says what it is for, and is refused for anything else.

``spec.json`` says what is measured and ``env.json`` where; results are written beside them, whole or not at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from elbowroom.errors import RequestError

_OURS = frozenset({"env.json", "env.json.new", "spec.json.new"})
"""What a crash can leave before there is a spec."""
_OTHER = "give another --out, or ask for the same as before"


class SpecDirectory:
    """A directory of one spec.

    Args:
        path: made if it is not there.
        spec: what is measured; plain values.
        env: where it is measured; plain values.

    Raises:
        RequestError: the directory is of another spec, holds files of something else, or is not writable.
    """

    def __init__(self, path: Path, spec: Mapping[str, object], env: Mapping[str, object]) -> None:
        self.path = path
        with self._file_errors():
            path.mkdir(parents=True, exist_ok=True)
            self._check_spec(spec, env)

    def read(self, name: str) -> Any:
        """Return what ``write`` wrote, or None."""
        path = self.path / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def write(self, name: str, value: Mapping[str, object]) -> None:
        """Write ``NAME.json``, whole or not at all."""
        with self._file_errors():
            self._replace(f"{name}.json", json.dumps(value, indent=1, allow_nan=False) + "\n")

    def _check_spec(self, spec: Mapping[str, object], env: Mapping[str, object]) -> None:
        wanted = json.loads(json.dumps(spec))
        found = self.read("spec")
        if found is None:
            if any(path.name not in _OURS for path in self.path.iterdir()):
                raise RequestError(f"--out {self.path} holds other files", "give a new or an empty directory")
            self.write("env", env)
            self.write("spec", spec)
        elif found != wanted:
            names = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
            changes = "; ".join(f"{name} was {found.get(name)!r}, is {wanted.get(name)!r}" for name in names)
            raise RequestError(f"--out {self.path} holds a run of another kind: {changes}", _OTHER)

    @contextmanager
    def _file_errors(self) -> Iterator[None]:
        """Turn what the file system says into an error that names the option."""
        try:
            yield
        except OSError as reason:
            message = f"--out {self.path}: {os.strerror(reason.errno or 0)}"
            raise RequestError(message, "make room there, or give another directory") from reason

    def _replace(self, name: str, text: str) -> None:
        draft = self.path / f"{name}.new"
        draft.write_text(text, encoding="utf-8")
        draft.replace(self.path / name)
