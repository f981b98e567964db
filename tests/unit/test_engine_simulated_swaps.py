"""Transfers of the simulated executor: what they cost, what overlaps, and what waits."""

from __future__ import annotations

import pytest

from elbowroom.engine.executors import LinearCostModel, SimExecutor
from elbowroom.engine.executors.simulated_transfers import SimTransfers, SwapShape
from elbowroom.engine.types import KVOp, Row, StepPlan, StepResult
from elbowroom.memory.swap_cost import SwapCost

STEP = LinearCostModel(step_s=0.1, token_s=0.0, sample_s=0.0, context_s=0.0)
COST = SwapCost(write_bytes_per_s=1000.0, read_bytes_per_s=2000.0, copy_s=0.01)
SHAPE = SwapShape(token_bytes=10.0, run_tokens=64)


class Sim:
    """An executor whose steps are listed by slots that decode."""

    def __init__(self, shape: SwapShape = SHAPE) -> None:
        self.executor = SimExecutor(STEP, transfers=SimTransfers(COST, shape))

    def step(self, *ops: KVOp, slots: tuple[int, ...] = (), steps: int = 1, waits: bool = False) -> StepResult:
        rows = tuple([Row(slot, "decode", 100, 1, None, None) for slot in slots])
        return self.executor.collect(self.executor.submit(StepPlan(ops, rows, steps, waits)))


def save(slot: int, tokens: int, is_async: bool = True) -> KVOp:
    return KVOp("save", slot, num_tokens=tokens, key=f"s{slot}", is_async=is_async)


def load(slot: int, source: int, tokens: int, is_async: bool = True) -> KVOp:
    return KVOp("load", slot, num_tokens=tokens, key=f"s{source}", is_async=is_async)


def test_synchronous_transfers_add_to_the_step() -> None:
    """128 tokens are 1,280 bytes in 2 copies: 1.3 s to write, 0.66 s to read."""
    sim = Sim()
    saved = sim.step(save(1, 128, is_async=False), KVOp("close", 1), slots=(2,))
    assert saved.duration_s == pytest.approx(1.3 + 0.1)
    assert [(each.num_bytes, each.num_copies, each.error) for each in saved.moved] == [(1280, 2, None)]
    loaded = sim.step(load(3, 1, 128, is_async=False), slots=(2, 3))
    assert loaded.duration_s == pytest.approx(0.66 + 0.1)


def test_asynchronous_transfers_overlap_and_a_repeated_step_stops_when_one_ends() -> None:
    """Steps of 0.1 s go on until the 1.3 s are over, then the scheduler hears of it."""
    sim = Sim()
    result = sim.step(save(1, 128), slots=(2,), steps=1000)
    assert (result.num_steps, [each.key for each in result.moved]) == (13, ["s1"])
    assert sim.step(slots=(2,), steps=1000).num_steps == 1000


def test_waiting_for_a_transfer_lasts_as_long_as_it_does() -> None:
    """With nothing to compute the step ends with the first transfer; the second begins behind it."""
    sim = Sim()
    sim.step(save(1, 128), save(2, 64))
    first, second, idle = sim.step(waits=True), sim.step(waits=True), sim.step(waits=True)
    assert (first.duration_s, second.duration_s, idle.duration_s) == (pytest.approx(1.3), pytest.approx(0.65), 0.0)
    assert [each.key for each in (*first.moved, *second.moved)] == ["s1", "s2"]


@pytest.mark.parametrize("kind", ["close", "truncate", "row"])
def test_a_change_waits_for_its_own_transfer(kind: str) -> None:
    """The step that changes a slot begins when its save has ended, and that of another slot does not matter."""
    sim = Sim()
    sim.step(save(1, 64), save(2, 64))
    ops = () if kind == "row" else (KVOp(kind, 1, num_tokens=10),)  # type: ignore[arg-type]
    result = sim.step(*ops, slots=(1,) if kind == "row" else (3,))
    assert result.duration_s == pytest.approx(0.65 + 0.1)
    assert [each.key for each in result.moved] == ["s1"]


@pytest.mark.parametrize(("keeps", "expected"), [(True, [1280, 1000, 1720]), (False, [1280, 2280, 1720])])
def test_only_what_is_new_is_written_where_copies_are_kept(keeps: bool, expected: list[int]) -> None:
    """100 tokens behind a load cost their own bytes; behind a rollback into the first block all is written again."""
    sim = Sim(SwapShape(token_bytes=10.0, keeps_copies=keeps))
    written = [sim.step(save(1, 128, False)).moved[0].num_bytes]
    sim.step(KVOp("close", 1), load(1, 1, 128, False))
    written.append(sim.step(save(1, 228, False)).moved[0].num_bytes)
    sim.step(KVOp("truncate", 1, num_tokens=63))
    written.append(sim.step(save(1, 172, False)).moved[0].num_bytes)
    assert written == expected


def test_failures_are_told_and_rows_of_absent_slots_are_not_computed() -> None:
    """A full tier and a missing object end in errors, at no price."""
    sim = Sim(SwapShape(token_bytes=10.0, capacity_bytes=1000.0))
    assert sim.step(save(1, 128, False)).moved[0].error == "swap is full"
    result = sim.step(load(2, 1, 128, False), slots=(2,))
    assert "no object" in (result.moved[0].error or "")
    assert result.duration_s == 0.0
