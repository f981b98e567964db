"""Training text: the running interpreter's standard library without tests, tables and the held-out files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from elbowroom.evals.heldout import heldout_names, stdlib_root

SKIPPED_FOLDERS = frozenset({"site-packages", "test", "tests", "idle_test", "encodings", "__pycache__"})
"""Not ours, test data, or code page tables."""


def training_files() -> list[Path]:
    """Return the files that may be trained on, sorted; held-out files are never among them."""
    root, heldout = stdlib_root(), set(heldout_names())
    files = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(relative.parts) and relative.as_posix() not in heldout:
            files.append(path)
    return files


def training_texts() -> Iterator[str]:
    """Yield the text of every training file that is valid UTF-8."""
    for path in training_files():
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


class Corpus:
    """Texts as one token stream with the places where a whole line may be put in between.

    Args:
        texts: documents; each is kept apart from the next by a line break.
        tokenizer: the built-in model's tokenizer, under which text before a non-blank line never merges with it.
    """

    def __init__(self, texts: list[str], tokenizer: Tokenizer) -> None:
        encoded = [item.ids for item in tokenizer.encode_batch([text.rstrip("\n") + "\n" for text in texts])]
        self.tokens: NDArray[np.int32] = np.concatenate([np.array(ids, dtype=np.int32) for ids in encoded])
        vocab = tokenizer.get_vocab_size()
        pieces = [tokenizer.decode([token]) for token in range(vocab)]
        ends_line = np.array([piece != "" and piece.strip("\n") == "" for piece in pieces])
        after_break = np.flatnonzero(ends_line[self.tokens]) + 1
        after_break = after_break[after_break < len(self.tokens)]
        self.line_starts: NDArray[np.int64] = after_break[~ends_line[self.tokens[after_break]]]

    def slice(self, rng: np.random.Generator, length: int) -> tuple[list[int], list[int]]:
        """Return ``length`` tokens from a random line start on, and the line starts inside as offsets (0 first)."""
        last = int(np.searchsorted(self.line_starts, len(self.tokens) - length - 1))
        first = int(rng.integers(last))
        start = int(self.line_starts[first])
        stop = int(np.searchsorted(self.line_starts, start + length))
        inside = self.line_starts[first:stop] - start
        return self.tokens[start : start + length].tolist(), inside.tolist()
