"""Scheduler: decides, step by step, which tokens of which sequences are computed. Deterministic and pure.

No tensors, no clock (``now`` is passed in), no I/O, seeded randomness only: the same code serves requests, replays
traces and runs in the planner's simulation. Bytes are counted by ``KVAccount``; the store is told what to do and
never asked.

Admission is by bytes: a waiting request enters when its whole prompt fits beside what is running. Running sequences
grow one block at a time; when a block does not fit, room is made in this order: cached prefixes nobody uses, parked
sessions, then, if the engine has a relief plan, running sequences are turned into it, and at last one of the younger
running sequences goes (it is recomputed later). No sequence is preempted for a younger one, and what could not run
alone is refused at ``add``, so there is always progress.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from elbowroom.core import STRIP_TOKENS
from elbowroom.engine.accounting import KVPricing, num_blocks
from elbowroom.engine.admission.base import AdmissionPolicy
from elbowroom.engine.admission.gate import may_begin
from elbowroom.engine.admission.greedy import GreedyAdmission
from elbowroom.engine.entry import enter
from elbowroom.engine.horizon import repeatable_steps
from elbowroom.engine.kv_account import KVAccount
from elbowroom.engine.limits import max_new_tokens
from elbowroom.engine.order import by_rank, decodes_first, fresh_seed, insert
from elbowroom.engine.ordering.base import OrderPolicy
from elbowroom.engine.ordering.priority import PriorityOrder
from elbowroom.engine.preemption.base import PreemptPolicy
from elbowroom.engine.preemption.recompute import RecomputePreemption
from elbowroom.engine.room import make_room, preempt
from elbowroom.engine.rotation import give_ways
from elbowroom.engine.sequence import SeqState, until_end
from elbowroom.engine.state import Rows, SchedulerState
from elbowroom.engine.stems import awaits_leader, expect, give_up_stems, keep_stem, leave, next_stop
from elbowroom.engine.swapping import forget, settle, stow
from elbowroom.engine.types import (
    FinishReason,
    KVOp,
    Request,
    Row,
    SampledToken,
    SchedulerStats,
    SequenceUpdate,
    StepPlan,
    StepResult,
)
from elbowroom.errors import RequestTooLarge
from elbowroom.kv.base import PromptPart
from elbowroom.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of a scheduler."""

    max_positions: int
    """Longest context in tokens."""
    max_step_tokens: int = 512
    """Tokens of one forward pass; long prompts are cut into chunks of this."""
    max_sequences: int = 64
    """Sequences that run at once."""
    eos_token_ids: tuple[int, ...] = ()
    prefix_cache: bool = True
    relief_plan: int | None = None
    """Number of the plan that sequences of the first one are turned into before any is preempted; None: they stay."""
    repeats_steps: bool = True
    """Whether the executor repeats steps that the plan allows to repeat: a simulated one does."""
    return_blocks: int = 2
    """Blocks for every running sequence that must be free before one comes back that had to go: hysteresis."""
    seed: int = 0
    """Seeds requests that bring none."""


