"""The part of the soak benchmark that tests by the schema: how it reads reports, and what it says without its tool."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from tests.support.tiny_model import write_tiny_model

from elbowroom.bench import soak, soak_schema
from elbowroom.models.hf_config import read_config

VALID = {"coverage": {"accepted": 1, "rejected": 2}, "fuzzing": {"accepted": 4, "rejected": 0}}
CLEAN: dict[str, Any] = {
    "seed": 3,
    "running_time": 8.0,
    "stop_reason": "max_time",
    "complete": True,
    "operations": {"selected": 2, "tested": 2},
    "test_cases": {"generated": 70},
    "failures": [],
    "errors": [],
    "valid_rates": dict.fromkeys(soak_schema.GENERATING, VALID),
}
FAILURE = {"title": "Server error", "count": 3, "operations": ["POST /v1/completions"]}


def report(**changed: Any) -> dict[str, Any]:
    return copy.deepcopy(CLEAN) | changed


def test_a_clean_report_has_no_failures() -> None:
    rows, failures, reason = soak_schema.read_report(report())

    assert failures == 0
    assert reason == "70 cases of 2 operations as the schema says"
    assert rows[0] == {"row": "schema: POST /v1/chat/completions", "valid": 5, "refused": 2}
    assert rows[-1]["stop_reason"] == "max_time"


def test_failures_and_errors_are_counted_and_named() -> None:
    _, failures, reason = soak_schema.read_report(report(failures=[FAILURE], errors=[{"title": "Runtime Error"}]))

    assert failures == 4
    assert reason == '3 x Server error (POST /v1/completions); error: {"title": "Runtime Error"}'


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"complete": False}, "2 of 2"),
        ({"operations": {"selected": 9, "tested": 8}}, "8 of 9"),
        ({"valid_rates": {"POST /v1/completions": VALID}}, "no valid request to POST /v1/chat/completions"),
    ],
)
def test_a_run_that_did_not_reach_everything_proves_nothing(changed: dict[str, Any], said: str) -> None:
    _, failures, reason = soak_schema.read_report(report(**changed))

    assert failures is None
    assert said in reason


def test_failures_count_even_if_the_run_ended_early() -> None:
    assert soak_schema.read_report(report(failures=[FAILURE], complete=False))[1] == 3


def test_without_the_package_the_claim_has_no_value_and_names_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak_schema, "is_installed", lambda: False)

    rows, claim = soak.by_schema(seconds=1.0)

    assert rows == []
    assert (claim.id, claim.value, claim.holds) == ("soak.schema", None, False)
    assert "`make bench`" in claim.reason


def test_the_tested_copy_of_a_model_has_a_short_context(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = write_tiny_model(tmp_path_factory.mktemp("tiny"), context=8192)

    short = soak_schema.with_short_context(directory, tmp_path_factory.mktemp("copy") / "model")

    assert read_config(short).max_positions == soak_schema.CONTEXT
    assert read_config(directory).max_positions == 8192
