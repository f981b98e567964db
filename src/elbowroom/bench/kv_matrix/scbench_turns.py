"""[scbench.turns]: what is lost of questions that nobody knew when the cache was cut, turn by turn (SCBench's core).

Contexts hold five facts, asked one after the other in one session with the reference answers as history. In
``follow_ups`` the context is read and cut before any question; in ``first_seen`` the first question is read with it, as
in SCBench's multi-turn mode. Codecs (int8, bfp, kivi) keep every token; policies (snapkv, streaming) keep as many bytes
as int8 and as bfp do, in whole tokens.

A question is lost that dense attention answers and the plan does not. Counted are those of turns at which the question
was not known: all of ``follow_ups``, the second to fifth of ``first_seen``. A plan *falls* where the 95 % interval
(Wilson) of the share lost lies above 0.1, and is *flat* where it lies below. The claim: policies fall, codecs are flat.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from elbowroom.bench.base import BenchOptions, Claim, Row
from elbowroom.bench.kv_matrix.compared import Compared, Questions, compare_plans
from elbowroom.bench.kv_matrix.part import Part, claimed
from elbowroom.bench.kv_matrix.plans import PLANS, MatrixPlan, Sizes
from elbowroom.evals.comparison.quality import Scores
from elbowroom.evals.stats import mean_interval, wilson_interval
from elbowroom.models.directory import find_model
from elbowroom.models.hf_config import read_config

NAME = "scbench.turns"
CLAIM = claimed(NAME, "<=", 0.0, "plans and modes that neither fall as policies do nor stay flat as codecs do")
LIMIT = 0.1
"""Share of questions lost that tells falling from flat."""
NUM_TURNS = 5
UNKNOWN = {"follow_ups": range(NUM_TURNS), "first_seen": range(1, NUM_TURNS)}
"""By task the turns at which the question was not known when the cache was cut."""
CODECS = ("int8", "bfp", "kivi 4", "kivi 2")
POLICIES = ("snapkv", "streaming")
EQUAL_TO = ("int8", "bfp")
"""Codecs whose bytes the policies hold."""
QUESTIONS = Questions(length=1024, tasks=tuple(UNKNOWN), keys=NUM_TURNS, num_queries=120)
QUICK = replace(QUESTIONS, length=512, num_queries=10, num_contexts=1)
_BY_NAME: Mapping[str, MatrixPlan] = {plan.name: plan for plan in PLANS}


def measure(options: BenchOptions) -> Part:
    """Ask 24 sessions of each mode (quick: 2, of three plans)."""
    questions = replace(QUICK if options.quick else QUESTIONS, seed=options.seed)
    kinds = kinds_of_plans(Sizes(read_config(find_model(None)).layers, questions.length), quick=options.quick)
    with tempfile.TemporaryDirectory() as scratch:
        compared = compare_plans([text for text in kinds if text != "plain"], questions, Path(scratch) / "turns")
    return part_of(compared, kinds)


def kinds_of_plans(sizes: Sizes, *, quick: bool = False) -> dict[str, str]:
    """Return, by plan, whether it is ``dense``, a ``codec`` or a ``policy``."""
    kinds = {"plain": "dense"} | {_BY_NAME[name].text: "codec" for name in (CODECS[:1] if quick else CODECS)}
    for codec in EQUAL_TO[1:] if quick else EQUAL_TO:
        for policy in POLICIES[:1] if quick else POLICIES:
            text = sizes.largest(_BY_NAME[policy], sizes.held_bytes(_BY_NAME[codec].text))
            if text is not None:
                kinds[text] = "policy"
    return kinds


def part_of(compared: Compared, kinds: Mapping[str, str]) -> Part:
    """Return a row for every plan and mode, and the claim."""
    rows = [_row(compared, text, kind, task) for task in UNKNOWN for text, kind in kinds.items()]
    return Part(list[Row](rows), [_claim(rows, compared)])


def _row(compared: Compared, text: str, kind: str, task: str) -> dict[str, object]:
    """Return accuracy by turn, the share lost, and what that makes of the plan."""
    about = {"claim": NAME, "kv": text, "kind": kind, "mode": task}
    dense, found = compared.scores("plain", task), compared.scores(text, task)
    if not found or not dense:
        reason = compared.weak.get(task) or compared.rows[text].get("error") or "questions failed"
        return about | {"verdict": None, "reason": reason}
    by_turn = [[value for (_, turn), value in sorted(found.items()) if turn == each] for each in range(NUM_TURNS)]
    num_lost, num_asked = lost(found, dense, UNKNOWN[task])
    low, high = wilson_interval(num_lost, num_asked)
    return about | {
        "context_bytes": compared.rows[text]["context_bytes"],
        "kv_ratio": compared.rows[text]["kv_ratio"],
        "accuracy_by_turn": [sum(values) / len(values) for values in by_turn],
        "interval_by_turn": [list(mean_interval(values)) for values in by_turn],
        "num_sessions": len(by_turn[0]),
        "lost": num_lost / num_asked,
        "lost_interval": [low, high],
        "num_questions": num_asked,
        "verdict": verdict(low, high),
    }


def lost(found: Scores, dense: Scores, turns: range) -> tuple[int, int]:
    """Return the questions of ``turns`` that dense attention answers and a plan does not, and all that it answers."""
    answered = [key for key, value in dense.items() if value == 1.0 and key[1] in turns]
    return sum(found[key] < 1.0 for key in answered), len(answered)


def verdict(low: float, high: float) -> str:
    """Return what an interval of the share lost says."""
    if low > LIMIT:
        return "falls"
    return "flat" if high < LIMIT else "undecided"


def _claim(rows: Sequence[Mapping[str, object]], compared: Compared) -> Claim:
    expected = {"codec": "flat", "policy": "falls"}
    judged = [row for row in rows if row["kind"] in expected]
    missing = [f"{row['kv']}, {row['mode']}: {row['reason']}" for row in judged if row["verdict"] is None]
    if missing or compared.weak:
        return replace(CLAIM, reason="; ".join(missing))
    wrong = [row for row in judged if row["verdict"] != expected[str(row["kind"])]]
    found = [f"{row['kv']}, {row['mode']}: {row['verdict']}, {row['lost']:.3f} lost" for row in wrong]
    return replace(
        CLAIM,
        value=float(len(wrong)),
        num_runs=len(judged),
        reason="; ".join(found),
    )
