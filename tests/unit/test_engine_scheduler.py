"""The scheduler against random life: every plan is executed on a real store and every output is known in advance."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tests.support.engine_world import World, bound, expected_output, layer

from elbowroom.engine.ordering import ORDERS
from elbowroom.engine.preemption.recompute import RecomputePreemption
from elbowroom.engine.preemption.swap import SwapPreemption
from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.engine.types import Request, SampledToken, SequenceUpdate, SessionRef, StepResult
from elbowroom.errors import ContextTooLong, RequestError, RequestTooLarge
from elbowroom.kv.plan import KVPlan

PLANS = {
    "full": bound(layer(), layer()),
    "window": bound(layer(window=80), layer(window=80)),
    "mixed": bound(layer(window=40), layer()),
    "odd": bound(layer(kv_heads=1, width=9), layer(kv_heads=3, width=5), dtype="bfloat16"),
}
"""A block is 16 KiB in the first three; in the last one strips are no whole number of pages."""
CODECS = {
    "relief": ((layer(), layer()), ("plain", "plain(bf16)"), 1),
    "seals": ((layer(width=32), layer(width=32)), ("plain", "kivi(4,4,32)"), 1),
    "windows": ((layer(window=40), layer()), ("plain", "int8", "plain(bf16)"), 2),
    "choices": ((layer(), layer()), ("plain", "plain(bf16)", "int8"), None),
}
"""Layers, plans that requests may ask for, and the number of the one that relieves memory."""
EAGER = {"fair": {"quantum": 16.0, "least_steps": 2, "interval": 1}, "slo": {"ttft_s": 1.0, "slack_s": 0.1}}
NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)
PREFIXES = [[(i * k) % 49 + 1 for i in range(400)] for k in (3, 5)]

ADD = st.tuples(
    st.just("add"),
    st.fixed_dictionaries(
        {
            "prefix": st.integers(0, 1),
            "shared": st.integers(0, 300),
            "own": st.integers(0, 30),
            "max_tokens": st.integers(0, 150) | st.none(),
            "n": st.sampled_from([1, 1, 1, 2, 3]),
            "priority": st.sampled_from([0, 0, 0, 1, -1]),
            "salt": st.sampled_from([b"", b"", b"x"]),
            "ignore_eos": st.booleans(),
            "plan": st.sampled_from([0, 0, 0, 1, 2]),
            "keeps_plan": st.booleans(),
            "tenant": st.sampled_from(["a", "a", "b"]),
        }
    ),
)
ASK = st.tuples(
    st.just("ask"),
    st.fixed_dictionaries(
        {
            "session": st.integers(0, 2),
            "back": st.just(0) | st.integers(1, 250),
            "own": st.integers(1, 100),
            "max_tokens": st.integers(0, 40),
            "n": st.sampled_from([1, 1, 2]),
            "ignore_eos": st.booleans(),
            "plan": st.sampled_from([0, 0, 0, 0, 1]),
        }
    ),
)
ACTION = st.one_of(
    ADD,
    ADD,
    ASK,
    ASK,
    st.tuples(st.just("run"), st.integers(1, 12)),
    st.tuples(st.just("run"), st.integers(1, 12)),
    st.tuples(st.just("abort"), st.integers(0, 5)),
    st.tuples(st.just("stop"), st.integers(0, 5)),
    st.tuples(st.just("fork"), st.tuples(st.integers(0, 2), st.integers(0, 2))),
    st.tuples(st.just("close"), st.integers(0, 2)),
    st.tuples(st.just("capacity"), st.integers(2, 60)),
    st.tuples(st.just("reclaim"), st.integers(1, 20)),
    st.tuples(st.just("snapshot"), st.integers(1, 5)),
)


@dataclass
class FakeSession:
    """What a user keeps of a session."""

    key: int
    parent: int | None = None
    tokens: list[int] = field(default_factory=list)


@dataclass
class Driver:
    """Plays actions on a world and checks what comes out."""

    world: World
    open: dict[tuple[int, int], Request] = field(default_factory=dict)
    tokens: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    ended: dict[tuple[int, int], str] = field(default_factory=dict)
    sessions: list[FakeSession] = field(default_factory=lambda: [FakeSession(i) for i in range(3)])
    asking: dict[int, FakeSession] = field(default_factory=dict)
    log: list[object] = field(default_factory=list)
    next_id: int = 0
    next_key: int = 3

    def play(self, actions: list[tuple[str, Any]]) -> None:
        """Play all, then run to the end."""
        for name, argument in actions:
            getattr(self, f"do_{name}")(argument)
        self.drain()

    def drain(self) -> None:
        """Everything ends within a bounded number of steps, and nothing is left behind."""
        steps = 0
        while self.world.scheduler.has_work():
            seen = self.progress()
            self.step()
            assert self.progress() != seen or not self.open, "a step made no progress"
            steps += 1
            assert steps < 20_000, "requests never end"
        assert not self.open, "requests were forgotten"
        self.world.check_empty()

    def progress(self) -> tuple[int, int, int]:
        return len(self.log), self.world.num_rows, self.world.executor.num_moved

    def step(self, repeats: int = 1) -> None:
        for update in self.world.step(repeats):
            self.take(update)

    def take(self, update: SequenceUpdate) -> None:
        key = update.request_id, update.sample
        self.log.append((key, [each.token_id for each in update.tokens], update.finish_reason))
        assert key not in self.ended, "news of a sample that had ended"
        self.tokens[key] += [each.token_id for each in update.tokens]
        if update.finish_reason is not None:
            self.end(key, update.finish_reason)

    def end(self, key: tuple[int, int], reason: str) -> None:
        request, made = self.open.pop(key), self.tokens[key]
        self.ended[key] = reason
        sampling = request.sampling
        limit = sampling.max_tokens if sampling.max_tokens is not None else len(made)
        wanted = expected_output(list(request.prompt_token_ids), 5, key[1], limit, sampling.ignore_eos)
        assert made == (wanted if reason in ("length", "stop!") else wanted[: len(made)])
        session = self.asking.pop(request.id, None) if key[1] == 0 else None
        if session is not None and reason in ("length", "stop"):
            session.tokens = [*request.prompt_token_ids, *made]

    def submit(self, prompt: list[int], ref: SessionRef | None, options: dict[str, Any]) -> int | None:
        self.next_id += 1
        names = ("n", "max_tokens", "ignore_eos")
        sampling = SamplingParams(seed=5, **{name: options[name] for name in names})
        extra = {name: options[name] for name in ("priority", "salt", "keeps_plan", "tenant") if name in options}
        extra["plan"] = options["plan"] % len(self.world.scheduler.account.pricings)
        request = Request(id=self.next_id, prompt_token_ids=tuple(prompt), sampling=sampling, session=ref, **extra)
        try:
            self.world.scheduler.add(request)
        except RequestError:
            return None
        for sample in range(sampling.n):
            self.open[request.id, sample], self.tokens[request.id, sample] = request, []
        return request.id

    def do_add(self, options: dict[str, Any]) -> None:
        prompt = PREFIXES[options["prefix"]][: options["shared"]] + [11] * options["own"]
        self.submit(prompt, None, options)

    def do_ask(self, options: dict[str, Any]) -> None:
        session = self.sessions[options["session"]]
        if session in self.asking.values():
            return
        del session.tokens[max(len(session.tokens) - options["back"], 0) :]
        prompt = session.tokens + PREFIXES[0][: options["own"]]
        made = self.submit(prompt, SessionRef(session.key, session.parent), options)
        if made is not None:
            self.asking[made] = session

    def do_run(self, steps: int) -> None:
        for _ in range(steps):
            self.step(repeats=steps)

    def do_abort(self, number: int) -> None:
        if self.open:
            self.world.scheduler.abort(sorted(self.open)[number % len(self.open)][0])

    def do_stop(self, number: int) -> None:
        live = sorted((seq.request.id, seq.sample) for seq in self.world.scheduler._live())
        if live:
            key = live[number % len(live)]
            self.world.scheduler.finish_sample(*key)
            self.end(key, "stop")

    def do_fork(self, pair: tuple[int, int]) -> None:
        source, target = (self.sessions[each] for each in pair)
        if source is not target and source not in self.asking.values():
            self.next_key += 1
            self.sessions[pair[1]] = FakeSession(self.next_key, source.key, list(source.tokens))

    def do_close(self, number: int) -> None:
        self.world.scheduler.close_session(self.sessions[number].key)

    def do_capacity(self, blocks: int) -> None:
        self.world.set_capacity(blocks * self.world.pricing.block_bytes)

    def do_reclaim(self, blocks: int) -> None:
        wanted = blocks * self.world.pricing.block_bytes
        can = self.world.scheduler.account.reclaimable_bytes
        assert self.world.scheduler.account.reclaim(wanted) >= min(wanted, can)

    def do_snapshot(self, steps: int) -> None:
        """A restored scheduler makes the same plans again."""
        scheduler = self.world.scheduler
        snapshot, plans = scheduler.snapshot(), []
        for _ in range(2):
            scheduler.restore(snapshot)
            plans.append([self._dry_step() for _ in range(steps)])
        assert repr(plans[0]) == repr(plans[1])  # errors compare by identity
        scheduler.restore(snapshot)

    def _dry_step(self) -> object:
        plan = self.world.scheduler.schedule(0.0)
        tokens = {row.slot: [SampledToken(row.slot % 5)] for row in plan.rows if row.sample is not None}
        updates = self.world.scheduler.update(StepResult(tokens))
        return plan, [(each.request_id, each.sample, each.tokens, each.finish_reason) for each in updates]


def make_world(name: str, blocks: int, sequences: int) -> World:
    plan = PLANS[name]
    return World(plan, blocks * 16384, max_sequences=sequences, max_step_tokens=128, max_positions=600)


@pytest.mark.parametrize("name", list(PLANS))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(actions=st.lists(ACTION, max_size=25), blocks=st.integers(3, 60), sequences=st.integers(1, 6))
def test_whatever_happens_every_request_ends_once_with_its_own_tokens(
    name: str, actions: list[tuple[str, Any]], blocks: int, sequences: int
) -> None:
    """No schedule, preemption, cache hit, session or change of capacity changes a token, leaks a slot or hangs."""
    driver = Driver(make_world(name, blocks, sequences))
    driver.play(actions)
    assert driver.world.shortfalls == 0, "the store had less than the scheduler counted on"


@pytest.mark.parametrize("delay", [None, 0, 3])
@pytest.mark.parametrize("order", ORDERS.names())
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow], phases=NO_SHRINKING)
@given(actions=st.lists(ACTION, max_size=25), blocks=st.integers(6, 40), fails=st.sampled_from([0, 0, 2, 3]))
def test_so_it_is_in_every_order_and_when_sequences_are_saved(
    order: str, delay: int | None, actions: list[tuple[str, Any]], blocks: int, fails: int
) -> None:
    saves = RecomputePreemption() if delay is None else SwapPreemption(is_async=delay > 0)
    world = World(
        PLANS["full"],
        blocks * 16384,
        max_sequences=5,
        order=ORDERS.get(order)(**EAGER.get(order, {})),
        preemption=saves,
    )
    world.executor.delay, world.executor.fails_every = delay or 0, fails
    Driver(world).play([each for each in actions if each[0] != "snapshot"])
    assert world.shortfalls == 0, "the store had less than the scheduler counted on"


@pytest.mark.parametrize("name", list(CODECS))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(actions=st.lists(ACTION, max_size=25), blocks=st.integers(8, 60), sequences=st.integers(1, 6))
def test_so_it_is_with_several_plans_and_under_relief(
    name: str, actions: list[tuple[str, Any]], blocks: int, sequences: int
) -> None:
    """Sequences of several plans share the memory, and go over from one to another, and nothing else changes."""
    layers, texts, relief = CODECS[name]
    plans = [KVPlan.parse(text).bind(layers, "float32") for text in texts]
    limits = {"max_sequences": sequences, "max_step_tokens": 128, "max_positions": 600}
    driver = Driver(World(plans, blocks * 4 * plans[0].block_bytes // 3, relief_plan=relief, **limits))
    driver.play(actions)
    assert driver.world.shortfalls == 0, "the store had less than the scheduler counted on"


@pytest.mark.parametrize(("name", "repeats"), [("full", True), ("mixed", False)])
def test_steps_are_repeated_only_where_an_early_end_can_be_cut_back(name: str, repeats: bool) -> None:
    """With sliding windows, a sequence that may stop at a token decodes one step a plan: a cut could reach too far."""
    for ignore_eos in (False, True):
        world, plans = make_world(name, 40, 1), []
        for seed in range(5):
            sampling = SamplingParams(max_tokens=40, ignore_eos=ignore_eos, seed=seed)
            world.scheduler.add(Request(id=seed, prompt_token_ids=(9,) * 70, sampling=sampling))
            while world.scheduler.has_work():
                plan = world.scheduler.schedule(0.0)
                plans.append(plan.valid_for_steps)
                world.scheduler.update(world.executor.run(plan, plan.valid_for_steps))
        assert (max(plans) > 1) == (repeats or ignore_eos)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(actions=st.lists(ACTION, max_size=15), blocks=st.integers(6, 30), missing=st.integers(1, 25))
def test_a_store_with_less_than_promised_slows_or_refuses_but_never_hangs(
    actions: list[tuple[str, Any]], blocks: int, missing: int
) -> None:
    """Steps that the store refuses are tried again with less, and what cannot run at all ends with an error."""
    world = make_world("full", blocks, 4)
    world.store.resize(max(blocks - missing, 0) * 16384)
    driver = Driver(world)
    driver.play([action for action in actions if action[0] != "capacity"])
    assert not driver.open
    assert {key for key, _, _ in driver.log} <= set(driver.ended), "news of a request that never ended"


@settings(max_examples=25, deadline=None)
@given(actions=st.lists(ACTION, max_size=15), blocks=st.integers(3, 40))
def test_equal_lives_give_equal_news(actions: list[tuple[str, Any]], blocks: int) -> None:
    """The scheduler is deterministic: the same requests at the same steps give the same tokens in the same order."""
    logs = []
    for _ in range(2):
        driver = Driver(make_world("full", blocks, 3))
        driver.play(actions)
        logs.append(driver.log)
    assert logs[0] == logs[1]


def request(number: int, prompt: int, max_tokens: int | None, **options: Any) -> Request:
    return Request(
        id=number,
        prompt_token_ids=tuple(i % 40 + 8 for i in range(prompt)),
        sampling=SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=5),
        **options,
    )


@pytest.mark.parametrize("name", ["full", "mixed"])
def test_what_can_never_fit_is_refused_at_once_with_numbers(name: str) -> None:
    """The largest request that the message allows runs, one token more is refused, and nothing of it stays behind."""
    world = make_world(name, 7, 4)
    room = world.pricing.largest(world.capacity_bytes)
    assert 100 < room < 600
    with pytest.raises(RequestTooLarge, match=rf"enough for {room} tokens in all"):
        world.scheduler.add(request(1, room - 9, 10))
    assert not world.scheduler.has_work()
    made = world.run_all([request(2, room - 10, 10), request(3, room - 70, None)])
    assert [len(tokens) for tokens in made.values()] == [10, 70]
    assert world.scheduler.stats().preemptions <= 1


def test_malformed_requests_are_refused() -> None:
    """An empty prompt and one that leaves no room in the context are the user's errors."""
    world = make_world("full", 500, 4)
    with pytest.raises(RequestError, match="prompt is empty"):
        world.scheduler.add(request(1, 0, 1))
    with pytest.raises(ContextTooLong, match="590 prompt tokens and 11 new ones exceed the context of 600"):
        world.scheduler.add(request(1, 590, 11))
    assert world.scheduler.stats().num_waiting == 0


