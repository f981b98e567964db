"""A store and, beside it, every sequence as plain tensors: each step is checked against dense attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from elbowroom.core import LayerSpec
from elbowroom.kv import AttnOut, BoundPlan, ContiguousStore, KVHandle, KVPlan, KVStep, PagedStore, Want
from elbowroom.kv.pool import ABSENT
from elbowroom.memory import Arena, Budget, HostTier, Ledger

BLOCK = 64
NOTHING = Want()


def make_spec(q_heads: int = 2, kv_heads: int = 1, dim: int = 8, v_dim: int = 8, **options: Any) -> LayerSpec:
    base = LayerSpec(
        num_q_heads=q_heads, num_kv_heads=kv_heads, head_dim=dim, v_head_dim=v_dim, scale=dim**-0.5, rope=None
    )
    return dataclasses.replace(base, **options)


FULL = make_spec()  # a strip is exactly one page
MIXED = [
    make_spec(),
    make_spec(kv_heads=2, q_heads=4, dim=4, window=40),  # strips that share pages
    make_spec(q_heads=3, kv_source=0, window=70),
    make_spec(window=100, softcap=2.0, q_heads=1),
    make_spec(kv_heads=2, q_heads=2, dim=4, kv_source=1, window=20),
]


WIDE = [dataclasses.replace(spec, head_dim=32, v_head_dim=16) for spec in MIXED]


@dataclasses.dataclass
class Reference:
    """One sequence as plain tensors: for each layer all keys and values ``[n, Hkv, D]``, expired or not."""

    k: list[Tensor]
    v: list[Tensor]
    expired: list[int]
    """For each layer, leading blocks that must be gone."""
    open_from: int = 0
    """Blocks from this one on are held as they were computed, where full ones are sealed."""

    @property
    def num_tokens(self) -> int:
        return self.k[0].shape[0]

    def prefix(self, count: int) -> Reference:
        k, v = [k[:count].clone() for k in self.k], [v[:count].clone() for v in self.v]
        return Reference(k, v, list(self.expired), count // BLOCK)

    def pick(self, rows: list[int]) -> Reference:
        return Reference([k[rows] for k in self.k], [v[rows] for v in self.v], self.expired, len(rows) // BLOCK)


Pair = tuple[Tensor, Tensor]


def dense(
    spec: LayerSpec, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, sealed: Pair | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return out ``[n, Hq, Dv]``, lse ``[n, Hq]`` and probabilities ``[n, Hq, S]`` in float64.

    With ``sealed`` keys and values, a query reads those of the blocks before its own one.
    """
    distance = positions[:, None] - torch.arange(k.shape[0])[None, :]
    hidden, count = (distance < 0) | (distance >= (spec.window or 10**9)), k.shape[0]
    if sealed is not None:
        own = positions[:, None] // BLOCK == torch.arange(count)[None, :] // BLOCK
        hidden = torch.cat([hidden | ~own, hidden | own], dim=1)
        k, v = torch.cat([k, sealed[0]]), torch.cat([v, sealed[1]])
    k, v = (x.double().repeat_interleave(spec.group_size, dim=1) for x in (k, v))
    scores = torch.einsum("nhd,shd->nhs", q.double(), k) * spec.scale
    if spec.softcap is not None:
        scores = torch.tanh(scores / spec.softcap) * spec.softcap
    scores = scores.masked_fill(hidden[:, None, :], -torch.inf)
    probs = scores.softmax(dim=-1)
    out, lse = torch.einsum("nhs,shd->nhd", probs, v), scores.logsumexp(dim=-1)
    return out, lse, probs if sealed is None else probs[..., :count] + probs[..., count:]


