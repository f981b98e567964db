"""Scheduling: which policies an engine's scheduler follows, by name, and the swap tier that they need."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from elbowroom.engine.admission import ADMISSIONS, AdmissionPolicy
from elbowroom.engine.ordering import ORDERS, OrderPolicy
from elbowroom.engine.ordering.fair import FairOrder
from elbowroom.engine.ordering.slo import SloOrder
from elbowroom.engine.preemption import PREEMPTIONS, PreemptPolicy
from elbowroom.engine.preemption.auto import AutoPreemption
from elbowroom.engine.preemption.recompute import RecomputePreemption
from elbowroom.engine.preemption.swap import SwapPreemption
from elbowroom.errors import ConfigError, PlanError
from elbowroom.memory.disk import DiskTier
from elbowroom.memory.ledger import Ledger
from elbowroom.memory.swap_cost import SwapCost, measure_swap_cost
from elbowroom.units import parse_bytes

_MEASURED_BYTES = 4 << 20
_LEAST_SWAP_BYTES = 1 << 20
_TARGETS = {"slo_ttft_s": "--slo-ttft", "slo_tpot_s": "--slo-tpot"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduling:
    """Policies by name.

    Raises:
        PlanError: a name is unknown, or what it needs is missing.
    """

    admission: str = "greedy"
    """Who may begin: ``greedy``, ``conservative``, ``past_future``, ``past_future_paper``; ``oracle`` simulates."""
    order: str = "priority"
    """Who is served first: ``priority``, ``fcfs``, ``fair``, ``slo``."""
    tenant_weights: Mapping[str, float] = field(default_factory=dict)
    """What ``fair`` gives a tenant, against 1 of those not named."""
    slo_ttft_s: float | None = None
    """For ``slo``: seconds from arrival until the first token is due; None: what the order has by default."""
    slo_tpot_s: float | None = None
    """For ``slo``: seconds from one token until the next is due."""
    preemption: str | None = None
    """What becomes of those that have to go: ``recompute``, ``swap``, ``auto``; by default ``auto`` with a swap
    directory, else ``recompute``."""
    swap_directory: str | Path | None = None
    """Where sequences are saved that have to go."""
    swap_limit: str | int = "4GiB"
    """Most bytes that are saved there."""

    def __post_init__(self) -> None:
        """Check everything before any model is loaded."""
        if self.saves and parse_bytes(self.swap_limit) < _LEAST_SWAP_BYTES:
            raise PlanError(f"a swap limit of {self.swap_limit} holds next to nothing", "raise it: --swap-limit 4GiB")
        for registry, name in ((ADMISSIONS, self.admission), (ORDERS, self.order), (PREEMPTIONS, self.preemption)):
            if name is not None:
                registry.get(name)
        for name, option in _TARGETS.items():
            seconds = getattr(self, name)
            if seconds is not None and self.order != "slo":
                raise PlanError(
                    f"{option} means nothing to the order {self.order}", f"add --order slo, or leave {option} out"
                )
            if seconds is not None and not 0 < seconds < math.inf:
                raise PlanError(f"{option} must be above 0, not {seconds:g}", "give seconds")
        if self.preemption in ("swap", "auto") and self.swap_directory is None:
            raise PlanError(f"preemption {self.preemption} has nowhere to save to", "name a directory: swap= (--swap)")

    @property
    def saves(self) -> bool:
        """Whether sequences that have to go can be saved."""
        return self.swap_directory is not None and self.preemption != "recompute"

    def make_admission(self) -> AdmissionPolicy:
        """Return the admission policy."""
        return ADMISSIONS.get(self.admission)()

    def make_order(self) -> OrderPolicy:
        """Return the order policy."""
        if self.order == "fair":
            return FairOrder(weights=dict(self.tenant_weights))
        if self.order == "slo":
            given = {name.removeprefix("slo_"): getattr(self, name) for name in _TARGETS}
            return SloOrder(**{name: seconds for name, seconds in given.items() if seconds is not None})
        return ORDERS.get(self.order)()

    def make_tier(self, ledger: Ledger) -> DiskTier | None:
        """Return the swap tier; None: nothing is saved.

        Raises:
            ConfigError: its directory cannot be written.
        """
        if self.swap_directory is None or not self.saves:
            return None
        return DiskTier(self.swap_directory, parse_bytes(self.swap_limit), ledger)

    def measure(self) -> SwapCost | None:
        """Write to the swap directory and read it again; return what that costs. None: nothing is saved.

        Raises:
            ConfigError: its directory cannot be written, or its disk is full.
        """
        if self.swap_directory is None or not self.saves:
            return None
        limit_bytes = parse_bytes(self.swap_limit)
        tier = DiskTier(self.swap_directory, limit_bytes)
        try:
            return measure_swap_cost(tier, min(_MEASURED_BYTES, limit_bytes))
        except OSError as reason:
            hint = "free some space there, or name another directory (--swap)"
            raise ConfigError(f"{self.swap_directory} cannot hold swapped KV: {reason}", hint) from None
        finally:
            tier.close()

    def make_preemption(self, cost: SwapCost | None) -> PreemptPolicy:
        """Return the preemption policy; ``auto`` goes by what swapping costs."""
        if cost is None:
            return RecomputePreemption()
        return SwapPreemption() if self.preemption == "swap" else AutoPreemption(cost)
