"""Benchmarks: one file each, a ``run(options)`` that measures and says which claims hold."""

from elbowroom.bench.base import Benchmark, BenchOptions, BenchResult, Claim, LoadOptions
from elbowroom.registry import Registry

NAMES = (
    "batch",
    "budget",
    "compose",
    "decode",
    "decode8",
    "http",
    "kv-capacity",
    "kv-matrix",
    "kv-speed",
    "kvpress",
    "long",
    "overhead",
    "parity",
    "prefill",
    "reasoning",
    "release",
    "relief",
    "retrieval",
    "serve",
    "serve-admission",
    "serve-fair",
    "shared-prefix",
    "soak",
    "stores",
)
BENCHES: Registry[Benchmark] = Registry(
    "benchmark", {name: f"elbowroom.bench.{name.replace('-', '_')}:run" for name in NAMES}
)

__all__ = ["BENCHES", "BenchOptions", "BenchResult", "Benchmark", "Claim", "LoadOptions"]
