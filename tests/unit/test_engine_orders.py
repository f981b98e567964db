"""Orders and preemption: who is served first, who gives way, and that nobody is put out and taken in by turns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from tests.support.engine_world import World, bound, layer

from elbowroom.engine.admission import ADMISSIONS
from elbowroom.engine.ordering import ORDERS
from elbowroom.engine.preemption import PREEMPTIONS
from elbowroom.engine.preemption.auto import AutoPreemption
from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.engine.scheduling import Scheduling
from elbowroom.engine.types import Request, SessionRef
from elbowroom.errors import PlanError
from elbowroom.memory.swap_cost import SwapCost

PLAN = bound(layer(), layer())
BLOCK = 16384


@dataclass
class Life:
    """What happened in a run."""

    world: World
    ends: dict[int, int] = field(default_factory=dict)
    """Request -> step of its end."""
    firsts: dict[int, int] = field(default_factory=dict)
    """Request -> step of its first token."""
    steps: int = 0

    def run(self, arrivals: dict[int, list[Request]]) -> Life:
        """Add requests in the steps named and run all to the end."""
        while arrivals or self.world.scheduler.has_work():
            for request in arrivals.pop(self.steps, []):
                self.world.scheduler.add(request)
            for update in self.world.step():
                self.firsts.setdefault(update.request_id, self.steps)
                if update.finish_reason:
                    self.ends[update.request_id] = self.steps
            self.steps += 1
            assert self.steps < 20_000
        return self

    @property
    def preemptions(self) -> int:
        return self.world.scheduler.stats().preemptions


def request(number: int, prompt: int, new: int, **fields: Any) -> Request:
    sampling = SamplingParams(max_tokens=new, ignore_eos=True, seed=1)
    tokens = tuple((number * 7 + i) % 40 + 8 for i in range(prompt))
    return Request(id=number, prompt_token_ids=tokens, sampling=sampling, **fields)


def life(blocks: int, arrivals: dict[int, list[Request]], **options: Any) -> Life:
    world = World(PLAN, blocks * BLOCK, prefix_cache=False, **options)
    return Life(world).run(arrivals)


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_what_had_to_go_does_not_come_back_to_go_again(mode: str) -> None:
    """Memory that ends free up lets one back in; without blocks kept for those that run, it would soon go again."""

    def preemptions(**limits: int) -> int:
        arrivals = {0: [request(k, 60, 100 + 60 * (k * 7 % 24)) for k in range(24)]}
        return life(80, arrivals, preemption=PREEMPTIONS.get(mode)(), max_step_tokens=512, **limits).preemptions

    assert preemptions() <= 0.7 * preemptions(return_blocks=0)


def test_a_light_tenant_does_not_wait_for_a_heavy_one() -> None:
    def arrivals() -> dict[int, list[Request]]:
        heavy = [request(number, 200, 200, tenant="heavy") for number in range(12)]
        return {0: heavy, 40: [request(50, 100, 50, tenant="light")]}

    fcfs = life(20, arrivals(), order=ORDERS.get("fcfs")())
    fair = life(20, arrivals(), order=ORDERS.get("fair")())
    assert fair.firsts[50] < fcfs.firsts[50] / 4
    assert fair.steps < 1.3 * fcfs.steps


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_tenants_take_turns_of_a_quantum_and_not_of_a_step(mode: str) -> None:
    """Two tenants that fit only one by one: without hysteresis they would be put out for each other all the time."""

    def switches(**limits: Any) -> Life:
        order = ORDERS.get("fair")(**limits)
        arrivals = {0: [request(number, 100, 400, tenant=f"tenant {number}") for number in range(2)]}
        return life(10, arrivals, order=order, preemption=PREEMPTIONS.get(mode)())

    eager, calm = switches(quantum=0.0, least_steps=0, interval=1), switches()
    assert eager.preemptions > 50
    assert calm.preemptions <= 2 * 400 * 2 / 256 + 2
    assert calm.steps <= eager.steps


def test_a_tenant_that_was_away_has_saved_up_nothing() -> None:
    order = ORDERS.get("fair")()
    life(20, {0: [request(0, 100, 100, tenant="a")], 300: [request(1, 100, 100, tenant="b")]}, order=order)
    assert order.counters.keys() <= {"a", "b"}
    assert not order.present


def test_a_heavier_weight_gets_more() -> None:
    def ends(weights: dict[str, float]) -> dict[int, int]:
        arrivals = {0: [request(n, 100, 150, tenant="ab"[n % 2]) for n in range(12)]}
        return life(8, arrivals, order=ORDERS.get("fair")(weights=weights)).ends

    even, uneven = ends({}), ends({"b": 4.0})
    assert sum(uneven[n] for n in range(1, 12, 2)) < 0.9 * sum(even[n] for n in range(1, 12, 2))


def test_priority_puts_out_what_is_less_urgent() -> None:
    def arrivals() -> dict[int, list[Request]]:
        return {0: [request(0, 300, 300, priority=5)], 20: [request(1, 300, 50, priority=1)]}

    queued = life(10, arrivals(), order=ORDERS.get("fcfs")())
    urgent = life(10, arrivals(), order=ORDERS.get("priority")())
    assert urgent.ends[1] < queued.ends[0] < urgent.ends[0]
    assert urgent.preemptions == 1


@pytest.mark.parametrize("admission", list(ADMISSIONS.names()))
def test_a_refusal_ends_with_the_save_that_it_waits_for(admission: str) -> None:
    """A request that does not fit before others are saved begins then: it is not told that it never will."""
    policies = {"admission": ADMISSIONS.get(admission)(), "preemption": PREEMPTIONS.get("swap")()}
    world = World(PLAN, 10 * BLOCK, prefix_cache=False, **policies)
    world.executor.delay = 3
    arrivals = {0: [request(0, 400, 100, priority=5)], 10: [request(1, 400, 50, priority=1)]}
    Life(world).run(arrivals)
    stats = world.scheduler.stats()
    assert stats.finished == {"length": 2}
    assert stats.swaps_out > 0


def test_swapped_tokens_are_not_computed_again() -> None:
    arrivals = {
        0: [request(0, 300, 300, priority=5)],
        20: [request(1, 300, 20, priority=1)],
        90: [request(2, 300, 20, priority=1)],
    }
    prefills = {}
    for mode in ("recompute", "swap"):
        made = life(10, dict(arrivals), preemption=PREEMPTIONS.get(mode)())
        assert made.preemptions == 2
        prefills[mode] = made.world.num_prefilled
    stats = made.world.scheduler.stats()
    assert (stats.swaps_out, stats.swaps_in, stats.failed_swaps) == (2, 2, 0)
    assert prefills["swap"] == 900 + 2  # the token that was sampled last is computed behind what is read
    assert prefills["recompute"] > 900 + 2 * 300


def test_two_requests_of_a_session_at_once_leave_nothing_behind() -> None:
    world = World(PLAN, 40 * BLOCK, prefix_cache=False, preemption=PREEMPTIONS.get("swap")())
    session = SessionRef(key=1)
    world.run_all([request(number, 100, 20, session=session) for number in range(3)])
    assert len(world.scheduler.account.parked) == 1
    world.scheduler.account.reclaim(2**62)
    world.step()
    assert len(world.executor.objects) == 1
    world.scheduler.close_session(1)
    world.step()
    world.check_empty()


def test_a_turn_goes_on_from_what_was_saved() -> None:
    """Its session's slot was needed by others meanwhile: nothing but what is new is computed."""
    world = World(PLAN, 40 * BLOCK, prefix_cache=False, preemption=PREEMPTIONS.get("swap")())
    session = SessionRef(key=1)
    first = request(0, 300, 20, session=session)
    said = [*first.prompt_token_ids, *world.run_all([first])[0, 0]]
    world.scheduler.account.reclaim(2**62)
    world.step()
    assert not world.scheduler.account.parked
    before = world.num_prefilled
    turn = Request(
        id=1,
        prompt_token_ids=(*said, *range(8, 38)),
        sampling=SamplingParams(max_tokens=5, ignore_eos=True, seed=1),
        session=session,
    )
    world.run_all([turn])
    assert world.num_prefilled - before == 30 + 1
    assert world.scheduler.stats().swaps_in == 1


