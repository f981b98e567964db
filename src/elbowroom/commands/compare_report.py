"""Reports of comparisons: the JSON object, a table of bytes and speeds, a table of answers, rankings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from elbowroom.units import format_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from elbowroom.evals.comparison.plan import ComparePlan
    from elbowroom.evals.comparison.quality import Quality
    from elbowroom.evals.comparison.ranking import Equal
    from elbowroom.evals.comparison.table import Comparison, MethodRow

BUSY = 0.05
"""Share of the CPU that others may take before speeds carry a remark."""


def comparison_to_json(plan: ComparePlan, comparison: Comparison, equal: Equal | None) -> dict[str, object]:
    """Return the object that ``compare --json`` prints and ``compare.json`` holds."""
    from elbowroom.evals.comparison.ranking import rank

    found: dict[str, object] = {"plan": plan.to_json()} | comparison.to_json()
    if equal is not None:
        found["equal"] = {"what": equal, "rankings": [each.to_json() for each in rank(comparison, equal)]}
    return found


def print_comparison(plan: ComparePlan, comparison: Comparison, equal: Equal | None) -> None:
    """Print both tables, what went wrong, and rankings if they were asked for."""
    from rich.console import Console

    console = Console()
    typer.echo(
        f"{plan.questions.context_tokens} tokens, seed {plan.questions.seed}; KV of one context among "
        f"{plan.num_contexts}, peak of the process,\nKV bytes read for a decoded token; prefill and decode in tokens/s"
    )
    console.print(_bytes_table(comparison))
    if comparison.compared:
        console.print(_quality_table(comparison))
    for line in _remarks(comparison):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if equal is not None:
        for line in _rankings(comparison, equal):
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def _bytes_table(comparison: Comparison) -> Table:
    table = _table("method", "KV", "ratio", "peak", "read", "prefill", "decode")
    for row in comparison.rows:
        found = row.footprint
        if found is None:
            table.add_row(row.method.label, "failed")
            continue
        read = found.read_bytes_per_token
        inactive, share = row.inactive(comparison.dense_bytes), found.context_bytes / comparison.dense_bytes
        table.add_row(
            row.method.label,
            format_bytes(found.context_bytes),
            "inactive" if inactive else f"{share:.2f}",
            format_bytes(found.peak_over_baseline_bytes),
            "unknown" if read is None else format_bytes(read),
            f"{found.prefill_tokens_per_s:,.0f}",
            f"{found.decode_tokens_per_s:,.0f}",
        )
    return table


def _quality_table(comparison: Comparison) -> Table:
    table = _table("method", "score", "95% interval", "to dense", "95% interval", "items")
    for task in comparison.compared:
        table.add_row(f"{task}:")
        for row in comparison.rows:
            if task in row.qualities:
                table.add_row(f"  {row.method.label}", *_cells(row.qualities[task]))
        table.add_section()
    return table


def _cells(found: Quality) -> tuple[str, str, str, str, str]:
    low, high = found.interval
    difference = ("", "")
    if found.difference is not None and found.difference_interval is not None:
        below, above = found.difference_interval
        difference = f"{found.difference:+.3f}", f"{below:+.3f} to {above:+.3f}"
    return f"{found.score:.3f}", f"{low:.3f} to {high:.3f}", *difference, str(found.num_items)


def _table(*names: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False)
    for name in names:
        left = name == "method"
        table.add_column(
            name, justify="left" if left else "right", no_wrap=not left, overflow="fold", min_width=12 if left else 0
        )
    return table


def _remarks(comparison: Comparison) -> list[str]:
    from elbowroom.evals.comparison.table import INACTIVE

    lines = [f"{task}: {reason}" for task, reason in comparison.weak.items()]
    if "perplexity" in comparison.compared:
        lines.append("perplexity is in bits per byte: less is better")
    for row in comparison.rows:
        lines += _failures(row)
        if row.inactive(comparison.dense_bytes):
            lines.append(f"{row.method.label}: inactive, holds {INACTIVE:.0%} of dense's bytes or more")
        if row.footprint is not None and row.footprint.foreign_cpu_share > BUSY:
            share = row.footprint.foreign_cpu_share
            lines.append(f"{row.method.label}: others took {share:.0%} of the CPU while speeds were measured")
    return lines


def _failures(row: MethodRow) -> list[str]:
    if row.error is not None:
        return [row.error]
    return [f"{row.method.label}, {task}: {reason}" for task, reason in row.failures.items()]


def _rankings(comparison: Comparison, equal: Equal) -> list[str]:
    from elbowroom.evals.comparison.ranking import rank

    lines = []
    for each in rank(comparison, equal):
        scores = {
            row.method.label: row.qualities[each.task].score for row in comparison.rows if each.task in row.qualities
        }
        names = ", ".join(f"{label} ({scores[label]:.3f})" for label in each.methods)
        if equal == "quality":
            worse = f"; worse: {', '.join(each.dropped)}" if each.dropped else ""
            lines.append(f"{each.task}, not worse than dense, fewest bytes first: {names}{worse}")
        elif len(each.methods) > 1:
            sizes = f"{format_bytes(each.lowest_bytes)} to {format_bytes(each.highest_bytes)}"
            lines.append(f"{each.task}, {sizes}, best first: {names}")
    return lines or ["no two methods hold the same bytes, within 5 %: nothing to rank"]
