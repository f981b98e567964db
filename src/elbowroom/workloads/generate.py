"""Workloads that are made: arrivals, lengths, sharing and reasoning, each chosen by itself, from one seed."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from elbowroom.core import STRIP_TOKENS
from elbowroom.workloads.arrivals import Arrivals
from elbowroom.workloads.base import TimedRequest, Workload
from elbowroom.workloads.lengths import Lengths


@dataclass(frozen=True, slots=True, kw_only=True)
class Generator:
    """Makes workloads; equal seeds make equal ones."""

    arrivals: Arrivals
    prompts: Lengths
    outputs: Lengths
    reasoning_share: float = 0.0
    """Of each answer that users do not see."""
    shared_tokens: int = 0
    """With which prompts begin: a system prompt of one of ``num_prefixes`` applications; they come on top."""
    num_prefixes: int = 1
    tenants: tuple[str, ...] = field(default=("",))
    """Each request is of one of them, all equally likely."""

    def make(self, count: int, seed: int = 0, name: str = "generated") -> Workload:
        """Return ``count`` requests."""
        generator = np.random.default_rng(seed)
        times = self.arrivals.times(count, generator).tolist()
        prompts, outputs = self.prompts.draw(count, generator), self.outputs.draw(count, generator)
        prefixes, owners = (generator.integers(0, most, count) for most in (self.num_prefixes, len(self.tenants)))
        return Workload(
            name,
            tuple(
                TimedRequest(
                    arrival_s=times[i],
                    num_prompt_tokens=int(prompts[i]) + self.shared_tokens,
                    num_output_tokens=int(outputs[i]),
                    tenant=self.tenants[owners[i]],
                    block_keys=self._keys(i, int(prompts[i]), int(prefixes[i])),
                    num_reasoning_tokens=int(self.reasoning_share * int(outputs[i])),
                )
                for i in range(count)
            ),
        )

    def _keys(self, number: int, own_tokens: int, prefix: int) -> tuple[bytes, ...] | None:
        if self.shared_tokens == 0:
            return None
        shared = self.shared_tokens // STRIP_TOKENS
        own = (self.shared_tokens + own_tokens) // STRIP_TOKENS - shared
        keys = [f"p{prefix}.{block}" for block in range(shared)] + [f"r{number}.{block}" for block in range(own)]
        return tuple(key.encode() for key in keys)
