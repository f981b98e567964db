"""Stems: computed once, kept until the last member has ended, at every codec and under any shortage of memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.engine_world import World, expected_output, layer
from tests.unit.test_offline_tree import Lists

from elbowroom.engine.executors.base import LinearCostModel
from elbowroom.engine.offline import JobPlan, PrefixTree
from elbowroom.engine.offline.forecast import forecast
from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.engine.scheduler import Scheduler
from elbowroom.engine.types import Request
from elbowroom.kv.plan import KVPlan

NEW_TOKENS = 5


def job(prompts: Sequence[Sequence[int]], order: str = "planned", weights: Sequence[int] = ()) -> JobPlan:
    tree = PrefixTree(Lists(prompts))
    for number in range(len(prompts)):
        tree.insert(number, weights[number] if weights else 1)
    return JobPlan.of(tree, Lists(prompts), [NEW_TOKENS] * len(prompts), order)  # type: ignore[arg-type]


def requests(plan: JobPlan, prompts: Sequence[Sequence[int]]) -> Iterator[Request]:
    for prompt, stems in plan.feed():
        sampling = SamplingParams(
            max_tokens=NEW_TOKENS, temperature=0.0, seed=5, ignore_eos=True, n=plan.tree.weight.get(prompt, 1)
        )
        yield Request(id=prompt, prompt_token_ids=tuple(prompts[prompt]), sampling=sampling, stems=stems)


def documents(num_documents: int, num_questions: int) -> list[list[int]]:
    """Return prompts of three levels, of lengths that are no whole blocks, in an order without order."""
    made = [
        [1] * 37 + [document + 2] * (150 + 7 * document) + [40, question, document] * (4 + question % 3)
        for question in range(num_questions)
        for document in range(num_documents)
    ]
    return made[::2] + made[1::2]


def run(world: World, plan: JobPlan, prompts: Sequence[Sequence[int]], num_waiting: int = 6) -> int:
    """Feed the job as the runner does; return the prompt tokens that were computed."""
    feed, tokens = requests(plan, prompts), dict[tuple[int, int], list[int]]()
    ahead = next(feed, None)
    for _ in range(20_000):
        while ahead is not None and world.scheduler.stats().num_waiting < num_waiting:
            world.scheduler.add(ahead)
            ahead = next(feed, None)
        if not world.scheduler.has_work():
            break
        for update in world.step():
            made = tokens.setdefault((update.request_id, update.sample), [])
            made.extend(each.token_id for each in update.tokens)
    assert len(tokens) == sum(plan.tree.weight.get(prompt, 1) for prompt in range(len(prompts)))
    for (prompt, sample), made in tokens.items():
        assert made == expected_output(list(prompts[prompt]), 5, sample, NEW_TOKENS, True)
    stats = world.scheduler.stats()
    return stats.prompt_tokens - stats.cached_prompt_tokens


@pytest.mark.parametrize("kv", ["plain", "int8", "kivi"])
def test_every_shared_token_is_computed_once(kv: str) -> None:
    prompts = documents(4, 6)
    plan = job(prompts)
    world = World(KVPlan.parse(kv).bind([layer(width=64), layer(width=64)], "float32"), 2**22)

    assert run(world, plan, prompts) == plan.planned_tokens
    # Some questions are prefixes of others, and share fewer tokens than a stem is worth.
    assert plan.tree.least_tokens <= plan.planned_tokens <= plan.tree.least_tokens * 1.05
    account = world.scheduler.account
    assert (account.used_bytes, account.cached_bytes, account.stems) == (0, 0, {}), "freed at once, without eviction"
    assert account.evicted_blocks == 0
    world.check_empty()


def test_a_prefix_goes_when_its_last_member_ends_and_not_before() -> None:
    prompts = [[1] * 200 + [2], [1] * 200 + [3], [1] * 200 + [4], [5] * 100]
    world = World(KVPlan.parse("plain").bind([layer()], "float32"), 2**22, max_sequences=1)
    for request in requests(job(prompts), prompts):
        world.scheduler.add(request)
    held, ended = [], 0
    while world.scheduler.has_work():
        ended += sum(update.finish_reason is not None for update in world.step())
        held.append((ended, world.scheduler.account.cached_bytes > 0))

    members = {request.id: bool(request.stems) for request in requests(job(prompts), prompts)}
    order = [members[number] for number in job(prompts).order]
    last = len(order) - order[::-1].index(True)
    assert all(kept for done, kept in held if order.index(True) < done < last)
    assert not any(kept for done, kept in held if done >= last)


def test_samples_of_one_prompt_branch_from_all_of_it() -> None:
    prompts = [[1] * 100 + [2] * 30]
    plan = job(prompts, weights=[4])
    world = World(KVPlan.parse("plain").bind([layer()], "float32"), 2**22)

    assert run(world, plan, prompts) == 130 + 3  # each of the others computes the last token
    world.check_empty()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 150), st.integers(0, 2), st.integers(1, 40)),
        min_size=2,
        max_size=12,
    ),
    st.integers(4, 30),
    st.integers(1, 8),
    st.sampled_from(["plain", "int8"]),
    st.sampled_from(["planned", "sorted", "arrival"]),
)
def test_any_job_ends_with_the_right_tokens_in_any_memory(
    shapes: list[tuple[int, int, int, int]], blocks: int, sequences: int, kv: str, order: str
) -> None:
    prompts = [[a] * (70 * a) + [b + 3] * long + [9] * rest for a, long, b, rest in shapes]
    plan = job(prompts, order)
    bound = KVPlan.parse(kv).bind([layer(width=64)], "float32")
    probe = World(bound, 2**26)
    least = max(probe.pricing.price(-(-(len(each) + NEW_TOKENS) // 64)) for each in prompts)
    capacity = probe.pricing.transient_bytes + max(least, blocks * probe.pricing.block_bytes)
    world = World(bound, capacity, max_sequences=sequences)

    run(world, plan, prompts)
    assert not world.scheduler.account.stems
    world.check_empty()


def test_when_only_one_runs_stems_give_way_rather_than_it() -> None:
    """Two prompts with long stems that do not fit beside each other, and are wanted again later."""
    prompts = [[1] * 190 + [2], [3] * 190 + [4], [1] * 190 + [5], [3] * 190 + [6]]
    plan = job(prompts)
    bound = KVPlan.parse("plain").bind([layer()], "float32")
    pricing = World(bound, 2**24).pricing
    world = World(bound, pricing.transient_bytes + pricing.price(4), max_sequences=4)
    feed = {request.id: request for request in requests(plan, prompts)}
    for number in range(4):  # not in the planned order: both stems are wanted all the time
        world.scheduler.add(feed[number])
    tokens = 0
    while world.scheduler.has_work():
        tokens += sum(len(update.tokens) for update in world.step())

    assert tokens == 4 * NEW_TOKENS


@pytest.mark.parametrize("order", ["planned", "sorted", "arrival"])
def test_the_forecast_counts_what_the_engine_will_compute(order: str) -> None:
    prompts = documents(3, 5)
    plan = job(prompts, order)
    bound = KVPlan.parse("plain").bind([layer()], "float32")
    capacity = 12 * World(bound, 2**24).pricing.block_bytes
    world = World(bound, capacity)
    twin = Scheduler(world.scheduler.config, world.scheduler.account.pricings, capacity)

    found = forecast(plan, [NEW_TOKENS] * len(prompts), twin, LinearCostModel(), 6)
    assert found.computed_tokens >= run(world, plan, prompts)
    assert found.seconds > 0
    assert found.peak_kv_bytes <= capacity
    assert found.new_tokens == NEW_TOKENS * len(prompts)
    cut = Scheduler(world.scheduler.config, world.scheduler.account.pricings, capacity)
    part = forecast(plan, [NEW_TOKENS] * len(prompts), cut, LinearCostModel(), 6, most_steps=12)
    assert part.is_extrapolated
    assert 0.3 < part.seconds / found.seconds < 3


def test_of_equal_prompts_that_come_together_one_is_computed() -> None:
    """Without a plan, too: the others wait for the first and share its blocks."""
    world = World(KVPlan.parse("plain").bind([layer()], "float32"), 2**24)
    sampling = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    prompts = [(1,) * 200 + (number,) for number in range(5)]

    world.run_all([Request(id=n, prompt_token_ids=ids, sampling=sampling) for n, ids in enumerate(prompts)])
    stats = world.scheduler.stats()
    assert stats.prompt_tokens - stats.cached_prompt_tokens == 201 + 4 * (201 - 192)
