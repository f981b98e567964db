"""A padded batch as transformers sees it, over sequences of a store that hold only its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from elbowroom.errors import IntegrityError, OutOfBudget, RequestError
from elbowroom.kv.adapters.hf_prompts import Prompts
from elbowroom.kv.base import KVHandle, KVStep, KVStore, PromptPart
from elbowroom.units import format_bytes

_NO_COLUMNS = torch.empty(0, 0, dtype=torch.bool)


@dataclass(frozen=True, slots=True)
class PaddedStep:
    """New columns of a padded batch, and the same tokens as packed rows of a store."""

    kv: KVStep | None
    """None: there is nothing but padding."""
    is_token: Tensor
    """bool ``[B, T]``."""
    is_dense: bool
    """No new column is padding."""
    part: PromptPart
    chooses: bool
    """Something is chosen from behind its layers: it cannot be undone from then on."""

    def pack(self, x: Tensor) -> Tensor:
        """Return ``[N, H, D]`` of ``x [B, H, T, D]``: row by row, without padding."""
        rows = x.transpose(1, 2)
        return rows.flatten(0, 1) if self.is_dense else rows[self.is_token]

    def unpack(self, packed: Tensor) -> Tensor:
        """Return ``[B, T, H, D]`` of ``packed [N, H, D]``, with zeros where there is padding."""
        if self.is_dense:
            return torch.unflatten(packed, 0, self.is_token.shape)
        padded = packed.new_zeros(*self.is_token.shape, *packed.shape[1:])
        padded[self.is_token] = packed
        return padded


class PaddedBatch:
    """Columns of B rows, each a token or padding; row r's tokens are one sequence of the store.

    What a forward pass adds counts when ``end`` is called. A pass that never got there is forgotten, and its strips
    are freed, by whatever comes next.

    Args:
        store: keeps the sequences; others may keep theirs there too.
        handles: the sequences of the rows; none before the first pass.
        is_token: bool ``[B, columns]``, of finished passes.
        prompts: which passes read and end prompts.
    """

    def __init__(
        self,
        store: KVStore,
        handles: Sequence[KVHandle] = (),
        is_token: Tensor = _NO_COLUMNS,
        prompts: Prompts | None = None,
    ) -> None:
        self.prompts = prompts or Prompts()
        self._store = store
        self._handles = list(handles)
        self._is_token = is_token
        self._step: PaddedStep | None = None
        self._is_lost = False

    @property
    def num_rows(self) -> int:
        """Rows B; 0 before the first pass."""
        return len(self._handles)

    @property
    def num_columns(self) -> int:
        """Columns of finished passes, padding included."""
        return self._is_token.shape[1]

    def begin(self, is_token: Tensor, num_new: int) -> PaddedStep:
        """Take what ``num_new`` more columns need and return them.

        Args:
            is_token: bool ``[B, columns + num_new]``: which columns are tokens, earlier ones too.
            num_new: columns of this pass.

        Raises:
            RequestError: the batch does not continue the stored one, or it is no prompt and no single tokens.
            OutOfBudget: the tokens do not fit; nothing changes then.
        """
        self._settle()
        self._check(is_token, num_new)
        part = self.prompts.part(self.num_columns, num_new)
        if part is PromptPart.END:
            self._check_ends(is_token)
        if self.num_rows != is_token.shape[0]:
            self.clear()
            self._handles = [self._store.open() for _ in range(is_token.shape[0])]
            self._is_token = is_token[:, :0]
        new = is_token[:, self.num_columns :]
        kv, chooses = self._kv_step(new, part), False
        if kv is not None:
            self._reserve(kv)
            layers = self.prompts.chosen_layers[:1]
            chooses = any(self._store.strips(layer, kv) is None for layer in layers)
        self._step = PaddedStep(kv, new, bool(new.all()), part, chooses)
        return self._step

    def end(self) -> None:
        """Make the columns of the pass final."""
        step, self._step = self._step, None
        assert step is not None
        if step.kv is not None:
            self._store.end_step(step.kv)
        self.prompts.end(step.part, self.num_columns, step.is_token.shape[1])
        self._is_token = torch.cat([self._is_token, step.is_token], dim=1)

    def abandon(self) -> None:
        """Forget a pass that did not end, and free what it took; if it chose among cached tokens, these are lost."""
        step, self._step = self._step, None
        if step is not None and step.chooses:
            held = self.num_columns
            self.clear()
            self._is_lost = held > 0
        elif step is not None:
            for handle in self._handles:
                self._store.truncate(handle, self._store.num_tokens(handle))

    def crop(self, num_removed: int) -> None:
        """Take the last ``num_removed`` columns away, from all rows or from none.

        Raises:
            RequestError: there are fewer.
            IntegrityError: the plan has sealed or dropped what would be needed; nothing changes then.
        """
        self._settle()
        if not 0 <= num_removed <= self.num_columns:
            raise RequestError(f"cannot remove {num_removed} of {self.num_columns} cached columns")
        kept, twins = self._is_token[:, : self.num_columns - num_removed], []
        try:
            for handle, count in zip(self._handles, kept.sum(1).tolist(), strict=True):
                twins.append(self._store.fork(handle, count))
        except IntegrityError:
            for twin in twins:
                self._store.close(twin)
            raise
        for handle in self._handles:
            self._store.close(handle)
        self._handles, self._is_token = twins, kept
        self.prompts.cut(self.num_columns)

    def select(self, rows: Sequence[int]) -> None:
        """Make row i what row ``rows[i]`` was; rows that are named more than once share their tokens."""
        self._settle()
        unused, chosen = set(range(self.num_rows)), []
        for row in rows:
            chosen.append(self._handles[row] if row in unused else self._store.fork(self._handles[row]))
            unused.discard(row)
        for row in unused:
            self._store.close(self._handles[row])
        self._handles, self._is_token = chosen, self._is_token[list(rows)]

    def fork(self) -> PaddedBatch:
        """Return a batch that shares all tokens."""
        self._settle()
        handles = [self._store.fork(handle) for handle in self._handles]
        return PaddedBatch(self._store, handles, self._is_token, self.prompts.fork())

    def clear(self) -> None:
        """Forget all rows and free their strips."""
        self._step = None
        for handle in self._handles:
            self._store.close(handle)
        self._handles, self._is_token = [], _NO_COLUMNS
        self._is_lost = False
        self.prompts.cut(0)

    def _settle(self) -> None:
        """Leave no pass half done.

        Raises:
            RequestError: the tokens were lost with one.
        """
        self.abandon()
        if self._is_lost:
            raise RequestError(
                "a pass died while a policy chose among the cached tokens, which are lost",
                "call cache.reset() and read the prompt again",
            )

    def _check(self, is_token: Tensor, num_new: int) -> None:
        """Refuse a batch of another shape, or one that calls stored tokens padding or the other way round."""
        past = self.num_columns
        if is_token.shape[1] != past + num_new:
            raise RequestError(
                f"an attention_mask of {is_token.shape[1]} columns for {past} cached and {num_new} new tokens",
                "give the mask of all tokens, cached ones included",
            )
        if past and is_token.shape[0] != self.num_rows:
            raise RequestError(
                f"a batch of {is_token.shape[0]} rows continues a cache of {self.num_rows}",
                "call cache.batch_select_indices() or cache.reset() first",
            )
        if past and not torch.equal(is_token[:, :past], self._is_token):
            raise RequestError(
                "the attention_mask calls cached tokens padding, or cached padding tokens",
                f"give the mask that the {past} cached columns came with, and the new ones behind it",
            )

    def _check_ends(self, is_token: Tensor) -> None:
        """Refuse to end the prompt of rows that have nothing but padding where it ends."""
        begun = self.prompts.begun
        if begun is None or not self.prompts.chosen_layers:
            return
        ended = is_token[:, begun : self.num_columns].any(1) & ~is_token[:, self.num_columns :].any(1)
        if ended.any():
            raise RequestError(
                f"row {int(ended.nonzero()[0])} has only padding in the pass that ends its prompt",
                "pad on the left, so that all prompts end together",
            )

    def _kv_step(self, new: Tensor, part: PromptPart) -> KVStep | None:
        counts = new.sum(1).numpy()
        active = np.flatnonzero(counts)
        if not active.size:
            return None
        handles = tuple([self._handles[row] for row in active.tolist()])
        counts = counts[active]
        starts = np.concatenate([[0], np.cumsum(counts)])
        firsts = np.asarray([self._store.num_tokens(handle) for handle in handles], dtype=np.int64)
        positions = np.repeat(firsts - starts[:-1], counts) + np.arange(starts[-1])
        prompts = np.full(active.size, part, dtype=np.int8)
        return KVStep(handles, starts.astype(np.int32), positions.astype(np.int64), prompts)

    def _reserve(self, step: KVStep) -> None:
        missing = self._store.reserve(step)
        if missing is not None:
            needed, available = format_bytes(missing.needed_bytes), format_bytes(missing.available_bytes)
            raise OutOfBudget(
                f"{step.positions.size} more tokens in {len(step.handles)} rows need {needed} of KV memory; "
                f"{available} could be had",
                "raise memory= of for_hf(), take a plan of fewer bits, or free tokens by cache.crop() or cache.reset()",
            )
