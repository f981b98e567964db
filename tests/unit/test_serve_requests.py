"""Bodies become requests and sampling, or errors that name the field; no engine is needed."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request
from tests.support.tiny_model import VOCAB_SIZE, write_byte_tokenizer

from elbowroom.errors import RequestError
from elbowroom.models.tokenizer import Tokenizer
from elbowroom.serve.body import parse_body, until_disconnect
from elbowroom.serve.errors import BodyTooLarge, InvalidField, error_object
from elbowroom.serve.limits import ServerLimits
from elbowroom.serve.open_requests import HoldRequests, OpenRequests
from elbowroom.serve.requests import ChatRequest, CompletionRequest
from elbowroom.serve.sampling import chat_sampling, completion_sampling


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(directory)
    return Tokenizer.from_directory(directory)


def request_of(*chunks: bytes, headers: dict[str, str] | None = None) -> Request:
    messages = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks[:-1]]
    messages.append({"type": "http.request", "body": chunks[-1], "more_body": False})

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    raw = [(key.encode(), value.encode()) for key, value in (headers or {}).items()]
    return Request({"type": "http", "method": "POST", "path": "/", "headers": raw}, receive)


def parse(body: Any, schema: type = CompletionRequest, limit: int = 10_000) -> Any:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return asyncio.run(parse_body(request_of(raw), schema, ServerLimits(max_body_bytes=limit)))


def test_prompts_of_all_four_shapes_become_lists() -> None:
    assert parse({"prompt": "a"}).prompts == ["a"]
    assert parse({"prompt": ["a", "b"]}).prompts == ["a", "b"]
    assert parse({"prompt": [1, 2]}).prompts == [[1, 2]]
    assert parse({"prompt": [[1], [2, 3]]}).prompts == [[1], [2, 3]]


@pytest.mark.parametrize("prompt", ["", [], [""], [[]], ["a", ""], ["a", 1], [1, [2]], [1.5], [True], None, {}, 7])
def test_a_prompt_that_is_empty_or_mixed_is_refused_by_name(prompt: object) -> None:
    with pytest.raises(InvalidField) as caught:
        parse({"prompt": prompt})

    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "0.5"),
        ("temperature", True),
        ("max_tokens", 1.5),
        ("max_tokens", "7"),
        ("n", True),
        ("stop", 5),
        ("stop", [5]),
        ("stream", "yes"),
        ("stream_options", []),
        ("logit_bias", {"1": "x"}),
        ("logit_bias", [1]),
        ("seed", 1.25),
        ("model", 3),
        ("echo", 1),
        ("stop_token_ids", ["a"]),
    ],
)
def test_a_field_of_another_type_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InvalidField) as caught:
        parse({"prompt": "a", field: value})

    assert caught.value.param.split(".")[0] == field


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"null",
        b"\xff\xfe",
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "unknown": -Infinity}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": ' + b"[" * 2000 + b"]" * 2000 + b"}",
        b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_no_json_object_with_finite_numbers_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        parse(body)

    assert caught.value.http_status == 400


def test_null_means_default_and_unknown_fields_are_ignored(tokenizer: Tokenizer) -> None:
    body = parse({"prompt": "a", "temperature": None, "stop": None, "n": None, "logit_bias": None, "brand_new": {}})

    sampling = completion_sampling(body, tokenizer, VOCAB_SIZE)

    assert (sampling.temperature, sampling.n, sampling.stop, sampling.max_tokens) == (1.0, 1, (), None)


def test_every_sampling_field_arrives(tokenizer: Tokenizer) -> None:
    fields = {
        "n": 2,
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 0.25,
        "frequency_penalty": -0.25,
        "repetition_penalty": 1.5,
        "seed": 11,
        "ignore_eos": True,
        "logprobs": 3,
    }
    body = parse({"prompt": "a", "stop": "x", "stop_token_ids": [4], "logit_bias": {"5": -100}, **fields})

    sampling = completion_sampling(body, tokenizer, VOCAB_SIZE)

    assert {name: getattr(sampling, name) for name in fields} == fields
    assert (sampling.stop, sampling.stop_token_ids, dict(sampling.logit_bias)) == (("x",), (4,), {5: -100.0})


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 100_000}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -3}, "max_tokens"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"logprobs": 21}, "logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"suffix": "x"}, "suffix"),
        ({"n": 2, "best_of": 3}, "best_of"),
        ({"best_of": 2}, "best_of"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"seed": 2**70}, "seed"),
    ],
)
def test_what_is_out_of_range_or_not_built_is_refused_by_name(
    tokenizer: Tokenizer, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(RequestError) as caught:
        completion_sampling(parse({"prompt": "a", **fields}), tokenizer, VOCAB_SIZE)

    assert error_object(caught.value)["error"]["param"] == param


def test_ids_outside_the_vocabulary_are_refused(tokenizer: Tokenizer) -> None:
    for fields in ({"logit_bias": {str(VOCAB_SIZE): 1}}, {"stop_token_ids": [-1]}):
        with pytest.raises(InvalidField, match="token id") as caught:
            completion_sampling(parse({"prompt": "a", **fields}), tokenizer, VOCAB_SIZE)
        assert [caught.value.param] == list(fields)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_chat_refuses_what_is_not_built(tokenizer: Tokenizer, fields: dict[str, Any], param: str) -> None:
    body = parse({"messages": [{"role": "user", "content": "a"}], **fields}, ChatRequest)
    with pytest.raises(InvalidField) as caught:
        chat_sampling(body, tokenizer, VOCAB_SIZE)

    assert caught.value.param == param


def test_chat_takes_text_format_no_tools_and_the_newer_limit(tokenizer: Tokenizer) -> None:
    fields = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "max_completion_tokens": 3}
    body = parse({"messages": [{"role": "user", "content": "a"}], "max_tokens": 9, **fields}, ChatRequest)

    assert chat_sampling(body, tokenizer, VOCAB_SIZE).max_tokens == 3


@pytest.mark.parametrize(
    "messages",
    [None, [], "hi", [1], [{"content": "a"}], [{"role": "wizard", "content": "a"}], [{"role": "user", "content": 5}]],
)
def test_malformed_messages_are_refused_by_name(messages: object) -> None:
    with pytest.raises(InvalidField) as caught:
        parse({"messages": messages}, ChatRequest)

    assert caught.value.param.startswith("messages")


def test_a_body_above_the_limit_is_refused_declared_or_not() -> None:
    declared = request_of(b"", headers={"content-length": "11"})
    streamed = request_of(b"123456", b"123456", b"")
    for request in (declared, streamed):
        with pytest.raises(BodyTooLarge):
            asyncio.run(parse_body(request, CompletionRequest, ServerLimits(max_body_bytes=10)))


def test_work_is_cancelled_when_the_client_hangs_up() -> None:
    ended = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    with pytest.raises(ClientDisconnect):
        asyncio.run(until_disconnect(receive, work()))
    assert ended == [True]


def test_unexpected_errors_do_not_show_their_message() -> None:
    shown = error_object(ValueError("secret path"))["error"]

    assert "secret" not in str(shown)
    assert shown["type"] == "server_error"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_body_bytes": 0}, "^max_body_bytes must be at least 1, not 0"),
        ({"drain_timeout_s": -1}, "^--drain-timeout .* at least 0, not -1"),
        ({"max_queue": 0}, "^--max-queue .*max_queue.* at least 1, not 0"),
        ({"max_queue_per_tenant": 0}, "^--max-queue-per-tenant "),
        ({"queue_timeout_s": 0}, "^--queue-timeout .* above 0, not 0"),
        ({"request_timeout_s": float("nan")}, "^--request-timeout .* above 0, not nan"),
    ],
)
def test_limits_that_make_no_sense_are_refused_by_the_names_of_their_options(
    fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(RequestError, match=words) as refusal:
        ServerLimits(**fields)
    assert (refusal.value.hint == "leave it out for no limit") == bool(
        {"queue_timeout_s", "request_timeout_s"} & fields.keys()
    )


@pytest.mark.parametrize("endless", [False, True])
def test_a_refused_request_is_read_before_it_is_answered(endless: bool) -> None:
    """Unread bytes would reset the connection and the answer with it; who sends without end is not heard to it."""
    requests, heard = OpenRequests(most=1), []
    requests.is_draining = True
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}

    async def receive() -> dict[str, Any]:
        heard.append("part")
        return {"type": "http.request", "body": b"x" * 65536, "more_body": endless or heard.count("part") < 3}

    async def send(message: dict[str, Any]) -> None:
        heard.append(str(message.get("status", "body")))

    asyncio.run(HoldRequests(None, requests)(scope, receive, send))  # type: ignore[arg-type]
    assert heard == ["part"] * (129 if endless else 3) + ["503", "body"]
    heard.clear()
    scope["headers"] = [(b"expect", b"100-continue")]
    asyncio.run(HoldRequests(None, requests)(scope, receive, send))  # type: ignore[arg-type]
    assert heard == ["503", "body"]
