"""The report of ``bench serve``: one HTML file with tables and pictures, nothing to fetch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import numpy.typing as npt

from elbowroom.bench.load_svg import Bars, Curves, Series
from elbowroom.units import format_bytes
from elbowroom.workloads.metrics import Percentiles, RunRecord, RunSummary
from elbowroom.workloads.timeline import Timeline

_POINTS = 600
"""Of a curve; each is the peak of what it stands for."""
_STYLE = (
    "body{font:14px sans-serif;margin:2em;color:#222}table{border-collapse:collapse}"
    "td,th{border-bottom:1px solid #ddd;padding:.3em .8em;text-align:right}"
    "td:first-child,th:first-child{text-align:left}"
    "svg{display:block;margin:1em 0}h2{margin-top:2em}"
)


@dataclass(frozen=True, slots=True)
class Shown:
    """One run in the report."""

    label: str
    record: RunRecord
    summary: RunSummary


def html(title: str, facts: Mapping[str, object], runs: Sequence[Shown], rows: Sequence[Mapping[str, object]]) -> str:
    """Return the page."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = [names, *[[_cell(row.get(name)) for name in names] for row in rows]]
    parts = [
        f"<!doctype html><html><head><meta charset='utf-8'><title>{escape(title)}</title>",
        f"<style>{_STYLE}</style></head>",
        f"<body><h1>{escape(title)}</h1>",
        _table([["", ""], *[[name, _cell(value)] for name, value in facts.items()]]),
        "<h2>Runs</h2>",
        _table(table),
        "<h2>Latencies</h2>",
        _latencies("TTFT, seconds", [(run.label, run.summary.ttft) for run in runs]),
        _latencies("TPOT, seconds", [(run.label, run.summary.tpot) for run in runs]),
        _latencies("largest gap, seconds", [(run.label, run.summary.largest_gap) for run in runs]),
        Bars("evictions", [("", [(run.label, float(run.summary.evictions)) for run in runs])]).svg(),
    ]
    for run in runs:
        parts += [f"<h2>{escape(run.label)}</h2>", _memory(run.record.timeline), _queue(run.record.timeline)]
    return "\n".join([*parts, "</body></html>", ""])


def _latencies(title: str, found: Sequence[tuple[str, Percentiles]]) -> str:
    groups = [
        (name, [(label, getattr(percentiles, name)) for label, percentiles in found]) for name in ("p50", "p90", "p99")
    ]
    return Bars(title, groups).svg()


def _memory(timeline: Timeline) -> str:
    series = [
        Series(owner, *_thinned(timeline, np.frombuffer(column, dtype=np.int64)))
        for owner, column in timeline.owners.items()
        if any(column)
    ]
    return Curves("memory by owner", series, format_bytes, stacked=True).svg()


def _queue(timeline: Timeline) -> str:
    columns = {"waiting": timeline.waiting, "running": timeline.running}
    series = [
        Series(name, *_thinned(timeline, np.frombuffer(column, dtype=np.int64))) for name, column in columns.items()
    ]
    return Curves("requests", series, lambda value: f"{value:,.0f}").svg()


def _thinned(timeline: Timeline, values: npt.NDArray[np.int64]) -> tuple[list[float], list[float]]:
    """Return times and values, of each stretch of time the peak."""
    times = np.frombuffer(timeline.times_s, dtype=np.float64)
    if not times.size:
        return [], []
    edges = np.linspace(times[0], times[-1], min(_POINTS, times.size))
    starts = np.unique(times.searchsorted(edges, side="right") - 1)
    return times[starts].tolist(), np.maximum.reduceat(values, starts).astype(float).tolist()


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"] if any(head) else []
    lines += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in body]
    return "<table>" + "".join(lines) + "</table>"


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
