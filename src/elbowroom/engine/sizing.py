"""Sizing: divides the memory budget among weights, workspace, runtime reserve and KV cache, before loading."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from elbowroom.core import STRIP_TOKENS
from elbowroom.engine.accounting import KVPricing, num_blocks
from elbowroom.errors import BudgetTooSmall
from elbowroom.kv.bound import BoundPlan
from elbowroom.kv.conversion import RUN_BLOCKS
from elbowroom.memory.tiers import HostTier
from elbowroom.models.buffers import decoder_buffers, native_buffers, native_scratch
from elbowroom.models.config import ModelConfig
from elbowroom.models.loader import weights_bytes
from elbowroom.models.path import ComputePath
from elbowroom.units import format_bytes

STEP_TOKENS = (512, 256, 128, 64)
"""Chunk sizes to choose from, largest first."""
MINIMUM_CONTEXT = 128
"""Tokens that must fit for a budget to be accepted."""
RUNTIME_BASE_BYTES = 16 * 2**20
"""What Python, torch and the server allocate outside the workspace, whatever the model."""
PAGE_BOOK_BYTES = 13
"""What the arena keeps about every page that is in use."""
ALIGN = 64
"""Bytes to which weights and workspace buffers are aligned."""
FEWEST_SEQUENCES = 8
"""Sequences at once (if so many were asked for) in the smallest budget."""
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
    config: ModelConfig,
    dtype: torch.dtype,
    path: ComputePath,
    plans: Sequence[BoundPlan],
    budget_bytes: int,
    max_sequences: int,
    relief: int | None = None,
) -> MemoryPlan:
    """Return how ``budget_bytes`` are divided for this model, its compute path and KV plans, the usual one first.

    ``relief`` is the number of the plan that sequences can go over to.

    Raises:
        BudgetTooSmall: weights, the smallest workspace and one short sequence do not fit; names the minimum.
    """
    weights = reserved_weights_bytes(config, dtype)
    divide = functools.partial(_divide, config, dtype, path, plans, weights, relief is not None)
    for step_tokens in STEP_TOKENS:
        made = divide(budget_bytes, step_tokens, max_sequences)
        room = budget_bytes - weights - RUNTIME_BASE_BYTES
        overhead = made.workspace_bytes + made.runtime_bytes - RUNTIME_BASE_BYTES
        if overhead <= WORKSPACE_SHARE * room and made.kv_bytes >= _minimum_kv(plans, step_tokens, relief):
            return made
    fewest = min(max_sequences, FEWEST_SEQUENCES)
    smallest = divide(budget_bytes, STEP_TOKENS[-1], fewest)
    needed = _minimum_kv(plans, smallest.max_step_tokens, relief)
    if smallest.kv_bytes >= needed:
        return smallest
    least = smallest
    while least.kv_bytes < needed:  # a larger budget needs a little more for its own books
        enough = least.budget_bytes + needed - least.kv_bytes
        least = divide(enough, STEP_TOKENS[-1], fewest)
    minimum = least.budget_bytes
    raise BudgetTooSmall(
        f"a budget of {format_bytes(budget_bytes)} is too small: weights {format_bytes(weights)}, "
        f"workspace {format_bytes(least.workspace_bytes)}, runtime {format_bytes(least.runtime_bytes)} and "
        f"{MINIMUM_CONTEXT} tokens of KV cache {format_bytes(needed)} need {minimum} bytes ({format_bytes(minimum)})",
        minimum,
        f"set memory= (--memory) to at least {-(-minimum // 2**20)}MiB, or use a smaller model or dtype",
    )


def reserved_weights_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Return the bytes that the weights take in memory, each aligned, in whole pages."""
    return _pages(weights_bytes(config, dtype) + ALIGN * len(config.tensor_shapes()))


