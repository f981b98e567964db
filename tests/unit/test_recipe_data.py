"""The held-out text of the evaluations is never trained on."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipes.builtin import data

from elbowroom.evals.heldout import heldout_names, heldout_texts, stdlib_root


def test_training_and_heldout_files_are_disjoint() -> None:
    root = stdlib_root()
    trained = {path.relative_to(root).as_posix() for path in data.training_files()}
    assert len(trained) > 300
    assert trained.isdisjoint(heldout_names())


def test_heldout_files_exist_and_are_enough() -> None:
    assert len(heldout_texts()) == len(heldout_names()) >= 40
    assert sum(len(text.encode("utf-8")) for text in heldout_texts()) >= 400_000


def test_training_never_opens_a_heldout_file(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    read_text = Path.read_text

    def recording(self: Path, *args: str | None, **kwargs: str | None) -> str:
        opened.append(self.as_posix())
        return read_text(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", recording)
    num_bytes = sum(len(text) for text in data.training_texts())
    root = stdlib_root().as_posix()
    assert num_bytes > 4_000_000
    assert any(path.startswith(root) for path in opened)
    assert not {f"{root}/{name}" for name in heldout_names()} & set(opened)
