"""Channels of keys sorted by magnitude before they are stored, and of queries alike: scores stay what they are.

Trukhanov and Soloveychik (arXiv 2403.20137) sort channels so that outliers share blocks of a block floating point
format. Two orders, from root mean squares behind RoPE over a calibration text, for each KV head: by *magnitude* of
keys, as in the paper; and by *ratio* of keys to queries. What shares a block with an outlier is rounded to the exponent
of that, and the error weighs as much as the query there: channels with small queries should join the outliers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from elbowroom.engine.executors.local import StoreContext
from elbowroom.kv.base import KVStep, KVStore
from elbowroom.models.decoder import Decoder
from elbowroom.models.dense import DenseContext

Order = Literal["magnitude", "ratio"]


class _Measuring(DenseContext):
    """Notes the magnitude of every channel of the keys and queries it is given, by layer and KV head."""

    def __init__(self, decoder: Decoder, length: int) -> None:
        super().__init__(decoder.config.layers, 1, length)
        self.keys: list[Tensor] = []
        self.queries: list[Tensor] = []

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Note, and attend."""
        self.keys.append(k.float().square().mean(0).sqrt())
        groups = q.float().square().mean(0).view(k.shape[1], -1, q.shape[2])
        self.queries.append(groups.mean(1).sqrt())
        return super().attend(layer, q, k, v)


@torch.inference_mode()
def channel_orders(decoder: Decoder, tokens: Sequence[int]) -> dict[Order, list[Tensor]]:
    """Return, by layer, the channels of each KV head from the smallest to the largest, int64 ``[Hkv, D]``."""
    context = _Measuring(decoder, len(tokens))
    decoder(torch.tensor(tokens), context)
    ratios = [k / q.clamp(min=torch.finfo(q.dtype).tiny) for k, q in zip(context.keys, context.queries, strict=True)]
    return {
        "magnitude": [each.argsort(dim=-1) for each in context.keys],
        "ratio": [each.argsort(dim=-1) for each in ratios],
    }


class SortedContext(StoreContext):
    """Hands keys and queries to the store with their channels in a given order."""

    def __init__(self, store: KVStore, step: KVStep, order: Sequence[Tensor]) -> None:
        super().__init__(store, step)
        self._order = order

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return attention ``[N, Hq, Dv]`` over everything stored."""
        order = self._order[layer]
        of_queries = order.repeat_interleave(q.shape[1] // k.shape[1], dim=0)
        return super().attend(layer, q.gather(2, of_queries.expand_as(q)), k.gather(2, order.expand_as(k)), v)


def sorting(order: Sequence[Tensor]) -> Callable[[KVStore, KVStep], SortedContext]:
    """Return what makes contexts that sort."""
    return lambda store, step: SortedContext(store, step, order)
