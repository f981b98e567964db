"""kvpress: the share of a cache that kvpress reports as saved, beside what its tensors and process hold, and ours.

The built-in model, equal prompts of held-out text. kvpress runs in an environment of its own (``kvpress_environment``)
and keeps the caches of all prompts; the process is weighed before and behind. Ours holds the same prompts under plans
of the same budget. There is no claim: rows show which reported savings are there.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from elbowroom.bench.base import BenchOptions, BenchResult, Row
from elbowroom.bench.child import run_child
from elbowroom.bench.kvpress_environment import VARIABLE, found
from elbowroom.bench.machine import machine_info, usable_threads
from elbowroom.bench.pairs import one_line
from elbowroom.bench.side import SIDES, Side, rival_environment
from elbowroom.errors import ElbowroomError
from elbowroom.evals.comparison.perplexity import windows
from elbowroom.evals.engine_target import PlainTokenizer
from elbowroom.models.directory import find_model
from elbowroom.models.tokenizer import Tokenizer

PRESSES = {
    "none": 0.0,
    "SnapKVPress": 0.75,
    "StreamingLLMPress": 0.75,
    "AdaKVPress": 0.75,
    "ThinKPress": 0.5,
}
"""Each with the ratio that it is asked for: of tokens, or (ThinK) of the channels of keys."""
LENGTH, NUM_PROMPTS = 2048, 8
MEMORY = "512MiB"
HOW = f"make its environment with `python -m elbowroom.bench.kvpress_environment DIR`, then set {VARIABLE}=DIR"


@dataclass(frozen=True, slots=True)
class Load:
    """Prompts; the first one only warms up."""

    prompts: list[list[int]]

    @classmethod
    def of(cls, options: BenchOptions) -> Load:
        """Return 8 prompts of 2,048 tokens behind the first one (quick: 3 of 512)."""
        tokenizer = PlainTokenizer(Tokenizer.from_directory(find_model(None)))
        length, count = (512, 3) if options.quick else (LENGTH, NUM_PROMPTS)
        return cls(windows(tokenizer, length, count + 1))


def plans(length: int) -> tuple[str, ...]:
    """Return our plans: dense, and a quarter of the tokens by either policy."""
    return "plain", f"snapkv(tokens={length // 4})", f"streaming(tokens={length // 4})"


def run(options: BenchOptions) -> BenchResult:
    """Weigh both sides (quick: three short prompts)."""
    machine, load = machine_info(), Load.of(options)
    rows = _their_rows(load) + _our_rows(load)
    return BenchResult(name="kvpress", machine=machine, rows=list[Row](rows), claims=[])


def _their_rows(load: Load) -> list[dict[str, object]]:
    python = found()
    if python is None:
        return [{"side": "kvpress", "reported": None, "reason": f"kvpress is not there: {HOW}"}]
    rows: list[dict[str, object]] = []
    dense: Mapping[str, Any] | None = None
    for press, ratio in PRESSES.items():
        try:
            measured = _hold(str(python), press, ratio, load)
        except ElbowroomError as error:
            rows.append({"side": "kvpress", "method": press, "reported": None, "reason": one_line(error)})
            continue
        dense = dense or measured
        rows.append({"side": "kvpress", "method": press, **_saved(measured, dense)})
        sys.stderr.write(f"  {press}: reports {measured['reported_ratio']:.2f}\n")
    return rows


def _hold(python: str, press: str, ratio: float, load: Load) -> dict[str, Any]:
    """Hold all prompts but the first under a press, in a fresh process that has read the first one before."""
    threads = usable_threads()
    with Side(SIDES / "kvpress_side.py", rival_environment(threads), python=python) as side:
        side.ask("load", model=str(find_model(None)), num_threads=threads)
        side.ask("hold", press=press, ratio=ratio, prompts=load.prompts[:1], keep=False)
        before = side.status_bytes("VmRSS")
        side.reset_peak()
        answer = side.ask("hold", press=press, ratio=ratio, prompts=load.prompts[1:], keep=True)
        grew = {"rest_bytes": side.status_bytes("VmRSS") - before, "peak_bytes": side.status_bytes("VmHWM") - before}
    return answer | grew


def _our_rows(load: Load) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    dense: Mapping[str, Any] | None = None
    for kv in plans(len(load.prompts[0])):
        spec = {"task": "hold", "model": None, "memory": MEMORY, "kv": kv, "length": len(load.prompts[0])}
        measured = run_child(spec | {"num_prompts": len(load.prompts)})
        dense = dense or measured
        reported = {"reported_ratio": 1 - measured["tensor_bytes"] / dense["tensor_bytes"]}
        rows.append({"side": "ours", "method": kv, **_saved(measured | reported, dense)})
        sys.stderr.write(f"  {kv}: reports {reported['reported_ratio']:.2f}\n")
    return rows


def _saved(measured: Mapping[str, Any], dense: Mapping[str, Any]) -> dict[str, object]:
    """Return what is reported as saved, and what is, as shares of the same side's dense cache."""
    shares = {
        "reported": measured["reported_ratio"],
        "saved_tensors": 1 - measured["tensor_bytes"] / dense["tensor_bytes"],
        "saved_process": 1 - measured["rest_bytes"] / dense["rest_bytes"],
        "saved_peak": 1 - measured["peak_bytes"] / dense["peak_bytes"],
    }
    kept = ("tensor_bytes", "rest_bytes", "peak_bytes", "version", "transformers")
    return shares | {name: measured[name] for name in kept if name in measured}
