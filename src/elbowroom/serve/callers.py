"""Caller: who sent a request, how urgent it is and how long it may take."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from starlette.requests import Request

from elbowroom.serve.errors import InvalidField
from elbowroom.serve.limits import ServerLimits
from elbowroom.serve.tenants import Tenant

TIMEOUT_HEADER = "X-Request-Timeout"
_MOST = 2**31


@dataclass(frozen=True, slots=True)
class Caller:
    """What a request brings besides its body's text and sampling."""

    tenant: Tenant = field(default_factory=Tenant)
    priority: int = 0
    """Lower runs first."""
    timeout_s: float | None = None
    """How long it may take from ``arrived_s`` on; None: as long as it wants."""
    arrived_s: float = field(default_factory=time.monotonic)

    @property
    def left_s(self) -> float | None:
        """Seconds until it has taken too long; None: it never does."""
        return None if self.timeout_s is None else max(self.arrived_s + self.timeout_s - time.monotonic(), 0.0)


def caller_of(request: Request, priority: int | None, limits: ServerLimits) -> Caller:
    """Return who sent ``request``, whose body asks for ``priority``.

    Raises:
        InvalidField: the server lets nobody choose a priority, or a value is out of range.
    """
    if priority and not limits.allow_priority:
        raise InvalidField("priority", "this server lets no request choose one", "start it with --allow-priority")
    if priority is not None and not -_MOST <= priority < _MOST:
        raise InvalidField("priority", f"must be from {-_MOST} to {_MOST - 1}, not {priority}")
    tenant = getattr(request.state, "tenant", Tenant())
    return Caller(tenant, priority or 0, _timeout_s(request.headers.get(TIMEOUT_HEADER), limits.request_timeout_s))


def _timeout_s(given: str | None, most: float | None) -> float | None:
    if given is None:
        return most
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InvalidField(TIMEOUT_HEADER, "must be a number of seconds above 0")
    return seconds if most is None else min(seconds, most)
