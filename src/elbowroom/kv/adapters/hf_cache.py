"""A transformers cache whose keys and values lie in a KV store."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from elbowroom.errors import RequestError
from elbowroom.kv.adapters.hf_attention import mark
from elbowroom.kv.adapters.hf_batch import PaddedBatch
from elbowroom.kv.adapters.hf_mask import PaddingMask
from elbowroom.kv.adapters.hf_passes import Passes
from elbowroom.kv.adapters.hf_prompts import Prompts
from elbowroom.kv.base import KVReport
from elbowroom.kv.paged import PagedStore
from elbowroom.memory.arena import Arena


@dataclass(slots=True)
class SharedStore:
    """A store that a cache and its forks use; the last one to leave closes it."""

    store: PagedStore
    arena: Arena
    on_close: Callable[[], None]
    num_users: int = 0

    def leave(self) -> None:
        """Free everything when nobody is left."""
        self.num_users -= 1
        if self.num_users == 0:
            self.store.close_all()
            self.on_close()


class StoreLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer of a StoreCache; rows and columns are those of the whole cache."""

    is_croppable = True
    supports_early_init = False

    def __init__(self, passes: Passes, index: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_initialized = True
        self._passes, self._index = passes, index

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the store is there already."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the new keys and values alone; the attention function brings them back, with queries and mask."""
        self._passes.enter(self._index)
        mark(key_states, self)
        return key_states, value_states

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: PaddingMask, options: dict[str, Any]) -> Tensor:
        """Store ``k, v [B, Hkv, T, D]`` and return attention ``[B, T, Hq, Dv]`` of ``q [B, Hq, T, D]``."""
        return self._passes.attend(self._index, q, k, v, mask, options)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the columns that a mask is made for, and the first of them: all, whatever the layer's window."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Return the cached columns, padding included."""
        return self._passes.batch.num_columns

    def get_max_length(self) -> int:
        """Return that there is no limit but memory."""
        return -1


class StoreCache(Cache):
    """Keys and values of a batch, kept as a KV plan says; for ``past_key_values=`` of transformers models.

    Padding is never stored. ``close`` (or leaving a ``with`` block) frees everything and gives the model back the
    attention that it had; copies (``fork``, ``copy.deepcopy``) share their tokens and are closed one by one.

    Args:
        shared: where the bytes are.
        batch: rows to begin with; None for an empty cache.
    """

    def __init__(self, shared: SharedStore, batch: PaddedBatch | None = None) -> None:
        plan, shared.num_users = shared.store.plan, shared.num_users + 1
        self._shared = shared
        batch = batch or PaddedBatch(shared.store, prompts=Prompts(plan.chosen_layers, plan.interval))
        self._passes = Passes(shared.store, plan.layers, batch, shared.arena)
        self.ledger = shared.arena.ledger
        super().__init__(layers=[StoreLayer(self._passes, index) for index in range(len(plan.layers))])

    @property
    def batch_size(self) -> int:
        """Rows of the batch; -1 before the first pass."""
        return self._passes.batch.num_rows or -1

    def report(self) -> KVReport:
        """Return what the store holds: this cache's tokens and those of its forks."""
        return self._shared.store.report()

    def reading(self) -> AbstractContextManager[None]:
        """Return a ``with`` block in which calls of the model read parts of a prompt; the next call behind it ends it.

        ``generate`` needs none, and neither does a prompt that is read in one call.
        """
        return self._passes.batch.prompts.reading()

    def generating(self, until: int) -> AbstractContextManager[None]:
        """Return a ``with`` block in which the prompt ends at column ``until``: how ``generate`` says so."""
        return self._passes.batch.prompts.generating(until)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last columns; ``tokens_to_remove`` is their number, negated, as in transformers.

        Raises:
            RequestError: there are fewer columns, or the number is positive.
            IntegrityError: the plan has sealed or dropped what would be needed; nothing changes then.
        """
        if tokens_to_remove > 0:
            raise RequestError(f"crop({tokens_to_remove}) would add tokens", "give minus the tokens to remove")
        self._idle()
        if tokens_to_remove:
            self._passes.batch.crop(-tokens_to_remove)
            self._shared.arena.trim()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i what row ``beam_idx[i]`` was; beams that come from one row share its tokens."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Any) -> None:
        """Keep the rows ``indices`` (numbers or a mask), in that order."""
        self._idle()
        if self.get_seq_length():
            rows = torch.arange(self._passes.batch.num_rows)[indices]
            self._passes.batch.select(rows.flatten().tolist())
            self._shared.arena.trim()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Follow each row by copies that share its tokens, ``repeats`` in all."""
        self.batch_select_indices(torch.arange(self._passes.batch.num_rows).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget all rows and free their bytes."""
        self._idle()
        self._passes.batch.clear()
        self._shared.arena.trim(0.0)

    def fork(self) -> StoreCache:
        """Return a cache that shares all tokens, for another continuation; close it by itself."""
        self._idle()
        return StoreCache(self._shared, self._passes.batch.fork())

    def __deepcopy__(self, memo: dict[int, Any]) -> StoreCache:
        return self.fork()

    def close(self) -> None:
        """Free everything and give the model its attention back; a second close does nothing."""
        if not self._passes.closed:
            self.reset()
            self._passes.closed = True
            self._shared.leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _idle(self) -> None:
        """Leave no pass half done.

        Raises:
            RequestError: the cache is closed.
        """
        if self._passes.closed:
            raise RequestError("the cache is closed", "make another one by KVPlan.for_hf(model)")
        self._passes.drop()
