"""[matrix.defaults]: every plan in every size on the same questions; does a combination beat its parts at equal bytes?

Plans (``plans``) that keep a budget of tokens are sized for 1/4 and 1/8 of what bfloat16 holds; codecs have
the size they have. ``elbowroom compare`` measures each in a process of its own: resident bytes, peak, bytes read for a
token, tokens a second, and answers in four columns (``columns``). A codec belongs to a budget of which it holds at most
1.1 times the bytes.

A combination *beats* a part at a budget if it is surely better in one column at least and surely worse in none: the
95 % interval of the paired difference on the same questions lies wholly on one side of 0. A default combination must
beat every part that fits the budget, at one budget at least; those that do not anywhere are to be dropped.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from elbowroom.bench.base import BenchOptions, Claim, Row
from elbowroom.bench.kv_matrix.columns import COLUMNS, KEYS, TASKS
from elbowroom.bench.kv_matrix.compared import Compared, Questions, compare_plans
from elbowroom.bench.kv_matrix.part import Part, claimed
from elbowroom.bench.kv_matrix.plans import PLANS, SHARES, MatrixPlan, Point, Sizes
from elbowroom.bench.kv_matrix.verdicts import Duel, best_point, duels
from elbowroom.models.directory import find_model
from elbowroom.models.hf_config import read_config

NAME = "matrix.defaults"
CLAIM = claimed(NAME, "<=", 0.0, "default combinations that beat their parts at no budget")
QUESTIONS = Questions(length=2048, tasks=TASKS, keys=KEYS, num_queries=48, num_windows=6)
QUICK = replace(QUESTIONS, length=512, num_queries=4, num_windows=2, num_contexts=1)
QUICK_PLANS, QUICK_SHARES = ("plain", "int8", "snapkv", "snapkv | int8"), (1 / 4,)
_FIGURES = (
    "context_bytes",
    "kv_ratio",
    "peak_over_baseline_bytes",
    "read_bytes_per_token",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "foreign_cpu_share",
)


def measure(options: BenchOptions) -> Part:
    """Compare every plan in every size (quick: four plans, at one budget)."""
    questions = replace(QUICK if options.quick else QUESTIONS, seed=options.seed)
    plans = [plan for plan in PLANS if not options.quick or plan.name in QUICK_PLANS]
    shares = QUICK_SHARES if options.quick else SHARES
    points = Sizes(read_config(find_model(None)).layers, questions.length).points(plans, shares)
    with tempfile.TemporaryDirectory() as scratch:
        texts = [point.text for point in points if point.plan is not PLANS[0]]
        compared = compare_plans(texts, questions, Path(scratch) / "matrix")
    return part_of(plans, points, shares, compared)


def part_of(plans: Sequence[MatrixPlan], points: Sequence[Point], shares: Sequence[float], compared: Compared) -> Part:
    """Return a row for each plan of each size, for each duel, and for the best of each budget and column; the claim."""
    found = list(duels(points, shares, compared))
    rows = [_row(point, compared) for point in points]
    rows += [{"claim": NAME, "kind": "duel", **duel.row()} for duel in found]
    rows += list(_best(points, shares, compared))
    kept = winners(found)
    combinations = [plan for plan in plans if plan.parts]
    rows.append(
        {
            "claim": NAME,
            "kind": "combinations",
            "kept": [plan.name for plan in combinations if plan.name in kept],
            "dropped": [plan.name for plan in combinations if plan.name not in kept],
        }
    )
    return Part(list[Row](rows), [_claim(combinations, found, kept, compared)])


def winners(found: Sequence[Duel]) -> dict[str, list[float]]:
    """Return the combinations that beat all parts that fit some budget, with those budgets."""
    kept: dict[str, list[float]] = {}
    for name, share in dict.fromkeys((duel.combination.plan.name, duel.share) for duel in found):
        here = [duel for duel in found if (duel.combination.plan.name, duel.share) == (name, share)]
        if all(duel.wins for duel in here):
            kept.setdefault(name, []).append(share)
    return kept


def _row(point: Point, compared: Compared) -> dict[str, object]:
    measured = compared.rows[point.text]
    about = {"claim": NAME, "kind": "plan", "plan": point.plan.name, "kv": point.text, "share": point.share}
    cells = {column.name: column.cell(compared, point.text) for column in COLUMNS}
    return about | {name: measured.get(name) for name in (*_FIGURES, "error")} | cells


def _best(points: Sequence[Point], shares: Sequence[float], compared: Compared) -> Iterator[dict[str, object]]:
    for share in shares:
        for column in COLUMNS:
            best = best_point(points, column, share, compared)
            if best is not None:
                about = {"claim": NAME, "kind": "best", "share": share, "column": column.name}
                yield about | {"kv": best[0].text, "score": best[1]}


def _claim(
    combinations: Sequence[MatrixPlan], found: Sequence[Duel], kept: dict[str, list[float]], compared: Compared
) -> Claim:
    defaults = [plan.name for plan in combinations if plan.default]
    met = {duel.combination.plan.name for duel in found}
    missing = [f"{task}: {reason}" for task, reason in compared.weak.items()]
    missing += [f"{text}: {row['error']}" for text, row in compared.rows.items() if row.get("error")]
    missing += [f"{name} met none of its parts" for name in defaults if name not in met]
    if missing:
        return replace(CLAIM, reason="; ".join(missing))
    beaten = [f"{name} at {', '.join(f'{share:g}' for share in kept[name])}" for name in kept]
    dropped = [plan.name for plan in combinations if plan.name not in kept]
    return replace(
        CLAIM,
        value=float(sum(name not in kept for name in defaults)),
        num_runs=len(defaults),
        reason=f"beat their parts: {'; '.join(beaten) or 'none'}; dropped: {', '.join(dropped) or 'none'}",
    )
