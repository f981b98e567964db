"""A world for the scheduler without a model: every step is executed on a real PagedStore whose tokens are followed.

The "model" is a hash: the next token is a function of the tokens stored in the slot, so a request's output is known
in advance whatever the schedule, and one misplaced fork, truncation or stale slot changes it.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from elbowroom.core import LayerSpec
from elbowroom.engine.accounting import KVPricing
from elbowroom.engine.admission import AdmissionPolicy
from elbowroom.engine.ordering import OrderPolicy
from elbowroom.engine.preemption import PreemptPolicy
from elbowroom.engine.scheduler import Scheduler, SchedulerConfig
from elbowroom.engine.types import KVOp, Moved, Request, Row, SampledToken, SequenceUpdate, StepPlan, StepResult
from elbowroom.errors import OutOfBudget
from elbowroom.kv.base import KVHandle, KVStep
from elbowroom.kv.bound import BoundPlan
from elbowroom.kv.capacity import Capacity
from elbowroom.kv.mixed import MixedStore
from elbowroom.kv.paged import PagedStore
from elbowroom.kv.plan import KVPlan
from elbowroom.memory.arena import Arena
from elbowroom.memory.ledger import Budget, Ledger
from elbowroom.memory.tiers import HostTier

VOCAB = 50
EOS = 7


def layer(window: int | None = None, kv_heads: int = 1, width: int = 16) -> LayerSpec:
    """Return a tiny layer: a strip of the default one is 8 KiB in float32."""
    return LayerSpec(
        num_q_heads=kv_heads,
        num_kv_heads=kv_heads,
        head_dim=width,
        v_head_dim=width,
        scale=1.0,
        rope=None,
        window=window,
    )


def bound(*layers: LayerSpec, dtype: str = "float32") -> BoundPlan:
    """Return the plain plan for ``layers``."""
    return KVPlan.parse("plain").bind(layers, dtype)


def next_token(tokens: list[int], seed: int, sample: int) -> int:
    """Return the token behind ``tokens``."""
    return zlib.crc32(np.asarray([seed % 2**31, sample, *tokens], dtype="<i4").tobytes()) % VOCAB


def expected_output(prompt: list[int], seed: int, sample: int, limit: int, ignore_eos: bool) -> list[int]:
    """Return what a request must generate."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < limit:
        tokens.append(next_token(tokens, seed, sample))
        if tokens[-1] == EOS and not ignore_eos:
            break
    return tokens[len(prompt) :]


