"""PatientVisitor: a client that waits when it is told to; what the benchmark ``soak`` sends in crowds."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx
import openai

from elbowroom.bench.http_visitor import HANG_S, Outcome, Visitor

T = TypeVar("T")
MOST_WAIT_S = 10.0
"""Longest single wait; a server that asks for more is asked again sooner."""
GIVE_UP_S = 240.0


@dataclass(slots=True)
class Town:
    """What all visitors share."""

    url: str
    model: str
    keys: list[str]
    """One of each tenant."""
    is_away: threading.Event = field(default_factory=threading.Event)
    """Set while the server ends or starts."""
    is_open: threading.Event = field(default_factory=threading.Event)
    """Cleared while nobody is to come."""
    clients: dict[str, openai.OpenAI] = field(default_factory=dict)
    waits: Counter[str] = field(default_factory=Counter)
    """How often somebody was told to wait, by reason."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        """Make the official clients, one a tenant, without the retries that would hide faults."""
        self.is_open.set()
        for key in self.keys:
            self.clients[key] = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=HANG_S)

    def visit(self, kind: str, seed: int) -> Outcome:
        """Make one visit as one of the tenants."""
        visitor = PatientVisitor(self, seed)
        return visitor.visit(kind, seed)

    def told_to_wait(self, reason: str) -> None:
        """Count a wait."""
        with self.lock:
            self.waits[reason] += 1


class _Refused(httpx.HTTPError):
    """An answer to no official client says that the request is not taken."""

    def __init__(self, response: httpx.Response) -> None:
        super().__init__(f"HTTP {response.status_code}")
        self.response, self.code = response, response.json()["error"]["code"]


class PatientVisitor(Visitor):
    """Comes again after 429, after the 503 of a server that drains, and where nobody listens during a restart.

    A connection that breaks before any answer is such a case only while the server is away: then the request was either
    not accepted, or is among those that the server itself says it cut off.
    """

    def __init__(self, town: Town, seed: int) -> None:
        self._town, self._rng = town, random.Random(seed)
        self.url, self.model, self.waited_s = town.url, town.model, 0.0
        self.api_key = self._rng.choice(town.keys)
        self.client = town.clients[self.api_key]

    def _create(self, fields: dict[str, Any], **more: Any) -> Any:
        create = super()._create
        return self._patiently(lambda: create(fields, **more))

    def _post(self, url: str, body: bytes) -> httpx.Response:
        post = super()._post

        def attempt() -> httpx.Response:
            answer = post(url, body)
            if answer.status_code in (429, 503):
                raise _Refused(answer)
            return answer

        return self._patiently(attempt)

    def _hang_up(self, rng: random.Random, outcome: Outcome) -> None:
        self._town.is_open.wait()
        with contextlib.suppress(OSError):  # nobody listens, or the server was the first to hang up
            super()._hang_up(rng, outcome)

    def _patiently(self, attempt: Callable[[], T]) -> T:
        while True:
            started = time.perf_counter()
            self._town.is_open.wait()
            self.waited_s += time.perf_counter() - started
            was_away, started = self._town.is_away.is_set(), time.perf_counter()
            try:
                return attempt()
            except (openai.APIStatusError, _Refused) as error:
                self._wait_as_told(error, started)
            except (openai.APITimeoutError, httpx.TimeoutException):
                raise
            except (openai.APIConnectionError, httpx.TransportError) as error:
                if not (was_away or self._town.is_away.is_set()):
                    raise
                cause = error.__cause__ if isinstance(error, openai.APIConnectionError) else error
                self._wait(f"away: {type(cause).__name__}", started, 0.3)

    def _wait_as_told(self, error: openai.APIStatusError | _Refused, started: float) -> None:
        code, status = str(error.code), error.response.status_code
        if not (status == 429 or (status == 503 and code == "draining")) or self.waited_s > GIVE_UP_S:
            raise error
        self._wait(f"{status} {code}", started, float(error.response.headers["retry-after"]))

    def _wait(self, reason: str, started: float, seconds: float) -> None:
        """Wait as long as told, and a little more, so that not all come back at once."""
        self._town.told_to_wait(reason)
        time.sleep(min(seconds, MOST_WAIT_S) * self._rng.uniform(1.0, 1.5))
        self.waited_s += time.perf_counter() - started
