"""Prompts of a job: token ids on disk, so that memory holds a few bytes of each prompt, whatever its length."""

from __future__ import annotations

import os
import tempfile
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
_WIDTH = 4
"""Bytes of a token id."""


class Prompts(Protocol):
    """Token ids of numbered prompts."""

    def __len__(self) -> int:
        """Return how many there are."""

    def read(self, prompt: int, start: int, stop: int) -> Ids:
        """Return ids ``start .. stop - 1`` of a prompt, int32 ``[stop - start]``."""

    def length(self, prompt: int) -> int:
        """Return the tokens of a prompt."""


class PromptSpool:
    """Prompts in a nameless file, which is gone when it is closed or the process ends.

    Args:
        directory: where there is room for 4 bytes a token.
    """

    def __init__(self, directory: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115  closed by close
        self._ends = array("q", [0])

    def __len__(self) -> int:
        """Return how many prompts there are."""
        return len(self._ends) - 1

    def append(self, token_ids: Sequence[int]) -> int:
        """Add a prompt and return its number.

        Raises:
            OSError: the disk is full.
        """
        self._file.write(np.asarray(token_ids, dtype=np.int32).tobytes())
        self._ends.append(self._ends[-1] + len(token_ids))
        return len(self) - 1

    def flush(self) -> None:
        """Make all prompts readable.

        Raises:
            OSError: the disk is full.
        """
        self._file.flush()

    def length(self, prompt: int) -> int:
        """Return the tokens of a prompt."""
        return self._ends[prompt + 1] - self._ends[prompt]

    def read(self, prompt: int, start: int, stop: int) -> Ids:
        """Return ids ``start .. stop - 1`` of a prompt, int32 ``[stop - start]``."""
        begin = (self._ends[prompt] + start) * _WIDTH
        return np.frombuffer(os.pread(self._file.fileno(), (stop - start) * _WIDTH, begin), dtype=np.int32)

    def tokens(self, prompt: int) -> tuple[int, ...]:
        """Return all ids of a prompt."""
        return tuple(self.read(prompt, 0, self.length(prompt)).tolist())

    def close(self) -> None:
        """Forget everything."""
        self._file.close()

    def __enter__(self) -> Self:
        """Return itself; ``close`` runs at the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()