@dataclass
class StoreExecutor:
    """Executes plans on a store (bytes are real, attention is not) and on token lists."""

    store: PagedStore | MixedStore
    handles: dict[int, KVHandle] = field(default_factory=dict)
    content: dict[int, list[int]] = field(default_factory=dict)
    specs: dict[int, tuple[int, int]] = field(default_factory=dict)
    last: dict[int, int] = field(default_factory=dict)
    objects: dict[str, tuple[list[int], bytes]] = field(default_factory=dict)
    """What was saved: tokens and span."""
    pending: list[KVOp] = field(default_factory=list)
    """Transfers under way, the oldest first."""
    delay: int = 0
    """Steps that asynchronous transfers take."""
    fails_every: int = 0
    """One transfer in so many fails; 0: none does."""
    early: list[Moved] = field(default_factory=list)
    num_moved: int = 0
    age: int = 0

    def begin(self, op: KVOp) -> None:
        """Begin a transfer, or delete an object."""
        if op.kind == "forget":
            for each in [each for each in self.pending if each.key == op.key]:
                self.pending.remove(each)
                self.early.append(self._move(each))
            self.objects.pop(op.key, None)
            return
        assert op.kind == "save" or op.slot not in self.content, "a slot is opened twice"
        self.pending.append(op)

    def moved(self, plan: StepPlan) -> tuple[Moved, ...]:
        """End the transfers that are due."""
        for row in plan.rows:
            self.wait_for(row.slot)
        due = [op for op in self.pending if not op.is_async]
        self.age += 1
        if self.pending and not due and (plan.waits or self.age > self.delay):
            due, self.age = self.pending[:1], 0
        self.pending = [op for op in self.pending if op not in due]
        early, self.early = self.early, []
        return (*early, *[self._move(op) for op in due])

    def wait_for(self, slot: int) -> None:
        """Whoever changes a slot waits until it is saved."""
        for op in [each for each in self.pending if each.slot == slot and each.kind == "save"]:
            self.pending.remove(op)
            self.early.append(self._move(op))

    def _move(self, op: KVOp) -> Moved:
        self.num_moved += 1
        if op.kind == "load" and op.key not in self.objects:
            return Moved("load", op.slot, op.key, 0, 0.0, 0, 0, "the object is gone")
        if self.fails_every and self.num_moved % self.fails_every == 0:
            self.objects.pop(op.key, None)
            return Moved("save" if op.kind == "save" else "load", op.slot, op.key, 0, 0.0, 0, 0, "no luck")
        if op.kind == "save":
            content = self.content[op.slot]
            assert len(content) == op.num_tokens, "a slot changed while it was saved"
            self.objects[op.key] = list(content), self.store.export_span(self.handles[op.slot], 0, op.num_tokens)
            return Moved("save", op.slot, op.key, op.num_tokens, 0.0, 1, 1)
        tokens, span = self.objects[op.key]
        assert len(tokens) == op.num_tokens
        self.handles[op.slot], self.content[op.slot] = self.store.open(op.plan), list(tokens)
        self.store.import_span(self.handles[op.slot], span)
        return Moved("load", op.slot, op.key, op.num_tokens, 0.0, 1, 1)

    def apply(self, op: KVOp) -> bool:
        """Apply one change; slots must be used as KVOp says. False: a sequence could not go over."""
        if op.kind in ("save", "load", "forget"):
            self.begin(op)
            return True
        self.wait_for(op.slot)
        if op.slot not in self.content and op.kind in ("close", "truncate"):
            assert op.kind == "close", "a slot is cut before it was read"
            self.pending = [each for each in self.pending if each.slot != op.slot]  # it never came back
        elif op.kind == "open":
            assert op.slot not in self.content, "a slot is opened twice"
            self.handles[op.slot], self.content[op.slot] = self.store.open(op.plan), []
        elif op.kind == "fork":
            assert op.slot not in self.content, "a slot is opened twice"
            assert len(self.content[op.source]) >= op.num_tokens, "a fork's source is too short"
            self.handles[op.slot] = self.store.fork(self.handles[op.source], op.num_tokens)
            self.content[op.slot] = self.content[op.source][: op.num_tokens]
        elif op.kind == "truncate":
            self.store.truncate(self.handles[op.slot], op.num_tokens)
            del self.content[op.slot][op.num_tokens :]
        elif op.kind == "convert":
            assert self.handles[op.slot].plan != op.plan, "a sequence goes over to the plan that it has"
            try:
                self.handles[op.slot] = self.store.convert(self.handles[op.slot], op.plan)
            except OutOfBudget:
                return False
        else:
            self.pending = [each for each in self.pending if each.slot != op.slot]
            self.store.close(self.handles.pop(op.slot))
            del self.content[op.slot]
            self.specs.pop(op.slot, None)
            self.last.pop(op.slot, None)
        return True

    def run(self, plan: StepPlan, num_steps: int = 1) -> StepResult:
        """Apply the plan's changes and run its rows ``num_steps`` times; report a shortfall as executors do."""
        stranded = tuple([op.slot for op in plan.ops if not self.apply(op)])
        rows = tuple([row for row in plan.rows if row.slot not in stranded])
        moved = self.moved(plan)
        assert not {row.slot for row in rows} & {op.slot for op in self.pending}, "a row of a slot that is moved"
        made: dict[int, list[SampledToken]] = {}
        for repeat in range(num_steps if rows else 0):
            step = self._step(rows, repeat)
            shortfall = self.store.reserve(step)
            if shortfall is not None:
                assert repeat == 0, "a repetition that the plan allows does not fit"
                missing = shortfall.needed_bytes - shortfall.available_bytes
                return StepResult({}, shortfall_bytes=missing, stranded=stranded, moved=moved)
            self.store.end_step(step)
            for row in rows:
                self._advance(row, repeat, made)
        return StepResult(made, num_steps if rows else 1, stranded=stranded, moved=moved)

    def _step(self, rows: tuple[Row, ...], repeat: int) -> KVStep:
        rows = tuple(sorted(rows, key=lambda row: self.handles[row.slot].plan))
        starts = np.zeros(len(rows) + 1, dtype=np.int32)
        np.cumsum([row.num_tokens for row in rows], out=starts[1:])
        pieces = [np.arange(row.start + repeat, row.start + repeat + row.num_tokens) for row in rows]
        return KVStep(tuple(self.handles[row.slot] for row in rows), starts, np.concatenate(pieces))

    def _advance(self, row: Row, repeat: int, made: dict[int, list[SampledToken]]) -> None:
        content = self.content[row.slot]
        assert len(content) == row.start + repeat, "a row starts where its slot does not end"
        assert row.num_tokens > 0
        tokens = [self.last[row.slot]] if row.tokens is None or repeat else list(row.tokens)
        assert len(tokens) == row.num_tokens
        content += tokens
        if row.sample is None:
            return
        if row.sample.history is not None:
            assert list(row.sample.history) == content[: len(row.sample.history)]
            assert len(row.sample.history) == len(content) or repeat, "the sampler's position would be wrong"
            self.specs[row.slot] = row.sample.seed, row.sample.sample
        assert self.specs[row.slot] == (row.sample.seed, row.sample.sample), "the slot samples for another sequence"
        token = self.choose(row, content)
        self.last[row.slot] = token
        made.setdefault(row.slot, []).append(SampledToken(token))

    def choose(self, row: Row, content: list[int]) -> int:
        """Return the token behind ``content``."""
        return next_token(content, *self.specs[row.slot])


