"""Elbowroom: say how much memory you have; it plans, runs and serves language models inside it."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

# Two thread pools that spin against each other cost several times the work; must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from elbowroom.engine.async_llm import AsyncLLM
    from elbowroom.engine.llm import LLM
    from elbowroom.engine.output import RequestOutput, SampleOutput
    from elbowroom.engine.sampling_params import SamplingParams
    from elbowroom.engine.scheduling import Scheduling
    from elbowroom.engine.session import Session
    from elbowroom.errors import ElbowroomError
    from elbowroom.kv.plan import KVPlan
    from elbowroom.serve.batch import BatchOptions, BatchReport, run_batch

__version__ = "0.1.0"

_EXPORTS = {
    "AsyncLLM": "elbowroom.engine.async_llm",
    "BatchOptions": "elbowroom.serve.batch",
    "BatchReport": "elbowroom.serve.batch",
    "ElbowroomError": "elbowroom.errors",
    "KVPlan": "elbowroom.kv.plan",
    "LLM": "elbowroom.engine.llm",
    "RequestOutput": "elbowroom.engine.output",
    "SampleOutput": "elbowroom.engine.output",
    "SamplingParams": "elbowroom.engine.sampling_params",
    "Scheduling": "elbowroom.engine.scheduling",
    "Session": "elbowroom.engine.session",
    "run_batch": "elbowroom.serve.batch",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "BatchOptions",
    "BatchReport",
    "ElbowroomError",
    "KVPlan",
    "RequestOutput",
    "SampleOutput",
    "SamplingParams",
    "Scheduling",
    "Session",
    "run_batch",
]


def __getattr__(name: str) -> object:
    """Import public names when first used, so that the command line answers at once."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'elbowroom' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