def test_a_shared_prefix_is_stored_and_computed_once() -> None:
    """Ten requests with the same 300 tokens pay for them once, and nine of them do not compute them."""
    world = make_world("full", 60, 4)
    prompts = [request(number, 300, 3, salt=b"") for number in range(10)]
    world.run_all(prompts[:1])
    world.run_all(prompts[1:])
    stats = world.scheduler.stats()
    assert stats.cached_prompt_tokens == 9 * 256
    assert stats.cached_blocks == 4
    assert world.store.report().num_strips == 4 * 2


def test_prefixes_are_not_shared_across_salts() -> None:
    """A tenant's cache is of no use to another tenant."""
    world = make_world("full", 60, 4)
    world.run_all([request(1, 300, 3, salt=b"a")])
    world.run_all([request(2, 300, 3, salt=b"b")])
    assert world.scheduler.stats().cached_prompt_tokens == 0


def test_a_lowered_budget_ends_what_no_longer_fits_with_an_error() -> None:
    """A request that fitted when it came and cannot run any more does not wait for ever."""
    world = make_world("full", 20, 4)
    world.scheduler.add(request(1, 500, 50))
    world.scheduler.add(request(2, 60, 5))
    world.step()
    world.set_capacity(4 * world.pricing.block_bytes)
    updates = [update for _ in range(20) for update in world.step()]
    error = next(update.error for update in updates if update.request_id == 1)
    assert isinstance(error, RequestTooLarge)
    assert sum(len(update.tokens) for update in updates if update.request_id == 2) == 5
    world.check_empty()


def test_a_parked_session_pays_only_for_what_is_its_own() -> None:
    """A parked session and the cached prefix that it shares both go when a large request needs the room."""
    world = make_world("full", 10, 4)
    first = request(1, 500, 2, session=SessionRef(1))
    world.run_all([first])
    assert world.scheduler.stats().num_parked == 1
    made = world.run_all([Request(id=2, prompt_token_ids=(9,) * 560, sampling=first.sampling)])
    assert len(made[2, 0]) == 2
    assert world.scheduler.stats().num_parked == 0