class World:
    """Scheduler, pricing and store of one tiny model, stepped by hand; with several plans or one."""

    def __init__(
        self,
        plan: BoundPlan | Sequence[BoundPlan],
        capacity_bytes: int,
        admission: AdmissionPolicy | None = None,
        order: OrderPolicy | None = None,
        preemption: PreemptPolicy | None = None,
        **config: object,
    ) -> None:
        plans = [plan] if isinstance(plan, BoundPlan) else list(plan)
        settings = SchedulerConfig(**{"max_positions": 4096, "max_step_tokens": 128, "eos_token_ids": (EOS,), **config})
        tier = HostTier()
        limits = settings.max_positions, settings.max_step_tokens, tier.page_bytes
        pricings = [KVPricing.of(each, *limits, namespace=each.fingerprint()) for each in plans]
        self.pricing = pricings[0]
        self.scheduler = Scheduler(settings, pricings, capacity_bytes, admission, order, preemption)
        arena, capacity = Arena(tier, Ledger(Budget({}))), Capacity(capacity_bytes)
        stores = [PagedStore(each, arena, capacity) for each in plans]
        self.store = MixedStore(stores) if len(stores) > 1 else stores[0]
        self.executor = StoreExecutor(self.store)
        self._first_capacity_bytes = capacity_bytes
        self.shortfalls = 0
        self.num_rows = self.num_prefilled = 0

    @property
    def capacity_bytes(self) -> int:
        """Capacity as the scheduler counts."""
        return self.scheduler.account.capacity_bytes

    def set_capacity(self, num_bytes: int) -> None:
        """Change what scheduler and store may hold (the store has address space for twice what it began with)."""
        num_bytes = min(num_bytes, 2 * self._first_capacity_bytes)
        self.scheduler.account.capacity_bytes = num_bytes
        self.store.resize(num_bytes)

    def step(self, repeats: int = 1) -> list[SequenceUpdate]:
        """Run one step (repeated up to ``repeats`` times if the plan allows) and check every book."""
        running = {seq.rank: seq for seq in self.scheduler._state.running}
        plan = self.scheduler.schedule(0.0)
        self._check_plan(plan, running)
        result = self.executor.run(plan, min(repeats, plan.valid_for_steps))
        self.shortfalls += result.shortfall_bytes > 0
        self.num_rows += len(plan.rows)
        self.num_prefilled += sum(row.num_tokens for row in plan.rows if row.kind == "chunk")
        updates = self.scheduler.update(result)
        self.scheduler.check()
        self._check_content()
        return updates

    def _check_plan(self, plan: StepPlan, before: dict[tuple[float, ...], object]) -> None:
        account, state = self.scheduler.account, self.scheduler._state
        held = account.used_bytes + account.cached_bytes
        if held:
            assert held + account.transient_bytes <= self.capacity_bytes, "more is held than there is"
        assert plan.num_tokens <= self.scheduler.config.max_step_tokens
        assert len({row.slot for row in plan.rows}) == len(plan.rows) <= self.scheduler.config.max_sequences
        assert len(state.running) <= self.scheduler.config.max_sequences
        if state.order.name not in ("fcfs", "priority"):
            return  # ranks change
        gave_way = [seq for seq in state.waiting if seq.rank in before]
        for seq in gave_way:
            assert not state.running or seq.rank > state.running[0].rank, "the oldest gave way to a younger one"
            assert all(other.request.priority <= seq.request.priority for other in state.running), "more urgent"

    def _check_content(self) -> None:
        """A slot holds the tokens that its sequence or parked session says, but for changes still to be applied."""
        state = self.scheduler._state
        changed = {op.slot for op in state.account.ops}
        for seq in state.running:
            if seq.slot not in changed and not seq.is_loading:
                assert self.executor.content[seq.slot] == seq.tokens[: seq.num_computed]
        for parked in state.account.parked.values():
            if parked.slot not in changed:
                assert self.executor.content[parked.slot] == parked.tokens

    def check_empty(self) -> None:
        """After the cache is cleared nothing is held anywhere."""
        account = self.scheduler.account
        account.reclaim(2**62)
        for key in list(account.stowed):
            self.scheduler.close_session(key)
        self.step()
        assert (account.used_bytes, account.cached_bytes, account.ops) == (0, 0, [])
        assert not self.executor.content
        assert not self.executor.objects, "something saved was forgotten"
        assert not self.executor.pending
        assert self.store.report().num_strips == 0
        self.store.check_integrity()

    def run_all(self, requests: list[Request], limit: int = 10_000) -> dict[tuple[int, int], list[int]]:
        """Add the requests, run them to their end and return their tokens by (request, sample)."""
        for request in requests:
            self.scheduler.add(request)
        tokens: dict[tuple[int, int], list[int]] = {}
        for _ in range(limit):
            if not self.scheduler.has_work():
                return tokens
            for update in self.step():
                tokens.setdefault((update.request_id, update.sample), []).extend(
                    each.token_id for each in update.tokens
                )
        raise AssertionError(f"no end after {limit} steps")
