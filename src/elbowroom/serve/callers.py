"""Caller: who sent a request, how urgent it is and how long it may take."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from starlette.requests import Request

from elbowroom.engine.admission import ADMISSIONS
from elbowroom.serve.errors import InvalidField
from elbowroom.serve.limits import ServerLimits
from elbowroom.serve.requests import GenerationRequest
from elbowroom.serve.tenants import Tenant

TIMEOUT_HEADER = "X-Request-Timeout"
MOST_PRIORITY = 2**31


@dataclass(frozen=True, slots=True)
class Caller:
    """What a request brings besides its body's text and sampling."""

    tenant: Tenant = field(default_factory=Tenant)
    priority: int = 0
    """Lower runs first."""
    deadline_s: float | None = None
    """Seconds from its arrival in which its first token is due; None: what the order says."""
    admission: str | None = None
    """Admission policy that it asks for."""
    timeout_s: float | None = None
    """How long it may take from ``arrived_s`` on; None: as long as it wants."""
    arrived_s: float = field(default_factory=time.monotonic)

    @property
    def left_s(self) -> float | None:
        """Seconds until it has taken too long; None: it never does."""
        return None if self.timeout_s is None else max(self.arrived_s + self.timeout_s - time.monotonic(), 0.0)


def caller_of(request: Request, body: GenerationRequest, limits: ServerLimits) -> Caller:
    """Return who sent ``request``, whose body asks for a priority, a deadline or an admission policy.

    Raises:
        InvalidField: the server lets nobody choose that, or a value is out of range.
    """
    priority, deadline_s = body.priority, body.deadline_s
    if priority and not limits.allow_priority:
        raise InvalidField("priority", "this server lets no request choose one", "start it with --allow-priority")
    if priority is not None and not -MOST_PRIORITY <= priority < MOST_PRIORITY:
        raise InvalidField("priority", f"must be from {-MOST_PRIORITY} to {MOST_PRIORITY - 1}, not {priority}")
    if deadline_s is not None and not limits.allow_priority:
        raise InvalidField("deadline_s", "this server lets no request choose one", "start it with --allow-priority")
    return Caller(
        tenant=getattr(request.state, "tenant", Tenant()),
        priority=priority or 0,
        deadline_s=deadline_s,
        admission=_admission(body.admission, limits),
        timeout_s=_timeout_s(request.headers.get(TIMEOUT_HEADER), limits.request_timeout_s),
    )


def _admission(name: str | None, limits: ServerLimits) -> str | None:
    if name is None:
        return None
    if not limits.allow_admission:
        raise InvalidField("admission", "this server lets no request choose one", "start it with --allow-admission")
    if name not in ADMISSIONS.names():
        raise InvalidField("admission", f"there is no policy {name!r}", f"choose {', '.join(ADMISSIONS.names())}")
    return name


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
