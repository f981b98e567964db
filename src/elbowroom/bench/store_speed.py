"""How fast a batch decodes from each store, and what its reservations cost; part of ``stores``.

A step is what an engine asks of a store: reserve, then append and attend in every layer, then end the step. All stores
hold the same keys and values and take turns.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from elbowroom.bench.base import Row
from elbowroom.bench.pairs import Play, Run, Turns, take_turns
from elbowroom.bench.store_waste import run_lengths
from elbowroom.kernels import attention
from elbowroom.kv.base import KVHandle, KVStep, KVStore
from elbowroom.kv.bound import BoundPlan
from elbowroom.kv.contiguous import ContiguousStore
from elbowroom.kv.paged import PagedStore
from elbowroom.memory.arena import Arena
from elbowroom.memory.ledger import Budget, Ledger
from elbowroom.memory.meter import rss_bytes
from elbowroom.memory.tiers import HostTier

_CHUNK = 256


def make_store(name: str, plan: BoundPlan, num_rows: int, row_tokens: int) -> tuple[KVStore, Arena]:
    """Return a store with room for ``num_rows`` sequences of ``row_tokens``."""
    arena = Arena(HostTier(), Ledger(Budget({})))
    if name == "paged":
        capacity = (row_tokens // 64 + 2) * num_rows * plan.block_bytes
        return PagedStore(plan, arena, capacity), arena
    static = name == "static"
    return ContiguousStore(plan, arena, 2**40, num_rows=num_rows, row_tokens=row_tokens, static=static), arena


class Decoding:
    """A store with a batch of sequences that grow together.

    Args:
        name: ``paged``, ``contiguous`` or ``static``.
        plan: layers and formats.
        num_rows: sequences.
        num_tokens: of each before the first step.
        most_tokens: that each can have.
        seed: of keys, values and queries.
    """

    def __init__(self, name: str, plan: BoundPlan, num_rows: int, num_tokens: int, most_tokens: int, seed: int) -> None:
        self.plan, self.num_rows = plan, num_rows
        self.store, self.arena = make_store(name, plan, num_rows, most_tokens)
        self.handles = tuple(self.store.open() for _ in range(num_rows))
        self._random = torch.Generator().manual_seed(seed)
        layer = plan.layers[0]
        self.rows = [
            torch.randn(num_rows, heads, width, generator=self._random)
            for heads, width in (
                (layer.num_q_heads, layer.head_dim),
                (layer.num_kv_heads, layer.head_dim),
                (layer.num_kv_heads, layer.v_head_dim),
            )
        ]
        self.fill(num_tokens)

    def fill(self, num_tokens: int) -> float:
        """Append tokens to all sequences; return the seconds of writing them."""
        layer, seconds = self.plan.layers[0], 0.0
        for handle in self.handles:
            for first in range(0, num_tokens, _CHUNK):
                count = min(_CHUNK, num_tokens - first)
                step = self._step((handle,), count)
                assert self.store.reserve(step) is None, "the store has room"
                k, v = (
                    torch.randn(count, layer.num_kv_heads, width, generator=self._random)
                    for width in (layer.head_dim, layer.v_head_dim)
                )
                began = time.perf_counter()
                for index in range(len(self.plan.layers)):
                    strips = self.store.strips(index, step)
                    assert strips is not None, "plain strips are always named"
                    attention.append(strips, k, v)
                seconds += time.perf_counter() - began
                self.store.end_step(step)
        return seconds

    def step(self) -> Tensor:
        """Decode a token of each sequence; return the last layer's output."""
        q, k, v = self.rows
        step = self._step(self.handles, 1)
        assert self.store.reserve(step) is None, "the store has room"
        out = q
        for index, layer in enumerate(self.plan.layers):
            strips = self.store.strips(index, step)
            assert strips is not None, "plain strips are always named"
            attention.append(strips, k, v)
            out, _ = attention.attend(strips, layer, q)
        self.store.end_step(step)
        return out

    def grow(self, num_tokens: int, handles: tuple[KVHandle, ...] | None = None) -> None:
        """Lengthen sequences, all if none are named, without writing their tokens."""
        for handle in self.handles if handles is None else handles:
            step = self._step((handle,), num_tokens)
            assert self.store.reserve(step) is None, "the store has room"
            self.store.end_step(step)

    def reserve_only(self) -> float:
        """Lengthen all sequences by a token that is not written; return the seconds of reserving and ending."""
        step = self._step(self.handles, 1)
        began = time.perf_counter()
        assert self.store.reserve(step) is None, "the store has room"
        self.store.end_step(step)
        return time.perf_counter() - began

    def run_bytes(self) -> float:
        """Return the mean bytes of a run when a sequence is moved."""
        step = self._step(self.handles, 1)
        assert self.store.reserve(step) is None, "the store has room"
        blocks = [self.store.num_tokens(handle) // 64 + 1 for handle in self.handles]
        return float(np.mean(run_lengths(self.store, step, len(self.plan.layers), blocks)))

    def _step(self, handles: tuple[KVHandle, ...], count: int) -> KVStep:
        starts = np.arange(len(handles) + 1, dtype=np.int32) * count
        first = [self.store.num_tokens(handle) for handle in handles]
        positions = np.concatenate([np.arange(each, each + count, dtype=np.int64) for each in first])
        return KVStep(handles, starts, positions)


def moved_row(name: str, plan: BoundPlan, num_rows: int, seed: int) -> Row:
    """Return how long the runs are of which sequences consist after many came, grew side by side, and went."""
    rng, side = np.random.default_rng(seed), Decoding(name, plan, num_rows, 0, 2048, seed)
    goals = rng.integers(1, 16, num_rows) * 128
    for _ in range(40 * num_rows):
        row = int(rng.integers(num_rows))
        if side.store.num_tokens(side.handles[row]) >= goals[row]:
            side.store.close(side.handles[row])
            side.handles = (*side.handles[:row], side.store.open(), *side.handles[row + 1 :])
            goals[row] = rng.integers(1, 16) * 128
        side.grow(int(rng.integers(1, 128)), side.handles[row : row + 1])
    held = [side.store.num_tokens(handle) for handle in side.handles if side.store.num_tokens(handle)]
    side.handles = tuple(handle for handle in side.handles if side.store.num_tokens(handle))
    return {"part": "moved", "store": name, "mean_tokens": float(np.mean(held)), "run_bytes": side.run_bytes()}


def decode_turns(sides: Mapping[str, Decoding], num_steps: int, num_rounds: int) -> Turns:
    """Return seconds of a step of every side, round by round."""
    return take_turns({name: _play(side, num_steps) for name, side in sides.items()}, num_rounds)


def _play(side: Decoding, num_steps: int) -> Play:
    def play(_: int) -> Run:
        began = time.perf_counter()
        for _number in range(num_steps):
            side.step()
        return {"seconds": (time.perf_counter() - began) / num_steps}

    return play


def sdpa_seconds(side: Decoding) -> tuple[float, float]:
    """Return the seconds of torch's attention over the plain tensors of a contiguous store, and its greatest error.

    The error is that of the last layer against our kernels.
    """
    store, (q, _, _) = side.store, side.rows
    assert isinstance(store, ContiguousStore)
    ours, seconds, error = side.step(), 0.0, 0.0
    for index in range(len(side.plan.layers)):
        for row, handle in enumerate(side.handles):
            k, v = (part.transpose(0, 1)[None] for part in store.tensors(handle, index))
            query = q[row][:, None][None].to(k.dtype)
            began = time.perf_counter()
            out = torch.nn.functional.scaled_dot_product_attention(query, k, v, enable_gqa=True)
            seconds += time.perf_counter() - began
            error = max(error, float((out[0, :, 0].float() - ours[row]).abs().max()))
    return seconds, error


def burst_row(plan: BoundPlan, num_rows: int, num_tokens: int, seed: int) -> Row:
    """Return how long the process holds the bytes of a burst behind its end, and what a second one costs."""
    side = Decoding("contiguous", plan, num_rows, 64, num_tokens + 64, seed)
    for handle in side.handles:
        side.store.close(handle)
    side.arena.trim(0.0)
    before = rss_bytes()
    times = []
    for _ in range(2):  # the second burst finds the pages of the first one
        side.handles = tuple(side.store.open() for _ in range(num_rows))
        times.append(side.fill(num_tokens))
        grown = rss_bytes() - before
        for handle in side.handles:
            side.store.close(handle)
    began = time.perf_counter()
    while rss_bytes() - before > 0.02 * grown and time.perf_counter() - began < 5:
        time.sleep(0.02)
        side.arena.trim()
    return {
        "part": "burst",
        "store": "contiguous",
        "burst_bytes": grown,
        "back_s": time.perf_counter() - began,
        "fill_fresh_s": times[0],
        "fill_warm_s": times[1],
    }
