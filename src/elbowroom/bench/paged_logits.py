"""Logits of every position of a prompt through the KV store, chunk by chunk, as the engine computes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from elbowroom.engine.executors.local import StoreContext
from elbowroom.errors import OutOfBudget
from elbowroom.kv.base import KVStep, KVStore
from elbowroom.kv.paged import PagedStore
from elbowroom.kv.plan import KVPlan
from elbowroom.memory.arena import Arena
from elbowroom.memory.ledger import Budget, Ledger
from elbowroom.memory.tiers import HostTier
from elbowroom.models.base import TorchScratch
from elbowroom.models.decoder import Decoder
from elbowroom.models.path import ComputePath

_CAPACITY_BYTES = 256 * 2**20


@torch.inference_mode()
def paged_logits(
    decoder: Decoder,
    tokens: Sequence[int],
    chunk: int,
    path: ComputePath,
    kv: str | KVPlan = "plain",
    contexts: Callable[[KVStore, KVStep], StoreContext] = StoreContext,
) -> Tensor:
    """Return the logits ``[T, V]`` of ``tokens``, read in chunks of ``chunk`` on ``path`` with KV kept as ``kv``.

    ``contexts`` makes what stands between the model and the store in each step.

    Raises:
        OutOfBudget: the prompt needs more than 256 MiB of KV cache.
    """
    dtype = str(decoder.final_norm.weight.dtype).removeprefix("torch.")
    plan = KVPlan.parse(kv).bind(decoder.config.layers, dtype)
    store = PagedStore(plan, Arena(HostTier(), Ledger(Budget({}))), _CAPACITY_BYTES)
    handle, pieces, model = store.open(), [], path.model(decoder)
    for start in range(0, len(tokens), chunk):
        part = tokens[start : start + chunk]
        positions = np.arange(start, start + len(part), dtype=np.int64)
        step = KVStep((handle,), np.asarray([0, len(part)], dtype=np.int32), positions)
        if store.reserve(step) is not None:
            raise OutOfBudget(f"{len(tokens)} tokens need more than {_CAPACITY_BYTES} bytes of KV cache")
        context, rows = contexts(store, step), torch.arange(len(part))
        pieces.append(model.step(torch.tensor(part), context, rows, TorchScratch()))
        store.end_step(step)
    store.close_all()
    return torch.cat(pieces)