class Scheduler:
    """See the module's text.

    Args:
        config: limits.
        pricings: what sequences cost under each of the plans that requests may ask for, the usual one first.
        capacity_bytes: bytes that the KV store may hold.
        admission: who of those that fit may begin; by default all. A request may name another policy.
        order: who is served first; by default priority, then arrival.
        preemption: whether those that have to go are saved or computed again; by default computed again.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        pricings: Sequence[KVPricing],
        capacity_bytes: int,
        admission: AdmissionPolicy | None = None,
        order: OrderPolicy | None = None,
        preemption: PreemptPolicy | None = None,
    ) -> None:
        self.config = config
        self._eos_token_ids = frozenset(config.eos_token_ids)
        books = KVAccount(tuple(pricings), capacity_bytes, config.prefix_cache, config.relief_plan)
        self._state = SchedulerState(
            books,
            admission or GreedyAdmission(),
            order or PriorityOrder(),
            preemption or RecomputePreemption(),
            return_blocks=config.return_blocks,
        )

    # Requests

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            PlanError: there is no admission policy of the name that it gives.
            RequestError: as in ``most_new_tokens``.
        """
        limit, pricing = self.most_new_tokens(request), self.account.pricings[request.plan]
        state, order = self._state, self._state.next_order
        state.use_admission(request.admission)
        state.next_order += 1
        seed = request.sampling.seed
        keys = state.account.keys(request)
        expect(state.account, request)
        stops = frozenset(request.sampling.stop_token_ids)
        if not request.sampling.ignore_eos:
            stops |= self._eos_token_ids
        for sample in range(request.sampling.n):
            seq = SeqState(
                request=request,
                sample=sample,
                order=order,
                seed=seed if seed is not None else fresh_seed(self.config.seed, order),
                max_new_tokens=limit,
                stop_token_ids=stops,
                tokens=list(request.prompt_token_ids),
                keys=list(keys),
                plan=request.plan,
                pricing=pricing,
            )
            state.order.joined(seq)
            seq.rank = state.order.rank(seq, request.arrival_s)
            insert(state.waiting, seq)

    def most_new_tokens(self, request: Request) -> int:
        """Return how many tokens each sample of a request may get.

        Raises:
            RequestError: the prompt is empty.
            ContextTooLong: prompt and max_tokens exceed the context.
            RequestTooLarge: it could not run even alone in the KV budget.
        """
        account, pricing = self.account, self.account.pricings[request.plan]
        usable_bytes = account.capacity_bytes - account.transient_bytes + pricing.transient_bytes
        return max_new_tokens(request, self.config.max_positions, pricing, usable_bytes)

    def abort(self, request_id: int) -> bool:
        """Drop all samples of a request; its blocks are free from the next step on. False if it is unknown."""
        hit = [seq for seq in self._live() if seq.request.id == request_id]
        for seq in hit:
            self._finish(seq, "abort")
        return bool(hit)

    def fail_all(self, error: Exception) -> list[SequenceUpdate]:
        """End every request with ``error`` and forget all slots (the executor lost its store); return the news."""
        state, account = self._state, self.account
        updates = [SequenceUpdate(seq.request.id, seq.sample, [], "error", error) for seq in self._live()]
        for seq in self._live():
            state.order.left(seq)
            forget(seq, account)
        state.waiting.clear()
        state.running.clear()
        state.leaving.clear()
        state.in_flight = []
        state.updates = []
        stats = state.stats
        stats.finished["error"] = stats.finished.get("error", 0) + len(updates)
        forgotten = [op for op in account.ops if op.kind == "forget"]
        state.account = account.emptied()
        state.account.ops = forgotten
        return updates

    def finish_sample(self, request_id: int, sample: int) -> None:
        """End one sample from outside (a stop string was found in its text)."""
        for seq in self._live():
            if seq.request.id == request_id and seq.sample == sample:
                self._finish(seq, "stop", report=False)

    def close_session(self, key: int) -> None:
        """Forget a parked sequence."""
        if key in self.account.parked:
            self.account.drop_parked(key)
        self.account.drop_stowed(key)

    def has_work(self) -> bool:
        """Return whether a step would do something."""
        state = self._state
        return bool(state.waiting or state.running or state.leaving or state.account.ops or state.updates)

    @property
    def queues(self) -> tuple[Sequence[SeqState], Sequence[SeqState]]:
        """Sequences that wait and that run, in order of rank."""
        return self._state.waiting, self._state.running

    @property
    def refuses_head(self) -> bool:
        """Whether a refusal of the first that waits stands."""
        waiting, refused = self._state.waiting, self._state.refused
        return refused is not None and bool(waiting) and waiting[0] is refused

    @property
    def order_name(self) -> str:
        """Name of the order in which requests are served."""
        return self._state.order.name

    @property
    def account(self) -> KVAccount:
        """The books: bytes, cached prefixes, parked sessions."""
        return self._state.account

    # Steps

    def schedule(self, now: float) -> StepPlan:
        """Return the next step: decodes first, then prompts under way, then admissions into what is left.

        Args:
            now: seconds on the caller's clock, that of ``Request.arrival_s``.
        """
        state, account = self._state, self.account
        state.now = now
        if account.free_bytes < 0:
            make_room(lambda: 0, None, state)
        self._review()
        rows: Rows = []
        budget, preemptions = self.config.max_step_tokens, state.stats.preemptions
        for seq in decodes_first(state.running):
            row = self._extend(seq, budget) if seq.slot >= 0 else None
            if row is not None:
                rows.append((seq, row))
                budget -= row.num_tokens
        while budget > 0 and state.waiting and len(state.running) < self.config.max_sequences:
            seq = state.waiting[0]
            if not self._admit(seq):
                if state.running or state.leaving:
                    break
                if give_up_stems(account, seq):
                    state.refused = None
                else:
                    self._give_up(seq)
                continue
            row = self._extend(seq, budget)
            if row is not None:
                rows.append((seq, row))
                budget -= row.num_tokens
        if state.stats.preemptions > preemptions:  # perhaps for an older sequence, after the row was made
            rows = [(seq, row) for seq, row in rows if seq.slot == row.slot and not seq.is_leaving]
        state.in_flight = rows
        ops, account.ops = tuple(account.ops), []
        valid_for = repeatable_steps(rows, state) if self.config.repeats_steps else 1
        return StepPlan(ops, tuple([row for _, row in rows]), valid_for, waits=not rows)

    def update(self, result: StepResult) -> list[SequenceUpdate]:
        """Take in what the executor did; return the news for every sample that got tokens or ended."""
        state = self._state
        rows, state.in_flight = state.in_flight, []
        for moved in result.moved:
            settle(moved, state)
        for seq in [seq for seq in state.running if seq.slot in result.stranded]:
            preempt(seq, state)
        if result.shortfall_bytes > 0:
            self._retreat(rows, result.shortfall_bytes)
            rows = []
        repeats = result.num_steps - 1
        state.num_steps += result.num_steps
        if result.duration_s > 0 and any(row.prompt for _, row in rows):
            state.preemption.computed(sum([row.num_tokens for _, row in rows]), result.duration_s)
        for seq, row in rows:
            if seq.slot == row.slot:  # else it ended while the step ran
                self._advance(seq, row, repeats)
                if row.sample is not None:
                    self._append_tokens(seq, result.tokens[row.slot])
                elif seq.num_left == 0:
                    self._finish(seq, "length")  # a request that only prefills
        updates, state.updates = state.updates, []
        return updates

    def snapshot(self) -> object:
        """Return a copy of the whole state, to be given to ``restore``."""
        return copy.deepcopy(self._state)

    def restore(self, snapshot: object) -> None:
        """Go back to a snapshot."""
        assert isinstance(snapshot, SchedulerState)
        self._state = copy.deepcopy(snapshot)

    def stats(self) -> SchedulerStats:
        """Return counters and gauges."""
        state, account = self._state, self.account
        stats = state.stats
        stats.num_waiting, stats.num_running = len(state.waiting), len(state.running)
        stats.num_parked = len(account.parked)
        stats.kv_used_bytes = account.used_bytes + account.cached_bytes
        stats.kv_capacity_bytes = account.capacity_bytes
        stats.cached_blocks, stats.evicted_blocks = account.index.num_blocks, account.evicted_blocks
        return stats

    def check(self) -> None:
        """Assert that the books agree (tests, and when idle)."""
        state = self._state
        assert all(seq.slot < 0 and seq.num_blocks == 0 for seq in state.waiting), "a waiting sequence holds blocks"
        assert all(seq.slot >= 0 and seq.num_left > 0 for seq in state.running), "a running sequence has no next row"
        assert all(seq.is_leaving and seq.slot >= 0 for seq in state.leaving), "a leaving sequence has no slot"
        self.account.check([*state.running, *state.leaving])

    # Admission

    def _admit(self, seq: SeqState) -> bool:
        """Start a waiting sequence if all its tokens fit beside what runs; True when it runs now."""
        state = self._state
        if awaits_leader(self.account, seq, state.running):
            return False
        if not self._enters(seq):
            return False
        if seq.num_generated == 0:
            seq.num_cached_tokens = seq.num_computed
            state.stats.prompt_tokens += seq.num_prompt
            state.stats.cached_prompt_tokens += seq.num_computed
            if not seq.num_preemptions:
                state.order.served(seq, seq.num_prompt - seq.num_computed, 0)
        seq.num_steps_run, seq.is_new_to_executor = 0, True
        state.waiting.remove(seq)
        insert(state.running, seq)
        return True

    def _enters(self, seq: SeqState) -> bool:
        """Ask the admission policy, and enter; a policy's no stands for some steps, or until a sequence goes."""
        state, policy = self._state, self._state.admission_of(seq)
        if state.refused is seq and state.running and state.num_steps < state.asks_again_at:
            return False
        state.refused = None
        if may_begin(seq, state.running, state, self.config.max_step_tokens) and enter(seq, state):
            return True
        if policy.looks_ahead:  # also where the prompt does not fit: it will not before a sequence goes
            state.refused, state.asks_again_at = seq, state.num_steps + policy.patience
        return False

    def _review(self) -> None:
        """Sort anew where ranks have changed, and put out who has to go for the head of the queue."""
        state = self._state
        if state.order.reviews(state.num_steps):
            for seq in (*state.waiting, *state.running):
                seq.rank = state.order.rank(seq, state.now)
            state.waiting.sort(key=by_rank)
            state.running.sort(key=by_rank)
        for seq in give_ways(state, self.config.max_sequences, self.config.max_step_tokens):
            preempt(seq, state)

    # Growth and preemption

    def _extend(self, seq: SeqState, most_tokens: int) -> Row | None:
        """Pay for the next tokens of a running sequence, ``most_tokens`` at most, and return its row.

        None if nothing may be computed, or the sequence had to give way.
        """
        if seq.is_loading:
            return None
        start, end = seq.num_computed, len(seq.tokens)
        stop = end if end - start <= most_tokens else start + most_tokens
        if stop == start:
            return None
        prompt = PromptPart.NONE
        if start < seq.num_prompt:
            if seq.pricing.chooses:  # computed again: what was generated was no part of that choice either
                stop = min(stop, seq.num_prompt)
            stop = next_stop(self.account, seq, stop)
            prompt = PromptPart.PART if stop < seq.num_prompt else PromptPart.END
        elif seq.pricing.interval and stop >= (choice := seq.pricing.next_choice(seq.num_prompt, start)):
            # By the query of one token, also when it is computed again.
            stop, prompt = (choice, PromptPart.CHOICE) if start == choice - 1 else (choice - 1, prompt)
        if not self._afford(seq, stop, prompt):
            return None
        if stop == end == start + 1 and start >= seq.num_prompt and not seq.is_new_to_executor:
            return Row(seq.slot, "decode", start, 1, None, seq.spec, prompt)
        sample = seq.sample_spec() if stop == end and seq.max_new_tokens > 0 else None
        return Row(seq.slot, "chunk", start, stop - start, seq.tokens[start:stop], sample, prompt)

    def _afford(self, seq: SeqState, stop: int, prompt: PromptPart) -> bool:
        """Pay for computing ``seq`` up to ``stop``; it gives way, and False is returned, without room."""
        if not (prompt and seq.pricing.chooses) and stop <= seq.num_blocks * STRIP_TOKENS:
            return True
        if not make_room(lambda: seq.price_at(stop, prompt) - seq.paid_bytes, seq, self._state):
            if not self._state.leaving:  # else it waits for what comes free soon
                preempt(seq, self._state)
            return False
        self.account.grow(seq, num_blocks(stop), seq.price_at(stop, prompt))
        return True

    def _retreat(self, rows: Rows, shortfall_bytes: int) -> None:
        """The store had less than was counted on: until some sequence ends, count on so much less."""
        self.account.lacking_bytes += max(self.account.free_bytes, 0) + shortfall_bytes
        for seq, _ in rows:
            seq.is_new_to_executor = True

    def _give_up(self, seq: SeqState) -> None:
        """Nothing runs, all caches may go, and still ``seq`` does not fit: the budget was lowered after ``add``."""
        account = self.account
        need = seq.pricing.admission(len(seq.tokens), (), 0, seq.num_generated)[1] + account.transient_bytes
        there = account.capacity_bytes - account.lacking_bytes
        text = f"{len(seq.tokens)} tokens need {format_bytes(need)} of KV cache; {format_bytes(there)} are left"
        self._finish(seq, "error", error=RequestTooLarge(text, "raise memory= (--memory)"))

    # Progress

    def _advance(self, seq: SeqState, row: Row, repeats: int) -> None:
        """Note that ``row`` was computed and repeated so often behind that."""
        before = seq.num_computed
        seq.num_steps_run += 1 + repeats
        seq.num_computed = before + row.num_tokens + repeats
        if repeats and seq.num_computed > seq.num_blocks * STRIP_TOKENS:  # the plan saw that it fits
            self.account.grow(seq, num_blocks(seq.num_computed), seq.price_at(seq.num_computed, PromptPart.NONE))
        if row.prompt:
            keep_stem(self.account, seq)
            ends = row.prompt.settles
            dropped = seq.pricing.dropped(seq.dropped, seq.num_computed, ends_prompt=ends)
            if ends or dropped != seq.dropped:
                self.account.shrink(seq, dropped)
        if before < seq.num_prompt <= seq.num_computed:
            self.account.cache(seq, seq.num_prompt // STRIP_TOKENS)

    def _append_tokens(self, seq: SeqState, tokens: list[SampledToken]) -> None:
        known, state = seq.tokens, self._state
        tokens, reason = until_end(seq, tokens)
        known += [token.token_id for token in tokens]
        state.stats.generated_tokens += len(tokens)
        state.order.served(seq, 0, len(tokens))
        update = SequenceUpdate(
            seq.request.id, seq.sample, tokens, reason, None, seq.num_cached_tokens, seq.is_relieved
        )
        state.updates.append(update)
        if reason is not None:
            if seq.num_computed >= len(known):  # a repeated step ran on behind the end
                seq.num_computed = seq.pricing.resume_point(len(known) - 1, seq.num_computed)
                self.account.ops.append(KVOp("truncate", seq.slot, num_tokens=seq.num_computed))
            self._finish(seq, reason, report=False)

    def _finish(self, seq: SeqState, reason: FinishReason, report: bool = True, error: Exception | None = None) -> None:
        state, session = self._state, seq.request.session
        state.refused, self.account.lacking_bytes = None, 0
        if reason in ("stop", "length"):
            state.ended(seq)
        state.order.left(seq)
        if seq in state.waiting:
            state.waiting.remove(seq)
        elif seq in state.leaving:
            state.leaving.remove(seq)
            self.account.give_back(seq)
        else:
            state.running.remove(seq)
            self.account.cache(seq, seq.num_computed // STRIP_TOKENS)
            if session is not None and seq.sample == 0 and reason in ("stop", "length"):
                stow(seq, state)
                self.account.park(seq, session.key)
            else:
                self.account.give_back(seq)
        leave(self.account, seq)
        forget(seq, self.account)
        state.stats.finished[reason] = state.stats.finished.get(reason, 0) + 1
        if report:
            update = SequenceUpdate(seq.request.id, seq.sample, [], reason, error, seq.num_cached_tokens)
            state.updates.append(update)

    def _live(self) -> list[SeqState]:
        return [*self._state.running, *self._state.waiting, *self._state.leaving]
