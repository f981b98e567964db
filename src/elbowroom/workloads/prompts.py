"""Token ids of a workload's requests: traces say how long prompts are, some which begin alike, none what they say."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np

from elbowroom.core import STRIP_TOKENS
from elbowroom.engine.types import SessionRef
from elbowroom.workloads.base import TimedRequest

TOKEN, END = 0, 1
"""What answers consist of, and what ends them; prompts have neither."""
FIRST_TOKEN = 2


@dataclass(slots=True)
class PromptMaker:
    """Makes prompts whose beginnings are equal exactly where the workload says so.

    Args:
        vocab_size: token ids are below it.
        seed: of the random ones.
    """

    vocab_size: int
    seed: int = 0
    _sessions: dict[str, int] = field(default_factory=dict)
    _histories: dict[str, list[int]] = field(default_factory=dict)

    def tokens(self, number: int, request: TimedRequest) -> tuple[int, ...]:
        """Return the prompt of the ``number``-th request, random where nothing is known."""
        known = list(self._histories.get(request.session, [])) if request.session is not None else []
        if not known and request.block_keys is not None:
            for key in request.block_keys:
                known += self._random(hashlib.blake2b(key, digest_size=8).digest(), STRIP_TOKENS)
        known = known[: request.num_prompt_tokens]
        fresh = self._random(number.to_bytes(8, "little"), request.num_prompt_tokens - len(known))
        return (*known, *fresh)

    def session(self, request: TimedRequest) -> SessionRef | None:
        """Return the session that a request goes on with."""
        if request.session is None:
            return None
        return SessionRef(self._sessions.setdefault(request.session, len(self._sessions) + 1))

    def ended(self, request: TimedRequest, tokens: tuple[int, ...], answer: list[int]) -> None:
        """Note what a turn of a session said, for the next one."""
        if request.session is not None:
            self._histories[request.session] = [*tokens, *answer]

    def _random(self, key: bytes, count: int) -> list[int]:
        generator = np.random.default_rng([self.seed, *key])
        drawn: list[int] = generator.integers(FIRST_TOKEN, self.vocab_size, count).tolist()
        return drawn
