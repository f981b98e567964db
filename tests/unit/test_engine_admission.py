"""Admission policies: what they foresee, against slow oracles, and that none of them changes an answer or hangs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.engine_world import World, bound, expected_output, layer

from elbowroom.engine.admission import ADMISSIONS, Outlook
from elbowroom.engine.admission.lengths import WINDOW, Kind, LengthModel
from elbowroom.engine.admission.past_future import PastFutureAdmission
from elbowroom.engine.admission.past_future_paper import PastFuturePaperAdmission
from elbowroom.engine.admission.peak import future_peak
from elbowroom.engine.executors.base import LinearCostModel
from elbowroom.engine.executors.simulated import SimExecutor
from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.engine.scheduler import Scheduler, SchedulerConfig
from elbowroom.engine.types import Request
from elbowroom.errors import PlanError

PLAN = bound(layer(), layer())
BLOCK = 16384
KIND = Kind("", 12)
FORESEEING = [name for name in ADMISSIONS.names() if name != "greedy"]


def outlook(num_tokens: int, num_generated: int = 0, most: int = 100, true: int | None = None) -> Outlook:
    return Outlook(
        num_tokens=num_tokens,
        num_generated=num_generated,
        kind=KIND,
        most_new_tokens=most,
        true_new_tokens=true,
        chunk_steps=0,
        prices=np.arange(200, dtype=np.int64) * BLOCK,
        most_bytes=200 * BLOCK,
        spared_bytes=0,
    )


@given(st.lists(st.tuples(st.integers(1, 500), st.integers(0, 700)), min_size=1, max_size=8))
def test_the_peak_is_that_of_stepping(sequences: list[tuple[int, int]]) -> None:
    """Step by step: all get a token, then those that have all of theirs free what they held."""
    outlooks = [outlook(held) for held, _ in sequences]
    most = 0
    for step in range(max(more for _, more in sequences) + 1):
        alive = [-(-(held + step) // 64) * BLOCK for held, more in sequences if more >= step]
        most = max(most, sum(alive))
    assert future_peak(outlooks, np.asarray([more for _, more in sequences])) == most


def test_bytes_stop_at_a_bound_and_leave_out_what_is_shared() -> None:
    made = outlook(64)
    bounded = made._replace(most_bytes=3 * BLOCK, spared_bytes=BLOCK)
    peaks = [[future_peak([each], np.asarray([more])) for more in (0, 64, 640)] for each in (made, bounded)]
    assert peaks == [[BLOCK, 2 * BLOCK, 11 * BLOCK], [0, BLOCK, 2 * BLOCK]]
    # Two plans in one batch, and the higher of two guesses.
    assert future_peak([made, bounded], np.asarray([[0, 0], [640, 64]])) == 11 * BLOCK


@given(st.lists(st.integers(1, 9), max_size=12), st.lists(st.integers(0, 9), max_size=6))
def test_survival_is_that_of_kaplan_and_meier(finished: list[int], running: list[int]) -> None:
    model = LengthModel(limit=0)
    for length in finished:
        model.add(KIND, length)
    lengths, shares = model.survival([KIND], [KIND] * len(running), np.asarray(running, dtype=np.int64))
    alive = 1.0
    for length, share in zip(lengths.tolist(), shares[0].tolist(), strict=True):
        at_risk = sum(each >= length for each in (*finished, *running))
        if at_risk:
            alive *= 1 - finished.count(length) / at_risk
            assert share == pytest.approx(alive)


def known(model: LengthModel, has: list[int], limit: int, steps: list[list[int]], running: int = 0) -> list[float]:
    kinds, limits = [KIND] * len(has), np.full(len(has), limit)
    shape = np.asarray(steps * len(has))
    return model.chances(kinds, np.asarray(has), limits, running, shape)[-1].tolist()


def test_chances_follow_what_is_known() -> None:
    model = LengthModel()
    for length in (10, 20, 30, 40):
        model.add(KIND, length)
    steps = [[1, 10, 11, 31, 40, 41]]
    assert known(model, [0], 100, steps) == pytest.approx([1.0, 1.0, 0.75, 0.25, 0.25, 0.0])
    # One with 25 tokens is one of the two longest; one with 45 is longer than all that is known: up to its limit.
    assert known(model, [25], 100, steps) == pytest.approx([1.0, 0.5, 0.5, 0.0, 0.0, 0.0])
    assert known(model, [45], 55, steps) == [1.0, 1.0, 0, 0, 0, 0]
    # Four that still run with 15 tokens say that few end early.
    assert known(model, [15, 15, 15, 15, 0], 100, steps, running=4)[2] == pytest.approx(7 / 8)


def test_before_anything_is_known_lengths_are_spread_over_all_magnitudes() -> None:
    model = LengthModel(prior=4.0)
    model.allow(4096)
    steps = [[9, 65, 513]]
    assert known(model, [0], 4096, steps) == pytest.approx([0.75, 0.5, 0.25], abs=0.05)
    for _ in range(400):
        model.add(KIND, 500)
    assert known(model, [0], 4096, steps) == pytest.approx([1, 1, 0], abs=0.03)


def test_answers_of_a_kind_are_told_apart_and_others_fill_in() -> None:
    model, steps = LengthModel(), np.asarray([[50]] * 4)
    short, long = Kind.of("a", 100), Kind.of("a", 3000)
    for _ in range(200):
        model.add(short, 10)
        model.add(long, 90)
    kinds = [short, long, Kind.of("a", 100_000), Kind.of("b", 100)]
    found = model.chances(kinds, np.zeros(4, dtype=np.int64), np.full(4, 100), 0, steps)[:, 0]
    assert found == pytest.approx([0, 1, 0.5, 0.5], abs=0.02)  # what is new is like all others


def test_only_the_newest_answers_are_remembered() -> None:
    model = LengthModel()
    for number in range(WINDOW):
        model.add(Kind.of(f"tenant {number}", 100), 10)
    for _ in range(WINDOW):
        model.add(KIND, 500)
    assert known(model, [0], 4096, [[11, 489]]) == pytest.approx([1, 1])
    assert len(model._ended) == 3  # tenants that are gone take no memory


def test_policies_admit_what_they_foresee() -> None:
    running, small, room = [outlook(640, 100, 400, 110)], outlook(64, 0, 400, 10), 13 * BLOCK
    make = {name: ADMISSIONS.get(name)() for name in ADMISSIONS.names()}
    assert make["greedy"].admits(small, running, room)
    assert not make["conservative"].admits(small, running, room)
    assert make["oracle"].admits(small, running, room)
    assert make["oracle"].admits(outlook(64, 0, 400, 300), running, room)  # the other one has ended by then
    assert not make["oracle"].admits(outlook(128, 0, 400, 10), running, room)
    for name in ("past_future", "past_future_paper"):
        assert not make[name].admits(small, running, room)  # nothing is known: as long as may be
        for _ in range(300):
            make[name].ended(KIND, 105)
        assert make[name].admits(small, running, 16 * BLOCK)
        assert not make[name].admits(outlook(640), running, 16 * BLOCK)


def test_unknown_policies_name_those_there_are() -> None:
    with pytest.raises(PlanError, match="unknown admission policy 'x'") as refusal:
        ADMISSIONS.get("x")
    assert "past_future" in refusal.value.hint


REQUESTS = st.lists(st.tuples(st.integers(1, 200), st.integers(1, 120), st.integers(0, 1)), min_size=1, max_size=10)


@pytest.mark.parametrize("name", ADMISSIONS.names())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(requests=REQUESTS, blocks=st.integers(6, 30))
def test_no_policy_changes_an_answer_or_hangs(name: str, requests: list[tuple[int, int, int]], blocks: int) -> None:
    world = World(PLAN, blocks * BLOCK, max_sequences=6, admission=ADMISSIONS.get(name)())
    made = [
        Request(
            id=number,
            prompt_token_ids=tuple((number * shared + i) % 40 + 8 for i in range(prompt)),
            sampling=SamplingParams(max_tokens=new, ignore_eos=True, seed=5),
            num_output_tokens=new,
        )
        for number, (prompt, new, shared) in enumerate(requests)
        if -(-(prompt + new) // 64) <= blocks
    ]
    tokens = world.run_all(made)
    for each in made:
        wanted = expected_output(list(each.prompt_token_ids), 5, 0, each.sampling.max_tokens or 0, True)
        assert tokens[each.id, 0] == wanted
    if name in ("conservative", "oracle"):
        assert world.scheduler.stats().preemptions == 0
    world.check_empty()


@pytest.mark.parametrize("name", FORESEEING)
def test_a_restored_scheduler_decides_the_same(name: str) -> None:
    scheduler = _simulated(name, 12)
    for number in range(8):
        scheduler.add(_request(number, 100, 60 + number))
    executor = SimExecutor(LinearCostModel())
    for _ in range(3):
        scheduler.update(executor.collect(executor.submit(scheduler.schedule(0.0))))
    snapshot, lives = scheduler.snapshot(), []
    for _ in range(2):
        scheduler.restore(snapshot)
        plans = []
        while scheduler.has_work():
            plans.append(scheduler.schedule(0.0))
            scheduler.update(executor.collect(executor.submit(plans[-1])))
        lives.append(repr(plans))
    assert lives[0] == lives[1]


def test_simulated_answers_end_where_their_trace_says() -> None:
    scheduler, lengths = _simulated("greedy", 1000), {0: 1, 1: 77, 2: 200, 3: 5}
    for number, length in lengths.items():
        scheduler.add(_request(number, 70, length))
    executor = SimExecutor(LinearCostModel(), end_token_id=1)
    made = dict.fromkeys(lengths, 0)
    reasons: dict[int, Any] = {}
    while scheduler.has_work():
        for update in scheduler.update(executor.collect(executor.submit(scheduler.schedule(0.0)))):
            made[update.request_id] += len(update.tokens)
            reasons[update.request_id] = update.finish_reason
    assert made == lengths
    assert set(reasons.values()) == {"stop"}


@pytest.mark.parametrize("name", ADMISSIONS.names())
@pytest.mark.parametrize("seed", range(3))
def test_skipping_to_events_changes_nothing(name: str, seed: int) -> None:
    generator = np.random.default_rng(seed)
    lengths = list(zip(generator.integers(1, 200, 14).tolist(), generator.integers(1, 300, 14).tolist(), strict=True))
    ends = []
    for repeats in (False, True):
        scheduler, executor, steps = _simulated(name, 12, repeats), SimExecutor(LinearCostModel()), 0
        for number, (prompt, length) in enumerate(lengths):
            scheduler.add(_request(number, prompt, length))
        seen = []
        while scheduler.has_work():
            result = executor.collect(executor.submit(scheduler.schedule(0.0)))
            steps += result.num_steps
            seen += [(each.request_id, steps) for each in scheduler.update(result) if each.finish_reason]
        ends.append((sorted(seen), scheduler.stats().preemptions))
    assert ends[0] == ends[1]


def _simulated(name: str, blocks: int, repeats: bool = True) -> Scheduler:
    config = SchedulerConfig(
        max_positions=4096, max_step_tokens=128, eos_token_ids=(1,), prefix_cache=False, repeats_steps=repeats
    )
    world = World(PLAN, blocks * BLOCK, max_positions=4096)
    return Scheduler(config, [world.pricing], blocks * BLOCK, ADMISSIONS.get(name)())


def _request(number: int, prompt: int, length: int) -> Request:
    sampling = SamplingParams(max_tokens=400, seed=0)
    return Request(id=number, prompt_token_ids=(2,) * prompt, sampling=sampling, num_output_tokens=length)


def _begun(scheduler: Scheduler) -> list[int]:
    """Run one step and return which requests hold a slot."""
    executor = SimExecutor(LinearCostModel())
    scheduler.update(executor.collect(executor.submit(scheduler.schedule(0.0))))
    return sorted(seq.request.id for seq in scheduler.queues[1])


@pytest.mark.parametrize(
    ("usual", "own", "begins"),
    [("greedy", "conservative", False), ("conservative", "greedy", True), ("greedy", "greedy", True)],
)
def test_a_request_is_let_in_by_the_policy_that_it_names(usual: str, own: str, begins: bool) -> None:
    """Both prompts fit; at their limits of 400 tokens, eight blocks each, they do not."""
    scheduler = _simulated(usual, 12)
    scheduler.add(_request(0, 100, 300))
    scheduler.add(replace(_request(1, 20, 300), admission=own))
    scheduler.add(replace(_request(2, 20, 300), admission=own))
    assert _begun(scheduler) == ([0, 1, 2] if begins else [0])


def test_a_request_may_not_name_a_policy_that_there_is_not() -> None:
    scheduler = _simulated("greedy", 12)
    with pytest.raises(PlanError, match="unknown admission policy 'soon'"):
        scheduler.add(replace(_request(0, 100, 300), admission="soon"))
    assert not scheduler.has_work()


def test_every_policy_in_use_learns_from_every_answer() -> None:
    scheduler = _simulated("past_future_paper", 40)
    own = [None, "past_future", "greedy", "past_future_paper", "past_future"]
    for number, name in enumerate(own):
        scheduler.add(replace(_request(number, 20, 10 + number), admission=name))
    executor = SimExecutor(LinearCostModel(), end_token_id=1)
    while scheduler.has_work():
        scheduler.update(executor.collect(executor.submit(scheduler.schedule(0.0))))
    state = scheduler._state
    assert isinstance(state.admission, PastFuturePaperAdmission)
    assert sorted(state.admission.window)[:5] == [10, 11, 12, 13, 14]
    assert sorted(state.others) == ["greedy", "past_future"], "the usual one is there once"
    learnt = state.others["past_future"]
    assert isinstance(learnt, PastFutureAdmission)
    assert sorted(length for _, length in learnt.lengths.finished) == [10, 11, 12, 13, 14]


def test_who_was_let_in_to_its_limit_goes_last() -> None:
    """3 fits to its limit beside 0 to 2, and holds most of the younger half; 4 to 6 only fit now."""
    scheduler = _simulated("greedy", 24)
    for number in range(7):
        request = replace(_request(number, 60, 250), sampling=SamplingParams(max_tokens=250, seed=0))
        if number == 3:
            request = replace(request, prompt_token_ids=(2,) * 200, admission="conservative")
        scheduler.add(request)
    executor, gone = SimExecutor(LinearCostModel(), end_token_id=1), set()
    while scheduler.has_work():
        scheduler.update(executor.collect(executor.submit(scheduler.schedule(0.0))))
        gone |= {seq.request.id for seq in scheduler.queues[0] if seq.num_preemptions}
    assert gone
    assert 3 not in gone


@pytest.mark.parametrize("usual", ["greedy", "past_future"])
@pytest.mark.parametrize("seed", range(4))
def test_skipping_to_events_changes_nothing_where_requests_name_policies(usual: str, seed: int) -> None:
    generator = np.random.default_rng(seed)
    names = [None, *ADMISSIONS.names()]
    made = [
        replace(
            _request(number, int(generator.integers(1, 200)), int(generator.integers(1, 300))),
            admission=names[int(generator.integers(len(names)))],
            priority=int(generator.integers(2)),
        )
        for number in range(16)
    ]
    ends = []
    for repeats in (False, True):
        scheduler, executor, steps = _simulated(usual, 12, repeats), SimExecutor(LinearCostModel(), end_token_id=1), 0
        for request in made:
            scheduler.add(request)
        seen = []
        while scheduler.has_work():
            result = executor.collect(executor.submit(scheduler.schedule(0.0)))
            steps += result.num_steps
            seen += [(each.request_id, steps) for each in scheduler.update(result) if each.finish_reason]
        ends.append((sorted(seen), scheduler.stats().preemptions))
    assert len(ends[0][0]) == len(made)
    assert ends[0] == ends[1]


def test_room_is_kept_while_nobody_has_waited_long() -> None:
    """Lengths are uncertain; whoever has just come needs more room than whoever has waited, up to a bound."""
    policy = ADMISSIONS.get("past_future")()
    for length in (50, 100, 200, 400, 800, 1600) * 5:
        policy.ended(KIND, length)
    running = [outlook(300 + 40 * number, 40 * number, most=2000) for number in range(8)]

    def least_room(waited_s: float) -> int:
        candidate = outlook(300, most=2000)._replace(waited_s=waited_s)
        return next(blocks for blocks in range(300) if policy.admits(candidate, running, blocks * BLOCK))

    needs = [least_room(waited_s) for waited_s in (0.0, 2.5, 5.0, 50.0)]
    assert needs[0] > needs[1] > needs[2] == needs[3]
