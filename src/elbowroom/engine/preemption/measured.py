"""What swapping and computing take, as measured: the constants of preemption ``auto``."""

from __future__ import annotations

from dataclasses import replace

from elbowroom.engine.core import StepTimes
from elbowroom.engine.preemption.auto import SwapCosts
from elbowroom.memory.swap_cost import SwapCost


def measured_costs(swap: SwapCost, times: StepTimes) -> SwapCosts:
    """Return the costs of a tier (``measure_swap_cost``) and of the prompts read so far; a guess before the first."""
    costs = SwapCosts(
        write_bytes_per_s=swap.write_bytes_per_s, read_bytes_per_s=swap.read_bytes_per_s, transfer_s=swap.transfer_s
    )
    if not times.prefill_tokens or times.prefill_s <= 0:
        return costs
    return replace(costs, prefill_tokens_per_s=times.prefill_tokens / times.prefill_s)
