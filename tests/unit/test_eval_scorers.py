"""Scorers against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from elbowroom.errors import PlanError
from elbowroom.evals.base import Turn
from elbowroom.evals.bleu import sentence_bleu
from elbowroom.evals.scorers import first_function, score_turn

ADD = "def add(first, second):\n    total = first + second\n    return total"
SUB = "def sub(first, second):\n    total = first - second\n    return total"


def turn(scorer: str, *targets: str, rivals: tuple[str, ...] = ()) -> Turn:
    return Turn(
        prompt="?",
        target=targets[0],
        more_targets=targets[1:],
        reference="",
        max_new_tokens=8,
        scorer=scorer,
        rivals=rivals,
    )


@pytest.mark.parametrize(
    ("scorer", "targets", "reply", "value"),
    [
        ("first", ["482135"], "It is 482135.", 1.0),
        ("first", ["482135"], "1 or 482135", 0.0),
        ("first", ["red"], " red", 1.0),
        ("number", ["17"], " 17, I think", 1.0),
        ("number", ["17"], " 17.0", 1.0),
        ("number", ["17"], " 017", 1.0),
        ("number", ["17"], " 170", 0.0),
        ("number", ["17"], "not 16 but 17", 0.0),
        ("number", ["-3"], "it is -3", 1.0),
        ("number", ["17"], "seventeen", 0.0),
        ("share", ["ABC", "def"], "abc and DEF", 1.0),
        ("share", ["ABC", "def"], "xABCx", 0.5),
        ("share", ["a1", "b2", "c3"], "a1 b2", 2 / 3),
        ("share", ["a1"], "", 0.0),
    ],
)
def test_values_are_those_of_the_definition(scorer: str, targets: list[str], reply: str, value: float):
    assert score_turn(turn(scorer, *targets), reply).value == pytest.approx(value)


def test_a_score_says_what_is_missing():
    assert score_turn(turn("share", "one", "two"), "only one").why == "missing: two"


def test_a_scorer_has_to_exist():
    with pytest.raises(PlanError, match="unknown scorer 'guess'"):
        score_turn(turn("guess", "x"), "x")


@pytest.mark.parametrize(
    ("reference", "candidate", "value"),
    [
        ("a b c d e", "a b c d e", 1.0),
        ("a b c d e", "v w x y z", 0.0),
        ("a b c d e", "", 0.0),
        ("a", "a", 0.0),  # no order but the first can match, and ln 1 smooths nothing
        # 3/4 words, 1/3 pairs, then ln 4 / (5 x 2) of 2 and ln 4 / (5 x 4) of 1; five words against four: exp(-1/4).
        ("a b c d e", "a b x d", math.exp(-0.25) * (3 / 4 * 1 / 3 * math.log(4) / 20 * math.log(4) / 20) ** 0.25),
        # Repeated words count as often as the reference has them: 2/4, 1/3, then ln 4 / 10 of 2, ln 4 / 20 of 1.
        ("a b", "a b a b", (2 / 4 * 1 / 3 * math.log(4) / 20 * math.log(4) / 20) ** 0.25),
        # Longer than the reference: no brevity penalty. 4/5, 3/4, 2/3, 1/2.
        ("a b c d", "a b c d e", (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25),
    ],
)
def test_bleu_matches_its_formula(reference: str, candidate: str, value: float):
    assert sentence_bleu(reference.split(), candidate.split()) == pytest.approx(value)


def test_bleu_of_a_worked_example():
    assert sentence_bleu(["a", "b", "c", "d", "e"], ["a", "b", "x", "d"]) == pytest.approx(0.144986, abs=1e-6)


@pytest.mark.parametrize(
    "reply",
    [
        ADD,
        f"{ADD}\n```\nThat was it.",
        f"```python\n{ADD}\n```",
        f"Here you are:\n```python\n{ADD}\n```\nGood luck.",
        f"import os\n\n{ADD}\n\n\n{SUB}",
        f"{ADD}\n\ndef cut(sho",
        f"    {ADD}".replace("\n", "\n    "),
        f"class Sums:\n    {ADD}".replace("\n    ", "\n        ").replace("class Sums:\n        ", "class Sums:\n    "),
    ],
)
def test_the_first_function_is_found(reply: str):
    assert first_function(reply).split() == ADD.split()


@pytest.mark.parametrize("reply", ["", "no code at all", "(" * 300, "\x00", "def broken(:\n  pass"])
def test_a_reply_without_function_is_no_error(reply: str):
    assert score_turn(turn("function", ADD), reply).value == 0.0


def test_a_function_counts_when_it_is_nearest_to_the_asked_one():
    assert score_turn(turn("function", ADD, rivals=(SUB,)), ADD).value == 1.0
    assert score_turn(turn("function", ADD, rivals=(SUB,)), SUB).value == 0.0
    assert score_turn(turn("function", ADD), "def add(first, second):\n    return 0").value == 0.0
    assert score_turn(turn("function", ADD, rivals=(ADD,)), ADD).value == 0.0
