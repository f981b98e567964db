"""Benchmarks: one file each, a ``run(options)`` that measures and says which claims hold."""

from elbowroom.bench.base import Benchmark, BenchOptions, BenchResult, Claim
from elbowroom.registry import Registry

BENCHES: Registry[Benchmark] = Registry(
    "benchmark",
    {name: f"elbowroom.bench.{name}:run" for name in ("budget", "http", "parity", "release", "retrieval")},
)

__all__ = ["BENCHES", "BenchOptions", "BenchResult", "Benchmark", "Claim"]
