"""A cold ``elbowroom run`` with hooks: seconds by part from the moment the process was asked for.

``python -m elbowroom.bench.cold_child '{"arguments": ["run", ...], "spawned_s": 12.3}'``, where ``spawned_s`` is the
parent's ``time.monotonic()``, which all processes of a machine share.
"""

from __future__ import annotations

import time

_STARTED_S = time.monotonic()

import contextlib  # noqa: E402  what is imported from here on counts as imports
import io  # noqa: E402
import json  # noqa: E402
import runpy  # noqa: E402
import sys  # noqa: E402
from collections import defaultdict  # noqa: E402
from collections.abc import Callable, Mapping, Sequence  # noqa: E402
from typing import Any  # noqa: E402


def measure(arguments: Sequence[str], spawned_s: float) -> dict[str, float]:
    """Run the command line and return the seconds of its parts; they add up to ``first_token``."""
    from elbowroom.bench.patching import replaced
    from elbowroom.engine import llm, output, resident
    from elbowroom.models.tokenizer import Tokenizer

    imported_s = time.monotonic()
    spent: dict[str, float] = defaultdict(float)
    first_token_s: list[float] = []

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.monotonic()
            try:
                return function(*args, **kwargs)
            finally:
                spent[part] += time.monotonic() - started

        return call

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, update: Any, now: float) -> Any:
            if update.tokens and not first_token_s:
                first_token_s.append(time.monotonic())
            return function(self, update, now)

        return call

    with contextlib.ExitStack() as patches, contextlib.redirect_stdout(io.StringIO()):
        for part, owner, name in (
            ("baseline", resident, "measure_baseline"),
            ("weights", resident, "read_weights"),
            ("tokenizer", Tokenizer, "from_directory"),
            ("build", llm, "build_engine"),
        ):
            patches.enter_context(replaced(owner, name, timed(part, getattr(owner, name))))
        push = output.RequestProcessor.push
        patches.enter_context(replaced(output.RequestProcessor, "push", noting(push)))
        patches.enter_context(replaced(sys, "argv", ["elbowroom", *arguments]))
        try:
            runpy.run_module("elbowroom.commands", run_name="__main__")
        except SystemExit as ended:
            if ended.code:
                raise
    return _parts(spent, spawned_s, imported_s, first_token_s[0])


def _parts(spent: Mapping[str, float], spawned_s: float, imported_s: float, token_s: float) -> dict[str, float]:
    inside = spent["baseline"] + spent["weights"] + spent["tokenizer"]
    return {
        "interpreter": _STARTED_S - spawned_s,
        "imports": imported_s - _STARTED_S,
        "baseline": spent["baseline"],
        "weights": spent["weights"],
        "tokenizer": spent["tokenizer"],
        "rest_of_build": spent["build"] - inside,
        "prompt_to_token": token_s - imported_s - spent["build"],
        "first_token": token_s - spawned_s,
    }


if __name__ == "__main__":
    _spec = json.loads(sys.argv[1])
    print(json.dumps(measure(_spec["arguments"], _spec["spawned_s"])))
