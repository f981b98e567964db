"""Side: one competitor of a benchmark, a process of its own that is loaded once and runs when it is its turn.

Requests and answers are JSON, one line each, over stdin and stdout of ``sides/loop.py``. A side that waits for its
turn sleeps in a read of stdin; ``idle_cpu_s`` says what it used all the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from elbowroom.errors import ElbowroomError
from elbowroom.memory.meter import status_bytes

SIDES = Path(__file__).parent / "sides"
LOOP = SIDES / "loop.py"
TIMEOUT_S = 900.0
SETTLE_S = 0.05
"""Pause behind each turn: threads of a finished side may spin a little before they sleep."""
OUR_SETTINGS = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "ELBOWROOM_THREADS", "ELBOWROOM_KERNELS")
"""Set for our own good, by this package or by a user: a rival runs without them."""


def rival_environment(num_threads: int) -> dict[str, str]:
    """Return the environment of a rival: this process's without our settings, and ``num_threads`` OpenMP threads.

    The programs of this Python's environment come first: some rivals compile a part of themselves.
    """
    kept = {name: value for name, value in os.environ.items() if name not in OUR_SETTINGS}
    path = os.pathsep.join(filter(None, [str(Path(sys.executable).parent), kept.get("PATH")]))
    return kept | {"OMP_NUM_THREADS": str(num_threads), "HF_HUB_OFFLINE": "1", "PATH": path}


def our_environment(num_threads: int) -> dict[str, str]:
    """Return the environment of our own side: as a user has it, held to ``num_threads``."""
    return dict(os.environ) | {"OMP_NUM_THREADS": str(num_threads), "ELBOWROOM_THREADS": str(num_threads)}


class Side:
    """A competitor in its own process.

    Args:
        script: defines ``load(**arguments)``, which returns the side's commands by name.
        environment: of the process.
        timeout_s: longest time for one answer; a slower side is stopped.
        program: what runs the script and speaks for it.
        python: the interpreter, of another environment where a rival needs one.
    """

    def __init__(
        self,
        script: Path,
        environment: Mapping[str, str],
        timeout_s: float = TIMEOUT_S,
        program: Path = LOOP,
        python: str = sys.executable,
    ) -> None:
        self._timeout_s, self._timed_out = timeout_s, False
        self._errors = tempfile.TemporaryFile(mode="w+", errors="replace")  # noqa: SIM115  closed by close()
        # -P: a directory of side scripts must not shadow the packages that they import.
        command = [python, "-P", str(program), str(script)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=dict(environment),
        )
        self.idle_cpu_s = 0.0
        """CPU seconds used between an answer and the next request, all threads together."""
        self._cpu_s: float | None = None

    def ask(self, command: str, **arguments: object) -> dict[str, Any]:
        """Send a request and return its answer; ``load`` comes first.

        Raises:
            ElbowroomError: a package is missing, the side failed, died, took too long, or does not speak JSON.
        """
        self.send(command, **arguments)
        return self.receive()

    def send(self, command: str, **arguments: object) -> None:
        """Send a request; ``receive`` gets its answer."""
        if self._cpu_s is not None and self._process.poll() is None:
            self.idle_cpu_s += self._cpu_seconds() - self._cpu_s
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"command": command, "arguments": arguments}) + "\n")
            self._process.stdin.flush()
        except OSError as error:  # the process is gone
            raise self._death() from error

    def receive(self) -> dict[str, Any]:
        """Return the answer to the last request.

        Raises:
            ElbowroomError: as ``ask``.
        """
        assert self._process.stdout is not None
        watch = threading.Timer(self._timeout_s, self._give_up)
        watch.start()
        try:
            line = self._process.stdout.readline()
        finally:
            watch.cancel()
        if not line:
            raise self._death()
        answer = _answer(line)
        time.sleep(SETTLE_S)
        self._cpu_s = self._cpu_seconds()
        return answer

    def close(self) -> None:
        """End the process: stdin closes, and a side that does not leave is stopped."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> Self:
        """Return itself; ``close`` runs at the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def status_bytes(self, field: str) -> int:
        """Return ``VmRSS`` or ``VmHWM`` of the process."""
        return status_bytes(self._process.pid, field)

    def reset_peak(self) -> None:
        """Let the process's peak (``VmHWM``) begin again at what is resident now."""
        Path(f"/proc/{self._process.pid}/clear_refs").write_text("5")

    def _cpu_seconds(self) -> float:
        try:
            times = psutil.Process(self._process.pid).cpu_times()
        except psutil.Error:  # it died just now; the next request says so
            return self._cpu_s or 0.0
        return float(times.user + times.system)

    def _give_up(self) -> None:
        self._timed_out = True
        self._process.kill()

    def _death(self) -> ElbowroomError:
        """Return the error of a process that answers no more."""
        code = self._process.wait()
        self._errors.seek(0)
        tail = " | ".join(self._errors.read().splitlines()[-4:]) or "it wrote nothing"
        if self._timed_out:
            return ElbowroomError(f"no answer within {self._timeout_s:g} s; stopped", "use --quick or a faster machine")
        return ElbowroomError(f"the process ended with code {code}; its last lines: {tail}")


def _answer(line: str) -> dict[str, Any]:
    try:
        answer = json.loads(line)
        if "missing" in answer:
            package = answer["missing"]
            raise ElbowroomError(f"the package {package} is not installed", "`make bench` installs it")
        if "error" in answer:
            raise ElbowroomError(f"failed: {answer['error']}")
        result: dict[str, Any] = answer["result"]
    except (ValueError, TypeError, KeyError) as error:
        raise ElbowroomError(f"answered what is not of the protocol: {line.strip()[:200]!r}") from error
    return result
