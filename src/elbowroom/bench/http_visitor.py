"""Visitor: one client of an HTTP server, well-behaved or not; what the benchmark ``http`` sends in crowds."""

from __future__ import annotations

import json
import random
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

HANG_S = 30.0
"""A visit that takes longer, or hears nothing for so long, counts as hung."""
WORDS = ("a", "list", "of", "words", "that", "make", "this", "prompt", "about", "memory", "and", "its", "pages")
SHARED = "Every second prompt begins with these words, so that prefixes are shared and evicted. " * 8
MALFORMED: tuple[bytes, ...] = (
    b"",
    b"{",
    b"[]",
    b'{"prompt": 5}',
    b'{"prompt": ""}',
    b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": "a", "temperature": "hot"}',
    b'{"prompt": "a", "max_tokens": 0}',
    b'{"prompt": "a", "max_tokens": 1000000000}',
    b'{"prompt": [-1], "messages": [{"role": "user"}], "n": -1}',
    b'{"prompt": "a", "messages": [], "stop": [""]}',
    b'{"prompt": "a", "messages": "hi", "logit_bias": {"x": 1}}',
    b'{"prompt": "a", "messages": [{"role": "user", "content": "a"}], "model": "no-such-model"}',
)
KINDS = {
    "completion": 20,
    "completion stream": 20,
    "chat": 15,
    "chat stream": 15,
    "cancel": 10,
    "hang up": 10,
    "malformed": 10,
}
"""What visitors do, and how often (weights)."""


@dataclass(slots=True)
class Outcome:
    """What one visit saw; ``fault`` says what was wrong with it."""

    kind: str
    fault: str | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None


