"""Executors: compute a step, or price it."""

from elbowroom.engine.executors.base import CostModel, Executor, LinearCostModel, StepShape
from elbowroom.engine.executors.local import TorchExecutor
from elbowroom.engine.executors.simulated import SimExecutor

__all__ = ["CostModel", "Executor", "LinearCostModel", "SimExecutor", "StepShape", "TorchExecutor"]
