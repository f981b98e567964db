"""Budget and Ledger: exact charges, refusals that explain themselves, live bounds; against a plain dict."""

from __future__ import annotations

import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from elbowroom.errors import IntegrityError, OutOfBudget
from elbowroom.memory import Budget, Ledger

MIB = 2**20


def test_charges_of_owners_add_up_to_the_tier_total():
    """The total of a tier is the sum over its owners, and other tiers do not count."""
    ledger = Ledger(Budget({"host": 100}))
    ledger.charge("kv", "host", 30)
    ledger.charge("weights", "host", 50)
    ledger.charge("kv", "device", 10**15)
    assert (ledger.total("host"), ledger.available("host")) == (80, 20)
    assert (ledger.held("kv", "host"), ledger.held("weights", "host"), ledger.held("nobody", "host")) == (30, 50, 0)
    assert ledger.available("device") is None


def test_bound_is_inclusive_and_one_byte_more_is_refused():
    """Exactly the bound can be charged; one byte above it changes nothing, neither current nor peak."""
    ledger = Ledger(Budget({"host": 100}))
    ledger.charge("kv", "host", 100)
    before = ledger.snapshot()
    assert not ledger.try_charge("kv", "host", 1)
    with pytest.raises(OutOfBudget):
        ledger.charge("other", "host", 1)
    assert ledger.snapshot() == before
    assert ledger.total("host") == ledger.peak("host") == 100


def test_refusal_names_asker_owners_by_size_and_what_to_lower():
    """A refusal says who asked for how much, lists owners from large to small, and its hint names the largest."""
    ledger = Ledger(Budget({"host": 10 * MIB}))
    ledger.charge("kv", "host", 2 * MIB)
    ledger.charge("weights", "host", 7 * MIB)
    ledger.charge("gone", "host", MIB)
    ledger.release("gone", "host", MIB)
    with pytest.raises(OutOfBudget) as caught:
        ledger.charge("workspace", "host", 3 * MIB)
    message, hint = caught.value.message, caught.value.hint
    assert "workspace asked for 3.0 MiB" in message
    assert "1.0 MiB of 10.0 MiB are free" in message
    assert message.index("weights 7.0 MiB") < message.index("kv 2.0 MiB")
    assert "gone" not in message
    assert hint is not None
    assert "--memory" in hint
    assert "weights" in hint


def test_peaks_remember_the_most_that_was_held_at_once():
    """Owner peaks and the tier peak are maxima over time, not sums of maxima."""
    ledger = Ledger(Budget({}))
    ledger.charge("a", "host", 70)
    ledger.release("a", "host", 70)
    ledger.charge("b", "host", 60)
    ledger.transfer("b", "a", "host", 50)
    assert ledger.peak("host") == 70
    assert ledger.snapshot() == {
        "a": {"host": {"current_bytes": 50, "peak_bytes": 70}},
        "b": {"host": {"current_bytes": 10, "peak_bytes": 60}},
    }


def test_transfer_never_raises_the_tier_peak():
    """Moving a charge between owners at the bound works and leaves the tier's peak alone."""
    ledger = Ledger(Budget({"host": 100}))
    ledger.charge("a", "host", 100)
    ledger.transfer("a", "b", "host", 100)
    assert (ledger.peak("host"), ledger.total("host"), ledger.held("b", "host")) == (100, 100, 100)


def test_lowered_bound_refuses_at_once_and_raised_bound_admits_at_once():
    """Budget.set works while running: below what is held, nothing but zero bytes can be charged."""
    budget = Budget({"host": 100})
    ledger = Ledger(budget)
    ledger.charge("kv", "host", 80)
    budget.set("host", 50)
    assert ledger.available("host") == -30
    assert not ledger.try_charge("kv", "host", 1)
    assert ledger.try_charge("kv", "host", 0)
    with pytest.raises(OutOfBudget, match="0 B of 50 B are free"):
        ledger.charge("kv", "host", 1)
    budget.set("host", 81)
    assert ledger.try_charge("kv", "host", 1)