@dataclass(slots=True)
class Visitor:
    """One client: visits the server in the ways of ``KINDS``."""

    url: str
    model: str
    api_key: str = "none"
    waited_s: float = 0.0
    """Seconds of a visit in which it was told to wait."""
    client: openai.OpenAI = field(init=False)

    def __post_init__(self) -> None:
        """Make the official client, without the retries that would hide faults."""
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.api_key, max_retries=0, timeout=HANG_S)

    def visit(self, kind: str, seed: int) -> Outcome:
        """Make one visit and return what was seen."""
        outcome, rng, started = Outcome(kind), random.Random(seed), time.perf_counter()
        try:
            self._visits()[kind](rng, outcome)
        except openai.APITimeoutError:
            outcome.fault = f"no byte for {HANG_S:.0f} s"
        except openai.APIStatusError as error:
            outcome.fault = f"HTTP {error.status_code}"
        except (openai.APIError, httpx.HTTPError) as error:
            outcome.fault = f"connection: {type(error).__name__}"
        except (ValueError, LookupError, TypeError, AttributeError) as error:  # whatever a check stumbles over
            outcome.fault = f"schema: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if outcome.fault is None and time.perf_counter() - started - self.waited_s > HANG_S:
            outcome.fault = f"took over {HANG_S:.0f} s"
        return outcome

    def _visits(self) -> dict[str, Callable[[random.Random, Outcome], None]]:
        return {
            "completion": lambda rng, outcome: self._whole(self._completion(rng), outcome),
            "completion stream": lambda rng, outcome: self._stream(self._completion(rng), outcome),
            "chat": lambda rng, outcome: self._whole(self._chat(rng), outcome),
            "chat stream": lambda rng, outcome: self._stream(self._chat(rng), outcome),
            "cancel": self._cancel,
            "hang up": self._hang_up,
            "malformed": self._malformed,
        }

    def _completion(self, rng: random.Random) -> dict[str, Any]:
        made: dict[str, Any] = {"model": self.model, "prompt": _text(rng, 300), "max_tokens": rng.randint(1, 64)}
        return made | {"seed": rng.randint(0, 99), "n": rng.choice([1, 1, 1, 2]), "logprobs": rng.choice([None, 2])}

    def _chat(self, rng: random.Random) -> dict[str, Any]:
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": _text(rng, 200)}]
        return {"model": self.model, "messages": messages, "max_tokens": rng.randint(1, 64), "seed": rng.randint(0, 99)}

    def _create(self, fields: dict[str, Any], **more: Any) -> Any:
        route = self.client.chat.completions if "messages" in fields else self.client.completions
        return route.create(**fields, **more)

    def _whole(self, fields: dict[str, Any], outcome: Outcome) -> None:
        started = time.perf_counter()
        answer = self._create(fields)
        outcome.e2e_s = time.perf_counter() - started
        _check(answer, ChatCompletion if "messages" in fields else Completion)
        _require(len(answer.choices) == fields.get("n", 1), "another number of choices than asked for")
        _require(all(choice.finish_reason in ("stop", "length") for choice in answer.choices), "finish_reason")
        _check_usage(answer.usage, fields)

    def _stream(self, fields: dict[str, Any], outcome: Outcome) -> None:
        started = time.perf_counter()
        usage, finished, arrivals = None, 0, []
        for chunk in self._create(fields, stream=True, stream_options={"include_usage": True}):
            _check(chunk, ChatCompletionChunk if "messages" in fields else Completion, is_chunk=True)
            usage = chunk.usage or usage
            for choice in chunk.choices:
                finished += choice.finish_reason is not None
                if getattr(choice, "text", None) or getattr(getattr(choice, "delta", None), "content", None):
                    arrivals.append(time.perf_counter())
        outcome.e2e_s = time.perf_counter() - started
        _require(finished == fields.get("n", 1), "not every choice was finished")
        _check_usage(usage, fields)
        if arrivals:
            outcome.ttft_s = arrivals[0] - started
        if len(arrivals) > 1 and fields.get("n", 1) == 1:
            outcome.tpot_s = (arrivals[-1] - arrivals[0]) / (len(arrivals) - 1)

    def _cancel(self, rng: random.Random, _outcome: Outcome) -> None:
        fields = (self._chat(rng) if rng.random() < 0.5 else self._completion(rng)) | {"max_tokens": 1000}
        with self._create(fields, stream=True) as stream:
            for count, _ in enumerate(stream):
                if count >= rng.randint(0, 20):
                    break

    def _hang_up(self, rng: random.Random, _outcome: Outcome) -> None:
        body = json.dumps(self._completion(rng) | {"max_tokens": 1000, "stream": rng.random() < 0.5}).encode()
        host, port = self.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=HANG_S) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {self.api_key}\r\n"
            sent = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
            connection.sendall(sent[: rng.randint(1, len(sent))] if rng.random() < 0.3 else sent)
            time.sleep(rng.uniform(0.0, 0.5))

    def _malformed(self, rng: random.Random, outcome: Outcome) -> None:
        route = rng.choice(["completions", "chat/completions"])
        answer = self._post(f"{self.url}/v1/{route}", rng.choice(MALFORMED))
        if not 400 <= answer.status_code < 500:
            outcome.fault = f"HTTP {answer.status_code} for a malformed body"
            return
        _require(set(answer.json()["error"]) == {"message", "type", "param", "code"}, "an error of another shape")

    def _post(self, url: str, body: bytes) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.api_key}"}
        return httpx.post(url, content=body, headers=headers, timeout=HANG_S)


class SchemaError(ValueError):
    """An answer is not what the API promises."""


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise SchemaError(what)


def _check(answer: BaseModel, schema: type[BaseModel], is_chunk: bool = False) -> None:
    values = answer.model_dump(exclude_unset=True, warnings=False)
    for choice in values["choices"]:
        # OpenAI sends null in all chunks but the last; its type of completions knows only whole ones.
        if is_chunk and choice["finish_reason"] is None and schema is Completion:
            choice["finish_reason"] = "stop"
    schema.model_validate(values)


def _check_usage(usage: Any, fields: dict[str, Any]) -> None:
    _require(usage is not None, "no usage")
    _require(usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, "usage does not add up")
    _require(0 < usage.completion_tokens <= fields["max_tokens"] * fields.get("n", 1), "more tokens than asked for")


def _text(rng: random.Random, most_words: int) -> str:
    return rng.choice(["", SHARED]) + " ".join(rng.choices(WORDS, k=rng.randint(1, most_words)))
