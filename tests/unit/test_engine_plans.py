"""Plans that requests ask for, and relief: which sequences go over when memory is short, and that nothing else does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.engine_world import World, expected_output, layer
from tests.support.tiny_model import write_tiny_model

from elbowroom.engine.llm import LLM
from elbowroom.engine.plans import KVPlans
from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.engine.sequence import Parked
from elbowroom.engine.types import Request
from elbowroom.errors import BudgetTooSmall, PlanError, RequestError
from elbowroom.kv.plan import KVPlan

GREEDY = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
CODECS = {
    "bf16": ((layer(), layer()), ("plain", "plain(bf16)")),
    "kivi": ((layer(width=32), layer(width=32)), ("plain", "kivi(4,4,32)")),
    "window": ((layer(window=40), layer()), ("plain", "plain(bf16)")),
}


def request(number: int, prompt: int, **options: object) -> Request:
    tokens = tuple((number + i) % 40 + 8 for i in range(prompt))
    sampling = SamplingParams(max_tokens=200, ignore_eos=True, seed=5)
    return Request(id=number, prompt_token_ids=tokens, sampling=sampling, **options)  # type: ignore[arg-type]


def world(name: str, relief: int | None) -> World:
    layers, texts = CODECS[name]
    plans = [KVPlan.parse(text).bind(layers, "float32") for text in texts]
    limits = {"max_sequences": 6, "max_step_tokens": 128, "max_positions": 600}
    return World(plans, 20 * plans[0].block_bytes, relief_plan=relief, **limits)


@pytest.mark.parametrize("name", list(CODECS))
def test_sequences_go_over_before_any_is_computed_again(name: str) -> None:
    requests = [request(number, 60 + 10 * number) for number in range(6)]
    counts = []
    for relief in (None, 1):
        made = world(name, relief)
        tokens = made.run_all(requests)
        for each in requests:
            assert tokens[each.id, 0] == expected_output(list(each.prompt_token_ids), 5, 0, 200, True)
        stats = made.scheduler.stats()
        counts.append((stats.reliefs, stats.preemptions))
        assert made.shortfalls == 0
        made.check_empty()
    (none, before), (reliefs, after) = counts
    assert none == 0
    assert reliefs > 0
    assert after <= before


def test_a_request_that_named_its_plan_keeps_it() -> None:
    made = world("bf16", 1)
    made.run_all([request(number, 60 + 10 * number, keeps_plan=True) for number in range(6)])
    stats = made.scheduler.stats()
    assert stats.reliefs == 0
    assert stats.preemptions > 0


@pytest.mark.parametrize("missing", [0.2, 0.5, 0.8])
def test_a_budget_that_is_lowered_ends_nobody(missing: float) -> None:
    """Then less than nothing is free: sequences are preempted until others can go over."""
    made = world("bf16", 1)
    requests = [request(number, 60 + 10 * number) for number in range(6)]
    for each in requests:
        made.scheduler.add(each)
    for _ in range(60):
        made.step()
    made.set_capacity(max(int(made.capacity_bytes * (1 - missing)), 8 * made.pricing.block_bytes))
    tokens = made.run_all([])
    for each in requests:
        assert len(tokens[each.id, 0]) > 100
    assert made.scheduler.stats().finished == {"length": 6}
    made.check_empty()


def test_one_that_cannot_go_over_is_computed_again() -> None:
    """The store has less than was counted on: nobody else loses anything by it."""
    made = world("bf16", 1)
    made.store.resize(made.capacity_bytes * 2 // 3)
    requests = [request(number, 60 + 10 * number) for number in range(6)]
    tokens = made.run_all(requests)
    for each in requests:
        assert tokens[each.id, 0] == expected_output(list(each.prompt_token_ids), 5, 0, 200, True)


def test_block_keys_of_other_plans_do_not_meet() -> None:
    made = world("bf16", None)
    keys = (b"a" * 16, b"b" * 16, b"c" * 16)
    for number, plan in enumerate((0, 1, 1)):
        made.run_all([replace(request(7, 200), id=number, plan=plan, block_keys=keys)])
        assert made.scheduler.stats().cached_prompt_tokens == (192 if number == 2 else 0)


def test_a_request_that_names_its_plan_does_not_go_on_relieved() -> None:
    parked = Parked(
        slot=1,
        asked_plan=0,
        plan=1,
        pricing=world("bf16", 1).pricing,
        tokens=[],
        shared=None,
        num_blocks=0,
        paid_bytes=0,
        dropped=(),
        last_used=0,
    )
    assert parked.suits(request(1, 9))
    assert not parked.suits(request(1, 9, keeps_plan=True))
    assert not parked.suits(request(1, 9, plan=1))


def test_the_least_budget_holds_what_relief_needs(tiny: Path) -> None:
    with pytest.raises(BudgetTooSmall) as refusal:
        LLM(str(tiny), "1MiB", kv_relief="int8")
    with LLM(str(tiny), refusal.value.minimum_bytes, kv_relief="int8") as made:
        sampling = SamplingParams(max_tokens=64, ignore_eos=True)
        output = made.generate({"prompt_token_ids": [40] * 64}, sampling)[0]
        assert len(output.outputs[0].token_ids) == 64


def test_no_prefix_of_a_sequence_that_went_over_is_cached() -> None:
    """Its blocks are not what the other plan would have computed."""
    made = world("bf16", 1)
    first = [request(number, 60 + 10 * number) for number in range(6)]
    made.run_all(first)
    assert made.scheduler.stats().reliefs > 0
    for node in made.scheduler.account.index.nodes.values():
        assert made.executor.handles[node.slot].plan == 0


def test_plans_do_not_share_prefixes() -> None:
    made = world("bf16", None)
    long = request(1, 200)
    made.run_all([long])
    made.run_all([Request(id=2, prompt_token_ids=long.prompt_token_ids, sampling=long.sampling, plan=1)])
    assert made.scheduler.stats().cached_prompt_tokens == 0
    made.run_all([Request(id=3, prompt_token_ids=long.prompt_token_ids, sampling=long.sampling, plan=1)])
    assert made.scheduler.stats().cached_prompt_tokens == 192


def test_plans_are_known_by_any_spelling_and_others_refused() -> None:
    plans = KVPlans.of("plain", ["snapkv(512) | int8", " int8 "], "int8")
    assert [each.text for each in plans.all] == [KVPlan.parse(t).text for t in ("plain", "snapkv(512)|int8", "int8")]
    assert plans.relief == 2
    assert plans.number(None) == 0
    assert plans.number("snapkv(tokens=512)|int8") == 1
    with pytest.raises(RequestError, match="not one of the plans") as refusal:
        plans.number("kivi")
    assert "snapkv(tokens=512" in refusal.value.message
    with pytest.raises(PlanError, match="unknown"):
        plans.number("nothing(3)")
    with pytest.raises(PlanError, match="chooses when a prompt ends"):
        KVPlans.of("snapkv(512)", (), "int8")
    with pytest.raises(PlanError, match="no relief from itself"):
        KVPlans.of("int8", (), "int8")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), context=2048)


@pytest.fixture(scope="module")
def llm(tiny: Path) -> Iterator[LLM]:
    with LLM(str(tiny), "48MiB", kv_choices=["int8", "bfp(n=16)", "snapkv(128,w=8)"]) as made:
        yield made
        made.engine.check_integrity()


def texts(seed: int, count: int) -> list[str]:
    return ["".join(chr(97 + (i * (seed + n)) % 23) for i in range(150 + 17 * n)) for n in range(count)]


def test_requests_of_several_plans_run_together(llm: LLM, tiny: Path) -> None:
    """Each gets what an engine of its plan alone gives."""
    plans = [None, "int8", "bfp(n=16)", "snapkv(128,w=8)", "int8", None]
    prompts = texts(3, len(plans))
    ids = [llm.tokenizer.encode(prompt) for prompt in prompts]
    futures = [llm.engine.generate(each, GREEDY, kv=kv) for each, kv in zip(ids, plans, strict=True)]
    together = [future.result().outputs[0].token_ids for future in futures]
    for kv, prompt, made in zip(plans, prompts, together, strict=True):
        with LLM(str(tiny), "48MiB", kv) as alone:
            assert alone.generate(prompt, GREEDY)[0].outputs[0].token_ids == made
    assert len(set(map(tuple, together))) == len(plans)


def test_generate_chat_and_sessions_take_a_plan(llm: LLM) -> None:
    prompt = texts(5, 1)[0]
    for kv in (None, "int8"):
        assert not llm.generate(prompt, GREEDY, kv=kv)[0].is_relieved
        assert llm.chat([{"role": "user", "content": "Hi"}], GREEDY, kv=kv)[0].finished
    with llm.session(prompt, kv="bfp(n=16)") as session:
        answer = session.ask("more", GREEDY).outputs[0].token_ids
        with session.fork() as twin:
            assert twin.ask("a", GREEDY).outputs[0].token_ids
    with llm.session(prompt + "more", kv="bfp(n=16)") as session:
        assert session.ask("a", GREEDY).finished
    assert llm.generate(prompt + "more", GREEDY, kv="bfp(n=16)")[0].outputs[0].token_ids == answer
    for call in (llm.generate, llm.session):
        with pytest.raises(RequestError, match="kv_choices"):
            call(prompt, kv="fp8")


def test_generate_and_chat_take_an_admission_policy(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, scheduler, asked = texts(5, 2), llm.engine.parts.core.scheduler, []
    add = scheduler.add
    monkeypatch.setattr(scheduler, "add", lambda request: (asked.append(request.admission), add(request)))
    usual = [each.outputs[0].token_ids for each in llm.generate(prompts, GREEDY)]
    chosen = [each.outputs[0].token_ids for each in llm.generate(prompts, GREEDY, admission="past_future")]
    assert llm.chat([{"role": "user", "content": "Hi"}], GREEDY, admission="conservative")[0].finished
    assert chosen == usual
    assert asked == [None, None, "past_future", "past_future", "conservative"]
    with pytest.raises(PlanError, match="unknown admission policy 'soon'"):
        llm.generate(prompts, GREEDY, admission="soon")
    with pytest.raises(RequestError, match="the order 'priority'") as caught:
        llm.engine.submit([5], GREEDY, lambda *_: None, deadline_s=2.0)
    assert "--order slo" in (caught.value.hint or "")


def test_relief_is_reported(tiny: Path) -> None:
    """Under pressure some go over, all are answered whole, and outputs and counters say who did."""
    sampling = SamplingParams(max_tokens=1200, temperature=0.0, ignore_eos=True)
    prompts = texts(7, 6)
    with LLM(str(tiny), "48MiB", kv_relief="int8", prefix_cache=False) as made:
        budget = made.engine.parts.ledger.total("host") - made.engine.parts.ledger.held("kv", "host")
        made.engine.set_budget(budget + 5 * 2**19)
        outputs = made.generate(prompts, sampling)
        stats = made.engine.stats()
        made.engine.check_integrity()
    assert [len(each.outputs[0].token_ids) for each in outputs] == [1200] * 6
    assert 0 < sum(each.is_relieved for each in outputs) <= stats.reliefs
