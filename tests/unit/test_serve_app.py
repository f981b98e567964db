"""Routes over a tiny engine, through ASGI without a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from tests.support.http import assert_no_leak, parse_metrics, tiny_llm, wait_idle
from tests.support.tiny_model import VOCAB_SIZE

from elbowroom import __version__
from elbowroom.engine.async_llm import AsyncLLM
from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.errors import ElbowroomError, EngineClosed
from elbowroom.serve import ServerLimits, create_app
from elbowroom.serve.sse import EventStream

USER = [{"role": "user", "content": "Hi"}]
Call = Callable[..., httpx.Response]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AsyncLLM]:
    made = tiny_llm(tmp_path_factory.mktemp("tiny"))
    yield made
    assert_no_leak(made)
    made.engine.close()


def caller(llm: AsyncLLM, limits: ServerLimits | None = None) -> Call:
    app = create_app({"tiny": llm}, limits)

    def call(method: str, path: str, **options: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **options)

        return asyncio.run(send())

    return call


@pytest.fixture(scope="module")
def call(llm: AsyncLLM) -> Call:
    return caller(llm)


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert response.headers["content-type"] == "application/json"
    error: dict[str, Any] = body["error"]
    return error


def test_a_completion_has_text_usage_and_the_shape_of_openai(call: Call) -> None:
    fields = {"model": "tiny", "prompt": "ab", "max_tokens": 5, "temperature": 0}

    answer = Completion.model_validate(call("POST", "/v1/completions", json=fields).json())

    assert answer.object == "text_completion"
    assert len(answer.choices[0].text) == 5
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (2, 5, 7)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_a_request_asks_for_a_plan_of_the_server(tmp_path: Path) -> None:
    llm = tiny_llm(tmp_path, kv_choices=["bfp(n=16)"])
    try:
        call, fields = caller(llm), {"prompt": "abc " * 60, "max_tokens": 30, "temperature": 0}
        usual, chosen = (
            call("POST", "/v1/completions", json=fields | extra).json() for extra in ({}, {"kv": " bfp( n=16 )"})
        )
        assert usual["choices"][0]["text"] != chosen["choices"][0]["text"]
        assert "kv_relieved" not in chosen["usage"]
        assert call("POST", "/v1/chat/completions", json={"messages": USER, "max_tokens": 2, "kv": "plain"}).is_success
        for kv, words in (("int8", "not one of the plans"), ("nothing", "unknown"), ("plain(", "cannot read")):
            error = error_of(call("POST", "/v1/completions", json=fields | {"kv": kv}))
            assert (error["code"], error["param"]) == ("invalid_request", "kv")
            assert words in error["message"]
    finally:
        assert_no_leak(llm)
        llm.engine.close()


def test_usage_says_who_went_over_to_the_relief_plan(tmp_path: Path) -> None:
    llm = tiny_llm(tmp_path, kv_relief="int8", context=2048, prefix_cache=False)
    try:
        held = llm.engine.parts.ledger.total("host") - llm.engine.parts.ledger.held("kv", "host")
        llm.engine.set_budget(held + 5 * 2**19)
        prompts = [chr(97 + i) * 200 for i in range(6)]
        fields = {"prompt": prompts, "max_tokens": 1200, "temperature": 0, "ignore_eos": True}
        answer = caller(llm)("POST", "/v1/completions", json=fields).json()
        assert answer["usage"]["completion_tokens"] == 7200
        assert answer["usage"]["kv_relieved"] is True
        assert llm.engine.stats().reliefs > 0
    finally:
        assert_no_leak(llm)
        llm.engine.close()


def test_choices_are_numbered_prompt_by_prompt(call: Call) -> None:
    fields = {"prompt": ["ab", "xyz"], "n": 2, "max_tokens": 3, "temperature": 0}

    answer = call("POST", "/v1/completions", json=fields).json()

    texts = [choice["text"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    assert answer["usage"]["prompt_tokens"] == 5
    assert answer["usage"]["completion_tokens"] == 12


def test_token_prompts_equal_their_text(call: Call) -> None:
    text = call("POST", "/v1/completions", json={"prompt": "ab", "max_tokens": 4, "temperature": 0}).json()
    ids = call("POST", "/v1/completions", json={"prompt": [97, 98], "max_tokens": 4, "temperature": 0}).json()

    assert text["choices"] == ids["choices"]


def test_echo_repeats_the_prompt_also_in_a_stream(call: Call) -> None:
    fields = {"prompt": "ab", "max_tokens": 3, "temperature": 0, "echo": True}
    whole = call("POST", "/v1/completions", json=fields).json()["choices"][0]["text"]
    events = events_of(call("POST", "/v1/completions", json={**fields, "stream": True}))

    assert whole.startswith("ab")
    assert "".join(event["choices"][0]["text"] for event in events) == whole


def test_an_omitted_limit_means_the_rest_of_the_context(call: Call) -> None:
    fields = {"prompt": "a" * 500, "temperature": 0, "ignore_eos": True}

    answer = call("POST", "/v1/completions", json=fields).json()

    assert answer["usage"]["total_tokens"] == 512
    assert answer["choices"][0]["finish_reason"] == "length"


def test_logprobs_of_completions_line_up_with_the_text(call: Call) -> None:
    fields = {"prompt": "ab", "max_tokens": 6, "temperature": 0, "logprobs": 3}

    choice = call("POST", "/v1/completions", json=fields).json()["choices"][0]

    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert logprobs["text_offset"] == [0, 1, 2, 3, 4, 5]
    for chosen, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top[chosen] == logprob == max(top.values())
        assert len(top) == 3


def test_logprobs_of_chat_have_bytes_and_the_asked_number(call: Call) -> None:
    fields = {"messages": USER, "max_tokens": 4, "temperature": 0, "logprobs": True, "top_logprobs": 2}

    answer = ChatCompletion.model_validate(call("POST", "/v1/chat/completions", json=fields).json())

    choice = answer.choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert "".join(entry.token for entry in choice.logprobs.content) == choice.message.content
    for entry in choice.logprobs.content:
        assert bytes(entry.bytes or b"").decode() == entry.token
        assert len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].logprob == entry.logprob <= 0


def test_a_chat_answers_as_assistant(call: Call) -> None:
    answer = call("POST", "/v1/chat/completions", json={"messages": USER, "max_tokens": 4}).json()

    checked = ChatCompletion.model_validate(answer)
    assert checked.choices[0].message.role == "assistant"
    assert answer["choices"][0]["logprobs"] is None


def test_parts_and_developer_are_text_and_system(call: Call) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    plain = [{"role": "system", "content": "S"}, {"role": "user", "content": "a\nb"}]
    other = [{"role": "developer", "content": "S"}, {"role": "user", "content": parts}]
    fields = {"max_tokens": 4, "temperature": 0}
    answers = [
        call("POST", "/v1/chat/completions", json={"messages": each, **fields}).json() for each in (plain, other)
    ]

    assert answers[0]["choices"] == answers[1]["choices"]
    assert answers[0]["usage"]["prompt_tokens"] == answers[1]["usage"]["prompt_tokens"]


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_stream_ends_with_usage_only_when_asked(call: Call) -> None:
    fields = {"messages": USER, "max_tokens": 4, "temperature": 0, "stream": True}

    plain = events_of(call("POST", "/v1/chat/completions", json=fields))
    asked = events_of(call("POST", "/v1/chat/completions", json={**fields, "stream_options": {"include_usage": True}}))

    for event in (*plain, *asked):
        ChatCompletionChunk.model_validate(event)
    assert all("usage" not in event for event in plain)
    assert [event["usage"] for event in asked[:-1]] == [None] * (len(asked) - 1)
    assert asked[-1]["choices"] == []
    assert asked[-1]["usage"]["completion_tokens"] == 4
    assert plain[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert len({event["id"] for event in plain}) == 1


def test_models_are_listed_and_described(call: Call) -> None:
    listed = call("GET", "/v1/models").json()

    assert [Model.model_validate(card).id for card in listed["data"]] == ["tiny"]
    assert call("GET", "/v1/models/tiny").json()["max_model_len"] == 512
    missing = call("GET", "/v1/models/some/other")
    assert missing.status_code == 404
    assert error_of(missing)["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"prompt": "a", "model": "gpt-5"}, 404, "model_not_found"),
        ({"prompt": ""}, 400, "invalid_request"),
        ({}, 400, "invalid_request"),
        ({"prompt": "a", "max_tokens": 0}, 400, "invalid_request"),
        ({"prompt": "a", "max_tokens": 512}, 400, "context_length_exceeded"),
        ({"prompt": "a", "max_tokens": 10**18}, 400, "context_length_exceeded"),
        ({"prompt": "a" * 512}, 400, "context_length_exceeded"),
        ({"prompt": "a" * 5000, "stream": True}, 400, "context_length_exceeded"),
        ({"prompt": [VOCAB_SIZE]}, 400, "invalid_request"),
        ({"prompt": [-1]}, 400, "invalid_request"),
        ({"prompt": [10**30]}, 400, "invalid_request"),
        ({"prompt": ["a"] * 65, "n": 2}, 400, "invalid_request"),
        ({"prompt": ["a", "a" * 600], "max_tokens": 2}, 400, "context_length_exceeded"),
    ],
)
def test_bad_completions_get_the_right_error(call: Call, fields: dict[str, Any], status: int, code: str) -> None:
    response = call("POST", "/v1/completions", json=fields)

    error = error_of(response)
    assert (response.status_code, error["code"]) == (status, code)
    if status == 404:
        assert "tiny" in error["message"]


def test_prompt_ids_outside_the_vocabulary_are_refused_by_name(call: Call) -> None:
    for prompt in ([VOCAB_SIZE], [[1], [-1]]):
        assert error_of(call("POST", "/v1/completions", json={"prompt": prompt}))["param"] == "prompt"


def test_the_hint_for_a_context_that_is_exceeded_is_one_that_can_be_followed(call: Call) -> None:
    for length, hint in ((500, "lower max_tokens to 12"), (512, "shorten the prompt to 511"), (600, "to 511 tokens")):
        error = error_of(call("POST", "/v1/completions", json={"prompt": [1] * length, "max_tokens": 20}))
        assert hint in error["message"]


def test_other_errors_keep_the_format(call: Call) -> None:
    assert error_of(call("GET", "/nowhere"))["code"] == "not_found"
    wrong = call("GET", "/v1/completions")
    assert (wrong.status_code, error_of(wrong)["code"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"
    assert call("POST", "/v1/completions", content=b"{]").status_code == 400
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    assert "image_url" in error_of(call("POST", "/v1/chat/completions", json={"messages": image}))["message"]
    reserved = {"messages": USER, "chat_template_kwargs": {"messages": []}}
    assert error_of(call("POST", "/v1/chat/completions", json=reserved))["param"] == "chat_template_kwargs"


def test_a_request_that_can_never_fit_is_refused_with_the_numbers(tmp_path_factory: pytest.TempPathFactory) -> None:
    llm = tiny_llm(tmp_path_factory.mktemp("long"), memory="24MiB", context=32768)
    try:
        response = caller(llm)("POST", "/v1/completions", json={"prompt": "a" * 20_000, "max_tokens": 10_000})
    finally:
        llm.engine.close()

    error = error_of(response)
    assert (response.status_code, error["code"]) == (400, "request_too_large")
    assert "MiB" in error["message"]


def test_a_large_body_is_refused(llm: AsyncLLM) -> None:
    call = caller(llm, ServerLimits(max_body_bytes=100))

    response = call("POST", "/v1/completions", json={"prompt": "a" * 200})

    assert (response.status_code, error_of(response)["code"]) == (413, "request_body_too_large")


def test_too_many_open_requests_are_refused_before_they_are_read(llm: AsyncLLM) -> None:
    app = create_app({"tiny": llm}, ServerLimits(max_open_requests=1))

    async def race() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            fields = {"prompt": "a", "max_tokens": 40, "ignore_eos": True}
            return await asyncio.gather(*(client.post("/v1/completions", json=fields) for _ in range(3)))

    responses = sorted(asyncio.run(race()), key=lambda each: each.status_code)

    assert [each.status_code for each in responses] == [200, 429, 429]
    assert responses[1].headers["retry-after"] == "1"
    assert error_of(responses[1])["type"] == "rate_limit_error"


def test_an_api_key_guards_v1_only(llm: AsyncLLM) -> None:
    call = caller(llm, ServerLimits(api_key="s3cret"))

    assert call("GET", "/health").status_code == 200
    for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}):
        response = call("GET", "/v1/models", headers=given)
        assert (response.status_code, error_of(response)["code"]) == (401, "invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer"
    assert call("GET", "/v1/models", headers={"Authorization": "Bearer s3cret"}).status_code == 200


def test_status_routes(call: Call, llm: AsyncLLM) -> None:
    health = call("GET", "/health").json()

    assert health["status"] == "ok"
    assert health["models"]["tiny"]["budget_bytes"] == 48 * 2**20
    assert 0 < health["models"]["tiny"]["used_bytes"] <= 48 * 2**20
    assert call("GET", "/version").json() == {"version": __version__}
    assert call("GET", "/openapi.json").status_code == 200


def test_the_schema_says_what_bodies_and_answers_are_and_that_a_key_is_needed(call: Call, llm: AsyncLLM) -> None:
    open_paths = call("GET", "/openapi.json").json()["paths"]
    guarded = caller(llm, ServerLimits(api_key="s3cret", debug_routes=True))("GET", "/openapi.json").json()

    chat = open_paths["/v1/chat/completions"]["post"]
    fields = chat["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert (fields["temperature"]["minimum"], fields["temperature"]["maximum"]) == (0.0, 100.0)
    assert fields["max_tokens"]["minimum"] == 1
    assert (fields["top_logprobs"]["minimum"], fields["top_logprobs"]["maximum"]) == (0, 20)
    assert (fields["model"]["enum"], fields["priority"]["enum"]) == (["tiny", None], [0, None])
    assert all(fields[name]["type"] == "null" for name in ("thinking_token_budget", "admission", "deadline_s"))
    allowing = caller(llm, ServerLimits(allow_priority=True, allow_admission=True))("GET", "/openapi.json").json()
    taken = allowing["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"conservative", "past_future", None} <= set(taken["properties"]["admission"]["enum"])
    assert taken["properties"]["priority"]["maximum"] == 2**31 - 1
    assert taken["properties"]["deadline_s"]["type"] == "null", "the order of this engine heeds none"
    assert fields["tools"]["maxItems"] == 0
    answer = chat["responses"]["200"]["content"]
    assert set(answer) == {"application/json", "text/event-stream"}
    assert "choices" in answer["application/json"]["schema"]["required"]
    assert "$ref" not in str(chat)
    assert open_paths["/v1/models/{name}"]["get"]["parameters"][0]["schema"]["examples"] == ["tiny"]
    assert "security" not in chat
    for path, method in (("/v1/models", "get"), ("/v1/chat/completions", "post"), ("/debug/reset", "post")):
        assert guarded["paths"][path][method]["security"] == [{"HTTPBearer": []}]
        assert "4XX" in guarded["paths"][path][method]["responses"]
    assert "security" not in guarded["paths"]["/health"]["get"]


def test_metrics_count_tokens_bytes_and_requests(llm: AsyncLLM) -> None:
    call = caller(llm)
    before = parse_metrics(call("GET", "/metrics").text)
    prompt = "m" * 130
    for _ in range(2):
        call("POST", "/v1/completions", json={"prompt": prompt, "max_tokens": 3, "ignore_eos": True})
    call("GET", "/nowhere")
    wait_idle(llm)

    after = parse_metrics(call("GET", "/metrics").text)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert grown("elbowroom_prompt_tokens_total{model=tiny}") == 260
    assert grown("elbowroom_generation_tokens_total{model=tiny}") == 6
    assert grown("elbowroom_prefix_cache_hits_total{model=tiny}") == 128
    assert grown("elbowroom_requests_finished_total{model=tiny,reason=length}") == 2
    assert grown("elbowroom_http_requests_total{code=200,route=/v1/completions}") == 2
    assert grown("elbowroom_http_requests_total{code=404,route=unmatched}") == 1
    for name in ("time_to_first_token", "time_per_output_token", "e2e_request_latency"):
        assert grown(f"elbowroom_{name}_seconds_count{{model=tiny}}") == 2
    assert after["elbowroom_memory_budget_bytes{model=tiny,tier=host}"] == 48 * 2**20
    assert after["elbowroom_memory_bytes{model=tiny,owner=weights,tier=host}"] > 300_000
    assert after["elbowroom_memory_peak_bytes{model=tiny,owner=kv,tier=host}"] > 0
    assert after["elbowroom_engine_up{model=tiny}"] == 1
    assert after["elbowroom_live_http_requests{model=tiny}"] == 0


def test_a_closed_engine_gives_503_and_bad_health(tmp_path_factory: pytest.TempPathFactory) -> None:
    llm = tiny_llm(tmp_path_factory.mktemp("closed"))
    call = caller(llm)
    llm.engine.close()

    response = call("POST", "/v1/completions", json={"prompt": "a"})

    assert (response.status_code, error_of(response)["code"]) == (503, "engine_closed")
    assert call("GET", "/health").status_code == 503
    assert parse_metrics(call("GET", "/metrics").text)["elbowroom_engine_up{model=tiny}"] == 0


def test_an_unexpected_error_is_a_500_without_its_message(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(llm.tokenizer, "encode", broken)
    response = caller(llm)("POST", "/v1/completions", json={"prompt": "a"})

    assert response.status_code == 500
    assert "secret" not in error_of(response)["message"]


def test_an_error_in_mid_stream_is_the_last_event() -> None:
    sent: list[bytes] = []

    async def events(error: Exception) -> AsyncIterator[bytes]:
        yield b"{}"
        raise error

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    async def receive() -> Any:
        await asyncio.sleep(60)

    async def play(error: Exception) -> None:
        stream = events(error)
        await EventStream(stream, stream)({"type": "http"}, receive, send)  # type: ignore[arg-type]

    for error in (ElbowroomError("no memory"), ZeroDivisionError("secret")):
        sent.clear()
        asyncio.run(play(error))
        text = b"".join(sent).decode()
        assert text.startswith('data: {}\n\ndata: {"error": ')
        assert "[DONE]" not in text
        assert "secret" not in text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_thread_ends_its_readers_and_shows_in_health(tmp_path_factory: pytest.TempPathFactory) -> None:
    llm = tiny_llm(tmp_path_factory.mktemp("dying"), context=8192)
    call = caller(llm)

    def die() -> None:
        raise SystemExit

    async def read() -> None:
        async for _ in llm.stream([1], SamplingParams(ignore_eos=True)):
            llm.engine._commands.put(die)

    with pytest.raises(EngineClosed):
        asyncio.run(read())
    llm.engine._thread.join(10)  # its last words are noted against the test that runs when it ends
    assert call("GET", "/health").json()["models"]["tiny"]["status"] == "dead"
    response = call("POST", "/v1/completions", json={"prompt": "a"})
    assert (response.status_code, error_of(response)["code"]) == (503, "engine_closed")
