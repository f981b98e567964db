"""The measured process of ``kv-speed``: attention over all layers, in stores of several plans that take turns.

``python -m elbowroom.bench.kv_speed_child '{"size": "336M", "plans": ["plain(bf16)"], "contexts": [2048], ...}'``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from elbowroom.bench.filled_cache import import_random
from elbowroom.bench.kv_shapes import layers_of
from elbowroom.bench.machine import ForeignCPU
from elbowroom.bench.pairs import Play, Run, take_turns
from elbowroom.core import STRIP_TOKENS
from elbowroom.kernels import attention
from elbowroom.kv.base import KVStep
from elbowroom.kv.bound import BoundPlan
from elbowroom.kv.paged import PagedStore
from elbowroom.kv.plan import KVPlan
from elbowroom.memory.arena import Arena
from elbowroom.memory.ledger import Budget, Ledger
from elbowroom.memory.tiers import HostTier

_FLUSH_BYTES = 128 * 2**20
_MOST_PASSES = 4
_PASS_TOKENS = 16_384


class Flush:
    """Puts other bytes into the caches of the cores, as the weights do between two attentions of a decode step."""

    def __init__(self) -> None:
        self._bytes = np.ones(_FLUSH_BYTES // 8, dtype=np.int64)

    def __call__(self) -> None:
        """Read a buffer larger than the caches."""
        self._bytes.max()


class FilledStore:
    """A store with one sequence of random keys and values, and one decode row that is about to attend.

    Args:
        plan: how keys and values are kept.
        num_tokens: before the row, a multiple of 64.
        seed: of keys, values and queries.
    """

    def __init__(self, plan: BoundPlan, num_tokens: int, seed: int) -> None:
        self._layers = plan.layers
        self.num_bytes = num_tokens // STRIP_TOKENS * plan.block_bytes
        """Bytes of the strips before the row."""
        spare = 4 * (plan.block_bytes + plan.tail_bytes)
        self.store = PagedStore(plan, Arena(HostTier(), Ledger(Budget({}))), 2 * self.num_bytes + spare)
        handle = self.store.open()
        import_random(self.store, handle, plan, self.store.fingerprint, num_tokens, seed)
        step = KVStep((handle,), np.asarray([0, 1], dtype=np.int32), np.asarray([num_tokens], dtype=np.int64))
        assert self.store.reserve(step) is None, "twice the bytes hold one more token"
        found = (self.store.strips(layer, step) for layer in range(len(plan.layers)))
        self._strips = [strips for strips in found if strips is not None]
        # Other numbers than those of the stored keys, or some queries would find themselves.
        generator, layer = torch.Generator().manual_seed(seed + 1), plan.layers[0]
        heads = (layer.num_q_heads, layer.num_kv_heads, layer.num_kv_heads)
        self._q, k, v = (torch.randn(1, each, layer.head_dim, generator=generator) for each in heads)
        self._out = torch.empty(1, layer.num_q_heads, layer.v_head_dim)
        for strips in self._strips:
            attention.append(strips, k, v)

    def attend(self) -> float:
        """Return the seconds of attention over all layers."""
        started = time.perf_counter()
        for strips, layer in zip(self._strips, self._layers, strict=True):
            attention.attend(strips, layer, self._q, self._out)
        return time.perf_counter() - started


def measure(spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return for each context and plan the bytes read and the seconds of each round."""
    flush, results = Flush(), []
    for num_tokens in spec["contexts"]:
        stores = {kv: _filled(spec, kv, num_tokens) for kv in spec["plans"]}
        num_passes = max(1, min(_MOST_PASSES, _PASS_TOKENS // num_tokens))
        sides = {kv: _side(store, flush, num_passes) for kv, store in stores.items()}
        with ForeignCPU() as foreign:
            turns = take_turns(sides, spec["num_rounds"])
        for kv, store in stores.items():
            seconds = turns.figures(kv, "seconds")
            row = {"context_tokens": num_tokens, "kv": kv, "num_bytes": store.num_bytes, "seconds": seconds}
            results.append(row | {"other_cpu_share": foreign.share})
            store.store.close_all()
        sys.stderr.write(f"  attention behind {num_tokens} tokens\n")
    return results


def _filled(spec: Mapping[str, Any], kv: str, num_tokens: int) -> FilledStore:
    return FilledStore(KVPlan.parse(kv).bind(layers_of(spec["size"]), "bfloat16"), num_tokens, spec["seed"])


def _side(store: FilledStore, flush: Flush, num_passes: int) -> Play:
    """Return a turn: the mean seconds of some passes, each with cold caches."""

    def play(_: int) -> Run:
        total = 0.0
        for _number in range(num_passes):
            flush()
            total += store.attend()
        return {"seconds": total / num_passes}

    return play


if __name__ == "__main__":
    print(json.dumps({"attention": measure(json.loads(sys.argv[1]))}))
