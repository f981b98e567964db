"""Offline jobs, whose prompts are all known: what they share, in which order they run, how long that takes."""

from elbowroom.engine.offline.forecast import Forecast
from elbowroom.engine.offline.plan import JobPlan, Order
from elbowroom.engine.offline.prompts import PromptSpool
from elbowroom.engine.offline.tree import PrefixTree

__all__ = ["Forecast", "JobPlan", "Order", "PrefixTree", "PromptSpool"]
