"""The program of every side: ``python -P loop.py SIDE.py`` answers JSON lines on stdin until stdin ends.

SIDE.py defines ``load(**arguments)``, which imports what it needs and returns the side's commands by name. Uses the
standard library only, and nothing of Elbowroom.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

Commands = dict[str, Callable[..., dict[str, Any]]]


def serve(load: Callable[..., Commands], requests: Iterable[str], answers: TextIO) -> None:
    """Answer each request; one that fails is answered with its error, and the next one is served.

    Args:
        load: gets the arguments of the request ``load`` and returns the other commands.
        requests: lines ``{"command", "arguments"}``.
        answers: gets lines ``{"result"}``, ``{"error"}`` or, when a package cannot be imported, ``{"missing"}``.
    """
    commands: Commands = {}
    for line in requests:
        request = json.loads(line)
        try:
            if request["command"] == "load":
                commands = load(**request["arguments"])
                answer: dict[str, Any] = {"result": {"commands": sorted(commands)}}
            else:
                answer = {"result": commands[request["command"]](**request["arguments"])}
        except ModuleNotFoundError as error:
            answer = {"missing": error.name}
        except Exception as error:  # noqa: BLE001  whatever a rival raises is its answer
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _load_of(path: Path) -> Callable[..., Commands]:
    spec = importlib.util.spec_from_file_location("side", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Where dataclasses look for the module of a class.
    sys.modules["side"] = module
    spec.loader.exec_module(module)
    load: Callable[..., Commands] = module.load
    return load


def _lines() -> Iterator[str]:
    """Yield the lines of stdin; at its end the process ends at once, in the middle of whatever it computes.

    So nothing goes on behind a benchmark that was stopped.
    """
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield lines.get()


def main() -> None:
    """Serve the side that the command line names; what its libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(_load_of(Path(sys.argv[1])), _lines(), answers)


if __name__ == "__main__":
    main()
