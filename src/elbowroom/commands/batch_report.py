"""What ``elbowroom batch`` prints: the forecast before it starts, and what it came to."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from elbowroom.units import format_bytes

if TYPE_CHECKING:
    from elbowroom.engine.offline.forecast import Forecast
    from elbowroom.serve.batch import BatchReport


def print_forecast(found: Forecast) -> None:
    """Print the forecast as a table on stdout."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("forecast", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    table.add_row("prompts", f"{found.num_prompts:,}")
    table.add_row("prompt tokens", f"{found.prompt_tokens:,}")
    table.add_row("  to compute", f"{found.computed_tokens:,}")
    table.add_row("  saved by shared prefixes", f"{found.saved_share:.1%} (at best {found.best_share:.1%})")
    table.add_row("new tokens, at most", f"{found.new_tokens:,}")
    table.add_row("peak KV cache", f"{format_bytes(found.peak_kv_bytes)} of {format_bytes(found.kv_bytes)}")
    about = "about " if found.is_extrapolated else ""
    table.add_row("time, if answers get so long", f"{about}{format_seconds(found.seconds)}")
    Console().print(table)


def print_report(report: BatchReport) -> None:
    """Print a line or two on stdout."""
    before = f", {report.num_before:,} of them before this run" if report.num_before else ""
    answered = f"{report.num_answered:,} of {report.num_lines:,} lines are answered{before}"
    errors = f"; {report.num_failed:,} got errors" if report.num_failed else ""
    print(answered + errors)
    if report.prompt_tokens:
        saved = 1.0 - report.computed_tokens / report.prompt_tokens
        print(
            f"{format_seconds(report.seconds)}: {report.computed_tokens:,} of {report.prompt_tokens:,} prompt tokens "
            f"computed ({saved:.1%} saved), {report.generated_tokens:,} generated"
        )


def print_stop(target: Path) -> None:
    """Say on stderr that nothing is lost."""
    sys.stderr.write(f"stopped: {target} keeps all answers so far; the same command goes on from there\n")


def format_seconds(seconds: float) -> str:
    """Return a short duration such as ``3 min 20 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
