"""The command line as a test calls it: in a process of its own, or refused in this one."""

from __future__ import annotations

import sys

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
