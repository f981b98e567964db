"""ServerLimits: what the server accepts, and how long it waits when it stops."""

from __future__ import annotations

from dataclasses import dataclass

from elbowroom.errors import RequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """Limits of one server.

    Raises:
        RequestError: a limit is not positive, or the key is empty.
    """

    max_body_bytes: int = 8 * 2**20
    """A larger request body is refused with 413."""
    max_live_requests: int = 512
    """Requests to one model that wait or run; more are refused with 429."""
    max_sequences_per_request: int = 128
    """Prompts of one request times ``n``."""
    retry_after_s: int = 1
    """What a refused client is told to wait."""
    grace_s: float = 10.0
    """How long running requests may go on after SIGTERM."""
    api_key: str | None = None
    """When set, every route under /v1 asks for ``Authorization: Bearer <key>``."""

    def __post_init__(self) -> None:
        """Check every limit."""
        for name in ("max_body_bytes", "max_live_requests", "max_sequences_per_request", "retry_after_s"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.grace_s >= 0:
            raise RequestError(f"grace_s must be at least 0, not {self.grace_s}")
        if self.api_key is not None and not (self.api_key and self.api_key.isascii()):
            raise RequestError("the API key is empty or not ASCII", "set --api-key to a key, or leave it out")
