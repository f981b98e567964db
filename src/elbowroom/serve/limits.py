"""ServerLimits: what the server accepts, how long anything may take, and who may ask."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from elbowroom.errors import RequestError

_COUNTS = "max_body_bytes", "max_open_requests", "max_queue", "max_sequences_per_request", "max_unread"
_SECONDS = "queue_timeout_s", "request_timeout_s", "body_timeout_s", "idle_timeout_s", "stall_timeout_s"
_MAY_BE_NONE = "queue_timeout_s", "request_timeout_s"
_OPTIONS = {
    "max_open_requests": "--max-requests",
    "max_queue": "--max-queue",
    "max_queue_per_tenant": "--max-queue-per-tenant",
    "queue_timeout_s": "--queue-timeout",
    "request_timeout_s": "--request-timeout",
    "drain_timeout_s": "--drain-timeout",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """Limits of one server.

    Raises:
        RequestError: a limit is out of range.
    """

    max_body_bytes: int = 8 * 2**20
    """A larger request body is refused with 413."""
    max_open_requests: int = 512
    """Requests that are being read, wait or are being answered; more are refused with 429 before they are read."""
    max_queue: int = 256
    """Requests to one model that wait to begin; more are refused with 429. Each prompt counts."""
    max_queue_per_tenant: int | None = None
    """The same of one tenant of weight 1; None: no limit of its own."""
    max_sequences_per_request: int = 128
    """Prompts of one request times ``n``."""
    max_unread: int = 4096
    """Pieces of an answer that may wait for a client to read them; then it is dropped."""
    queue_timeout_s: float | None = None
    """A request that has not begun after this is ended with 503; one that is predicted to, refused with 429."""
    request_timeout_s: float | None = None
    """A request that has not ended after this is ended with 504."""
    body_timeout_s: float = 60.0
    """How long the body of a request may take to arrive."""
    idle_timeout_s: int = 75
    """How long a connection may take to send the head of a request."""
    stall_timeout_s: float = 60.0
    """How long a client may leave what was sent unread, where the operating system watches that (Linux)."""
    drain_timeout_s: float = 10.0
    """How long accepted requests may go on after SIGTERM."""
    api_key: str | None = None
    """When set, every route under /v1 asks for ``Authorization: Bearer <key>``."""
    api_key_file: Path | None = None
    """Lines ``KEY TENANT [WEIGHT]``: keys as above, and whose they are."""
    tenant_header: str | None = None
    """Header that names the tenant; only behind a proxy that sets it."""
    allow_priority: bool = False
    """Whether requests may set ``priority`` and ``deadline_s``."""
    allow_admission: bool = False
    """Whether requests may set ``admission``."""
    debug_routes: bool = False
    """Whether POST /debug/reset is there."""

    def __post_init__(self) -> None:
        """Check every limit."""
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise RequestError(f"{_shown(name)} must be at least 1, not {getattr(self, name)}")
        if self.max_queue_per_tenant is not None and self.max_queue_per_tenant < 1:
            raise RequestError(f"{_shown('max_queue_per_tenant')} must be at least 1, not {self.max_queue_per_tenant}")
        for name in _SECONDS:
            seconds = getattr(self, name)
            if seconds is not None and not 0 < seconds < math.inf:
                hint = "leave it out for no limit" if name in _MAY_BE_NONE else None
                raise RequestError(f"{_shown(name)} must be above 0, not {seconds:g}", hint)
        if not 0 <= self.drain_timeout_s < math.inf:
            raise RequestError(f"{_shown('drain_timeout_s')} must be at least 0, not {self.drain_timeout_s:g}")


def _shown(name: str) -> str:
    """Return how errors call a limit: as the command line does, where it has such an option, and as Python does."""
    option = _OPTIONS.get(name)
    return name if option is None else f"{option} ({name})"
