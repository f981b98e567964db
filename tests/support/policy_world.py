"""The engine without thread, text and clock, under any policies: real model, store and swap files, stepped by hand.

``bench.schedules.Stepper`` runs one request under many schedules. Here many requests that get into each other's way
run under one set of policies, with two KV plans, sessions, cancels and a budget that is lowered meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from elbowroom.engine.accounting import KVPricing
from elbowroom.engine.admission import AdmissionPolicy
from elbowroom.engine.executors.local import TorchExecutor
from elbowroom.engine.executors.transfers import Transfers
from elbowroom.engine.ordering.base import OrderPolicy
from elbowroom.engine.ordering.fair import FairOrder
from elbowroom.engine.ordering.fcfs import FcfsOrder
from elbowroom.engine.ordering.priority import PriorityOrder
from elbowroom.engine.ordering.slo import SloOrder
from elbowroom.engine.preemption.base import PreemptPolicy
from elbowroom.engine.scheduler import Scheduler, SchedulerConfig
from elbowroom.engine.sizing import workspace_sizes
from elbowroom.engine.types import FinishReason, Request, SequenceUpdate
from elbowroom.kv.capacity import Capacity
from elbowroom.kv.mixed import MixedStore
from elbowroom.kv.paged import PagedStore
from elbowroom.kv.plan import KVPlan
from elbowroom.memory import Arena, Budget, DiskTier, HostTier, Ledger, Workspace
from elbowroom.memory.swap_cost import SwapCost
from elbowroom.models.decoder import Decoder
from elbowroom.models.path import ComputePath

PLANS = ("plain", "int8")
STEP_S = 0.05
"""Seconds of a step on the schedule's clock."""
FAST, SLOW = SwapCost(1e15, 1e15), SwapCost(1.0, 1.0)
"""Disks for ``auto``: it always saves, and never."""
# Each puts sequences out often enough for a run of some hundred steps.
ORDERS: dict[str, OrderPolicy] = {
    "fcfs": FcfsOrder(),
    "priority": PriorityOrder(),
    "fair": FairOrder(quantum=48.0, least_steps=4, interval=2),
    "slo": SloOrder(least_steps=4, interval=2),
}


@dataclass(slots=True)
class Answer:
    """What came of one sample."""

    tokens: list[int] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    """How much likelier each token was than the next one, in nats, where two log-probabilities were asked for."""
    reason: FinishReason | None = None


class PolicyWorld:
    """Scheduler, executor, store and swap tier of one decoder.

    Args:
        decoder: the model.
        path: which of its passes run native.
        blocks: of the first plan that the store can hold, beside what a step takes.
        policies: admission, order and preemption.
        tier: where sequences are saved.
    """

    def __init__(
        self,
        decoder: Decoder,
        path: ComputePath,
        blocks: int,
        policies: tuple[AdmissionPolicy, OrderPolicy, PreemptPolicy] | None = None,
        tier: DiskTier | None = None,
        *,
        step_tokens: int = 96,
        max_sequences: int = 6,
        prefix_cache: bool = True,
    ) -> None:
        config, host = decoder.config, HostTier()
        bound = [KVPlan.parse(text).bind(config.layers, "float32") for text in PLANS]
        limits = config.max_positions, step_tokens, host.page_bytes
        self.pricings = [KVPricing.of(each, *limits, namespace=each.fingerprint()) for each in bound]
        self._transient_bytes = max(each.transient_bytes for each in self.pricings)
        settings = SchedulerConfig(
            max_positions=config.max_positions,
            max_step_tokens=step_tokens,
            max_sequences=max_sequences,
            prefix_cache=prefix_cache,
            repeats_steps=False,
        )
        capacity_bytes = self._bytes_of(blocks)
        self.scheduler = Scheduler(settings, self.pricings, capacity_bytes, *(policies or ()))
        self.ledger = Ledger(Budget({}))
        arena, capacity = Arena(host, self.ledger), Capacity(capacity_bytes)
        self._workspace = Workspace(arena, workspace_sizes(config, torch.float32, path, step_tokens, max_sequences))
        self.store = MixedStore([PagedStore(each, arena, capacity) for each in bound])
        transfers = None if tier is None else Transfers(self.store, tier)
        self._executor = TorchExecutor(path.model(decoder), decoder.weights, self.store, self._workspace, transfers)
        self._tier = tier
        self.num_steps = 0
        self.answers: dict[tuple[int, int], Answer] = {}

    def set_blocks(self, blocks: int) -> None:
        """Change the budget while sequences run."""
        self.scheduler.account.capacity_bytes = self._bytes_of(blocks)
        self.store.resize(self._bytes_of(blocks))

    def step(self) -> list[SequenceUpdate]:
        """Run one step, take its tokens in and check the books.

        Raises:
            Exception: what a request ended with.
        """
        plan = self.scheduler.schedule(self.num_steps * STEP_S)
        updates = self.scheduler.update(self._executor.collect(self._executor.submit(plan)))
        self.num_steps += 1
        self.scheduler.check()
        for update in updates:
            if update.error is not None:
                raise update.error
            answer = self.answers.setdefault((update.request_id, update.sample), Answer())
            for token in update.tokens:
                answer.tokens.append(token.token_id)
                if len(token.top_logprobs) > 1:
                    answer.gaps.append(token.top_logprobs[0][1] - token.top_logprobs[1][1])
            answer.reason = update.finish_reason or answer.reason
        return updates

    def ended(self, number: int) -> bool:
        """Return whether all samples of a request that has begun have ended."""
        reasons = [answer.reason for (request, _), answer in self.answers.items() if request == number]
        return bool(reasons) and None not in reasons

    def close(self, sessions: Sequence[int] = ()) -> None:
        """Forget everything and check that nothing is left in memory or on disk."""
        for key in sessions:
            self.scheduler.close_session(key)
        self.scheduler.account.reclaim(2**62)
        while self.scheduler.has_work():
            self.step()
        assert (self.scheduler.account.used_bytes, self.scheduler.account.cached_bytes) == (0, 0)
        self.store.check_integrity()
        self.store.close_all()
        assert self.ledger.held("kv", "host") == 0
        self._workspace.close()
        if self._tier is not None:
            self._executor.reset()
            assert self._tier.usage().num_objects == 0

    def _bytes_of(self, blocks: int) -> int:
        return blocks * self.pricings[0].block_bytes + self._transient_bytes


def alone(decoder: Decoder, path: ComputePath, request: Request) -> list[Answer]:
    """Return what a request gets with nobody beside it, in memory that holds all: one answer for each sample."""
    world = PolicyWorld(decoder, path, 100, step_tokens=512, prefix_cache=False)
    world.scheduler.add(request)
    while world.scheduler.has_work():
        world.step()
    world.close()
    return [answer for _, answer in sorted(world.answers.items())]