def test_late_requests_go_behind_those_that_can_still_be_met() -> None:
    order = ORDERS.get("slo")(ttft_s=1.0)
    world = World(PLAN, 12 * BLOCK, prefix_cache=False, order=order, max_sequences=1)
    for number, arrival_s in enumerate([0.0, 1.0, 5.0]):
        world.scheduler.add(request(number, 100, 10, arrival_s=arrival_s))
    plan = world.scheduler.schedule(5.5)
    assert [seq.request.id for seq, _ in world.scheduler._state.in_flight] == [2]
    assert len(plan.rows) == 1


def test_a_request_with_a_deadline_of_its_own_goes_before_those_due_later() -> None:
    world = World(PLAN, 12 * BLOCK, prefix_cache=False, order=Scheduling(order="slo").make_order(), max_sequences=1)
    for number, deadline_s in enumerate([None, 30.0, 4.0]):
        world.scheduler.add(request(number, 100, 10, deadline_s=deadline_s))
    world.scheduler.schedule(0.0)
    assert [seq.request.id for seq, _ in world.scheduler._state.in_flight] == [2]
    assert [seq.request.id for seq in world.scheduler.queues[0]] == [0, 1]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"slo_ttft_s": 2.0}, "--slo-ttft means nothing to the order priority"),
        ({"order": "fair", "slo_tpot_s": 2.0}, "--slo-tpot means nothing to the order fair"),
        ({"order": "slo", "slo_tpot_s": 0.0}, "--slo-tpot must be above 0"),
        ({"order": "slo", "slo_ttft_s": float("inf")}, "--slo-ttft must be above 0"),
    ],
)
def test_targets_are_for_the_order_that_has_them(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words) as refusal:
        Scheduling(**fields)
    assert "above" in words or "--order slo" in str(refusal.value.hint)


