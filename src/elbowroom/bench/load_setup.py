"""What the benchmarks of workloads share: a server that exists only as prices, and runs on it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from elbowroom.core import STRIP_TOKENS, LayerSpec
from elbowroom.engine.accounting import KVPricing
from elbowroom.engine.admission import ADMISSIONS
from elbowroom.engine.executors.base import CostModel, ServingCostModel
from elbowroom.engine.executors.simulated_transfers import SimTransfers, SwapShape
from elbowroom.engine.ordering import ORDERS, OrderPolicy
from elbowroom.engine.preemption import PREEMPTIONS, PreemptPolicy
from elbowroom.engine.preemption.auto import AutoPreemption
from elbowroom.engine.scheduler import Scheduler, SchedulerConfig
from elbowroom.kv.plan import KVPlan
from elbowroom.memory.disk import DiskTier
from elbowroom.memory.swap_cost import SwapCost, measure_swap_cost
from elbowroom.workloads.base import Workload
from elbowroom.workloads.metrics import RunRecord, Targets
from elbowroom.workloads.prompts import END
from elbowroom.workloads.simulate import Simulation

MAX_TOKENS = 4096
"""Limit that clients send."""
KV_SHARE = 0.7
"""Of the mean live KV of an unlimited run: the memory of a run for which nobody names one."""
UNLIMITED = 1 << 50
PAGE_BYTES = 4096
MAX_POSITIONS = 1 << 18
"""Longest context: above that of any published trace."""


LINK = SwapCost(write_bytes_per_s=25e9, read_bytes_per_s=25e9, copy_s=10e-6)
"""A second pool of memory behind PCIe 4.0 x16: what simulated servers save to, where no directory is named."""


@dataclass(frozen=True, slots=True)
class Policies:
    """By name: who begins, who is served first, and what becomes of those that have to go.

    Raises:
        PlanError: a name is unknown; lists those that are not.
    """

    admission: str = "greedy"
    order: str = "priority"
    preemption: str = "recompute"

    def __post_init__(self) -> None:
        """Look the names up."""
        for registry, name in ((ADMISSIONS, self.admission), (ORDERS, self.order), (PREEMPTIONS, self.preemption)):
            registry.get(name)

    @property
    def saves(self) -> bool:
        """Whether those that have to go can be saved."""
        return self.preemption != "recompute"

    def __str__(self) -> str:
        """Return the name of the admission policy, and the others where they are not the usual ones."""
        usual = Policies()
        others = [name for name in ("order", "preemption") if getattr(self, name) != getattr(usual, name)]
        return ", ".join([self.admission, *(getattr(self, name) for name in others)])


def swap_cost(directory: Path | None) -> SwapCost:
    """Return what saving to a directory costs, measured; None: what it costs over ``LINK``."""
    if directory is None:
        return LINK
    tier = DiskTier(directory, 1 << 30)
    try:
        return measure_swap_cost(tier)
    finally:
        tier.close()


def server_layers() -> list[LayerSpec]:
    """Return the attention layers of an 8B Llama 3, whose step times ``ServingCostModel`` is about."""
    shape = LayerSpec(
        num_q_heads=32, num_kv_heads=8, head_dim=128, v_head_dim=128, scale=128**-0.5, rope=None, window=None
    )
    return [shape] * 32


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedServer:
    """Everything of a server but its arithmetic."""

    pricing: KVPricing
    cost: CostModel
    max_positions: int = MAX_POSITIONS
    max_step_tokens: int = 2048
    max_sequences: int = 256
    prefix_cache: bool = False
    seed: int = 0

    @classmethod
    def of_8b(cls, kv: str = "plain", cost: CostModel | None = None, prefix_cache: bool = False) -> SimulatedServer:
        """Return a server of an 8B model in bfloat16, its KV cache under plan ``kv``."""
        plan = KVPlan.parse(kv).bind(server_layers(), "bfloat16")
        pricing = KVPricing.of(plan, MAX_POSITIONS, 2048, PAGE_BYTES)
        return cls(pricing=pricing, cost=cost or ServingCostModel(), prefix_cache=prefix_cache)

    @property
    def token_bytes(self) -> float:
        """Bytes of one token, in full blocks."""
        return self.pricing.block_bytes / 64

    def run(
        self,
        workload: Workload,
        policy: str,
        kv_bytes: int,
        max_tokens: int = MAX_TOKENS,
        *,
        order: OrderPolicy | None = None,
        preemption: PreemptPolicy | None = None,
        transfers: SimTransfers | None = None,
    ) -> RunRecord:
        """Replay ``workload`` with ``kv_bytes`` of KV cache under an admission policy.

        Order and preemption are those of the scheduler where none are given; ``transfers`` prices what is saved.
        """
        config = SchedulerConfig(
            max_positions=self.max_positions,
            max_step_tokens=self.max_step_tokens,
            max_sequences=self.max_sequences,
            eos_token_ids=(END,),
            prefix_cache=self.prefix_cache,
            seed=self.seed,
        )
        scheduler = Scheduler(config, [self.pricing], kv_bytes, ADMISSIONS.get(policy)(), order, preemption)
        return Simulation(scheduler, self.cost, max_tokens, transfers).run(workload)

    def run_under(
        self, policies: Policies, workload: Workload, kv_bytes: int, max_tokens: int = MAX_TOKENS, cost: SwapCost = LINK
    ) -> RunRecord:
        """Replay ``workload`` under policies by name; what is saved is priced by ``cost``."""
        preemption: PreemptPolicy | None = None
        if policies.preemption == "auto":
            preemption = AutoPreemption(cost)
        elif policies.saves:
            preemption = PREEMPTIONS.get(policies.preemption)()
        transfers = SimTransfers(cost, SwapShape(self.token_bytes)) if policies.saves else None
        order = ORDERS.get(policies.order)()
        return self.run(
            workload,
            policies.admission,
            kv_bytes,
            max_tokens,
            order=order,
            preemption=preemption,
            transfers=transfers,
        )

    def part_of_live(self, workload: Workload, share: float, max_tokens: int = MAX_TOKENS) -> int:
        """Return ``share`` of the mean live bytes, and at least what each request needs alone at its limit."""
        live = self.mean_live_bytes(workload, max_tokens)
        return max(int(share * live), self.least_bytes(workload, max_tokens))

    def least_bytes(self, workload: Workload, max_tokens: int = MAX_TOKENS) -> int:
        """Return the bytes with which no request is too large; those that exceed the context are in any case."""
        lengths = [each.num_prompt_tokens + max(max_tokens, each.num_output_tokens) for each in workload.requests]
        longest = min(max(lengths, default=1), self.max_positions)
        pricing = self.pricing
        need = max(pricing.peak_bytes(longest, ()), pricing.by_blocks[-(-longest // STRIP_TOKENS)])
        return need + pricing.transient_bytes

    def mean_live_bytes(self, workload: Workload, max_tokens: int = MAX_TOKENS) -> float:
        """Return the mean bytes of KV that ``workload`` holds when nothing limits it."""
        record = self.run(workload, "greedy", UNLIMITED, max_tokens)
        return record.summary(Targets()).mean_kv_bytes

    def capacity(self, workload: Workload, kv_bytes: int, max_tokens: int = MAX_TOKENS) -> float:
        """Return the requests a second of ``workload`` that the oracle can serve when all of them wait at once."""
        at_once = replace(workload, requests=tuple(replace(each, arrival_s=0.0) for each in workload.requests))
        return self.run(at_once, "oracle", kv_bytes, max_tokens).summary(Targets()).requests_per_s
