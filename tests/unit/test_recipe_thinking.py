"""The recipe of the model that thinks: rows say what they teach, and a seed gives one model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from recipes.thinking import train
from recipes.thinking.export import export
from recipes.thinking.tokenizer import MARKS, build_tokenizer

from elbowroom.evals.sums import MAX_TERMS, STEP_TOKENS, random_sum
from elbowroom.models.directory import THINKING
from elbowroom.models.thinking import find_marks
from elbowroom.models.tokenizer import Tokenizer


def test_sums_are_worked_out_term_by_term() -> None:
    rng = np.random.default_rng(0)
    for num_terms in (1, 2, MAX_TERMS):
        made = random_sum(rng, num_terms)
        digits = [int(digit) for digit in made.question[1::2]]
        assert len(digits) == num_terms
        assert int(made.answer) == sum(digits) == int(made.working[-3:])
        assert len(made.working) == STEP_TOKENS * num_terms
        assert made.working[::STEP_TOKENS] == made.question[::2]


def test_rows_teach_working_and_answer_but_not_where_working_was_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, rng = build_tokenizer(), np.random.default_rng(0)
    begin, end = (tokenizer.token_to_id(mark) for mark in MARKS)
    for share, mark_weight, answer_weight in ((0.0, 1.0, 1.0), (1.0, 0.0, train.CUT_WEIGHT)):
        monkeypatch.setattr(train, "CUT_SHARE", share)
        tokens, weights = train.make_row(tokenizer, rng, 5, instructed=True)
        assert len(tokens) == len(weights)
        first, last = tokens.index(begin), tokens.index(end)
        assert not any(weights[:first])
        assert set(weights[first:last]) == {1.0}
        assert weights[last] == mark_weight
        assert set(weights[last + 1 :]) == {answer_weight}


def test_a_seed_gives_one_model(tmp_path: Path) -> None:
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        train.Trainer(tmp_path / name, num_steps=2, peak_rate=1e-3, seed=3).train()
        export(tmp_path / name, tmp_path / f"{name}-model")
        made.append((tmp_path / f"{name}-model" / "model.safetensors").read_bytes())
    state = torch.load(tmp_path / "a" / "checkpoint.pt", weights_only=True)
    assert state["counters"][0] == 2
    assert made[0] == made[1]


def test_the_shipped_model_is_small_and_has_its_marks() -> None:
    assert sum(path.stat().st_size for path in THINKING.iterdir()) <= 2**20
    marks = find_marks(Tokenizer.from_directory(THINKING))
    assert marks is not None
    assert (marks.begin, marks.end) == MARKS
    assert len(marks.end_ids) == 1
