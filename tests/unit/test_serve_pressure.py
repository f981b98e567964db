"""Limits, tenants and deadlines of the server: what is refused, with which numbers, and what is not."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from tests.support.engine_world import World, bound, layer
from tests.support.http import assert_no_leak, parse_metrics, tiny_llm

from elbowroom.engine.admission.conservative import ConservativeAdmission
from elbowroom.engine.async_llm import AsyncLLM
from elbowroom.engine.ordering.slo import SloOrder
from elbowroom.engine.queue import view_queue
from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.engine.scheduling import Scheduling
from elbowroom.engine.types import Request as EngineRequest
from elbowroom.errors import RequestError, Unread
from elbowroom.serve import ServerLimits, create_app
from elbowroom.serve.callers import caller_of
from elbowroom.serve.errors import InvalidField
from elbowroom.serve.metrics import MOST_TENANTS, ServerMetrics
from elbowroom.serve.requests import GenerationRequest
from elbowroom.serve.service_rate import ENOUGH, ServiceRate
from elbowroom.serve.tenants import Tenant, Tenants

PLAN = bound(layer(), layer())
BLOCK = 16384


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AsyncLLM]:
    made = tiny_llm(tmp_path_factory.mktemp("tiny"), max_sequences=1, context=2048)
    yield made
    assert_no_leak(made)
    made.engine.close()


def send(llm: AsyncLLM, limits: ServerLimits, *requests: dict[str, Any]) -> list[httpx.Response]:
    """Send all at once and return their responses in order."""

    async def all_at_once() -> list[httpx.Response]:
        transport = httpx.ASGITransport(create_app({"tiny": llm}, limits))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            posts = [client.post("/v1/completions", **request) for request in requests]
            return [*await asyncio.gather(*posts), await client.get("/metrics")]

    return asyncio.run(all_at_once())


def asking(headers: dict[str, str] | None = None, **fields: Any) -> dict[str, Any]:
    body = {"prompt": "a", "max_tokens": 30, "ignore_eos": True} | fields
    return {"json": body, "headers": headers or {}}


def wishing(**fields: Any) -> GenerationRequest:
    return GenerationRequest(**fields)


def queued(number: int, prompt: int, tenant: str = "", max_tokens: int = 20) -> EngineRequest:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return EngineRequest(id=number, prompt_token_ids=(number + 9,) * prompt, sampling=sampling, tenant=tenant)


def request_with(**headers: str) -> Request:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "headers": raw, "state": {}})


# Rate


def test_the_rate_counts_only_time_in_which_something_waits() -> None:
    rate = ServiceRate()
    assert (rate.retry_after_s(50), rate.predicted_s(50)) == (1, None)
    for second in range(100):  # one at a time, and nobody waits: says nothing
        rate.observe(float(second), is_waiting=False, num_ended=1)
    assert rate.predicted_s(5) is None

    for step in range(ENOUGH + 1):  # one every two seconds
        rate.observe(100.0 + 2 * step, is_waiting=True, num_ended=1)

    assert rate.predicted_s(4) == pytest.approx(10.0)
    assert rate.retry_after_s(4) == 8
    assert rate.retry_after_s(10**6) == 60
    assert rate.retry_after_s(0) == 1


def test_the_rate_forgets_what_is_older_than_a_minute() -> None:
    rate = ServiceRate()
    for step in range(30):
        rate.observe(float(step), is_waiting=True, num_ended=1)
    rate.observe(200.0, is_waiting=False)
    rate.observe(300.0, is_waiting=False)
    assert (rate.predicted_s(3), rate.retry_after_s(3)) == (None, 1)


def test_where_nothing_ends_the_wait_grows_with_what_was_seen() -> None:
    rate = ServiceRate()
    rate.observe(0.0, is_waiting=True)
    rate.observe(5.0, is_waiting=True)
    assert rate.retry_after_s(3) == 15


# Tenants


def test_keys_name_tenants_and_their_weights(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# keys\nk1 oak\nk2 elm 2.5\n\nk3 oak\n")
    tenants = Tenants("plain", file)

    found = [tenants.of(request_with(authorization=f"Bearer {key}")) for key in ("k1", "k2", "k3", "plain")]

    assert found == [Tenant("oak"), Tenant("elm", 2.5), Tenant("oak"), Tenant()]
    for wrong in ("Bearer k", "Bearer", "Basic k1", "k1", ""):
        with pytest.raises(RequestError, match="API key"):
            tenants.of(request_with(authorization=wrong))
    assert "k1" not in repr(vars(tenants))


@pytest.mark.parametrize(
    "text", ["", "k", "k oak 0", "k oak many", "k oak 1 2", "k sp/ace", "k oak\nk elm", "k\u00e4 oak", "k oak nan"]
)
def test_malformed_key_files_are_refused_without_showing_keys(tmp_path: Path, text: str) -> None:
    file = tmp_path / "names"
    file.write_text(text.replace("k", "SECRET"), encoding="utf-8")
    with pytest.raises(RequestError) as caught:
        Tenants(key_file=file)
    assert "SECRET" not in str(caught.value)


def test_a_header_names_the_tenant_where_the_server_says_so() -> None:
    assert Tenants().of(request_with(x_tenant="oak")) == Tenant()
    tenants = Tenants(header="X-Tenant")
    assert tenants.of(request_with(x_tenant="oak")) == Tenant("oak")
    assert tenants.of(request_with()) == Tenant()
    with pytest.raises(RequestError, match="X-Tenant"):
        tenants.of(request_with(x_tenant="o a k"))
    with pytest.raises(RequestError, match="keys or by a header"):
        Tenants(key_file=Path("any"), header="X-Tenant")


def test_labels_of_tenants_are_bounded() -> None:
    metrics = ServerMetrics()
    labels = {metrics.tenant(f"tenant {number}").label for number in range(500)}
    assert len(labels) == MOST_TENANTS + 1
    assert metrics.tenant("tenant 0").label == "tenant 0"


# Callers


def test_timeouts_and_priorities_are_read_and_bounded() -> None:
    limits = ServerLimits(request_timeout_s=5.0, allow_priority=True)
    assert caller_of(request_with(), wishing(), limits).timeout_s == 5.0
    assert caller_of(request_with(x_request_timeout="2.5"), wishing(priority=-3), limits).timeout_s == 2.5
    assert caller_of(request_with(x_request_timeout="60"), wishing(priority=-3), limits).timeout_s == 5.0
    assert caller_of(request_with(), wishing(priority=-3), limits).priority == -3
    for value in ("0", "-1", "nan", "inf", "soon"):
        with pytest.raises(RequestError, match="X-Request-Timeout"):
            caller_of(request_with(x_request_timeout=value), wishing(), limits)
    with pytest.raises(RequestError, match="--allow-priority"):
        caller_of(request_with(), wishing(priority=1), ServerLimits())
    assert caller_of(request_with(), wishing(priority=0), ServerLimits()).priority == 0
    with pytest.raises(RequestError, match="priority"):
        caller_of(request_with(), wishing(priority=2**40), limits)


def test_who_may_choose_an_admission_policy_and_a_deadline() -> None:
    may = ServerLimits(allow_priority=True, allow_admission=True)
    made = caller_of(request_with(), wishing(admission="conservative", deadline_s=2), may)
    assert (made.admission, made.deadline_s) == ("conservative", 2.0)
    made = caller_of(request_with(), wishing(), may)
    assert (made.admission, made.deadline_s) == (None, None)
    for fields, option in (({"admission": "greedy"}, "--allow-admission"), ({"deadline_s": 1.0}, "--allow-priority")):
        with pytest.raises(InvalidField, match="lets no request choose") as refusal:
            caller_of(request_with(), wishing(**fields), ServerLimits())
        assert option in str(refusal.value.hint)
        assert refusal.value.param in fields
    with pytest.raises(InvalidField, match="no policy 'soon'") as refusal:
        caller_of(request_with(), wishing(admission="soon"), may)
    assert "past_future" in str(refusal.value.hint)


def test_the_engine_hears_of_policy_priority_and_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = tiny_llm(tmp_path, scheduling=Scheduling(order="slo", slo_ttft_s=3.0, slo_tpot_s=0.25))
    seen: list[EngineRequest] = []
    add = llm.engine.parts.core.scheduler.add
    monkeypatch.setattr(llm.engine.parts.core.scheduler, "add", lambda request: (seen.append(request), add(request)))
    try:
        order = llm.engine.parts.core.scheduler._state.order
        assert isinstance(order, SloOrder)
        assert (order.ttft_s, order.tpot_s) == (3.0, 0.25)
        limits = ServerLimits(allow_priority=True, allow_admission=True)
        wishes = {"admission": "conservative", "priority": -2, "deadline_s": 1.5}
        chosen, usual, never, chat = send(
            llm, limits, asking(**wishes), asking(), asking(deadline_s=0), asking(admission="x")
        )[:4]
        assert [each.status_code for each in (chosen, usual, never, chat)] == [200, 200, 400, 400]
        assert never.json()["error"]["param"] == "deadline_s"
        assert chat.json()["error"]["param"] == "admission"
        seen.sort(key=lambda each: each.id)
        assert [(each.admission, each.priority) for each in seen] == [("conservative", -2), (None, 0)]
        assert seen[0].deadline_s == seen[0].arrival_s + 1.5
        assert seen[1].deadline_s is None
    finally:
        assert_no_leak(llm)
        llm.engine.close()


def test_a_deadline_is_refused_where_nobody_would_heed_it(llm: AsyncLLM) -> None:
    refused, _ = send(llm, ServerLimits(allow_priority=True), asking(deadline_s=2))
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (400, "deadline_s")
    assert "--order slo" in error["message"]


# Queue


def test_a_full_queue_is_a_429_that_says_what_is_full(llm: AsyncLLM) -> None:
    *responses, metrics = send(llm, ServerLimits(max_queue=2), *[asking(max_tokens=200) for _ in range(8)])

    statuses = [each.status_code for each in responses]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= 2
    refused = next(each for each in responses if each.status_code == 429)
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "overloaded")
    assert "2 requests to 'tiny' wait (at most 2 may)" in error["message"]
    assert "of KV cache are in use" in error["message"]
    counted = parse_metrics(metrics.text)
    assert counted["elbowroom_tenant_requests_total{outcome=refused,tenant=(none)}"] == statuses.count(429)
    assert counted["elbowroom_tenant_requests_total{outcome=finished,tenant=(none)}"] == statuses.count(200)


@pytest.mark.parametrize("admission", ["greedy", "conservative", "past_future"])
def test_a_burst_to_an_idle_server_fills_slots_and_queue(tmp_path: Path, admission: str) -> None:
    """Nothing has begun when the last of them comes; two can run, two may wait, and one is too many."""
    burst = tiny_llm(tmp_path, max_sequences=2, context=2048, scheduling=Scheduling(admission=admission))
    try:
        *responses, _ = send(burst, ServerLimits(max_queue=2), *[asking(max_tokens=300) for _ in range(5)])
        assert sorted(each.status_code for each in responses) == [200, 200, 200, 200, 429]
    finally:
        assert_no_leak(burst)
        burst.engine.close()


def test_who_has_no_room_waits_although_slots_are_free() -> None:
    """Eight slots; memory for two prompts of five blocks with a block each, and nothing for a third."""
    scheduler = World(PLAN, 14 * BLOCK, max_sequences=8, prefix_cache=False).scheduler
    for number in range(4):
        assert view_queue(scheduler, "oak").num_waiting == max(number - 2, 0)
        scheduler.add(queued(number, 300, tenant="oak" if number != 2 else "elm"))
    view = view_queue(scheduler, "oak")
    assert (view.num_waiting, view.num_waiting_of_tenant) == (2, 1)
    scheduler.add(queued(9, 300))
    assert view_queue(scheduler, "elm").num_waiting == 3


def test_who_was_refused_waits_although_it_would_fit() -> None:
    world = World(PLAN, 14 * BLOCK, max_sequences=8, admission=ConservativeAdmission(), prefix_cache=False)
    for number in range(3):
        world.scheduler.add(queued(number, 30, max_tokens=500))
    assert view_queue(world.scheduler, "").num_waiting == 0
    world.step()
    assert view_queue(world.scheduler, "").num_waiting == 2


def test_one_tenant_cannot_fill_the_queue(llm: AsyncLLM) -> None:
    limits = ServerLimits(max_queue=100, max_queue_per_tenant=1, tenant_header="X-Tenant")
    heavy = [asking({"X-Tenant": "heavy"}, max_tokens=200) for _ in range(6)]
    *responses, light, _ = send(llm, limits, *heavy, asking({"X-Tenant": "light"}))

    assert light.status_code == 200
    refused = [each for each in responses if each.status_code == 429]
    assert 4 <= len(refused) <= 5
    assert "1 of them are yours, at most 1 may be" in refused[0].json()["error"]["message"]


def test_what_never_fits_is_a_400_however_long_the_queue(llm: AsyncLLM) -> None:
    fits = [asking(max_tokens=200) for _ in range(4)]
    *_, never, _ = send(llm, ServerLimits(max_queue=1), *fits, asking(prompt="a" * 3000))
    assert (never.status_code, never.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_a_request_of_many_prompts_enters_whole(llm: AsyncLLM) -> None:
    response, _ = send(llm, ServerLimits(max_queue=1), asking(prompt=["a", "b", "c"], max_tokens=2))
    assert len(response.json()["choices"]) == 3


# Deadlines


def test_who_waits_too_long_gets_503_and_who_runs_is_left_alone(llm: AsyncLLM) -> None:
    long = asking(max_tokens=1500)
    first, second, _ = send(llm, ServerLimits(queue_timeout_s=0.05), long, long)

    assert sorted([first.status_code, second.status_code]) == [200, 503]
    late = first if first.status_code == 503 else second
    assert late.json()["error"]["code"] == "queue_timeout"
    assert int(late.headers["retry-after"]) >= 1


def test_who_takes_too_long_gets_504(llm: AsyncLLM) -> None:
    slow, streamed, _ = send(
        llm,
        ServerLimits(),
        asking({"X-Request-Timeout": "0.05"}, max_tokens=1500),
        asking({"X-Request-Timeout": "0.05"}, max_tokens=1500, stream=True),
    )
    assert (slow.status_code, slow.json()["error"]["code"]) == (504, "request_timeout")
    assert streamed.status_code == 200
    assert '"code": "request_timeout"' in streamed.text.strip().splitlines()[-1]


def test_an_answer_that_nobody_reads_is_dropped(llm: AsyncLLM) -> None:
    async def ignore() -> None:
        sampling = SamplingParams(max_tokens=1500, ignore_eos=True)
        with await llm.start([[1]], sampling, max_unread=20) as stream:
            while llm.engine.stats().num_running or not stream.has_begun:
                await asyncio.sleep(0.01)
            with pytest.raises(Unread, match="20 pieces"):
                await anext(stream)

    before = llm.engine.stats().generated_tokens
    asyncio.run(ignore())
    assert llm.engine.stats().generated_tokens - before < 1500
