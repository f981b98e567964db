"""The seam of trace layouts, and what their readers share."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from elbowroom.errors import RequestError
from elbowroom.workloads.base import TimedRequest, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceOptions:
    """What a reader may need beside the file."""

    count_tokens: Callable[[str], int] | None = None
    """Tokens of a text: layouts that hold conversations need it."""
    num_requests: int | None = None
    """Most requests that are read; layouts from which requests are drawn need it."""
    rate: float = 1.0
    """Requests a second, for layouts without times (Poisson arrivals)."""
    seed: int = 0


class TraceLayout(Protocol):
    """One layout."""

    name: str
    description: str
    """How it is recognised, for error messages."""

    def matches(self, path: Path, head: str) -> bool:
        """Return whether this is its layout; ``head``: the first line of a file, empty for a folder."""

    def read(self, path: Path, options: TraceOptions) -> Workload:
        """Return the workload; raises RequestError with the line where it cannot be read."""


Fields = Mapping[str, Any]


def columns(head: str) -> set[str]:
    """Return the column names in a CSV's first line."""
    return {name.strip() for name in next(csv.reader([head]), [])}


def json_keys(head: str) -> set[str]:
    """Return the keys of a JSON object in one line; empty if it is none."""
    try:
        made = json.loads(head)
    except ValueError:
        return set()
    return set(made) if isinstance(made, dict) else set()


def csv_rows(path: Path) -> Iterator[Fields]:
    """Yield the rows of a CSV with a header line."""
    with path.open(encoding="utf-8-sig", newline="") as lines:
        yield from csv.DictReader(lines)


def json_rows(path: Path) -> Iterator[Fields]:
    """Yield the objects of a file with one in each line."""
    with path.open(encoding="utf-8-sig") as lines:
        for line in lines:
            if line.strip():
                yield json.loads(line)


def read_rows(
    path: Path, rows: Iterator[Fields], first_line: int, make: Callable[[Fields], TimedRequest | None], most: int | None
) -> list[TimedRequest]:
    """Turn rows into requests, up to ``most``; None is left out.

    Raises:
        RequestError: a row cannot be read; names its line.
    """
    made: list[TimedRequest] = []
    line = first_line
    try:
        for row in rows:
            request = make(row)
            if request is not None:
                request.check()
                made.append(request)
            if len(made) == most:
                break
            line += 1
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, csv.Error) as error:
        found = f"no field {error}" if isinstance(error, KeyError) else str(error)
        raise RequestError(f"{path}, line {line}: {found}", "repair or delete the line") from error
    except RequestError as error:
        raise RequestError(f"{path}, line {line}: {error.message}", "repair or delete the line") from error
    return made


def by_arrival(name: str, requests: Sequence[TimedRequest]) -> Workload:
    """Return the requests in order, the first one at 0 seconds."""
    if not requests:
        raise RequestError(f"trace {name} holds no requests", "give one with at least a line that has an answer")
    start = min(each.arrival_s for each in requests)
    ordered = sorted(requests, key=lambda each: each.arrival_s)
    return Workload(name, tuple(replace(each, arrival_s=each.arrival_s - start) for each in ordered))
