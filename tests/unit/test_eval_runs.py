"""Runs: modes, histories, directories that survive a crash, errors beside wrong answers, controls."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.evals import FickleTarget, ForgetfulTarget, LoggedTarget, PieceTokenizer

from elbowroom.errors import EngineClosed, IntegrityError, RequestError
from elbowroom.evals.base import Mode, Sample
from elbowroom.evals.controls import OracleTarget, run_controls
from elbowroom.evals.retrieval import Outcome, outcomes_of, summarize
from elbowroom.evals.run_directory import RunDirectory
from elbowroom.evals.run_plan import RunPlan
from elbowroom.evals.runner import run_plan
from elbowroom.evals.tasks import TASKS

TOKENIZER = PieceTokenizer()
PLAN = RunPlan(tasks=("kv", "mf"), context_tokens=1200, num_queries=8, num_facts=2)
ENV: dict[str, object] = {"cpu": "any"}


def oracle(plan: RunPlan = PLAN) -> OracleTarget:
    return OracleTarget([sample for task in plan.tasks for sample in plan.samples(task, TOKENIZER)], TOKENIZER)


def kv_sample(mode: Mode, num_facts: int = 3) -> Sample:
    plan = replace(PLAN, tasks=("kv",), mode=mode, num_facts=num_facts)
    return next(plan.samples("kv", TOKENIZER))


def run_in(path: Path, target: LoggedTarget, plan: RunPlan = PLAN, *, retry_errors: bool = False) -> dict[str, object]:
    """Run into a directory and return the summary as JSON."""
    directory = RunDirectory(path, plan.to_json(), ENV, retry_errors)
    try:
        results = run_plan(plan, target, TOKENIZER, num_parallel=1, directory=directory)
    finally:
        directory.close()
    summary: dict[str, object] = {name: result.to_json() for name, result in results.items()}
    directory.write("summary", summary)
    return json.loads((path / "summary.json").read_text())


def test_questions_of_a_session_follow_the_references():
    sample = kv_sample("multi_turn")
    target = LoggedTarget(OracleTarget([sample], TOKENIZER))
    outcomes = list(outcomes_of(target, sample, "gold"))
    first, second, third = sample.turns
    assert target.log.calls == [
        ("fork ask", first.prompt),
        ("main push", first.prompt),
        ("main push", first.reference),
        ("fork ask", second.prompt),
        ("main push", second.prompt),
        ("main push", second.reference),
        ("fork ask", third.prompt),
    ]
    assert [outcome.turn for outcome in outcomes] == [0, 1, 2]
    assert target.log.opened == target.log.closed == 4


def test_a_session_may_keep_its_own_answers():
    sample = kv_sample("multi_turn")
    target = LoggedTarget(OracleTarget([sample], TOKENIZER))
    assert all(outcome.correct for outcome in outcomes_of(target, sample, "own"))
    assert target.log.calls == [("main ask", turn.prompt) for turn in sample.turns]


def test_requests_see_the_context_and_nothing_of_each_other():
    sample = kv_sample("multi_request")
    target = LoggedTarget(OracleTarget([sample], TOKENIZER))
    list(outcomes_of(target, sample, "gold"))
    assert target.contexts == [sample.context]
    assert target.log.calls == [("fork ask", turn.prompt) for turn in sample.turns]
    assert target.log.opened == target.log.closed == 4


def test_a_summary_has_turns_depths_and_errors_apart():
    outcomes = [
        Outcome("a", "1", "1", 1.0, 0.05, 0),
        Outcome("a", "1", "1", 0.5, 0.95, 1),
        Outcome("b", "1", "", 0.0, 0.05, 0, error="RuntimeError: no"),
        Outcome("c", "1", "2", 0.0, 0.05, 0),
    ]
    result = summarize(outcomes, 100)
    assert result.accuracy == 0.5
    assert (result.num_queries, result.num_correct, result.num_errors) == (3, 1, 1)
    assert [(part.num_queries, part.accuracy) for part in result.by_turn] == [(2, 0.5), (1, 0.5)]
    assert (result.by_depth[0].accuracy, result.by_depth[9].accuracy, result.by_depth[4].accuracy) == (0.5, 0.5, None)
    assert result.errors == ("RuntimeError: no",)
    assert result == summarize(reversed(outcomes), 100)


def test_a_run_counts_every_question_and_tells_how_far_it_is():
    moves: list[tuple[int, int]] = []
    results = run_plan(PLAN, oracle(), TOKENIZER, num_parallel=2, advance=lambda *move: moves.append(move))
    assert [result.num_queries for result in results.values()] == [8, 8]
    assert all(result.accuracy == 1.0 for result in results.values())
    assert moves[-1] == (16, 16)
    assert moves == sorted(moves)


def test_a_directory_holds_a_line_for_each_question(tmp_path: Path):
    summary = run_in(tmp_path, LoggedTarget(oracle()))
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert {(line["task"], line["sample_id"], line["turn"]) for line in lines} == {
        (task, f"{task}-{number}", turn) for task in PLAN.tasks for number in range(4) for turn in range(2)
    }
    assert all(line["reply"] and line["token_ids"] for line in lines)
    assert json.loads((tmp_path / "spec.json").read_text())["tasks"] == {"kv": 1, "mf": 1}
    assert json.loads((tmp_path / "env.json").read_text()) == ENV
    assert summary["kv"]["accuracy"] == 1.0


def test_a_finished_run_asks_nothing_again(tmp_path: Path):
    first = run_in(tmp_path, LoggedTarget(oracle()))
    again = LoggedTarget(oracle())
    assert run_in(tmp_path, again) == first
    assert again.contexts == []


@pytest.mark.parametrize("cut", [1, 2, 40, 500, 900, 1300])
def test_a_run_that_was_killed_goes_on_to_the_same_summary(tmp_path: Path, cut: int):
    plan = replace(PLAN, tasks=("kv", "vt"))
    whole = run_in(tmp_path / "whole", LoggedTarget(ForgetfulTarget(oracle(plan))), plan)
    assert 0 < whole["kv"]["accuracy"] < 1
    assert 0 < whole["vt"]["accuracy"] < 1
    broken = LoggedTarget(ForgetfulTarget(oracle(plan)), errors={5: KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path / "killed", broken, plan)
    path = tmp_path / "killed" / "samples.jsonl"
    text = path.read_bytes()
    path.write_bytes(text[:-cut])  # what kill -9 leaves: a line that stops anywhere
    assert not (tmp_path / "killed" / "summary.json").exists()
    rest = LoggedTarget(ForgetfulTarget(oracle(plan)))
    summary = run_in(tmp_path / "killed", rest, plan)
    assert summary == whole
    assert 0 < len(rest.contexts) < 8
    lines = path.read_text().splitlines()
    assert len(lines) == len({json.dumps([json.loads(line)[key] for key in ("sample_id", "turn")]) for line in lines})
    assert len(lines) == 16


def test_a_killed_start_is_no_foreign_directory(tmp_path: Path):
    (tmp_path / "env.json").write_text("{}")
    (tmp_path / "spec.json.new").write_text("{")
    assert run_in(tmp_path, LoggedTarget(oracle()))["kv"]["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("change", "words"),
    [({"seed": 1}, "seed was 0, is 1"), ({"mode": "multi_turn"}, "mode was None, is 'multi_turn'")],
)
def test_another_spec_is_refused_and_changes_nothing(tmp_path: Path, change: dict[str, object], words: str):
    run_in(tmp_path, LoggedTarget(oracle()))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RequestError, match=words) as refused:
        RunDirectory(tmp_path, replace(PLAN, **change).to_json(), ENV)
    assert "--out" in (refused.value.hint or "")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_directories_of_others_are_left_alone(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RequestError, match="holds other files"):
        RunDirectory(tmp_path, PLAN.to_json(), ENV)
    with pytest.raises(RequestError, match=r"--out .*notes\.txt"):
        RunDirectory(tmp_path / "notes.txt", PLAN.to_json(), ENV)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_error_is_no_wrong_answer_and_can_be_tried_again(tmp_path: Path):
    failing = LoggedTarget(oracle(), errors={1: RuntimeError("lost"), 6: RequestError("too long", "be short")})
    first = run_in(tmp_path, failing)
    assert (first["kv"]["num_queries"], first["kv"]["num_errors"], first["kv"]["accuracy"]) == (6, 2, 1.0)
    assert first["kv"]["errors"] == ["RuntimeError: lost"]
    assert first["mf"]["errors"] == ["RequestError: too long"]
    kept = LoggedTarget(oracle())
    assert run_in(tmp_path, kept) == first
    assert kept.contexts == []
    retried = LoggedTarget(oracle())
    second = run_in(tmp_path, retried, retry_errors=True)
    assert len(retried.contexts) == 2
    assert (second["kv"]["num_queries"], second["kv"]["num_errors"]) == (8, 0)


@pytest.mark.parametrize("error", [EngineClosed("gone"), IntegrityError("broken")])
def test_what_would_fail_every_sample_ends_the_run(error: Exception):
    with pytest.raises(type(error)):
        run_plan(PLAN, LoggedTarget(oracle(), errors={2: error}), TOKENIZER)


def test_sizes_are_refused_before_anything_is_asked():
    target = LoggedTarget(oracle())
    with pytest.raises(RequestError, match="vt: questions, answers"):
        run_plan(replace(PLAN, tasks=("kv", "vt"), context_tokens=320), target, TOKENIZER)
    assert target.contexts == []


def test_controls_of_a_sound_target_say_one_and_nothing_without_context():
    class Blind(LoggedTarget):
        def open(self, context: str):
            return super().open(context) if context else FickleTarget()

    found = dict(run_controls(PLAN, Blind(oracle()), TOKENIZER))
    assert list(found) == ["kv", "mf"]
    for result in found.values():
        assert (result.oracle, result.null, result.num_differing, result.num_queries) == (1.0, 0.0, 0, 8)


def test_a_target_that_changes_its_mind_fails_the_controls():
    with pytest.raises(IntegrityError, match="8 of 8 replies changed"):
        list(run_controls(PLAN, FickleTarget(), TOKENIZER))


def test_a_task_that_cannot_be_answered_fails_the_controls(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(TASKS._paths, "short", "tests.support.evals:TOO_SHORT")
    with pytest.raises(IntegrityError, match=r"short: the references score 0\.000"):
        list(run_controls(replace(PLAN, tasks=("short",)), FickleTarget(), TOKENIZER))


def test_a_first_question_may_be_read_with_the_context():
    plan = replace(PLAN, tasks=("first_seen",), context_tokens=400, num_facts=2)
    sample = next(plan.samples("first_seen", TOKENIZER))
    target = LoggedTarget(OracleTarget([sample], TOKENIZER))
    outcomes = list(outcomes_of(target, sample, "gold"))
    first, second = sample.turns
    assert target.contexts == [sample.context + first.prompt]
    assert target.log.calls == [
        ("fork ask", ""),
        ("main push", first.reference),
        ("fork ask", second.prompt),
    ]
    assert all(outcome.correct for outcome in outcomes)
    unseen = replace(plan, tasks=("follow_ups",)).samples("follow_ups", TOKENIZER)
    assert sample.context in {each.context for each in unseen}


def test_requests_of_their_own_have_no_first_question():
    plan = replace(PLAN, tasks=("first_seen",), context_tokens=400, mode="multi_request")
    sample = next(plan.samples("first_seen", TOKENIZER))
    assert sample.opening == sample.context
    assert not sample.first_seen
