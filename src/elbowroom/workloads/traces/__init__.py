"""Trace files that others publish: one file a layout; ``read_trace`` recognises which one it has."""

from elbowroom.workloads.traces.read import read_trace

__all__ = ["read_trace"]
