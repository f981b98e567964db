"""The step loop and the engine's thread on fakes: failures, receivers, budgets, endings."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.support.engine_world import World, bound, layer
from tests.support.tiny_model import write_tiny_model

from elbowroom import LLM, SamplingParams
from elbowroom.engine.core import EngineCore
from elbowroom.engine.executors.simulated import SimExecutor
from elbowroom.engine.output import OutputDelta, RequestOutput
from elbowroom.engine.types import Request, StepPlan, StepResult
from elbowroom.errors import (
    ElbowroomError,
    EngineClosed,
    OutOfBudget,
    RequestError,
    RequestTooLarge,
    TokenizerError,
)
from elbowroom.memory.arena import Arena
from elbowroom.memory.ledger import Budget, Ledger
from elbowroom.memory.tiers import HostTier

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)


class FailingExecutor:
    """Runs a StoreExecutor, and raises at the steps that the test names."""

    def __init__(self, world: World) -> None:
        self.world, self.error, self.resets = world, None, 0

    def submit(self, plan: StepPlan) -> int:
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        self.result = self.world.executor.run(plan)
        return 0

    def collect(self, ticket: int) -> StepResult:
        return self.result

    def reset(self) -> None:
        self.resets += 1
        executor = self.world.executor
        for handle in executor.handles.values():
            executor.store.close(handle)
        for kept in (executor.handles, executor.content, executor.specs, executor.last):
            kept.clear()


@pytest.fixture
def core() -> EngineCore:
    """A core on a world of 20 blocks."""
    world = World(bound(layer(), layer()), 20 * 16384)
    executor = FailingExecutor(world)
    core = EngineCore(world.scheduler, executor, Arena(HostTier(), Ledger(Budget({}))))
    core.reset_executor = executor.reset
    return core


def add(core: EngineCore, number: int, prompt: int = 10) -> list[OutputDelta]:
    made: list[OutputDelta] = []
    request = Request(id=number, prompt_token_ids=(9,) * prompt, sampling=GREEDY)
    core.add(request, [None], lambda delta, output: made.append(delta))
    return made


def run(core: EngineCore) -> None:
    while core.has_work():
        core.step()


@pytest.mark.parametrize("when", [0, 1, 3])
def test_a_failing_step_ends_its_requests_and_the_core_goes_on(core: EngineCore, when: int) -> None:
    """Every live request gets the error once; the next one runs in an empty store."""
    first, second = add(core, 1), add(core, 2, 300)
    for _ in range(when):
        core.step()
    core.executor.error = ValueError("weights on fire")
    core.step()
    for made in (first, second):
        assert "a step failed: ValueError: weights on fire" in str(made[-1].error)
        assert [delta.finish_reason for delta in made if delta.finish_reason] == ["error"]
    assert (core.num_live, core.has_work(), core.executor.resets) == (0, False, 1)
    third = add(core, 3)
    run(core)
    assert third[-1].finish_reason == "length"
    core.scheduler.check()
    core.executor.world.check_empty()


def test_memory_that_the_system_refuses_is_a_budget_error(core: EngineCore) -> None:
    """MemoryError names the setting to change."""
    made = add(core, 1)
    core.executor.error = MemoryError()
    core.step()
    assert isinstance(made[-1].error, OutOfBudget)
    assert "--memory" in str(made[-1].error)


def test_a_receiver_that_raises_loses_its_own_request_only(core: EngineCore, caplog: pytest.LogCaptureFixture) -> None:
    """An exception in a caller's sink neither stops the step nor anybody else's tokens."""

    def explode(delta: OutputDelta, output: RequestOutput) -> None:
        raise RuntimeError("the receiver is gone")

    core.add(Request(id=1, prompt_token_ids=(9,) * 10, sampling=GREEDY), [None], explode)
    other = add(core, 2)
    run(core)
    assert other[-1].finish_reason == "length"
    assert core.num_live == 0
    assert "the receiver of request 1 failed" in caplog.text
    core.executor.world.check_empty()


def test_simulated_steps_are_repeated_until_something_changes() -> None:
    """A thousand lone decode steps are a few plans, and their tokens and time add up."""

    class Cost:
        def step_seconds(self, shape: object) -> float:
            return 1.0

    world = World(bound(layer()), 40 * 8192, max_positions=2048)
    executor = SimExecutor(Cost())
    core = EngineCore(world.scheduler, executor, Arena(HostTier(), Ledger(Budget({}))))
    sampling = SamplingParams(max_tokens=1000, ignore_eos=True)
    made: list[int] = []
    core.add(
        Request(id=1, prompt_token_ids=(9,) * 10, sampling=sampling),
        [None],
        lambda delta, output: made.extend(delta.token_ids),
    )
    run(core)
    assert len(made) == 1000
    assert core.times.num_steps < 25
    assert (core.times.prefill_s, core.times.prefill_tokens) == (1, 10)
    assert (core.times.decode_s, core.times.decode_tokens) == (999, 999)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with a tokenizer."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def llm(model: Path) -> Iterator[LLM]:
    """An engine on the tiny model."""
    with LLM(str(model), memory="48MiB") as made:
        yield made
        if not made.engine._closed:
            made.engine.check_integrity()


def test_a_bad_prompt_among_many_drops_the_others(llm: LLM) -> None:
    """The error comes at once, and what was queued before it does not run on."""
    with pytest.raises(RequestError, match="prompt is empty"):
        llm.generate([{"prompt_token_ids": [1] * 5}, {"prompt_token_ids": []}], SamplingParams(max_tokens=400))
    llm.generate("x", GREEDY)
    assert llm.engine.call(lambda: llm.engine._core.num_live).result() == 0
    assert llm.engine.stats().generated_tokens < 100


def test_a_cancelled_future_drops_its_request(llm: LLM) -> None:
    """Nobody waits for it, so nothing is computed for it."""
    future = llm.engine.generate([1, 2, 3], SamplingParams(max_tokens=450, ignore_eos=True))
    assert future.cancel()
    llm.generate("x", GREEDY)
    assert llm.engine.stats().finished.get("abort") == 1


def test_stop_strings_need_a_tokenizer(model: Path, tmp_path: Path) -> None:
    """A stop string that nothing could find is refused instead of ignored."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((model / name).read_bytes())
    with LLM(str(tmp_path), memory="48MiB") as bare, pytest.raises(TokenizerError, match="stop strings"):
        bare.generate({"prompt_token_ids": [1]}, SamplingParams(stop=("x",)))


