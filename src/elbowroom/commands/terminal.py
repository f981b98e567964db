"""What commands write to a terminal: JSON objects, tables, progress bars."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from elbowroom.units import format_bytes


class Bar(Protocol):
    """Reports how much of a piece of work is done."""

    def __call__(self, done: int, total: int) -> None:
        """Show ``done`` of ``total``."""


def print_json(value: Mapping[str, object]) -> None:
    """Print one JSON object on stdout; NaN and infinity are refused, as JSON has none."""
    sys.stdout.write(json.dumps(value, allow_nan=False) + "\n")


def wants_progress(asked: bool | None) -> bool:
    """Return whether to show bars: as asked, else if stderr is a terminal."""
    return sys.stderr.isatty() if asked is None else asked


@contextmanager
def progress_bar(title: str, shown: bool, in_bytes: bool = False) -> Iterator[Bar]:
    """Yield a function that moves a bar on stderr; the bar disappears at the end of the block.

    Args:
        title: what is being done.
        shown: whether there is a bar at all.
        in_bytes: write amounts as bytes.
    """
    if not shown:
        yield _show_nothing
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    write: Callable[[float], str] = format_bytes if in_bytes else lambda value: f"{value:,.0f}"
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=sys.stderr.isatty()) as progress:
        task = progress.add_task(title, total=None, amount="")

        def move(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, amount=f"{write(done)} of {write(total)}")

        yield move


def _show_nothing(done: int, total: int) -> None:
    """Stand in for a bar."""
