"""The parent's side of ``compare_child``: start it, show how far it is, and say in one sentence how it died."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import IO, TYPE_CHECKING, Any

from elbowroom.commands.terminal import progress_bar
from elbowroom.errors import ElbowroomError

if TYPE_CHECKING:
    from elbowroom.commands.compare_child import Order

MODULE = "elbowroom.commands.compare_child"
_MEMORY = "lower --memory, --length or --contexts; the same command goes on from --out"


def run_method(order: Order, label: str, shown: bool, module: str = MODULE) -> None:
    """Run ``order`` in a process of its own; it never outlives this call.

    Args:
        order: what is measured, and where the results go.
        label: the method, for bars and errors.
        shown: whether there are bars.
        module: what is run.

    Raises:
        ElbowroomError: the process failed; the message begins with the method.
    """
    command = [sys.executable, "-m", module, json.dumps(order.to_json())]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            failure = follow(_messages(process.stdout), label, shown)
            code = process.wait()
        finally:
            if process.poll() is None:  # an interrupt, or a bug of ours: what is written so far is kept
                process.terminate()
        if failure is not None or code != 0:
            raise _error(label, failure, code, _last_line(stderr))


def follow(messages: Iterable[dict[str, Any]], label: str, shown: bool) -> dict[str, Any] | None:
    """Show a bar for each stage of a method; return the message that tells of an error, if there is one."""
    failure = None
    for stage, group in groupby(messages, lambda message: message.get("stage")):
        if stage is None:
            failure = list(group)[-1]
            continue
        with progress_bar(f"{label}: {stage}", shown, in_bytes=stage == "loading") as bar:
            for message in group:
                bar(message["done"], message["total"])
    return failure


def _messages(lines: IO[str]) -> Iterator[dict[str, Any]]:
    """Yield the messages among the lines; what libraries print is none."""
    for line in lines:
        try:
            message = json.loads(line)
        except ValueError:
            continue
        if isinstance(message, dict) and ("stage" in message or "error" in message):
            yield message


def _error(label: str, failure: dict[str, Any] | None, code: int, last_line: str) -> ElbowroomError:
    if failure is not None:
        error = ElbowroomError(f"{label}: {failure['error']}", failure["hint"])
        error.exit_code = failure["exit_code"]
        return error
    if code < 0:
        name = signal.Signals(-code).name
        if code == -signal.SIGKILL:
            return ElbowroomError(f"{label}: the process was killed ({name}), as systems do when memory ends", _MEMORY)
        return ElbowroomError(f"{label}: the process was ended by {name}")
    return ElbowroomError(f"{label}: the process failed: {last_line or f'exit code {code}'}")


def _last_line(stderr: IO[str]) -> str:
    stderr.seek(0)
    return next((line.strip() for line in reversed(stderr.read().splitlines()) if line.strip()), "")
