"""Light tenants beside heavy ones: the load, and what became of each kind."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from elbowroom.bench.load_setup import SimulatedServer
from elbowroom.workloads.base import TimedRequest, Workload
from elbowroom.workloads.metrics import Percentiles, RunRecord

OVERLOAD = 1.2
"""What heavy tenants ask for, of what the server can do."""


@dataclass(frozen=True, slots=True)
class Tenants:
    """Heavy ones ask for long answers all the time; light ones have a conversation each. Lengths in tokens."""

    num_heavy: int = 2
    num_light: int = 20
    turns: int = 6
    pause_s: float = 40.0
    """Between turns, on average."""
    prompt: int = 1500
    """Of heavy tenants, on average, and their answers."""
    answer: int = 400
    limit: int = 1000
    """max_tokens that clients send."""
    held: int = 16
    """Heavy sequences that the KV cache holds."""

    def load(self, server: SimulatedServer, seed: int) -> tuple[Workload, int]:
        """Return requests of both kinds of tenants, and the bytes of the KV cache."""
        generator = np.random.default_rng(seed)
        kv_bytes = int(self.held * (self.prompt + self.answer) * server.token_bytes)
        sample = Workload("heavy", self._heavy(generator, 64, 1.0))
        rate = OVERLOAD * server.capacity(sample, kv_bytes, self.limit)
        heavy = self._heavy(generator, max(int(rate * self.turns * self.pause_s), 1), rate)
        light = [each for number in range(self.num_light) for each in self._conversation(generator, f"light {number}")]
        return Workload("tenants", tuple(sorted((*heavy, *light), key=lambda each: each.arrival_s))), kv_bytes

    def _heavy(self, generator: np.random.Generator, count: int, rate: float) -> tuple[TimedRequest, ...]:
        times = np.cumsum(generator.exponential(1.0 / rate, count))
        prompts = generator.lognormal(np.log(self.prompt) - 0.08, 0.4, count).clip(64, 2 * self.prompt).astype(int)
        answers = generator.lognormal(np.log(self.answer) - 0.125, 0.5, count).clip(8, self.limit).astype(int)
        return tuple(
            TimedRequest(float(times[i]), int(prompts[i]), int(answers[i]), tenant=f"heavy {i % self.num_heavy}")
            for i in range(count)
        )

    def _conversation(self, generator: np.random.Generator, tenant: str) -> list[TimedRequest]:
        """Return the turns of one conversation; each prompt holds what was said before."""
        made, held, at_s = list[TimedRequest](), 0, float(generator.uniform(0, self.pause_s))
        for _ in range(self.turns):
            asked, answer = int(generator.integers(30, 90)), int(generator.integers(40, 120))
            made.append(TimedRequest(at_s, held + asked, answer, tenant=tenant, session=tenant))
            held, at_s = held + asked + answer, at_s + self.pause_s * float(generator.uniform(0.75, 1.25))
        return made


def facts_of(found: RunRecord, kind: str) -> dict[str, object]:
    """Return the latencies of tenants whose name begins with ``kind``."""
    answered = [each for each in found.requests if each.is_answered and each.request.tenant.startswith(kind)]
    ttft = Percentiles.of([each.ttft_s for each in answered])
    gap = Percentiles.of([each.largest_gap_s for each in answered])
    return {
        f"{kind}_ttft_p50_s": ttft.p50,
        f"{kind}_ttft_p99_s": ttft.p99,
        f"{kind}_gap_p99_s": gap.p99,
        f"{kind}_gap_max_s": gap.most,
    }


def jain(found: RunRecord) -> float:
    """Return Jain's index over tenants of how fast they were served: 1 if all requests wait alike for a token."""
    speeds: dict[str, list[float]] = {}
    for each in found.requests:
        if each.is_answered:
            speeds.setdefault(each.request.tenant, []).append(each.num_tokens / max(each.e2e_s, 1e-9))
    means = np.asarray([np.mean(each) for each in speeds.values()])
    return float(means.sum() ** 2 / (means.size * (means**2).sum()))
