"""budget: does the process stay inside the memory that it was given, as the operating system sees it?

For the built-in model and a random one of 300 million parameters, in the dtype of the checkpoint (bfloat16): 32 mixed
requests in budgets from "the longest request just fits" upwards, each in a fresh process. Excess is VmHWM minus the
baseline (VmRSS of ``elbowroom doctor --baseline`` in another fresh process) minus the budget; max(2 %, 8 MiB) of it is
allowed. Below the minimum the engine must refuse and name it, and that named minimum must run.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from elbowroom.bench.base import BenchOptions, BenchResult, Claim, Row
from elbowroom.bench.child import mixed_lengths, run_child
from elbowroom.bench.machine import machine_info
from elbowroom.bench.random_model import write_random_model
from elbowroom.engine.accounting import KVPricing
from elbowroom.engine.sizing import plan_memory
from elbowroom.kv.plan import KVPlan
from elbowroom.memory.tiers import HostTier
from elbowroom.models.directory import find_model
from elbowroom.models.hf_config import AUTO_DTYPE, choose_dtype, read_config
from elbowroom.models.path import ComputePath

MIB = 2**20
NUM_REQUESTS = 32
LOADS = {"builtin": (1500, 24), "300M": (160, 6)}
"""Longest prompt and most new tokens of the load on each model."""
STEPS = {"builtin": (0, 16, 64, 192), "300M": (0, 128, 512)}
"""MiB on top of the budget that just fits."""


def allowance_bytes(budget_bytes: int) -> int:
    """Return the excess that a budget allows."""
    return max(budget_bytes // 50, 8 * MIB)


def run(options: BenchOptions) -> BenchResult:
    """Measure every budget (quick: one budget of the built-in model)."""
    machine = machine_info()
    baseline = doctor_baseline()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in LOADS:
            if options.quick and name != "builtin":
                continue
            model = None if name == "builtin" else str(write_random_model(Path(scratch), name))
            rows += _measure(name, model, baseline, options)
    return BenchResult(name="budget", machine=machine, rows=rows, claims=_claims(rows))


def doctor_baseline() -> int:
    """Return VmRSS of a warm process without a model, in bytes."""
    command = [sys.executable, "-m", "elbowroom.commands", "doctor", "--baseline"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)


def _measure(name: str, model: str | None, baseline: int, options: BenchOptions) -> list[Row]:
    longest, most_new = LOADS[name]
    lengths = mixed_lengths(8 if options.quick else NUM_REQUESTS, longest, most_new, options.seed)
    spec = {"task": "budget", "model": model, "seed": options.seed}
    refusal = run_child(spec | {"memory": MIB, "lengths": []})
    minimum = int(refusal.get("minimum_bytes", 0))
    rows = [_refusal_row(name, refusal)]
    below = run_child(spec | {"memory": minimum - 1, "lengths": []})
    rows.append(_refusal_row(name, below, named_before=minimum))
    short = [(min(prompt, 100), min(new, 20)) for prompt, new in lengths[:8]]
    rows.append(
        _run_row(name, "minimum", run_child(spec | {"memory": minimum, "lengths": short}), minimum, baseline, short)
    )
    fits = _fitting_budget(model, minimum, max(prompt + new for prompt, new in lengths))
    for extra in STEPS[name][: 1 if options.quick else None]:
        memory = fits + extra * MIB
        rows.append(
            _run_row(
                name,
                f"fits + {extra} MiB",
                run_child(spec | {"memory": memory, "lengths": lengths}),
                memory,
                baseline,
                lengths,
            )
        )
    return rows


def _fitting_budget(model: str | None, minimum: int, tokens: int) -> int:
    """Return the smallest budget, in steps of 1 MiB from the minimum, in which ``tokens`` fit as one sequence."""
    directory = find_model(model)
    config, dtype = read_config(directory), choose_dtype(AUTO_DTYPE, directory)
    plan, kind = KVPlan.parse(None).bind(config.layers, dtype), getattr(torch, dtype)
    budget = minimum
    while True:
        sizes = plan_memory(config, kind, ComputePath.choose(kind, config.hidden_size), [plan], budget, 64)
        pricing = KVPricing.of(plan, config.max_positions, sizes.max_step_tokens, HostTier.page_bytes)
        if pricing.largest(sizes.kv_bytes) >= tokens:
            return budget
        budget += MIB


def _refusal_row(name: str, result: dict[str, Any], named_before: int | None = None) -> Row:
    named = result.get("minimum_bytes")
    right = bool(result["refused"]) and named is not None and named_before in (None, named)
    return {
        "model": name,
        "run": "below the minimum",
        "refused": result["refused"],
        "minimum_bytes": named,
        "right": right,
    }


def _run_row(
    name: str, label: str, result: dict[str, Any], memory: int, baseline: int, lengths: Sequence[tuple[int, int]]
) -> Row:
    if result["refused"]:
        return {"model": name, "run": label, "budget_bytes": memory, "refused": True, "num_incomplete": len(lengths)}
    excess = result["peak_bytes"] - baseline - memory
    kept = ("preemptions", "max_step_tokens", "max_sequences", "load_s", "run_s", "held_bytes", "ledger_peak_bytes")
    return {
        "model": name,
        "run": label,
        "budget_bytes": memory,
        "peak_over_baseline_bytes": result["peak_bytes"] - baseline,
        "excess_bytes": excess,
        "beyond_allowance_bytes": excess - allowance_bytes(memory),
        "num_requests": len(lengths),
        "num_incomplete": len(lengths) - result["num_complete"],
        **{key: result[key] for key in kept},
    }


def _claims(rows: Sequence[Row]) -> list[Claim]:
    runs = [row for row in rows if "budget_bytes" in row]
    beyond = [float(str(row["beyond_allowance_bytes"])) for row in runs if "beyond_allowance_bytes" in row]
    incomplete = [float(str(row["num_incomplete"])) for row in runs]
    wrong = [float(not row["right"]) for row in rows if "right" in row]
    why = "" if len(beyond) == len(runs) else f"{len(runs) - len(beyond)} runs were refused"
    return [
        _worst("budget.hwm", beyond if not why else [], "bytes beyond budget and allowance", why),
        _worst("budget.complete", incomplete, "requests that did not complete in one run", ""),
        _worst("budget.refusal", wrong, "wrong answers below the minimum", ""),
    ]


def _worst(name: str, values: Sequence[float], unit: str, reason: str) -> Claim:
    value = max(values, default=None)
    low, high = min(values, default=None), value
    return Claim(
        id=name, value=value, op="<=", target=0, unit=unit, num_runs=len(values), low=low, high=high, reason=reason
    )
