"""What a workload is: requests by arrival, kept as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from elbowroom.errors import RequestError

_INTEGERS = "num_prompt_tokens", "num_output_tokens", "num_reasoning_tokens"


@dataclass(frozen=True, slots=True)
class TimedRequest:
    """One request of a workload: when it comes and how long it is; no text."""

    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    tenant: str = ""
    session: str | None = None
    """Requests of a session are its turns: a later prompt begins with the earlier one and its answer."""
    block_keys: tuple[bytes, ...] | None = None
    """A key for each full block of ``STRIP_TOKENS`` of the prompt; equal keys mean equal beginnings. None: unknown."""
    num_reasoning_tokens: int = 0
    """Leading output tokens that users do not see."""

    def to_json(self) -> dict[str, object]:
        """Return the fields that are not at their defaults; keys in hexadecimal."""
        shown: dict[str, object] = {
            "arrival_s": self.arrival_s,
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_output_tokens": self.num_output_tokens,
        }
        if self.tenant:
            shown["tenant"] = self.tenant
        if self.session is not None:
            shown["session"] = self.session
        if self.block_keys is not None:
            shown["block_keys"] = [key.hex() for key in self.block_keys]
        if self.num_reasoning_tokens:
            shown["num_reasoning_tokens"] = self.num_reasoning_tokens
        return shown

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Return the request of ``to_json``.

        Raises:
            RequestError: a field is missing, unknown or out of range.
        """
        try:
            keys = fields.get("block_keys")
            made = cls(**{**fields, "block_keys": None if keys is None else tuple(map(bytes.fromhex, keys))})
        except (TypeError, ValueError) as error:
            raise RequestError(f"not a request of a workload: {error}") from error
        made.check()
        return made

    def check(self) -> None:
        """Raise RequestError unless all numbers are in range."""
        for name in _INTEGERS:
            value, least = getattr(self, name), 0 if name == "num_reasoning_tokens" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise RequestError(f"{name} must be a whole number from {least} on, not {value!r}")
        if not isinstance(self.arrival_s, int | float) or not 0 <= self.arrival_s < float("inf"):
            raise RequestError(f"arrival_s must be a number of seconds from 0 on, not {self.arrival_s!r}")
        if self.num_reasoning_tokens > self.num_output_tokens:
            raise RequestError("num_reasoning_tokens must not exceed num_output_tokens")


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in order of arrival."""

    name: str
    requests: tuple[TimedRequest, ...]

    @property
    def duration_s(self) -> float:
        """Seconds from 0 to the last arrival."""
        return self.requests[-1].arrival_s if self.requests else 0.0

    @property
    def rate(self) -> float:
        """Requests a second."""
        return len(self.requests) / self.duration_s if self.duration_s else float("inf")

    @property
    def has_block_keys(self) -> bool:
        """Whether it says which prompts begin alike."""
        return any(each.block_keys is not None for each in self.requests)

    def first(self, count: int | None) -> Workload:
        """Return the first ``count`` requests; None: all."""
        return self if count is None else replace(self, requests=self.requests[:count])

    def at_rate(self, rate: float) -> Workload:
        """Return the same requests with all arrival times scaled, so that ``rate`` come a second.

        Those that all come at once still do.

        Raises:
            RequestError: it is no rate above 0.
        """
        if not 0 < rate < float("inf"):
            raise RequestError(f"{self.name} cannot come at {rate:g} requests a second", "give a number above 0")
        scale = self.rate / rate if self.duration_s else 1.0
        return replace(self, requests=tuple(replace(each, arrival_s=each.arrival_s * scale) for each in self.requests))

    def with_at_most(self, output_tokens: int) -> Workload:
        """Return the same requests with answers cut off at ``output_tokens``, as ``max_tokens`` does."""
        return replace(
            self,
            requests=tuple(
                each
                if each.num_output_tokens <= output_tokens
                else replace(
                    each,
                    num_output_tokens=output_tokens,
                    num_reasoning_tokens=min(each.num_reasoning_tokens, output_tokens),
                )
                for each in self.requests
            ),
        )

    def save(self, path: Path) -> None:
        """Write one JSON object a request, the name in the first line."""
        lines = [json.dumps({"workload": self.name}), *(json.dumps(each.to_json()) for each in self.requests)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what ``save`` wrote.

        Raises:
            RequestError: it is no such file; names the line.
        """
        name, requests = path.stem, []
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
                if number == 1 and isinstance(fields, dict) and "workload" in fields:
                    name = str(fields["workload"])
                    continue
                requests.append(TimedRequest.from_json(fields))
            except (ValueError, RequestError, AttributeError) as error:
                text = error.message if isinstance(error, RequestError) else str(error)
                raise RequestError(f"{path}, line {number}: {text}", "see docs/serving.md for the layout") from error
        return cls(name, tuple(sorted(requests, key=lambda each: each.arrival_s)))