@pytest.mark.parametrize("operation", ["release", "transfer"])
def test_nobody_gives_back_more_than_they_hold(operation: str):
    """Giving back too much is an IntegrityError that changes nothing."""
    ledger = Ledger(Budget({}))
    ledger.charge("a", "host", 5)
    before = ledger.snapshot()
    with pytest.raises(IntegrityError, match="holds 5"):
        ledger.release("a", "host", 6) if operation == "release" else ledger.transfer("a", "b", "host", 6)
    assert (ledger.total("host"), ledger.snapshot()) == (5, before)


@pytest.mark.parametrize("operation", ["charge", "release", "transfer"])
def test_negative_amounts_are_refused(operation: str):
    """A negative amount is no way around the bound."""
    ledger = Ledger(Budget({"host": 10}))
    ledger.charge("a", "host", 5)
    owners = ("a", "b") if operation == "transfer" else ("a",)
    with pytest.raises(IntegrityError, match="below zero"):
        getattr(ledger, operation)(*owners, "host", -1)
    assert ledger.total("host") == 5


def test_threads_never_exceed_the_bound_together():
    """Concurrent charges take the tier to its bound exactly, and the refused ones leave no trace."""
    ledger = Ledger(Budget({"host": 1000}))
    granted: list[int] = []

    def work(owner: str) -> None:
        granted.append(sum(ledger.try_charge(owner, "host", 1) for _ in range(400)))

    threads = [threading.Thread(target=work, args=(str(n),)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(granted) == ledger.total("host") == ledger.peak("host") == 1000


class LedgerMachine(RuleBasedStateMachine):
    """A ledger beside a dict of charges and recomputed sums."""

    owners = st.sampled_from(["kv", "weights", "workspace"])
    tiers = st.sampled_from(["host", "device", "unbounded"])
    amounts = st.integers(0, 120)

    def __init__(self) -> None:
        super().__init__()
        self.limits = {"host": 100, "device": 150}
        self.ledger = Ledger(Budget(self.limits))
        self.held: dict[tuple[str, str], int] = {}
        self.peaks: dict[str, int] = {}

    def total(self, tier: str) -> int:
        return sum(amount for (_, where), amount in self.held.items() if where == tier)

    def note(self, owner: str, tier: str, amount: int) -> None:
        self.held[owner, tier] = self.held.get((owner, tier), 0) + amount
        self.peaks[tier] = max(self.peaks.get(tier, 0), self.total(tier))

    @rule(owner=owners, tier=tiers, amount=amounts)
    def charge(self, owner: str, tier: str, amount: int) -> None:
        fits = amount == 0 or self.total(tier) + amount <= self.limits.get(tier, 10**18)
        assert self.ledger.try_charge(owner, tier, amount) == fits
        if fits:
            self.note(owner, tier, amount)

    @rule(owner=owners, tier=tiers, amount=amounts)
    def release(self, owner: str, tier: str, amount: int) -> None:
        if amount > self.held.get((owner, tier), 0):
            with pytest.raises(IntegrityError):
                self.ledger.release(owner, tier, amount)
        else:
            self.ledger.release(owner, tier, amount)
            self.note(owner, tier, -amount)

    @rule(giver=owners, taker=owners, tier=tiers, amount=amounts)
    def transfer(self, giver: str, taker: str, tier: str, amount: int) -> None:
        if amount > self.held.get((giver, tier), 0):
            with pytest.raises(IntegrityError):
                self.ledger.transfer(giver, taker, tier, amount)
        else:
            self.ledger.transfer(giver, taker, tier, amount)
            self.note(giver, tier, -amount)
            self.note(taker, tier, amount)

    @rule(tier=st.sampled_from(["host", "device"]), limit=st.integers(0, 300))
    def rebudget(self, tier: str, limit: int) -> None:
        self.limits[tier] = limit
        self.ledger.budget.set(tier, limit)

    @invariant()
    def agrees(self) -> None:
        for tier in ("host", "device", "unbounded"):
            assert self.ledger.total(tier) == self.total(tier)
            assert self.ledger.peak(tier) == self.peaks.get(tier, 0)
        for (owner, tier), amount in self.held.items():
            assert self.ledger.held(owner, tier) == amount
        current = {(o, t): u["current_bytes"] for o, tiers in self.ledger.snapshot().items() for t, u in tiers.items()}
        assert {key: amount for key, amount in current.items() if amount} == {k: a for k, a in self.held.items() if a}


LedgerMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestLedgerMachine = LedgerMachine.TestCase
