"""Rounds in turns, medians with their intervals, and ratios round by round."""

from __future__ import annotations

import itertools
import random
import statistics
from collections import Counter

import pytest

from elbowroom.bench.pairs import MedianInterval, Turns, median_ratio, order_of, ratio_claim, take_turns
from elbowroom.errors import ElbowroomError


@pytest.mark.parametrize("names", ["ab", "abc"])
def test_every_order_comes_equally_often(names):
    count = len(list(itertools.permutations(names)))
    seen = Counter(tuple(order_of(names, number)) for number in range(2 * count))
    assert seen == dict.fromkeys(itertools.permutations(names), 2)


@pytest.mark.parametrize("num_sides", [1, 2, 3, 4, 5])
def test_every_side_has_every_place_equally_often(num_sides):
    names = [str(number) for number in range(num_sides)]
    rounds = [order_of(names, number) for number in range(2 * num_sides)]
    places = Counter((place, name) for order in rounds for place, name in enumerate(order))
    assert set(places.values()) == {2}
    assert len(places) == num_sides**2


def test_warm_ups_are_thrown_away_and_rounds_share_their_number():
    calls: list[tuple[str, int]] = []

    def side(name):
        return lambda number: calls.append((name, number)) or {"rate": float(number)}

    turns = take_turns({"a": side("a"), "b": side("b")}, num_rounds=3, num_warmups=2)
    assert turns.figures("a", "rate") == turns.figures("b", "rate") == [0.0, 1.0, 2.0]
    assert Counter(calls) == Counter((name, number) for name in "ab" for number in range(-2, 3))


def test_a_side_that_fails_is_left_out_and_the_others_go_on():
    def breaks(number):
        if number == 1:
            raise ElbowroomError("it broke", "mend it")
        return {"rate": 1.0}

    turns = take_turns({"ours": lambda _: {"rate": 2.0}, "rival": breaks}, num_rounds=4)
    assert turns.figures("ours", "rate") == [2.0] * 4
    assert turns.figures("rival", "rate") == []
    assert turns.failures == {"rival": "it broke: mend it"}


def test_a_bug_of_the_benchmark_is_not_taken_for_a_failing_side():
    with pytest.raises(ZeroDivisionError):
        take_turns({"ours": lambda _: {"rate": 1 / 0}}, num_rounds=1)


@pytest.mark.parametrize(
    ("count", "low", "coverage"), [(1, 0, 0.0), (2, 0, 0.5), (5, 0, 0.9375), (6, 0, 0.96875), (9, 1, 0.9609375)]
)
def test_the_interval_is_the_narrowest_that_covers_enough(count, low, coverage):
    """Coverages are those of tables for the sign test."""
    found = MedianInterval.of([float(value) for value in reversed(range(count))])
    assert (found.low, found.high) == (low, count - 1 - low)
    assert found.coverage == pytest.approx(coverage)
    assert found.median == (count - 1) / 2


def test_the_interval_covers_as_often_as_it_says():
    rng = random.Random(5)
    draws = [MedianInterval.of([rng.expovariate(1.0) for _ in range(9)]) for _ in range(2000)]
    held = statistics.fmean(each.low <= 0.6931 <= each.high for each in draws)
    assert held == pytest.approx(draws[0].coverage, abs=0.02)


def test_a_ratio_is_that_of_the_same_round():
    """Both sides slow down tenfold on the way; their ratio does not."""
    ours = [{"rate": 30.0 / slow} for slow in (1, 3, 10)]
    rival = [{"rate": 10.0 / slow} for slow in (1, 3, 10)]
    ratio = median_ratio(Turns({"ours": ours, "rival": rival}), "ours", "rival", "rate")
    assert ratio is not None
    assert (ratio.low, ratio.median, ratio.high) == pytest.approx((3.0, 3.0, 3.0))


def test_a_claim_has_the_median_ratio_and_says_what_its_interval_is():
    turns = Turns({"ours": [{"rate": 4.0}, {"rate": 6.0}, {"rate": 5.0}], "rival": [{"rate": 2.0}] * 3})
    claim = ratio_claim("x.vs_rival", turns, "rival", "rate", 2.5, "x")
    assert (claim.value, claim.low, claim.high, claim.num_runs, claim.holds) == (2.5, 2.0, 3.0, 3, True)
    assert "75.0 %" in claim.reason
    assert not ratio_claim("x.vs_rival", turns, "rival", "rate", 2.6, "x").holds


def test_a_claim_on_an_absent_rival_has_no_value_and_says_why():
    turns = Turns({"ours": [{"rate": 4.0}]}, {"rival": "the package rival is not installed: `make bench` installs it"})
    claim = ratio_claim("x.vs_rival", turns, "rival", "rate", 1.0, "x")
    assert (claim.value, claim.holds, claim.num_runs) == (None, False, 0)
    assert claim.reason == "rival: the package rival is not installed: `make bench` installs it"