def assert_close(made: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(made.double(), expected, rtol=1e-4, atol=2e-5)


def assert_nearly(made: Tensor, expected: Tensor) -> None:
    """Products with integer codes take queries and weights of 8 or 16 bits.

    Values are of the order of 1, so what is rounded is, however small their sum or a lone log-sum-exp may be.
    """
    assert float((made - expected).norm()) < 0.03 * float(expected.norm()) + 0.03


class World:
    """A store and, beside it, the plain tensors of every sequence; each step is checked against them."""

    def __init__(
        self,
        layers: Sequence[LayerSpec] = (FULL, FULL),
        capacity: int = 2**24,
        limit: int | None = None,
        plan: str = "plain",
        model_id: bytes = b"",
    ) -> None:
        self.layers = list(layers)
        self.ledger = Ledger(Budget({} if limit is None else {"host": limit}))
        self.arena = Arena(HostTier(), self.ledger)
        self.store = self.make_store(KVPlan.parse(plan).bind(layers, "float32"), capacity, model_id)
        self.refs: dict[KVHandle, Reference] = {}
        self.random = torch.Generator().manual_seed(1)

    def make_store(self, plan: BoundPlan, capacity: int, model_id: bytes) -> Any:
        return PagedStore(plan, self.arena, capacity, model_id)

    def rand(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random)

    def open(self, num_tokens: int = 0) -> KVHandle:
        handle = self.store.open()
        empty = [torch.empty(0, spec.num_kv_heads, spec.head_dim) for spec in self.layers]
        empty_v = [torch.empty(0, spec.num_kv_heads, spec.v_head_dim) for spec in self.layers]
        self.refs[handle] = Reference(empty, empty_v, [0] * len(self.layers))
        if num_tokens:
            self.append((handle, num_tokens))
        return handle

    def fork(self, handle: KVHandle, num_tokens: int | None = None) -> KVHandle:
        twin = self.store.fork(handle, num_tokens)
        ref = self.refs[handle]
        self.refs[twin] = ref.prefix(ref.num_tokens if num_tokens is None else num_tokens)
        return twin

    def truncate(self, handle: KVHandle, num_tokens: int) -> int:
        before = self.store.report().live_bytes
        freed = self.store.truncate(handle, num_tokens)
        assert freed == before - self.store.report().live_bytes
        self.refs[handle] = self.refs[handle].prefix(num_tokens)
        return freed

    def accept(self, handle: KVHandle, start: int, kept: Sequence[int]) -> None:
        """Keep some positions of the last step, which began at ``start``."""
        self.store.accept(handle, np.array(kept, dtype=np.int64))
        self.refs[handle] = self.refs[handle].pick([*range(start), *kept])

    def close(self, handle: KVHandle) -> int:
        before = self.store.report().live_bytes
        freed = self.store.close(handle)
        assert freed == before - self.store.report().live_bytes
        del self.refs[handle]
        return freed

    def make_step(self, rows: Sequence[tuple[KVHandle, Sequence[int]]]) -> KVStep:
        starts = np.cumsum([0, *(len(positions) for _, positions in rows)]).astype(np.int32)
        flat = np.concatenate([np.asarray(positions, dtype=np.int64) for _, positions in rows])
        return KVStep(tuple(handle for handle, _ in rows), starts, flat)

    def append_step(self, *rows: tuple[KVHandle, int]) -> KVStep:
        sizes = [(handle, self.refs[handle].num_tokens, count) for handle, count in rows]
        return self.make_step([(handle, range(start, start + count)) for handle, start, count in sizes])

    def append(self, *rows: tuple[KVHandle, int]) -> list[AttnOut]:
        """Append tokens to some sequences in one step; everything must fit."""
        step = self.append_step(*rows)
        assert self.store.reserve(step) is None
        return self.run(step)

    def run(self, step: KVStep, want: Want = NOTHING) -> list[AttnOut]:
        """Run a reserved step on random rows and compare all attention with the dense one."""
        held = self.state()
        self.check_tables(step)
        outs = []
        for layer, spec in enumerate(self.layers):
            count = len(step.positions)
            q = self.rand(count, spec.num_q_heads, spec.head_dim)
            k, v = (self.rand(count, spec.num_kv_heads, dim) for dim in (spec.head_dim, spec.v_head_dim))
            self.write_reference(layer, step, k, v)
            outs.append(self.store.attend(layer, q, k, v, step, want))
            self.compare(layer, step, q, outs[-1])
            self.store.end_layer(layer, step)
        assert self.state() == held, "attend took or freed strips"
        before = {handle: self.store.num_tokens(handle) for handle in step.handles}
        self.store.end_step(step)
        for handle in step.handles:
            start, end = before[handle], self.refs[handle].num_tokens
            self.expire(handle, max(start, end - 64))
            certain = end if end - start > 64 else min(start + 1, end)
            self.refs[handle].open_from = max(self.refs[handle].open_from, certain // BLOCK)
        return outs

    def check_tables(self, step: KVStep) -> None:
        prepared: Any = step.prepared
        for row, handle in enumerate(step.handles):
            table, given = self.store._sequences[handle.id].table[: len(self.layers)], prepared.tables[:, row]
            assert np.array_equal(given[:, : table.shape[1]], table)
            assert (given[:, table.shape[1] :] == ABSENT).all()

    def write_reference(self, layer: int, step: KVStep, k: Tensor, v: Tensor) -> None:
        for row, handle in enumerate(step.handles):
            begin, end = int(step.row_starts[row]), int(step.row_starts[row + 1])
            positions = torch.from_numpy(step.positions[begin:end])
            ref = self.refs[handle]
            for stored, new in ((ref.k, self.rounded(0, k)), (ref.v, self.rounded(1, v))):
                grown = max(stored[layer].shape[0], int(positions[-1]) + 1)
                wider = torch.zeros(grown, *new.shape[1:])
                wider[: stored[layer].shape[0]] = stored[layer]
                wider[positions] = new[begin:end]
                stored[layer] = wider

    def rounded(self, part: int, x: Tensor) -> Tensor:
        """Return keys (part 0) or values (1) as the store gives them back."""
        codec: Any = self.store.plan.plan.layout
        if codec.name == "plain" or codec.seals:
            return x
        rows = codec.formats()[part]
        decoded: Tensor = rows.decode(rows.encode(x))
        return decoded

    def sealed(self, layer: int, ref: Reference) -> Pair | None:
        """Return all full blocks of a sequence as the codec gives them back; others are as they are."""
        codec: Any = self.store.plan.plan.layout
        if not codec.seals:
            return None
        k, v = ref.k[layer].clone(), ref.v[layer].clone()
        fmt = self.store.plan.formats[layer]
        strip = torch.zeros(fmt.strip_bytes, dtype=torch.uint8)
        for start in range(0, ref.num_tokens // BLOCK * BLOCK, BLOCK):
            rows = slice(start, start + BLOCK)
            codec.store(strip, fmt, torch.arange(BLOCK), k[rows].transpose(0, 1), v[rows].transpose(0, 1))
            k[rows], v[rows] = (part.transpose(0, 1) for part in codec.open(strip, fmt))
        return k, v

    def compare(self, layer: int, step: KVStep, q: Tensor, got: AttnOut) -> None:
        spec = self.layers[layer]
        source = layer if spec.kv_source is None else spec.kv_source
        for row, handle in enumerate(step.handles):
            rows = slice(int(step.row_starts[row]), int(step.row_starts[row + 1]))
            ref, positions = self.refs[handle], torch.from_numpy(step.positions[rows])
            sealed = self.sealed(source, ref)
            out, lse, probs = dense(spec, q[rows], ref.k[source], ref.v[source], positions, sealed)
            close = (
                assert_nearly if self.store.plan.plan.codec.name in ("int8", "bfp", "kivi", "planes") else assert_close
            )
            close(got.out[rows], out)
            close(got.lse[rows], lse)
            if got.colsum is not None:
                sums = probs.sum(dim=0).view(spec.num_kv_heads, spec.group_size, -1).sum(dim=1)
                close(got.colsum[row], sums)
            if got.pmax is not None:
                close(got.pmax[rows], probs.amax(dim=-1))

    def expire(self, handle: KVHandle, num_tokens: int) -> None:
        ref = self.refs[handle]
        for layer, spec in enumerate(self.layers):
            if spec.window is not None and spec.kv_source is None:
                ref.expired[layer] = max(ref.expired[layer], max(num_tokens - spec.window + 1, 0) // BLOCK)

    def may_go_back(self, handle: KVHandle, num_tokens: int) -> bool:
        """Whether all layers still hold what tokens from ``num_tokens`` on read."""
        windows = [spec.window if spec.kv_source is None else None for spec in self.layers]
        if num_tokens % BLOCK and not self.is_open(handle, num_tokens // BLOCK):
            return False
        return all(
            window is None or expired * BLOCK <= max(num_tokens - window + 1, 0)
            for window, expired in zip(windows, self.refs[handle].expired, strict=True)
        )

    def is_open(self, handle: KVHandle, block: int) -> bool:
        """Whether the tokens of a block are held as they were computed."""
        codec: Any = self.store.plan.plan.layout
        return not codec.seals or block >= self.refs[handle].open_from

    def state(self) -> tuple[object, ...]:
        """Everything that a refused call must leave alone."""
        store = self.store
        tables = {number: (seq.table.tolist(), seq.num_tokens) for number, seq in store._sequences.items()}
        refs = [
            (np.argwhere(pool._refs).tolist(), pool._refs.sum(), pool.num_free_groups) for pool in store._pools.pools
        ]
        return tables, refs, self.ledger.snapshot()

    def check(self) -> None:
        """Compare every stored token of every sequence bit by bit, the blocks that are gone, and the charges."""
        store = self.store
        store.check_integrity()
        assert self.ledger.held("kv", "host") == store.report().live_bytes
        assert {KVHandle(number) for number in store._sequences} == set(self.refs)
        for handle, ref in self.refs.items():
            assert store.num_tokens(handle) == ref.num_tokens
            table = store._sequences[handle.id].table
            for layer, spec in enumerate(self.layers):
                if spec.kv_source is not None:
                    continue
                gone = ref.expired[layer]
                assert (table[layer, :gone] == ABSENT).all()
                blocks = range(gone, -(-ref.num_tokens // BLOCK))
                opened = [self.open_block(layer, int(block), table[:, block], ref) for block in blocks]
                for part, expected in enumerate(self.sealed(layer, ref) or (ref.k[layer], ref.v[layer])):
                    if opened:
                        held = torch.cat([pair[part] for pair in opened], dim=1).transpose(0, 1)
                        assert torch.equal(held[: ref.num_tokens - gone * BLOCK], expected[gone * BLOCK :])

    def open_block(self, layer: int, block: int, column: Any, ref: Reference) -> Pair:
        """Return what the store gives back of one block."""
        store = self.store
        number = store._pools.number_of[layer]
        if store._pools.tails and block == ref.num_tokens // BLOCK:
            pool = store._pools.tails[number].pool
            return store._open_codec.open(pool.strip(int(column[len(self.layers) + layer])), pool.fmt)
        pool = store._pools.main[number].pool
        return store._codec.open(pool.strip(int(column[layer])), pool.fmt)


class ContiguousWorld(World):
    """The same around a ContiguousStore."""

    row_tokens = 1024

    def make_store(self, plan: BoundPlan, capacity: int, model_id: bytes) -> Any:
        return ContiguousStore(plan, self.arena, capacity, model_id, num_rows=8, row_tokens=self.row_tokens)

    def check_tables(self, step: KVStep) -> None:
        for layer in range(len(self.layers)):
            strips = self.store.strips(layer, step)
            entries = np.diff(strips.table.astype(np.int64), axis=1)
            assert (entries * 64 == strips.fmt.strip_bytes).all(), "strips do not follow one another"

    def state(self) -> tuple[object, ...]:
        sequences = {
            number: (each.row, each.num_tokens, each.first.tolist(), each.end.tolist(), each.expired_blocks.tolist())
            for number, each in self.store._sequences.items()
        }
        return sequences, sorted(self.store._space._left), self.store._space._fresh, self.ledger.snapshot()

    def check(self) -> None:
        """Compare every stored token bit by bit, and the pages with the tokens that they are for."""
        store = self.store
        store.check_integrity()
        assert self.ledger.held("kv", "host") == store.report().live_bytes
        assert {KVHandle(number) for number in store._sequences} == set(self.refs)
        for handle, ref in self.refs.items():
            assert store.num_tokens(handle) == ref.num_tokens
            for layer, spec in enumerate(self.layers):
                gone = ref.expired[layer] * BLOCK
                if spec.kv_source is None:
                    k, v = store.tensors(handle, layer)
                    assert torch.equal(k[gone:].float(), ref.k[layer][gone:])
                    assert torch.equal(v[gone:].float(), ref.v[layer][gone:])


BOTH = pytest.mark.parametrize("kind", [World, ContiguousWorld], ids=["paged", "contiguous"])
"""For tests of what every store does."""
