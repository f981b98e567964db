"""Turns: a turn of a session is sent when its time has come and the turn before it has ended, as people do."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from elbowroom.workloads.base import TimedRequest


@dataclass(slots=True)
class Turns:
    """Holds back turns whose session is busy."""

    _held: dict[str, deque[int]] = field(default_factory=dict)
    """Session that is busy -> numbers of the requests that wait for it."""

    def may_go(self, number: int, request: TimedRequest) -> bool:
        """Return whether a request whose time has come may be sent; if not, ``ended`` will name it."""
        if request.session is None:
            return True
        held = self._held.get(request.session)
        if held is None:
            self._held[request.session] = deque()
            return True
        held.append(number)
        return False

    def ended(self, request: TimedRequest) -> int | None:
        """Note that a request was answered, refused or failed; return the one that is to be sent now."""
        if request.session is None:
            return None
        held = self._held[request.session]
        if held:
            return held.popleft()
        del self._held[request.session]
        return None
