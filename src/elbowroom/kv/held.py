"""What a store holds: counted, and decoded token by token."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from elbowroom.core import STRIP_TOKENS
from elbowroom.kv.base import KVReport
from elbowroom.kv.bound import BoundPlan
from elbowroom.kv.codecs import Codec, token_codec
from elbowroom.kv.holding import blocks_of
from elbowroom.kv.layout import PoolSet
from elbowroom.kv.pool import StripPool
from elbowroom.kv.read_count import ReadCount
from elbowroom.kv.sequence import Sequence


def report(pools: PoolSet, plan: BoundPlan, sequences: Rows[Sequence], reads: ReadCount | None) -> KVReport:
    """Return the bytes and tokens of ``sequences``, which are all that ``pools`` hold, and what was read of them."""
    tokens = sum(sequence.num_tokens for sequence in sequences)
    layers = [layer for layer in plan.layers if layer.kv_source is None]
    width = sum(layer.num_kv_heads * (layer.head_dim + layer.v_head_dim) for layer in layers)
    extents = [pools.extent(each, each.num_tokens) for each in sequences]
    dropped = sum(sum(extent.dropped) for extent in extents)
    choosing = sum(layer.window is None for layer in layers)
    return KVReport(
        live_bytes=pools.live_bytes,
        free_bytes=pools.free_bytes,
        capacity_bytes=pools.capacity.num_bytes,
        num_sequences=len(sequences),
        num_tokens=tokens,
        num_strips=sum(pool.num_strips for pool in pools.pools),
        num_dropped=STRIP_TOKENS * dropped // max(choosing, 1),
        num_shared_strips=sum(pool.num_shared_strips for pool in pools.pools),
        bf16_bytes=tokens * width * 2,
        reads=reads,
    )


def read_tokens(
    pools: PoolSet, sequence: Sequence, layer: int, span: tuple[int, int], codec: Codec
) -> tuple[Tensor, Tensor]:
    """Return keys ``[n, Hkv, Dk]`` and values ``[n, Hkv, Dv]`` of a span of tokens that begins with a block.

    What lies open is read as it was computed; what a sliding window has dropped is 0.

    Args:
        pools: where strips lie.
        sequence: whose tokens.
        layer: one with keys of its own.
        span: first token and the one behind the last.
        codec: of the layer's strips.
    """
    number, (start, stop) = pools.number_of[layer], span
    places = [(layer, pools.main[number].pool, codec)]
    if pools.tails:
        places.insert(0, (layer + len(pools.source_of), pools.tails[number].pool, token_codec(codec)))
    strips = [_open(sequence, block, places) for block in range(start // STRIP_TOKENS, blocks_of(stop))]
    k, v = (torch.cat(parts, 1)[:, : stop - start].transpose(0, 1).contiguous() for parts in zip(*strips, strict=True))
    return k, v


def _open(sequence: Sequence, block: int, places: Rows[tuple[int, StripPool, Codec]]) -> tuple[Tensor, Tensor]:
    """Return keys and values ``[Hkv, 64, D]`` of a block, from the first of the rows that holds it."""
    for row, pool, codec in places:
        if sequence.holds(row, block):
            k, v = codec.open(pool.strip(int(sequence.table[row, block])), pool.fmt)
            return k.float(), v.float()
    fmt = places[0][1].fmt
    k, v = (torch.zeros(fmt.num_kv_heads, STRIP_TOKENS, width) for width in (fmt.head_dim, fmt.v_head_dim))
    return k, v
