"""The arithmetic of the benchmark relief."""

from __future__ import annotations

from dataclasses import replace

from elbowroom.bench.relief import _agreement, _claims, _Run

PLAIN = _Run(
    kv="plain",
    relief=None,
    kv_bytes=100,
    kv_peak_bytes=100,
    seconds=10.0,
    longest_gap_s=2.0,
    preemptions=4,
    reliefs=0,
    tokens=[[1, 2, 3, 4], [5, 6, 7, 8]],
)


def test_tokens_agree_up_to_the_first_that_differs() -> None:
    assert _agreement(PLAIN.tokens, PLAIN.tokens) == 1.0
    assert _agreement(PLAIN.tokens, [[1, 2, 9, 4], [5, 6, 7, 8]]) == 0.75
    assert _agreement(PLAIN.tokens, [[9, 2, 3, 4], [9, 6, 7, 8]]) == 0.0


def test_claims_are_of_the_worse_relief() -> None:
    reliefs = [replace(PLAIN, longest_gap_s=0.5, preemptions=0), replace(PLAIN, longest_gap_s=1.2, preemptions=1)]
    gap, preemptions = _claims(PLAIN, reliefs)
    assert (gap.value, gap.holds) == (0.6, False)
    assert (preemptions.value, preemptions.holds) == (0.25, True)
    never = _claims(replace(PLAIN, preemptions=0), reliefs)[1]
    assert (never.value, never.holds) == (None, False)


def test_a_row_says_what_was_measured_and_no_tokens() -> None:
    row = replace(PLAIN, tokens=[[1, 2, 0, 4], [5, 6, 7, 8]]).row(PLAIN)
    assert row["agreement"] == 0.75
    assert row["tokens_per_s"] == 0.8
    assert "tokens" not in row
