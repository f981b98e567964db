"""Questions to an engine: read as prompts, or decoded token by token where a plan reads a part of what it keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.support.tiny_model import write_tiny_model

from elbowroom.engine.llm import LLM
from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.errors import RequestError
from elbowroom.evals.comparison.perplexity import FILE, score_windows
from elbowroom.evals.engine_target import EngineSession, EngineTarget, PlainTokenizer

CONTEXT, QUESTION = "abcdefgh " * 90, "what?"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("tiny"), context=2048))


def watched(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Return a list that gets the tokens of every step and whether they choose what they read."""
    store, steps = llm.engine.parts.store, []
    reserve = store.reserve

    def spy(step: Any) -> object:
        missing = reserve(step)
        steps.append((len(step.positions), missing is None and step.prepared.selection is not None))
        return missing

    monkeypatch.setattr(store, "reserve", spy)
    return steps


@pytest.mark.parametrize(
    ("kv", "expected"),
    [
        ("quest(256,skip=0)", [(1, False), *[(1, True)] * 4, *[(1, True)] * 2]),
        ("plain", [(5, False), *[(1, False)] * 2]),
    ],
)
def test_questions_select_where_a_plan_reads_a_part(model: str, kv: str, expected: list[Any], monkeypatch: Any) -> None:
    with LLM(model, "48MiB", kv, prefix_cache=False) as llm:
        session = EngineTarget(llm).open(CONTEXT)
        steps = watched(llm, monkeypatch)
        assert len(PlainTokenizer(llm.tokenizer).encode(QUESTION)) == 5
        session.ask(QUESTION, 3)
        assert steps == expected
        del steps[:]
        session.fork().ask(QUESTION, 3)
        assert [chosen for _, chosen in steps[-2:]] == [chosen for _, chosen in expected[-2:]]


def test_a_question_by_token_is_answered_as_one_that_is_read(model: str) -> None:
    """Where everything is read there is no difference, in the reply and in what the session holds."""
    with LLM(model, "48MiB", "plain") as llm:
        tokenizer, found = PlainTokenizer(llm.tokenizer), []
        for by_token in (False, True):
            with llm.session(CONTEXT) as session:
                asked = EngineSession(session, tokenizer, by_token=by_token)
                replies = [asked.ask(prompt, 12) for prompt in (QUESTION, " and then?", "x")]
                found.append((replies, session.token_ids))
        assert found[0] == found[1]
        assert len(found[0][0][0].token_ids) == 12


def test_perplexity_is_decoded(model: str, tmp_path: Path, monkeypatch: Any) -> None:
    """All tokens of a window that are scored but the first, which the prompt predicts, are read as decoding reads."""
    with LLM(model, "48MiB", "quest(256,skip=0)", prefix_cache=False) as llm:
        steps = watched(llm, monkeypatch)
        tokenizer = PlainTokenizer(llm.tokenizer)
        (scored,) = score_windows(llm, tokenizer, [tokenizer.encode(CONTEXT)[:600]], tmp_path / FILE, max)
    assert scored.num_tokens == 256
    assert steps[-255:] == [(1, True)] * 255
    assert sum(count for count, chosen in steps if not chosen) == 600 - 256


def test_forced_tokens_are_those_of_the_model(model: str) -> None:
    with LLM(model, "48MiB") as llm, pytest.raises(RequestError, match="token id 100000"):
        llm.generate({"prompt_token_ids": [1]}, SamplingParams(forced=(100_000,)))
