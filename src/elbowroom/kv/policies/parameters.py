"""Parameters of policies: whole numbers, and budgets that leave room for what a policy always keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from elbowroom.core import STRIP_TOKENS
from elbowroom.errors import PlanError

_MOST = 2**31
READING = 4
"""Budgets that a layer may hold while a prompt is read: what its end asks for must not have gone before."""


class _Named(Protocol):
    @property
    def name(self) -> str: ...


class _Renewed(_Named, Protocol):
    @property
    def interval(self) -> int: ...


def whole(policy: _Named, *names: str, least: int = 1) -> None:
    """Turn the fields ``names`` of a frozen dataclass into numbers of at least ``least``.

    Raises:
        PlanError: one is not.
    """
    for name in names:
        value = getattr(policy, name)
        try:
            number = int(value)
        except ValueError:
            number = -1
        if not least <= number < _MOST:
            raise PlanError(
                f"KV policy {policy.name!r} cannot take {name}={value}", f"give {name} as a number above {least - 1}"
            )
        object.__setattr__(policy, name, number)


def check_interval(policy: _Renewed) -> None:
    """Turn the field ``every`` of a frozen dataclass into a number: generated tokens from choice to choice.

    Raises:
        PlanError: it is not 0 and no multiple of a block.
    """
    whole(policy, "every", least=0)
    every = policy.interval
    if every % STRIP_TOKENS:
        raise PlanError(
            f"KV policy {policy.name!r} cannot take every={every}: tokens go in blocks of {STRIP_TOKENS}",
            f"give every={-(-every // STRIP_TOKENS) * STRIP_TOKENS}, or 0: what is generated stays",
        )


def one_of(policy: _Named, name: str, choices: Sequence[str]) -> None:
    """Refuse a field ``name`` that is none of ``choices``.

    Raises:
        PlanError: names the choices.
    """
    value = getattr(policy, name)
    if value not in choices:
        raise PlanError(f"KV policy {policy.name!r} cannot take {name}={value}", f"choose one of: {', '.join(choices)}")


def check_budget(policy: str, tokens: int, always: int, name: str = "tokens") -> None:
    """Refuse a budget that could not hold what always stays: blocks go whole, so up to a block less than it stays.

    Raises:
        PlanError: names the least budget.
    """
    least = always + STRIP_TOKENS
    if tokens < least:
        raise PlanError(
            f"KV policy {policy!r} cannot keep {tokens} tokens of a prompt: {always} always stay, and tokens go in "
            f"blocks of {STRIP_TOKENS}",
            f"give {name}={least} or more",
        )