def test_a_closed_engine_answers_every_caller(model: Path) -> None:
    """Calls before, during and after close end with a result or EngineClosed; none hangs."""
    llm = LLM(str(model), memory="48MiB")
    outcomes: list[str] = []

    def visit() -> None:
        while True:
            try:
                llm.engine.generate([1, 2], GREEDY).result(timeout=30)
                outcomes.append("result")
            except EngineClosed:
                outcomes.append("closed")
                return

    threads = [threading.Thread(target=visit) for _ in range(4)]
    for thread in threads:
        thread.start()
    while not outcomes:
        pass
    llm.close()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert outcomes.count("closed") == 4
    llm.close()
    llm.engine.abort(1)
    llm.engine.close_session(1)
    with pytest.raises(EngineClosed):
        llm.generate("x")


def test_a_broken_model_is_named_and_the_engine_lives(llm: LLM) -> None:
    """NaN weights end the request with an error that says what to do; repaired weights work again."""
    good = llm.generate("hello", GREEDY)[0].outputs[0].token_ids
    weight = llm.engine._core.executor._weights.linear("layers.0.mlp.down_proj").weight
    before = weight.clone()
    with torch.inference_mode():
        weight.fill_(torch.nan)
        with pytest.raises(ElbowroomError, match="gave the logit nan"):
            llm.generate("hello", GREEDY)
        weight.copy_(before)
    assert llm.generate("hello", GREEDY)[0].outputs[0].token_ids == good


def test_a_session_is_unchanged_by_what_is_refused(llm: LLM) -> None:
    """After a push that does not fit, the session goes on from where it was."""
    with llm.session("some context") as session:
        before = list(session.token_ids)
        with pytest.raises(RequestError):
            session.push([1] * 5000)
        assert session.token_ids == before
        first = session.ask(" and more", GREEDY).outputs[0].token_ids
        session.rollback(len(before))
        assert session.ask(" and more", GREEDY).outputs[0].token_ids == first
        assert session.last is not None
        assert session.last.cached_tokens > 0


def test_the_budget_of_a_running_engine_can_be_changed(llm: LLM) -> None:
    """Lowered, the cache is given up at once and what cannot run ends; raised, it runs again; nothing leaks."""
    many = [{"prompt_token_ids": [i % 250, *range(1, 200)]} for i in range(8)]
    llm.generate(many, GREEDY)
    engine, ledger = llm.engine, llm.engine.parts.ledger
    assert engine.kv_report().live_bytes > 0
    start = engine.parts.memory.budget_bytes
    fixed = ledger.total("host") - ledger.held("kv", "host") - ledger.held("arena.free", "host")
    engine.set_budget(fixed + 2 * 2**15)
    assert ledger.total("host") <= fixed + 2 * 2**15
    assert llm.generate("x", GREEDY)[0].outputs[0].finish_reason == "length"
    with pytest.raises(RequestTooLarge):
        llm.generate(many, GREEDY)
    with pytest.raises(OutOfBudget):
        engine.set_budget(fixed - 1)
    engine.set_budget(start)
    assert len(llm.generate(many, GREEDY)) == 8
    engine.check_integrity()
    assert llm.clear_cache() > 0
    assert engine.kv_report().live_bytes == 0


def test_a_cancelled_submission_never_runs_and_stops_nobody(tmp_path: Path) -> None:
    """A request whose future is cancelled while it is queued is dropped; what comes behind it is served."""
    with LLM(str(write_tiny_model(tmp_path)), memory="48MiB") as llm:
        engine, busy = llm.engine, threading.Event()
        held = engine.call(lambda: busy.wait(10))
        got: list[OutputDelta] = []
        _, cancelled = engine.enqueue([1], GREEDY, lambda delta, output: got.append(delta))
        assert cancelled.cancel()
        after = engine.enqueue([1], GREEDY, lambda delta, output: None)[1]
        busy.set()
        assert held.result(10)
        after.result(10)
        assert len(engine.generate([1], GREEDY).result(10).outputs[0].token_ids) == 8
        assert not got


def test_what_waits_behind_the_end_of_the_engine_is_told(tmp_path: Path) -> None:
    """Commands queued behind one that kills the thread get EngineClosed instead of waiting for ever."""
    llm = LLM(str(write_tiny_model(tmp_path)), memory="48MiB")
    engine, busy = llm.engine, threading.Event()
    engine.call(lambda: busy.wait(10))
    engine._commands.put(None)  # what close() sends
    waiting = [engine.enqueue([1], GREEDY, lambda delta, output: None)[1], engine.call(lambda: 5)]
    busy.set()
    for future in waiting:
        with pytest.raises(EngineClosed):
            future.result(10)
    with pytest.raises(EngineClosed):
        engine.submit([1], GREEDY, lambda delta, output: None)
    llm.close()
