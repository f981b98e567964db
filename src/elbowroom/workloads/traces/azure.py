"""Trace layout ``azure``: Microsoft's LLM inference traces (Azure/AzurePublicDataset), times and lengths as CSV."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from elbowroom.workloads.base import TimedRequest, Workload
from elbowroom.workloads.traces.base import Fields, TraceOptions, by_arrival, columns, csv_rows, read_rows

_COLUMNS = {"TIMESTAMP", "ContextTokens", "GeneratedTokens"}


class AzureLayout:
    """One row a request, in order of time."""

    name = "azure"
    description = "CSV with the columns TIMESTAMP, ContextTokens, GeneratedTokens"

    def matches(self, path: Path, head: str) -> bool:
        """Return whether all three columns are there."""
        return columns(head) >= _COLUMNS

    def read(self, path: Path, options: TraceOptions) -> Workload:
        """Return the workload; requests without an answer are left out."""
        return by_arrival(path.stem, read_rows(path, csv_rows(path), 2, _request, options.num_requests))


def _request(row: Fields) -> TimedRequest | None:
    prompt, output = int(row["ContextTokens"]), int(row["GeneratedTokens"])
    if prompt == 0 or output == 0:
        return None
    # Seven digits behind the second, which datetime does not read.
    text = row["TIMESTAMP"].strip()
    whole, _, fraction = text.partition(".")
    seconds = datetime.fromisoformat(whole + "+00:00").timestamp() + float("0." + (fraction[:9] or "0"))
    return TimedRequest(seconds, prompt, output)
