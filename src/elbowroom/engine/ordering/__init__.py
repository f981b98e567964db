"""Order policies by name: who is served first, and who gives way."""

from collections.abc import Callable

from elbowroom.engine.ordering.base import OrderPolicy, Rank
from elbowroom.registry import Registry

ORDERS: Registry[Callable[..., OrderPolicy]] = Registry(
    "order policy",
    {
        "fcfs": "elbowroom.engine.ordering.fcfs:FcfsOrder",
        "priority": "elbowroom.engine.ordering.priority:PriorityOrder",
        "fair": "elbowroom.engine.ordering.fair:FairOrder",
        "slo": "elbowroom.engine.ordering.slo:SloOrder",
    },
)

__all__ = ["ORDERS", "OrderPolicy", "Rank"]
