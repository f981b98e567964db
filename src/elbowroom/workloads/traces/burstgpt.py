"""Trace layout ``burstgpt``: BurstGPT's log of a campus service (arXiv 2401.17644) as CSV, sessions included."""

from __future__ import annotations

from pathlib import Path

from elbowroom.workloads.base import TimedRequest, Workload
from elbowroom.workloads.traces.base import Fields, TraceOptions, by_arrival, columns, csv_rows, read_rows

_COLUMNS = {"Timestamp", "Request tokens", "Response tokens"}


class BurstGPTLayout:
    """One row a request; rows without an answer are failures of the service that was logged."""

    name = "burstgpt"
    description = "CSV with the columns Timestamp (s), Request tokens, Response tokens (Session ID, Model)"

    def matches(self, path: Path, head: str) -> bool:
        """Return whether the three columns are there."""
        return columns(head) >= _COLUMNS

    def read(self, path: Path, options: TraceOptions) -> Workload:
        """Return the workload; the model is the tenant."""
        return by_arrival(path.stem, read_rows(path, csv_rows(path), 2, _request, options.num_requests))


def _request(row: Fields) -> TimedRequest | None:
    prompt, output = int(row["Request tokens"]), int(row["Response tokens"])
    if prompt == 0 or output == 0:
        return None
    session = (row.get("Session ID") or "").strip()
    tenant = (row.get("Model") or "").strip()
    return TimedRequest(float(row["Timestamp"]), prompt, output, tenant, session or None)
