"""Trace layout ``workload``: our own, as ``Workload.save`` writes it."""

from __future__ import annotations

from pathlib import Path

from elbowroom.workloads.base import Workload
from elbowroom.workloads.traces.base import TraceOptions, by_arrival, json_keys


class OwnLayout:
    """JSON lines; the first may be the name."""

    name = "workload"
    description = "JSON lines with the keys arrival_s, num_prompt_tokens, num_output_tokens"

    def matches(self, path: Path, head: str) -> bool:
        """Return whether it begins with a name or a request of ours."""
        keys = json_keys(head)
        return "workload" in keys or keys >= {"arrival_s", "num_prompt_tokens", "num_output_tokens"}

    def read(self, path: Path, options: TraceOptions) -> Workload:
        """Return the workload as it was saved."""
        made = Workload.load(path)
        by_arrival(made.name, made.requests)  # refuses a file without any
        return made.first(options.num_requests)
