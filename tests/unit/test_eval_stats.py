"""Intervals and paired differences."""

from __future__ import annotations

import numpy as np
import pytest

from elbowroom.errors import RequestError
from elbowroom.evals.stats import bootstrap_interval, mean_interval, paired_difference, wilson_interval


def test_bootstrap_agrees_with_the_normal_interval_of_many_values():
    values = np.random.default_rng(0).random(400)
    low, high = bootstrap_interval(values.tolist())
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.003)


def test_bootstrap_covers_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(1)
    intervals = [bootstrap_interval(rng.beta(2, 3, size=40).tolist()) for _ in range(60)]
    assert sum(low <= 0.4 <= high for low, high in intervals) >= 52


def test_bootstrap_depends_on_neither_order_nor_chance():
    assert bootstrap_interval([0.5, 0.25, 1.0]) == bootstrap_interval([1.0, 0.5, 0.25])
    assert bootstrap_interval([0.5, 0.25, 1.0], seed=1) == bootstrap_interval([0.5, 0.25, 1.0], seed=1)
    assert bootstrap_interval([]) == (0.0, 1.0)


def test_scores_of_zero_and_one_get_wilsons_interval():
    assert mean_interval([1.0] * 8 + [0.0] * 2) == wilson_interval(8, 10)
    assert mean_interval([0.5] * 4) == (0.5, 0.5)


def test_a_difference_is_paired_by_item():
    first = dict.fromkeys(range(20), 1.0)
    second = {item: float(item % 4 > 0) for item in range(20)}
    result = paired_difference(first, second)
    assert result.difference == 0.25
    assert (result.num_pairs, result.num_better, result.num_worse) == (20, 5, 0)
    assert result.interval[0] == pytest.approx(0.05, abs=0.051)
    assert result.interval[1] == pytest.approx(0.45, abs=0.051)
    opposite = paired_difference(second, first)
    assert opposite.difference == -0.25
    assert (opposite.num_better, opposite.num_worse) == (0, 5)


def test_pairing_sees_what_two_intervals_hide():
    values = np.random.default_rng(2).random(50)
    result = paired_difference(dict(enumerate(values + 0.01)), dict(enumerate(values)))
    assert result.interval == pytest.approx((0.01, 0.01))


@pytest.mark.parametrize(("first", "second"), [({1: 1.0}, {2: 1.0}), ({1: 1.0}, {1: 1.0, 2: 0.0}), ({}, {})])
def test_runs_of_other_items_are_not_compared(first: dict[int, float], second: dict[int, float]):
    with pytest.raises(RequestError, match="cannot be paired"):
        paired_difference(first, second)
