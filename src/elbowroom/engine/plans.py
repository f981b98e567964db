"""KVPlans: the KV plans that sequences of one engine may have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from elbowroom.core import LayerSpec
from elbowroom.errors import RequestError
from elbowroom.kv.bound import BoundPlan
from elbowroom.kv.calibration import Calibration
from elbowroom.kv.conversion import check_conversion
from elbowroom.kv.plan import KVPlan

PlanText = str | KVPlan | None


@dataclass(frozen=True, slots=True)
class KVPlans:
    """The usual plan first, then those that requests may ask for instead."""

    all: tuple[KVPlan, ...]
    relief: int | None = None
    """Number of the plan that running sequences of the first one are turned into when memory is short."""

    @classmethod
    def of(cls, kv: PlanText = None, choices: Sequence[PlanText] = (), relief: PlanText = None) -> KVPlans:
        """Return the plans, each once.

        Args:
            kv: the usual plan; None means ``plain``.
            choices: further plans that requests may ask for.
            relief: None: sequences that run keep their plan; it can be asked for, too.

        Raises:
            PlanError: one cannot be read, or the usual plan cannot be turned into ``relief``.
        """
        wanted = [KVPlan.parse(kv), *map(KVPlan.parse, choices)]
        number = None
        if relief is not None:
            plan = KVPlan.parse(relief)
            check_conversion(wanted[0], plan)
            wanted.append(plan)
        plans = tuple(dict.fromkeys(wanted))
        if relief is not None:
            number = plans.index(KVPlan.parse(relief))
        return cls(plans, number)

    def number(self, kv: PlanText) -> int:
        """Return the number of the plan that a request asks for; None asks for the first.

        Raises:
            PlanError: it cannot be read.
            RequestError: the engine has no such plan.
        """
        if kv is None:
            return 0
        plan = KVPlan.parse(kv)
        if plan not in self.all:
            raise RequestError(
                f"kv {plan.text!r} is not one of the plans that this engine was started with: "
                f"{', '.join(repr(each.text) for each in self.all)}",
                "choose one of them, leave kv out, or start the engine with --kv-choice (kv_choices=)",
            )
        return self.all.index(plan)

    @property
    def needs_calibration(self) -> bool:
        """Whether ``bind`` needs measurements of the model for one of them."""
        return any(plan.needs_calibration for plan in self.all)

    def bind(self, layers: Sequence[LayerSpec], dtype: str, calibration: Calibration | None) -> tuple[BoundPlan, ...]:
        """Fix all plans to a model; errors as in ``KVPlan.bind``."""
        return tuple(plan.bind(layers, dtype, calibration) for plan in self.all)
