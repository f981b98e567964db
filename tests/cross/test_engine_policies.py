"""Plans with policies in the engine: what is paid is what is held, and what a policy drops makes room for others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.support.policies import TAPERING
from tests.support.tiny_model import write_tiny_model

from elbowroom.bench.random_model import random_calibration
from elbowroom.bench.schedules import SCHEDULES, Stepper, Subject
from elbowroom.engine.llm import LLM
from elbowroom.engine.room import preempt
from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.errors import RequestTooLarge
from elbowroom.kernels import backend_name
from elbowroom.kv import KVPlan
from elbowroom.kv.base import KVStep, Shortfall
from elbowroom.models.decoder import Decoder
from elbowroom.models.loader import load_model
from elbowroom.models.path import ANY, ComputePath

PLANS = (
    "snapkv(128)",
    "snapkv(128) | kivi(2,2,32)",
    "streaming(128,sinks=4) | int8",
    "snapkv(tokens=200,w=16) | bfp(n=16)",
    "spatten(150,w=16) | fp8",
    TAPERING,
    "compresskv(160) | int8",
    "snapkv(160) | heads(0.5,skip=1) | int8",
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), context=2048)


@pytest.fixture(scope="module")
def decoder(directory: Path) -> Decoder:
    return load_model(directory, torch.float32)


def prompt(count: int, seed: int = 0) -> list[int]:
    return torch.randint(32, 120, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def watched(stepper: Stepper) -> list[Shortfall]:
    """Return a list that grows with every shortfall of the store."""
    found: list[Shortfall] = []
    reserve = stepper.store.reserve

    def call(step: KVStep) -> Shortfall | None:
        shortfall = reserve(step)
        found.extend([] if shortfall is None else [shortfall])
        return shortfall

    stepper.store.reserve = call  # type: ignore[method-assign]
    return found


@pytest.mark.parametrize("kv", PLANS)
@pytest.mark.parametrize("native_tokens", [0, ANY] if backend_name() == "native" else [0])
def test_every_schedule_runs_and_the_books_agree(decoder: Decoder, kv: str | KVPlan, native_tokens: int) -> None:
    """Batches, sessions, forks and samples; in the end nothing is held."""
    subject = Subject(decoder, ComputePath(native_tokens), kv, random_calibration(decoder.config.layers))
    for seed, name in enumerate(("batched", "prefix_hit", "forked", "rolled_back", "samples")):
        for tokens in SCHEDULES[name](subject, prompt(300), 30, seed):
            assert len(tokens) == 30


@pytest.mark.parametrize("kv", PLANS)
def test_what_is_dropped_makes_room(decoder: Decoder, kv: str | KVPlan) -> None:
    """Long prompts run side by side that would not all fit in full, without a shortfall or a preemption."""
    # Sealed strips are small beside those of a prompt that is read.
    stepper = Stepper(
        Subject(decoder, ComputePath(0), kv, random_calibration(decoder.config.layers)),
        8000 if "kivi" in str(kv) else 3600,
    )
    shortfalls = watched(stepper)
    for number in range(4):
        stepper.add(number, prompt(1500, number), 40)
    most = 0
    while stepper.scheduler.has_work():
        stepper.step()
        most = max(most, stepper.scheduler.stats().num_running)
        stepper.scheduler.check()
        account = stepper.scheduler.account
        if account.ops:  # a sequence that ended is closed with the next step
            continue
        assert stepper.store.report().live_bytes <= account.used_bytes + stepper.pricing.transient_bytes
    assert most > 1
    assert not shortfalls
    assert stepper.scheduler.stats().preemptions == 0
    stepper.close()


def test_a_prompt_is_paid_by_what_stays_of_it(decoder: Decoder) -> None:
    """1,500 tokens fit where 1,200 would be too many without the policy; generated tokens are paid in full."""
    stepper = Stepper(Subject(decoder, ComputePath(0), "snapkv(128)"), 1000)
    stepper.add(1, prompt(1500), 100)
    stepper.run()
    with pytest.raises(RequestTooLarge, match="2 prompt tokens and 1500 new ones"):
        stepper.add(2, prompt(2), 1500)
    stepper.close()
    plain = Stepper(Subject(decoder, ComputePath(0), "plain"), 1000)
    with pytest.raises(RequestTooLarge):
        plain.add(1, prompt(1200), 100)
    plain.close()


def test_a_session_is_compressed_before_its_questions_come(directory: Path) -> None:
    """Forks share what stayed; a later question goes on from there without reading the context again."""
    with LLM(str(directory), "256MiB", "snapkv(128)") as llm, llm.session(prompt(1000)) as session:
        report = llm.engine.parts.store.report
        held = report()
        assert held.num_dropped == 1000 - 104
        sampling = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
        with session.fork() as fork:
            answer = fork.ask([65, 66, 67], sampling)
            assert answer.cached_tokens == 1000
            assert report().num_shared_strips > 0
        again = session.ask([65, 66, 67], sampling)
        assert again.outputs[0].token_ids == answer.outputs[0].token_ids
        assert again.cached_tokens == 1000


@pytest.mark.parametrize(
    "kv",
    [
        "streaming(tokens=512)",
        "snapkv(512)",
        "kivi(k=2,v=2,g=64)",
        "snapkv(128) | kivi",
        "spatten(200,keep=1)",
        TAPERING,
        "compresskv",
    ],
)
@pytest.mark.parametrize("count", [64, 576, 600])
def test_what_is_accepted_runs_without_a_shortfall(decoder: Decoder, kv: str | KVPlan, count: int) -> None:
    """Prompts just above a budget, and of a whole block, in stores of every size that makes them share."""
    for capacity in range(count // 64 * 64 + 64, min(2000, 3 * count + 400), 192):
        stepper = Stepper(Subject(decoder, ComputePath(0), kv, random_calibration(decoder.config.layers)), capacity)
        shortfalls = watched(stepper)
        try:
            for number in range(3):
                stepper.add(number, prompt(count, number), 20)
        except RequestTooLarge:
            stepper.close()
            continue
        stepper.run()
        assert not shortfalls
        assert all(len(stepper.tokens[number, 0]) == 20 for number in range(3))
        stepper.close()


@pytest.mark.parametrize("kv", PLANS)
def test_preemption_changes_no_answer(decoder: Decoder, kv: str | KVPlan) -> None:
    """What was generated is computed again behind what the policy keeps of the prompt alone."""
    texts = []
    for interrupted in (False, True):
        stepper = Stepper(Subject(decoder, ComputePath(0), kv, random_calibration(decoder.config.layers)), 4000)
        stepper.add(1, prompt(300), 120)
        for number in range(200):
            if interrupted and number == 90:
                preempt(stepper.scheduler._state.running[0], stepper.scheduler._state)
            if stepper.scheduler.has_work():
                stepper.step()
        texts.append(stepper.tokens[1, 0])
        assert stepper.scheduler.stats().preemptions == interrupted
        stepper.close()
    assert texts[0] == texts[1]
