"""Memory amounts as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elbowroom.errors import RequestError
from elbowroom.units import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("512MiB", 512 * 2**20),
        ("6GiB", 6 * 2**30),
        ("6gib", 6 * 2**30),
        (" 6 GiB ", 6 * 2**30),
        ("6G", 6 * 2**30),
        ("6GB", 6 * 10**9),
        ("1.5KiB", 1536),
        ("0.5kb", 500),
        ("2T", 2**41),
        ("3TB", 3 * 10**12),
        ("7B", 7),
    ],
)
def test_amounts_with_units(text: str, value: int):
    """Binary units are powers of 1024, decimal ones of 1000, a bare letter is binary, and case does not matter."""
    assert parse_bytes(text) == value


def test_percent_is_of_what_is_available():
    """80% refers to the available bytes that the caller knows."""
    assert parse_bytes("80%", 1000) == 800
    assert parse_bytes("100 %", 1000) == 1000


@pytest.mark.parametrize(("amount", "available"), [("80%", None), ("101%", 1000), ("0%", 1000), ("10%", 5)])
def test_percent_of_nothing_is_refused(amount: str, available: int | None):
    """A share needs something to be a share of, at most all of it, and at least a byte."""
    with pytest.raises(RequestError, match="memory"):
        parse_bytes(amount, available)


@pytest.mark.parametrize(
    "amount", ["", "GiB", "six", "6 GiBs", "-1GiB", "1e3", "1,5GiB", "6PiB", "0", "0.3", 0, -5, "9" * 400]
)
def test_what_is_no_amount_is_refused_with_an_example(amount: str | int):
    """Whatever is no positive amount is refused, and the hint shows how to write one."""
    with pytest.raises(RequestError) as caught:
        parse_bytes(amount)
    assert "512MiB" in str(caught.value)


@given(st.integers(1, 2**80))
def test_integers_are_taken_exactly(value: int):
    """An int is a count of bytes, to the last one."""
    assert parse_bytes(value) == value


@given(st.integers(1, 2**20), st.sampled_from(["K", "M", "G", "T"]))
def test_binary_and_decimal_units_differ_by_their_base(number: int, prefix: str):
    """For each prefix, iB is 1024 to the power where B is 1000 to the power."""
    power = "KMGT".index(prefix) + 1
    assert parse_bytes(f"{number}{prefix}iB") == parse_bytes(f"{number}{prefix}") == number * 1024**power
    assert parse_bytes(f"{number}{prefix}B") == number * 1000**power


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1.5 * 2**20, "1.5 MiB"),
        (-(2**20), "-1.0 MiB"),
        (2**50, "1024.0 TiB"),
    ],
)
def test_format_is_short(value: float, text: str):
    """One decimal, the largest unit that keeps the number above one, nothing above TiB."""
    assert format_bytes(value) == text


@given(st.integers(2**10, 2**45))
def test_format_reads_back_within_its_rounding(value: int):
    """What is printed parses to the value within one printed digit."""
    assert parse_bytes(format_bytes(value)) == pytest.approx(value, rel=0.06)