def _pages(num_bytes: int) -> int:
    page = HostTier.page_bytes
    return -(-num_bytes // page) * page


def _minimum_kv(plans: Sequence[BoundPlan], step_tokens: int, relief: int | None) -> int:
    """Return the KV bytes that ``MINIMUM_CONTEXT`` tokens need, counted as the scheduler counts."""
    longest = max(MINIMUM_CONTEXT, RUN_BLOCKS * STRIP_TOKENS)
    pricings = [KVPricing.of(plan, longest, step_tokens, HostTier.page_bytes) for plan in plans]
    beside = 0 if relief is None else pricings[relief].conversion_bytes
    transient = sum(pricing.transient_bytes for pricing in pricings)
    return pricings[0].price(num_blocks(MINIMUM_CONTEXT)) + transient + beside


def _divide(
    config: ModelConfig,
    dtype: torch.dtype,
    path: ComputePath,
    plans: Sequence[BoundPlan],
    weights: int,
    relieves: bool,
    budget: int,
    step_tokens: int,
    max_sequences: int,
) -> MemoryPlan:
    workspace = workspace_sizes(config, dtype, path, step_tokens, max_sequences)
    books = budget // HostTier.page_bytes * PAGE_BOOK_BYTES
    runtime = RUNTIME_BASE_BYTES + books + _temporary_bytes(config, path, step_tokens, max_sequences)
    runtime += _mixing_bytes(config, step_tokens) * (len(plans) > 1) + _conversion_bytes(config) * relieves
    room = budget - weights - _pages(sum(workspace.values()) + ALIGN * len(workspace)) - runtime
    longest = config.max_positions
    runtime += max(_choice_bytes(plan, step_tokens, longest, room) + plan.reading_bytes(longest) for plan in plans)
    return MemoryPlan(
        budget_bytes=budget,
        weights_bytes=weights,
        workspace=workspace,
        runtime_bytes=runtime,
        kv_bytes=budget - weights - _pages(sum(workspace.values()) + ALIGN * len(workspace)) - runtime,
        max_step_tokens=step_tokens,
        max_sequences=max_sequences,
    )


def _mixing_bytes(config: ModelConfig, step_tokens: int) -> int:
    """Return the temporary bytes of attention in a step of several plans: the parts, and all of them together."""
    widest = max(layer.num_q_heads * (layer.v_head_dim + 1) for layer in config.layers)
    return 2 * 4 * step_tokens * widest


def _conversion_bytes(config: ModelConfig) -> int:
    """Return the temporary bytes while a sequence goes over: keys and values in float32, in four copies.

    Strips are decoded, joined, brought into the order of tokens, and encoded.
    """
    widest = max(layer.num_kv_heads * (layer.head_dim + layer.v_head_dim) for layer in config.layers)
    return 4 * 4 * RUN_BLOCKS * STRIP_TOKENS * widest


def _choice_bytes(plan: BoundPlan, step_tokens: int, max_tokens: int, room: int) -> int:
    """Return the bytes that are set aside of ``room`` for choosing among the tokens of a sequence.

    Without a bound on what is generated that may be all tokens that the rest of ``room`` holds, ``max_tokens`` at most.
    """
    most = plan.choice_bytes(step_tokens, max_tokens)
    if plan.interval or not plan.chooses:
        return most
    least, held = plan.choice_bytes(step_tokens, 0), num_blocks(max_tokens) * plan.chosen_bytes
    # Bytes of a choice grow with its tokens as their own bytes do.
    return min(most, least + max(room - least, 0) * (most - least) // (most - least + held))


def workspace_sizes(
    config: ModelConfig, dtype: torch.dtype, path: ComputePath, step_tokens: int, max_sequences: int
) -> dict[str, int]:
    """Return the bytes of every buffer that passes and the sampler take from the workspace."""
    sizes = {"logits": max_sequences * config.vocab_size * 4}
    native_tokens = min(step_tokens, path.native_tokens)
    if native_tokens:
        sizes |= {name: 4 * count for name, count in native_buffers(config, native_tokens).items()}
    if step_tokens > native_tokens:
        for name, count in decoder_buffers(config, step_tokens).items():
            sizes[name] = max(sizes.get(name, 0), count * dtype.itemsize)
    return sizes


def _temporary_bytes(config: ModelConfig, path: ComputePath, step_tokens: int, max_sequences: int) -> int:
    """Return an upper bound of what is allocated at once beside the workspace in one step."""
    sampled = 4 * config.vocab_size * (max_sequences + 8)
    if step_tokens <= path.native_tokens:
        return sampled + 4 * native_scratch(config, step_tokens) * (os.cpu_count() or 1)
    widest = max(layer.num_q_heads * max(layer.head_dim, layer.v_head_dim) for layer in config.layers)
    # Residual stream, normed copy and its float32 temporaries; rotated queries and keys; attention output.
    return step_tokens * 4 * (4 * config.hidden_size + 4 * widest) + sampled
