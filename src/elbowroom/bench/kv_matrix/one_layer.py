"""One attention layer in a store, fed with chosen queries, keys and values: for claims about arithmetic."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from elbowroom.core import LayerSpec
from elbowroom.errors import ElbowroomError
from elbowroom.kv.base import KVStep, PromptPart, Want
from elbowroom.kv.paged import PagedStore
from elbowroom.kv.plan import KVPlan
from elbowroom.memory import Arena, Budget, HostTier, Ledger

_CAPACITY = 2**28


class OneLayer:
    """A sequence of a layer.

    Args:
        plan: text of a KV plan.
        spec: the layer.
        dtype: of activations.
    """

    def __init__(self, plan: str, spec: LayerSpec, dtype: str = "float32") -> None:
        self.bound = KVPlan.parse(plan).bind([spec], dtype)
        self.store = PagedStore(self.bound, Arena(HostTier(), Ledger(Budget({}))), _CAPACITY)
        self._handle = self.store.open()

    def run(self, q: Tensor, k: Tensor, v: Tensor, part: PromptPart = PromptPart.NONE) -> Tensor:
        """Append rows ``[n, heads, D]`` and return their attention ``[n, Hq, Dv]``."""
        count, start = q.shape[0], self.store.num_tokens(self._handle)
        parts = np.array([part], dtype=np.int8)
        starts = np.array([0, count], dtype=np.int32)
        step = KVStep((self._handle,), starts, np.arange(start, start + count), parts)
        missing = self.store.reserve(step)
        if missing is not None:
            raise ElbowroomError(f"{missing.needed_bytes} bytes of KV memory are missing", "lower the length")
        out = self.store.attend(0, q, k, v, step, Want()).out
        self.store.end_layer(0, step)
        self.store.end_step(step)
        return out

    def strip_bytes(self) -> int:
        """Return the bytes of the strips that are sealed."""
        report = self.store.report()
        return (report.num_strips - 1) * self.bound.formats[0].strip_bytes


def dense(spec: LayerSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return attention ``[Hq, Dv]`` of one query ``[Hq, D]`` on keys and values ``[n, Hkv, D]``, in float64."""
    keys, values = (x.double().repeat_interleave(spec.group_size, dim=1) for x in (k, v))
    weights = torch.einsum("hd,nhd->hn", q.double() * spec.scale, keys).softmax(1)
    return torch.einsum("hn,nhd->hd", weights, values)
