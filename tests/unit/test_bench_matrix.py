"""The matrix of plans: sizes at equal bytes, who beats whom, what turns lose, claims that fail when they should."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from elbowroom.bench import BenchOptions
from elbowroom.bench.kv_matrix import (
    bfp_gain,
    defaults,
    joined,
    kivi_axes,
    kvmerger_exact,
    scbench_turns,
    spatten_bytes,
    think_bytes,
)
from elbowroom.bench.kv_matrix.columns import COLUMNS
from elbowroom.bench.kv_matrix.compared import Compared
from elbowroom.bench.kv_matrix.part import Part
from elbowroom.bench.kv_matrix.plans import FILLED, PLANS, SHARES, Point, Sizes
from elbowroom.bench.kv_matrix.verdicts import duels
from elbowroom.errors import PlanError
from elbowroom.evals.comparison.plan import PERPLEXITY
from elbowroom.evals.comparison.quality import TaskRun
from elbowroom.evals.stats import PairedDifference
from elbowroom.evals.tasks import TASKS
from elbowroom.kv.plan import KVPlan
from elbowroom.models.directory import find_model
from elbowroom.models.hf_config import read_config

SIZES = Sizes(read_config(find_model(None)).layers, 2048)
SMALL, INT8, BOTH = "snapkv(tokens=528)", "int8", "snapkv(tokens=976) | int8"
NAMED = {plan.name: plan for plan in PLANS}
POINTS = [
    Point(NAMED["plain"], "plain", None),
    Point(NAMED["int8"], INT8, None),
    Point(NAMED["snapkv"], SMALL, 0.25),
    Point(NAMED["snapkv | int8"], BOTH, 0.25),
]


def compared(scores: dict[str, dict[str, list[float]]], **ratios: float) -> Compared:
    """Return a comparison whose scores are given by plan and task; question n is turn n % 5 of session n // 5."""
    rows = {text: {"kv_ratio": ratios.get(text, 0.25), "context_bytes": 1e6, "error": None} for text in scores}
    runs = {
        text: {
            task: TaskRun({(f"s{number // 5}", number % 5): value for number, value in enumerate(values)})
            for task, values in tasks.items()
        }
        for text, tasks in scores.items()
    }
    return Compared(rows, runs, {})


def test_names_and_parts_of_plans_are_known_and_parse():
    assert PLANS[0].text == "plain"
    assert len({plan.name for plan in PLANS}) == len(PLANS)
    for plan in PLANS:
        KVPlan.parse(plan.text.format(tokens=512))
        assert set(plan.parts) <= NAMED.keys()
        assert bool(plan.parts) == ("|" in plan.text)
        assert plan.parts or not plan.default


def test_every_size_is_the_largest_that_a_budget_holds():
    dense = SIZES.held_bytes("plain")
    points = SIZES.points(PLANS, SHARES)
    for point in points:
        if point.share is not None:
            held = SIZES.held_bytes(point.text)
            assert FILLED * point.share * dense <= held <= point.share * dense
    for name in ("streaming", "snapkv", "snapkv | int8"):
        assert [point.share for point in points if point.plan.name == name] == list(SHARES)
    # All tokens in 4 bits hold about a quarter: with them no half can be filled.
    halves = SIZES.points(PLANS, (1 / 2, *SHARES))
    assert [point.share for point in halves if point.plan.name == "snapkv | bfp"] == list(SHARES)
    assert SIZES.largest(NAMED["snapkv"], 0.01 * dense) is None


def test_columns_ask_tasks_that_there_are():
    assert all(column.task in (*TASKS.names(), PERPLEXITY) for column in COLUMNS)


def cells(bits: float, seen: float, hidden: float) -> dict[str, list[float]]:
    noise = [0.001 * number for number in range(40)]
    return {
        PERPLEXITY: [bits + each for each in noise],
        "first_seen": [seen if number % 5 == 0 else hidden for number in range(40)],
        "retrieval": [hidden] * 40,
    }


