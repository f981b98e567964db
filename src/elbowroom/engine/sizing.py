"""Sizing: divides the memory budget among weights, workspace, runtime reserve and KV cache, before loading."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from elbowroom.errors import BudgetTooSmall
from elbowroom.kv.plan import BoundPlan
from elbowroom.models.config import ModelConfig
from elbowroom.models.loader import weights_bytes
from elbowroom.units import format_bytes

STEP_TOKENS = (512, 256, 128, 64)
"""Chunk sizes to choose from, largest first."""
MINIMUM_CONTEXT = 128
"""Tokens that must fit for a budget to be accepted."""
RUNTIME_BASE_BYTES = 16 * 2**20
"""What Python, torch and the server allocate outside the workspace, whatever the model."""
WORKSPACE_SHARE = 0.25
"""Larger chunks are chosen while workspace and activations stay below this share of what weights leave."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes for each owner, and the step limits that follow."""

    budget_bytes: int
    weights_bytes: int
    workspace: dict[str, int]
    """Bytes of each workspace buffer."""
    runtime_bytes: int
    """Reserve for what is allocated outside: interpreter, allocator slack, temporaries of torch."""
    kv_bytes: int
    max_step_tokens: int
    max_sequences: int

    @property
    def workspace_bytes(self) -> int:
        """Bytes of the whole workspace."""
        return sum(self.workspace.values())


def plan_memory(
    config: ModelConfig, dtype: torch.dtype, plan: BoundPlan, budget_bytes: int, max_sequences: int
) -> MemoryPlan:
    """Return how ``budget_bytes`` are divided for this model and KV plan.

    Raises:
        BudgetTooSmall: weights, the smallest workspace and one short sequence do not fit; names the minimum.
    """
    weights = weights_bytes(config, dtype)
    for step_tokens in STEP_TOKENS:
        made = _divide(config, dtype, weights, budget_bytes, step_tokens, max_sequences)
        room = budget_bytes - weights - RUNTIME_BASE_BYTES
        overhead = made.workspace_bytes + made.runtime_bytes - RUNTIME_BASE_BYTES
        if overhead <= WORKSPACE_SHARE * room:
            return made
    smallest = _divide(config, dtype, weights, budget_bytes, STEP_TOKENS[-1], min(max_sequences, 8))
    needed = _minimum_kv(plan, smallest.max_step_tokens)
    if smallest.kv_bytes < needed:
        minimum = budget_bytes - smallest.kv_bytes + needed
        raise BudgetTooSmall(
            f"a budget of {format_bytes(budget_bytes)} is too small: weights {format_bytes(weights)}, "
            f"workspace {format_bytes(smallest.workspace_bytes)}, runtime {format_bytes(smallest.runtime_bytes)} and "
            f"{MINIMUM_CONTEXT} tokens of KV cache {format_bytes(needed)} need {minimum} bytes "
            f"({format_bytes(minimum)})",
            minimum,
            f"set memory= (--memory) to at least {-(-minimum // 2**20)}MiB, or use a smaller model or dtype",
        )
    return smallest


def _minimum_kv(plan: BoundPlan, step_tokens: int) -> int:
    curve = plan.curve(MINIMUM_CONTEXT, np.asarray([MINIMUM_CONTEXT]), step_tokens)
    return int(curve.resident_bytes[0]) + curve.transient_bytes + 8 * 4096


def _divide(
    config: ModelConfig, dtype: torch.dtype, weights: int, budget: int, step_tokens: int, max_sequences: int
) -> MemoryPlan:
    workspace = workspace_sizes(config, dtype, step_tokens, max_sequences)
    runtime = RUNTIME_BASE_BYTES + _temporary_bytes(config, step_tokens, max_sequences)
    return MemoryPlan(
        budget_bytes=budget,
        weights_bytes=weights,
        workspace=workspace,
        runtime_bytes=runtime,
        kv_bytes=budget - weights - sum(workspace.values()) - runtime,
        max_step_tokens=step_tokens,
        max_sequences=max_sequences,
    )


def workspace_sizes(config: ModelConfig, dtype: torch.dtype, step_tokens: int, max_sequences: int) -> dict[str, int]:
    """Return the bytes of every buffer that the decoder and the sampler take from the workspace."""
    size, layers = dtype.itemsize, config.layers
    return {
        "q": step_tokens * max(layer.num_q_heads * layer.head_dim for layer in layers) * size,
        "k": step_tokens * max(layer.num_kv_heads * layer.head_dim for layer in layers) * size,
        "v": step_tokens * max(layer.num_kv_heads * layer.v_head_dim for layer in layers) * size,
        "block": step_tokens * config.hidden_size * size,
        "gate": step_tokens * config.intermediate_size * size,
        "up": step_tokens * config.intermediate_size * size,
        "logits": max_sequences * config.vocab_size * size,
    }


def _temporary_bytes(config: ModelConfig, step_tokens: int, max_sequences: int) -> int:
    """Return an upper bound of what torch allocates at once beside the workspace in one step."""
    widest = max(layer.num_q_heads * max(layer.head_dim, layer.v_head_dim) for layer in config.layers)
    # Residual stream, normed copy and its float32 temporaries; rotated queries and keys; attention output.
    hidden = step_tokens * 4 * (4 * config.hidden_size + 4 * widest)
    sampled = 4 * config.vocab_size * (max_sequences + 8)
    return hidden + sampled
