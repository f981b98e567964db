"""Memory amounts as people write them: ``512MiB``, ``6GiB``, ``80%``."""

from __future__ import annotations

import math
import re

from elbowroom.errors import RequestError

_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_UNITS |= {f"{prefix}iB": size for prefix, size in _UNITS.items() if prefix in "KMGT" and prefix}
_UNITS |= {f"{prefix}B": 10 ** (3 * power) for power, prefix in enumerate("KMGT", start=1)}
_AMOUNT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*|%)\s*")
_HINT = "write an amount such as 512MiB, 6GiB or 80%"


def parse_bytes(amount: str | int, available_bytes: int | None = None) -> int:
    """Return the number of bytes that ``amount`` means.

    Args:
        amount: a count of bytes, or text such as ``512MiB`` (binary), ``6GB`` (decimal), ``6G`` (binary) or ``80%``.
        available_bytes: what a percentage refers to.

    Raises:
        RequestError: the text is not an amount, or is below one byte.
    """
    value = amount if isinstance(amount, int) else _parse_text(amount, available_bytes)
    if value < 1:
        raise RequestError(f"memory amount {amount!r} is below one byte", _HINT)
    return int(value)


def _parse_text(amount: str, available_bytes: int | None) -> float:
    match = _AMOUNT.fullmatch(amount)
    if match is None:
        raise RequestError(f"{amount!r} is not a memory amount", _HINT)
    number, unit = float(match[1]), match[2]
    if not math.isfinite(number):
        raise RequestError(f"memory amount {amount!r} is too large", _HINT)
    if unit == "%":
        if available_bytes is None or number > 100:
            raise RequestError(f"{amount!r} is not a share of the available memory", _HINT)
        return number / 100 * available_bytes
    factor = {name.lower(): size for name, size in _UNITS.items()}.get(unit.lower())
    if factor is None:
        raise RequestError(f"unknown unit in memory amount {amount!r}", _HINT)
    return number * factor


def format_bytes(num_bytes: float) -> str:
    """Return a short binary amount such as ``1.5 MiB``."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
