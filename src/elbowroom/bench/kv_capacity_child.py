"""The measured process of ``kv-capacity``: one plan, one store, sequences that grow until it refuses.

``python -m elbowroom.bench.kv_capacity_child '{"kv": "fp8", "arena_bytes": 268435456, ...}'``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from elbowroom.bench.array_bytes import array_bytes
from elbowroom.bench.kv_shapes import equal_layers
from elbowroom.core import STRIP_TOKENS
from elbowroom.kernels import attention
from elbowroom.kv.base import KVStep, Want
from elbowroom.kv.bound import BoundPlan
from elbowroom.kv.paged import PagedStore
from elbowroom.kv.plan import KVPlan
from elbowroom.memory.arena import Arena
from elbowroom.memory.ledger import Budget, Ledger
from elbowroom.memory.malloc import limit_malloc_caching, trim_malloc
from elbowroom.memory.meter import peak_rss_bytes, reset_peak, rss_bytes
from elbowroom.memory.tiers import HostTier

PROMPT_TOKENS = 2 * STRIP_TOKENS
"""Tokens of each sequence in a prompt step: more than can be rolled back, so that full blocks are sealed at once."""


class Growing:
    """Sequences of equal length that share an arena with the tables that say where they lie.

    Args:
        plan: how keys and values are kept.
        arena_bytes: for strips, scales, tails, pages and tables together.
        num_sequences: that grow side by side.
        seed: of keys, values and queries.
    """

    def __init__(self, plan: BoundPlan, arena_bytes: int, num_sequences: int, seed: int) -> None:
        self._plan, self._arena_bytes = plan, arena_bytes
        self._budget = Budget({HostTier.name: arena_bytes})
        self._ledger = Ledger(self._budget)
        self.store = PagedStore(plan, Arena(HostTier(), self._ledger), arena_bytes)
        self._handles = tuple(self.store.open() for _ in range(num_sequences))
        self._generator = torch.Generator().manual_seed(seed)
        self.table_bytes = 0
        """Of sequences, reference counts and pages."""

    @property
    def length(self) -> int:
        """Tokens of each sequence."""
        return self.store.num_tokens(self._handles[0])

    @property
    def held_bytes(self) -> int:
        """Pages that are resident, used or not, and tables."""
        return self._ledger.total(HostTier.name) + self.table_bytes

    def read(self, num_tokens: int) -> bool:
        """Append ``num_tokens`` random ones to each sequence, unless the store refuses."""
        step = self._reserved(num_tokens)
        if step is None:
            return False
        _, k, v = self._random(num_tokens)
        for layer in range(len(self._plan.layers)):
            strips = self.store.strips(layer, step)
            assert strips is not None, "a codec alone always says where a layer lies"
            attention.append(strips, k, v)
        self.store.end_step(step)
        return True

    def decode(self) -> int | None:
        """Append one token to each sequence and attend; return by how much the process grew meanwhile, at its peak."""
        step = self._reserved(1)
        if step is None:
            return None
        q, k, v = self._random(1)
        reset_peak()
        resident = rss_bytes()
        for layer in range(len(self._plan.layers)):
            self.store.attend(layer, q, k, v, step, Want())
        growth = peak_rss_bytes() - resident
        self.store.end_step(step)
        return growth

    def cut(self, num_tokens: int) -> None:
        """Keep the first ``num_tokens`` of each sequence, and no strips of a step that never ran."""
        for handle in self._handles:
            self.store.truncate(handle, num_tokens)

    def _reserved(self, num_tokens: int) -> KVStep | None:
        """Return a step of ``num_tokens`` for each sequence, or None when strips and tables do not fit the arena."""
        count, length = len(self._handles), self.length
        positions = np.tile(np.arange(length, length + num_tokens, dtype=np.int64), count)
        starts = np.arange(count + 1, dtype=np.int32) * num_tokens
        step = KVStep(self._handles, starts.astype(np.int32), positions)
        self._count_tables()
        if self.store.reserve(step) is not None:
            return None
        self._count_tables()  # they may have grown for this step
        return step if self.held_bytes <= self._arena_bytes else None

    def _count_tables(self) -> None:
        self.table_bytes = array_bytes(self.store)
        self._budget.set(HostTier.name, self._arena_bytes - self.table_bytes)

    def _random(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries, keys and values of a step, for any layer."""
        layer, rows = self._plan.layers[0], num_tokens * len(self._handles)
        heads = (layer.num_q_heads, layer.num_kv_heads, layer.num_kv_heads)
        q, k, v = (torch.randn(rows, each, layer.head_dim, generator=self._generator) for each in heads)
        return q, k, v


def measure(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Fill an arena by prompt steps, go back some blocks and decode until it is full; return what it holds then."""
    limit_malloc_caching()
    plan = KVPlan.parse(spec["kv"]).bind(equal_layers(**spec["shape"]), "bfloat16")
    count, seed = spec["num_sequences"], spec["seed"]
    _warm_up(plan, spec["arena_bytes"], count, seed)
    trim_malloc()
    before = rss_bytes()
    growing = Growing(plan, spec["arena_bytes"], count, seed)
    while growing.read(PROMPT_TOKENS):
        pass
    peaks: list[int] = []
    while not peaks:  # unfinished blocks take more room than sealed ones
        growing.cut(growing.length - STRIP_TOKENS)
        while (peak := growing.decode()) is not None:
            peaks.append(peak)
    growing.cut(growing.length)
    growing.store.check_integrity()
    report = growing.store.report()
    return {
        "num_tokens": report.num_tokens,
        "live_bytes": report.live_bytes,
        "free_bytes": report.free_bytes,
        "table_bytes": growing.table_bytes,
        "rss_grew_bytes": rss_bytes() - before,
        "num_decode_steps": len(peaks),
        "decode_peak_bytes": max(peaks),
        "last_decode_peak_bytes": peaks[-1],
    }


def _warm_up(plan: BoundPlan, arena_bytes: int, num_sequences: int, seed: int) -> None:
    """Run every kernel once and start the threads: what they keep is no part of the store."""
    growing = Growing(plan, arena_bytes, num_sequences, seed)
    growing.read(PROMPT_TOKENS)
    growing.decode()
    growing.store.close_all()


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
