"""The command line as a test calls it: in a process of its own, or refused in this one."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from elbowroom.commands import invoke

COMMAND = [sys.executable, "-m", "elbowroom.commands"]


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int) -> str:
    """Run a command line that must fail with ``code``; return what it said on stderr."""
    assert invoke(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    return captured.err


def started(command: Sequence[str], **settings: Any) -> subprocess.Popen[str]:
    """Start a process that SIGINT interrupts, whoever runs the tests; ``settings`` are those of ``Popen``.

    A shell without job control lets background jobs ignore SIGINT; children inherit that, and no process of ours
    takes it back.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, text=True, **settings)
    finally:
        signal.signal(signal.SIGINT, before)
