"""The scheduler against random life: every plan is executed on a real store and every output is known in advance."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.engine.types import Request, SequenceUpdate, SessionRef
from elbowroom.errors import ContextTooLong, RequestError, RequestTooLarge
from tests.support.engine_world import World, bound, expected_output, layer

PLANS = {
    "full": bound(layer(), layer()),
    "window": bound(layer(window=80), layer(window=80)),
    "mixed": bound(layer(window=40), layer()),
    "odd": bound(layer(kv_heads=1, width=9), layer(kv_heads=3, width=5), dtype="bfloat16"),
}
"""A block is 16 KiB in the first three; in the last one strips are no whole number of pages."""
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
        for _ in range(5000):
            if not self.world.scheduler.has_work():
                break
            self.step()
        assert not self.open, "requests never ended"
        self.world.check_empty()

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
        extra = {name: options[name] for name in ("priority", "salt") if name in options}
        request = Request(
            id=self.next_id, prompt_token_ids=tuple(prompt), sampling=sampling, session=ref, **extra
        )
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
        assert plans[0] == plans[1]
        scheduler.restore(snapshot)

    def _dry_step(self) -> object:
        from elbowroom.engine.types import SampledToken, StepResult

        plan = self.world.scheduler.schedule(0.0)
        tokens = {row.slot: [SampledToken(row.slot % 5)] for row in plan.rows if row.sample is not None}
        return plan, self.world.scheduler.update(StepResult(tokens))


def make_world(name: str, blocks: int, sequences: int) -> World:
    plan = PLANS[name]
    return World(plan, blocks * 16384, max_sequences=sequences, max_step_tokens=128, max_positions=2048)


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
