"""Prometheus metrics: what the server measures itself. Names follow those of other engines where they exist."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from elbowroom.errors import ElbowroomError

MOST_TENANTS = 64
"""Tenants that are counted apart."""

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)


class Timed(Protocol):
    """One generated text and when its tokens came."""

    num_tokens: int
    num_reasoning_tokens: int
    first_s: float
    visible_s: float
    last_s: float
    finish_reason: str | None


class ServerMetrics:
    """Counters and histograms of one app, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "elbowroom_http_requests", "HTTP requests by route and status.", ["route", "code"], registry=self.registry
        )
        self._by_tenant = Counter(
            "elbowroom_tenant_requests",
            "Requests by tenant and outcome.",
            ["tenant", "outcome"],
            registry=self.registry,
        )
        self._tenant_tokens = Counter(
            "elbowroom_tenant_tokens", "Tokens of ended requests.", ["tenant", "kind"], registry=self.registry
        )
        self._tenants: set[str] = set()
        self._ttft = self._histogram("time_to_first_token", "Seconds from request to first token.", _SECONDS)
        self._ttfvt = self._histogram(
            "time_to_first_visible_token", "Seconds from request to the first text that is no thinking.", _SECONDS
        )
        self._reasoning = Counter(
            "elbowroom_reasoning_tokens",
            "Generated tokens that were thinking.",
            ["model"],
            registry=self.registry,
        )
        self._tpot = self._histogram("time_per_output_token", "Mean seconds between tokens of a text.", _TOKEN_SECONDS)
        self._e2e = self._histogram("e2e_request_latency", "Seconds from request to last token.", _SECONDS)

    def observe(self, model: str, started: float, texts: Sequence[Timed]) -> None:
        """Record an ended request.

        That is its first token and first visible text, the pace of each text and, if none was aborted, the last token.
        """
        begun = [text for text in texts if text.num_tokens]
        if begun:
            self._ttft.labels(model).observe(min(text.first_s for text in begun) - started)
        visible = [text.visible_s for text in begun if text.visible_s]
        if visible:
            self._ttfvt.labels(model).observe(min(visible) - started)
        self._reasoning.labels(model).inc(sum(text.num_reasoning_tokens for text in begun))
        for text in begun:
            if text.num_tokens > 1:
                self._tpot.labels(model).observe((text.last_s - text.first_s) / (text.num_tokens - 1))
        if begun and all(text.finish_reason is not None for text in texts):
            self._e2e.labels(model).observe(max(text.last_s for text in begun) - started)

    def tenant(self, name: str) -> TenantMetrics:
        """Return the counters of a tenant; those who come after the first 64 share some, under ``(other)``."""
        if len(self._tenants) < MOST_TENANTS:
            self._tenants.add(name)
        label = (name or "(none)") if name in self._tenants else "(other)"
        return TenantMetrics(label, self._by_tenant, self._tenant_tokens)

    def count_request(self, route: str, status: int) -> None:
        """Count an HTTP response."""
        self._requests.labels(route, str(status)).inc()

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"elbowroom_{name}_seconds", text, ["model"], buckets=buckets, registry=self.registry)


@dataclass(frozen=True, slots=True)
class TenantMetrics:
    """Counters of one tenant."""

    label: str
    requests: Counter
    tokens: Counter

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """Count a request that is refused inside the block."""
        try:
            yield
        except ElbowroomError:
            self.requests.labels(self.label, "refused").inc()
            raise

    def ended(self, num_prompt_tokens: int, texts: Sequence[Timed]) -> None:
        """Count a request that has ended, finished or not."""
        is_whole = all(text.finish_reason is not None for text in texts)
        self.requests.labels(self.label, "finished" if is_whole else "dropped").inc()
        self.tokens.labels(self.label, "prompt").inc(num_prompt_tokens)
        self.tokens.labels(self.label, "generated").inc(sum(text.num_tokens for text in texts))


class CountRequests:
    """ASGI middleware that counts responses by route."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and count the status that comes back."""

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "unmatched")
                self._metrics.count_request(route, message["status"])
            await send(message)

        await self._app(scope, receive, counted if scope["type"] == "http" else send)
