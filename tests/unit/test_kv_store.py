"""Both stores against plain tensors: the random life of a store of mixed layers."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tests.support.kv_world import MIXED, NOTHING, WIDE, ContiguousWorld, World

from elbowroom.errors import IntegrityError, OutOfBudget
from elbowroom.kv import KVHandle, KVStep, Want

GONE = "sliding window|are sealed"


class StoreMachine(RuleBasedStateMachine):
    """Random life of a store of mixed layers under a tight capacity."""

    capacity = 16 * 4096 * 4
    layers = MIXED
    plan = "plain"
    kind = World

    def __init__(self) -> None:
        super().__init__()
        self.world = self.kind(self.layers, self.capacity, plan=self.plan)
        self.limit = self.capacity

    def pick(self, data: st.DataObject, at_least: int = 0) -> KVHandle:
        fitting = [handle for handle, ref in self.world.refs.items() if ref.num_tokens >= at_least]
        return data.draw(st.sampled_from(fitting))

    def some_tokens(self) -> bool:
        return any(ref.num_tokens for ref in self.world.refs.values())

    def reserve(self, step: KVStep) -> bool:
        before = self.world.state()
        shortfall = self.world.store.reserve(step)
        if shortfall is not None:
            assert self.world.state() == before
            assert 0 <= shortfall.available_bytes < shortfall.needed_bytes
        return shortfall is None

    @precondition(lambda self: len(self.world.refs) < 6)
    @rule()
    def open(self) -> None:
        self.world.open()

    @precondition(lambda self: self.world.refs)
    @rule(data=st.data())
    def append(self, data: st.DataObject) -> None:
        handles = data.draw(st.lists(st.sampled_from(list(self.world.refs)), min_size=1, max_size=4, unique=True))
        sizes = st.one_of(st.integers(1, 3), st.sampled_from([1, 62, 63, 64, 65, 130]))
        step = self.world.append_step(*((handle, data.draw(sizes)) for handle in handles))
        if self.reserve(step):
            self.world.run(step, Want(colsum=True, pmax=True) if data.draw(st.booleans()) else NOTHING)

    @precondition(lambda self: self.world.refs)
    @rule(data=st.data())
    def abandon_a_reserved_step(self, data: st.DataObject) -> None:
        self.reserve(self.world.append_step((self.pick(data), data.draw(st.integers(1, 100)))))

    @precondition(lambda self: self.world.refs and len(self.world.refs) < 6)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        handle = self.pick(data)
        count = data.draw(st.one_of(st.none(), st.integers(0, self.world.refs[handle].num_tokens)))
        if count is None or self.world.may_go_back(handle, count):
            before = self.world.state()
            try:
                self.world.fork(handle, count)
            except OutOfBudget:  # where a fork is a copy
                assert self.kind is ContiguousWorld
                assert self.world.state() == before
            return
        before = self.world.state()
        with pytest.raises(IntegrityError, match=GONE):
            self.world.store.fork(handle, count)
        assert self.world.state() == before

    @precondition(lambda self: self.world.refs)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        handle = self.pick(data)
        count = data.draw(st.integers(0, self.world.refs[handle].num_tokens))
        if self.world.may_go_back(handle, count):
            self.world.truncate(handle, count)
            return
        before = self.world.state()
        with pytest.raises(IntegrityError, match=GONE):
            self.world.store.truncate(handle, count)
        assert self.world.state() == before

    @precondition(lambda self: self.world.refs)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        self.world.close(self.pick(data))

    @precondition(lambda self: self.some_tokens())
    @rule(data=st.data())
    def repair(self, data: st.DataObject) -> None:
        world, handle = self.world, self.pick(data, at_least=1)
        ref = world.refs[handle]
        positions = sorted(data.draw(st.sets(st.integers(0, ref.num_tokens - 1), min_size=1, max_size=5)))
        opened = all(world.is_open(handle, position // 64) for position in positions)
        if not world.may_go_back(handle, positions[0]) or not opened:
            with pytest.raises(IntegrityError, match=GONE):
                world.store.overwrite(handle, np.array(positions))
            return
        more = data.draw(st.sampled_from([0, 0, 1, 70]))
        world.store.overwrite(handle, np.array(positions))
        step = world.make_step([(handle, [*positions, *range(ref.num_tokens, ref.num_tokens + more)])])
        if self.reserve(step):
            world.run(step)

    @precondition(lambda self: self.world.refs)
    @rule(data=st.data())
    def accept_part_of_a_step(self, data: st.DataObject) -> None:
        world, handle = self.world, self.pick(data)
        start = world.refs[handle].num_tokens
        count = data.draw(st.sampled_from([1, 4, 9, 70]))
        step = world.append_step((handle, count))
        if not self.reserve(step):
            return
        world.run(step)
        if data.draw(st.booleans()):
            with contextlib.suppress(OutOfBudget):
                world.fork(handle)
        kept = sorted(data.draw(st.sets(st.integers(start, start + count - 1))))
        before = world.state()
        moved = [target for target, source in enumerate(kept, start) if target != source]
        opened = not moved or world.is_open(handle, moved[0] // 64)
        if not world.may_go_back(handle, start + len(kept)) or not opened:
            with pytest.raises(IntegrityError, match=GONE):
                world.store.accept(handle, np.array(kept, dtype=np.int64))
            assert world.state() == before
            return
        try:
            world.accept(handle, start, kept)
        except OutOfBudget:  # a fork made a copy necessary
            assert world.state() == before

    @precondition(lambda self: self.some_tokens() and len(self.world.refs) < 6)
    @rule(data=st.data())
    def export_and_import(self, data: st.DataObject) -> None:
        world, handle = self.world, self.pick(data, at_least=1)
        stop = data.draw(st.integers(1, world.refs[handle].num_tokens))
        if not world.may_go_back(handle, stop):
            with pytest.raises(IntegrityError, match=GONE):
                world.store.export_span(handle, 0, stop)
            return
        span = world.store.export_span(handle, 0, stop)
        source = world.refs[handle]
        if data.draw(st.booleans()):
            world.close(handle)  # a swap: the bytes are gone before they come back
        twin = world.open()
        before = world.state()
        try:
            assert world.store.import_span(twin, span) == stop
        except OutOfBudget:
            assert world.state() == before
            return
        assert world.store.export_span(twin, 0, stop) == span
        world.refs[twin] = source.prefix(stop)
        world.expire(twin, stop)

    @rule(idle=st.booleans())
    def trim(self, idle: bool) -> None:
        self.world.arena.trim(0 if idle else 10)

    @rule(share=st.sampled_from([0.2, 0.6, 1.0]))
    def resize(self, share: float) -> None:
        self.limit = int(self.capacity * share)
        held = self.world.store.report().live_bytes
        assert self.world.store.resize(self.limit) == max(held - self.limit, 0)

    @invariant()
    def agrees(self) -> None:
        self.world.check()
        assert self.world.store.report().live_bytes <= self.capacity

    def teardown(self) -> None:
        for handle in list(self.world.refs):
            self.world.close(handle)
        self.world.check()
        assert self.world.ledger.held("kv", "host") == 0
        self.world.store.close_all()
        assert self.world.ledger.total("host") == 0


class ContiguousMachine(StoreMachine):
    """The same where each sequence is contiguous and forks are copies."""

    kind = ContiguousWorld


class Int8Machine(StoreMachine):
    """The same with codes and scales."""

    plan = "int8"


class BfpMachine(StoreMachine):
    """The same with two codes a byte, and values in another format than keys."""

    plan = "bfp(k=4,v=8,n=16)"
    layers = WIDE


class KiviMachine(StoreMachine):
    """The same with strips that are sealed when they are full."""

    plan = "kivi(k=2,v=4)"
    layers = WIDE


# Shrinking a failure takes minutes; the first failing run prints all its steps as it is.
_SETTINGS = settings(stateful_step_count=25, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
StoreMachine.TestCase.settings = settings(_SETTINGS, max_examples=25)
for machine in (ContiguousMachine, Int8Machine, BfpMachine, KiviMachine):
    machine.TestCase.settings = settings(_SETTINGS, max_examples=12)
TestStoreMachine = StoreMachine.TestCase
TestContiguousMachine = ContiguousMachine.TestCase
TestInt8Machine = Int8Machine.TestCase
TestBfpMachine = BfpMachine.TestCase
TestKiviMachine = KiviMachine.TestCase