def test_auto_saves_what_is_cheaper_to_move_than_to_compute() -> None:
    policy = AutoPreemption(SwapCost(write_bytes_per_s=1e9, read_bytes_per_s=1e9), prefill_tokens_per_s=1000.0)
    assert policy.saves(1000, 10**8, 10**8)
    assert not policy.saves(1000, 10**9, 10**9)
    assert policy.saves(1000, 9 * 10**8, 0)
    for _ in range(100):
        policy.computed(500, 0.01)
    assert not policy.saves(1000, 10**8, 10**8)


@pytest.mark.parametrize(("registry", "kind"), [(ORDERS, "order policy"), (PREEMPTIONS, "preemption policy")])
def test_unknown_names_list_those_there_are(registry: Any, kind: str) -> None:
    with pytest.raises(PlanError, match=f"unknown {kind} 'x'"):
        registry.get("x")


def test_of_the_younger_half_the_largest_gives_way() -> None:
    """Six sequences fill the memory: the fourth holds most of the younger three, the second most of all."""
    sizes = [100, 300, 100, 230, 100, 100]
    world = World(PLAN, 24 * BLOCK, prefix_cache=False)
    for number, size in enumerate(sizes):
        world.scheduler.add(request(number, size, 200))
    while not world.scheduler.stats().preemptions:
        running = [seq.request.id for seq in world.scheduler._state.running]
        world.step()
    assert running == list(range(6))
    assert [seq.request.id for seq in world.scheduler._state.waiting] == [3]
