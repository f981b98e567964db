"""compose: every pair of parts of KV plans on one random model: it runs, or it is refused with the way out.

A pair runs when a prompt in two chunks, generated tokens behind it and a second request beside it give finite logits,
when the bytes then held are at most what the plan's curve says, and when nothing is held in the end.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from elbowroom.bench.base import BenchOptions, BenchResult, Claim, Row
from elbowroom.bench.machine import machine_info
from elbowroom.bench.random_model import random_calibration, write_random_model
from elbowroom.bench.schedules import Stepper, Subject
from elbowroom.errors import ElbowroomError, PlanError
from elbowroom.kv.bound import BoundPlan
from elbowroom.kv.calibration import Calibration
from elbowroom.kv.codecs import CODECS
from elbowroom.kv.plan import KVPlan
from elbowroom.kv.policies import CHANNELS, HEADS, POLICIES
from elbowroom.kv.reads import READS
from elbowroom.models.decoder import Decoder
from elbowroom.models.loader import load_model
from elbowroom.models.path import ANY, ComputePath

_PROMPT, _NEW = 700, 24
_ARGUMENTS = {
    "compresskv": "(256,heads=2)",
    "kvmerger": "(256)",
    "quest": "(256)",
    "snapkv": "(256)",
    "spatten": "(256)",
    "streaming": "(256)",
}


def run(options: BenchOptions) -> BenchResult:
    """Try every ordered pair of parts (quick: unordered ones)."""
    kinds = (CODECS, POLICIES, HEADS, CHANNELS, READS)
    machine, names = machine_info(), sorted(name for kind in kinds for name in kind.names())
    pairs = list(itertools.combinations(names, 2) if options.quick else itertools.permutations(names, 2))
    with tempfile.TemporaryDirectory() as scratch:
        decoder = load_model(write_random_model(Path(scratch) / "model", "20M", seed=options.seed), torch.bfloat16)
        rows = [_row(decoder, first, second, options.seed) for first, second in pairs]
    broken = [row for row in rows if row["outcome"] == "broken"]
    claim = Claim(
        id="compose.pairs",
        value=float(len(broken)),
        op="<=",
        target=0.0,
        unit="pairs that neither run nor are refused with the way out",
        num_runs=len(rows),
        reason="; ".join(f"{row['plan']}: {row['reason']}" for row in broken),
    )
    return BenchResult(name="compose", machine=machine, rows=rows, claims=[claim])


def _row(decoder: Decoder, first: str, second: str, seed: int) -> Row:
    text = " | ".join(name + _ARGUMENTS.get(name, "") for name in (first, second))
    sys.stderr.write(f"  {text}\n")
    calibration = random_calibration(decoder.config.layers, seed)
    row: dict[str, object] = {"first": first, "second": second, "plan": text}
    try:
        plan = KVPlan.parse(text)
        bound = plan.bind(decoder.config.layers, "bfloat16", calibration)
    except PlanError as error:
        refused = "refused" if error.hint else "broken"
        return row | {"outcome": refused, "reason": error.message, "fix": error.hint}
    try:
        return row | {"outcome": "runs", "reason": ""} | _run(decoder, bound, calibration, seed)
    except (ElbowroomError, AssertionError) as error:
        return row | {"outcome": "broken", "reason": f"{type(error).__name__}: {error}"}


def _run(decoder: Decoder, bound: BoundPlan, calibration: Calibration, seed: int) -> dict[str, object]:
    """Run two requests; return the bytes held while both decode, and what a plain plan would hold."""
    # Sealed strips are small beside those of two prompts that are being read.
    subject = Subject(decoder, ComputePath(ANY), bound.plan, calibration)
    stepper = Stepper(subject, 24 * _PROMPT, dtype="bfloat16")
    generator = torch.Generator().manual_seed(seed)
    for number in range(2):
        prompt = torch.randint(decoder.config.vocab_size, (_PROMPT,), generator=generator).tolist()
        stepper.add(number, prompt, _NEW)
    held = 0
    while stepper.scheduler.has_work():
        stepper.step()
        report = stepper.store.report()
        held = report.live_bytes if report.num_tokens >= 2 * _PROMPT else held
    plain = KVPlan.parse("plain").bind(decoder.config.layers, "bfloat16")
    total = np.array([_PROMPT + _NEW])
    most = 2 * (int(bound.curve(_PROMPT, total).resident_bytes[0]) + bound.tail_bytes)
    assert 0 < held <= 1.1 * most, f"{held} bytes are held, the plan says {most}"
    stepper.close()
    assert stepper.store.report().live_bytes == 0, "something is held in the end"
    return {"resident_bytes": held, "plain_bytes": 2 * int(plain.curve(_PROMPT, total).resident_bytes[0])}