@pytest.mark.parametrize(
    ("both", "wins"),
    [(cells(1.3, 1.0, 0.0), True), (cells(1.5, 1.0, 0.0), False), (cells(1.3, 0.0, 0.0), False)],
    ids=["better", "equal", "better here, worse there"],
)
def test_a_combination_beats_a_part_if_it_is_better_somewhere_and_worse_nowhere(both, wins):
    found = compared(
        {"plain": cells(1.2, 1, 1), INT8: cells(1.2, 1, 1), SMALL: cells(1.5, 1.0, 0.0), BOTH: both}, int8=0.5
    )
    (duel,) = duels(POINTS, (0.25,), found)
    assert (duel.combination.text, duel.part.text, duel.wins) == (BOTH, SMALL, wins)
    part = defaults.part_of((*PLANS[:1], NAMED["snapkv | int8"]), POINTS, (0.25,), found)
    (claim,) = part.claims
    assert claim.holds == wins
    (listed,) = [row for row in part.rows if row["kind"] == "combinations"]
    assert listed["kept" if wins else "dropped"] == ["snapkv | int8"]


def test_a_part_of_one_size_fits_budgets_that_are_not_smaller():
    """At a budget that int8 fits, the combination must beat it too."""
    scores = {"plain": cells(1.2, 1, 1), INT8: cells(1.2, 1, 1), SMALL: cells(1.5, 1.0, 0.0), BOTH: cells(1.3, 1, 0)}
    half = [point if point.share is None else Point(point.plan, point.text, 0.5) for point in POINTS]
    found = list(duels(half, (0.5,), compared(scores, int8=0.516)))
    assert {duel.part.text: duel.wins for duel in found} == {INT8: False, SMALL: True}
    assert defaults.winners(found) == {}


def test_the_best_plan_of_a_budget_holds_no_more():
    scores = {"plain": cells(1.2, 1, 1), INT8: cells(1.2, 1, 1), SMALL: cells(1.5, 1.0, 0.0), BOTH: cells(1.3, 1, 0)}
    part = defaults.part_of(PLANS, POINTS, (0.25, 0.5), compared(scores, plain=1.0, int8=0.516))
    best = {(row["share"], row["column"]): row["kv"] for row in part.rows if row["kind"] == "best"}
    assert best[0.25, "bits_per_byte"] == BOTH
    assert best[0.5, "question_hidden"] == INT8


def test_a_method_that_failed_leaves_no_claim():
    found = compared({"plain": cells(1.2, 1, 1), INT8: cells(1.2, 1, 1), SMALL: cells(1.5, 1, 0), BOTH: {}}, int8=0.5)
    found.rows[BOTH]["error"] = "it was killed"
    (claim,) = defaults.part_of(PLANS, POINTS, (0.25,), found).claims
    assert claim.value is None
    assert "it was killed" in claim.reason


def turns(*accuracy: float) -> dict[str, list[float]]:
    """Return 40 sessions of five turns, of which the given share of each turn is right."""
    values = [float(session < 40 * accuracy[turn]) for session in range(40) for turn in range(5)]
    return {"follow_ups": values, "first_seen": values}


KINDS = {"plain": "dense", INT8: "codec", SMALL: "policy"}


def test_policies_fall_and_codecs_are_flat():
    falling = {"follow_ups": turns(0.2, 0.1, 0, 0, 0)["follow_ups"], "first_seen": turns(1, 0.2, 0, 0, 0)["first_seen"]}
    part = scbench_turns.part_of(compared({"plain": turns(*[1] * 5), INT8: turns(*[1] * 5), SMALL: falling}), KINDS)
    (claim,) = part.claims
    assert claim.holds
    seen = next(row for row in part.rows if (row["kv"], row["mode"]) == (SMALL, "first_seen"))
    assert seen["accuracy_by_turn"] == [1.0, 0.2, 0.0, 0.0, 0.0]
    assert seen["num_questions"] == 160
    assert seen["lost"] == pytest.approx(1 - 0.2 / 4)


@pytest.mark.parametrize(
    "wrong", [{INT8: turns(1, 0.8, 0.8, 0.8, 0.8)}, {SMALL: turns(*[1] * 5)}], ids=["codec falls", "policy flat"]
)
def test_what_behaves_otherwise_breaks_the_claim(wrong):
    scores = {"plain": turns(*[1] * 5), INT8: turns(*[1] * 5), SMALL: turns(*[0] * 5)} | wrong
    (claim,) = scbench_turns.part_of(compared(scores), KINDS).claims
    assert claim.value == 2.0
    assert not claim.holds
    assert next(iter(wrong)) in claim.reason


def test_too_few_questions_decide_nothing():
    assert scbench_turns.verdict(0.0, 0.3) == "undecided"
    assert scbench_turns.verdict(0.0, 0.05) == "flat"
    assert scbench_turns.verdict(0.15, 0.9) == "falls"


def test_policies_of_the_turns_hold_no_more_than_the_codecs():
    sizes = Sizes(SIZES.layers, scbench_turns.QUESTIONS.length)
    kinds = scbench_turns.kinds_of_plans(sizes)
    policies = sorted(sizes.held_bytes(text) for text, kind in kinds.items() if kind == "policy")
    for codec, pair in zip(("bfp", "int8"), (policies[:2], policies[2:]), strict=True):
        assert all(0.9 * sizes.held_bytes(codec) < held <= sizes.held_bytes(codec) for held in pair)


def test_the_axes_claim_takes_the_closest_way():
    def bits(mean: float) -> dict[tuple[str, int], float]:
        return {("window", number): mean + 0.01 * number for number in range(8)}

    ways = {("channel", "token"): 1.3, ("channel", "channel"): 1.4, ("token", "token"): 2.2, ("token", "channel"): 2.1}
    claim, keys = kivi_axes.claims_of({way: bits(mean) for way, mean in ways.items()})
    assert claim.holds
    assert keys.value == pytest.approx(0.9)
    assert claim.value == pytest.approx(0.1)
    assert "closest: K by channel, V by channel" in claim.reason
    ways["channel", "channel"] = 1.25
    claim, keys = kivi_axes.claims_of({way: bits(mean) for way, mean in ways.items()})
    assert (claim.holds, keys.holds) == (False, True)


def test_the_claims_of_sorting_are_its_interval_and_nothing():
    saved = PairedDifference(difference=0.1, interval=(-0.01, 0.2), num_pairs=8, num_better=6, num_worse=2)
    assert not bfp_gain._gain(saved).holds
    assert not bfp_gain._none(saved).holds


def test_without_traces_nothing_is_claimed(tmp_path: Path):
    (claim,) = spatten_bytes.measure(BenchOptions(), tmp_path).claims
    assert claim.value is None
    assert "ELBOWROOM_DATA" in claim.reason


def test_a_trace_of_other_reads_breaks_the_claim(tmp_path: Path):
    header = (
        "iteration_id,layer_id,head_id,embedding_length_D,sentence_length_L,key_fetch_num,quant_key_bit,if_requant,"
    )
    for name in spatten_bytes.EXPECTED:
        head = header + "auto_requant_incre,value_fetch_num,quant_value_bit\n"
        (tmp_path / name).write_text(f"{head}0,0,0,8,4,4,-1,False,-1,4,-1\n1,0,0,8,5,5,-1,False,-1,5,-1\n")
    (claim,) = spatten_bytes.measure(BenchOptions(), tmp_path).claims
    assert claim.value == 4.0  # the one that prunes is not dense, the dense one is
    assert not claim.holds


@pytest.mark.parametrize("part", [kvmerger_exact, think_bytes], ids=lambda part: part.NAME)
def test_parts_of_one_layer_measure_what_they_claim(part):
    """The e2e tests run the parts that need a model."""
    made = part.measure(BenchOptions(quick=True))
    claimed = dict(joined.PARTS)[part.measure]
    assert [replace(each, value=None, num_runs=0, reason="") for each in made.claims] == [*claimed]
    assert all(claim.holds for claim in made.claims), made.claims
    assert made.rows


def test_a_part_that_fails_leaves_its_claims_without_values_and_the_others_theirs(monkeypatch, capsys):
    good, bad = kvmerger_exact.CLAIM, (think_bytes.BYTES, think_bytes.PACKED)

    def fail(_options: BenchOptions) -> Part:
        raise PlanError("think is gone", "find it")

    def measure(_options: BenchOptions) -> Part:
        return Part([{"part": good.id}], [replace(good, value=0.0, num_runs=1)])

    monkeypatch.setattr(joined, "machine_info", dict)
    monkeypatch.setattr(joined, "PARTS", ((fail, bad), (measure, (good,))))
    result = joined.run(BenchOptions())
    *lost, kept = result.to_json()["claims"]
    assert [(claim["id"], claim["value"], claim["holds"]) for claim in lost] == [(each.id, None, False) for each in bad]
    assert {claim["reason"] for claim in lost} == {"failed: PlanError: think is gone"}
    assert kept["holds"]
    assert result.rows == [{"part": good.id}]
    assert result.failures == ["think.bytes, think.packed"]
    assert "think is gone" in capsys.readouterr().err
