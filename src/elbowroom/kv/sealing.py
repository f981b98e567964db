"""Sealing at a prompt's end: policies choose among tokens as they were computed, and what stays is sealed whole.

While a prompt is read its blocks wait in the tail, unsealed. Behind a part of it tokens may be dropped and stay as they
are. Behind its end what is kept fills blocks, and those are sealed. Blocks that an earlier prompt has sealed go or stay
whole: they are never opened and sealed again.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from elbowroom.core import STRIP_TOKENS, LayerSpec, RopeSpec
from elbowroom.kernels import StripStep, attention
from elbowroom.kernels.base import PLAIN, UNIT_BYTES, LayerStrips, Tail
from elbowroom.kernels.extras import kept_heads, key_channels, slot_tokens
from elbowroom.kernels.rope import turned
from elbowroom.kv.bound import BoundPlan
from elbowroom.kv.codecs import Codec
from elbowroom.kv.compaction import Compaction, checked_choice
from elbowroom.kv.heads import HeadRun, heads_of
from elbowroom.kv.holding import blocks_of
from elbowroom.kv.layout import Lane
from elbowroom.kv.policies import LayerView, Merged, MergePolicy
from elbowroom.kv.sequence import Table
from elbowroom.kv.tables import Tails


@dataclass(frozen=True, slots=True, eq=False)
class OpenLayer:
    """Where a layer's sealed and open blocks lie while a step runs."""

    main: Lane
    tail: Lane
    sealed: Table
    """Entries of the sealed blocks, in their order."""
    opened: Table
    """Entries of the open ones behind them."""
    num_open: int
    """Tokens in those."""

    @property
    def num_sealed(self) -> int:
        """Tokens in sealed blocks."""
        return self.sealed.size * STRIP_TOKENS

    def open_head(self, head: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of a KV head in the open blocks, ``[num_open, D]``."""
        pool = self.tail.pool
        pairs = [PLAIN.open(pool.strip(int(entry)), pool.fmt) for entry in self.opened]
        k, v = (torch.cat([part[head] for part in parts])[: self.num_open] for parts in zip(*pairs, strict=True))
        return k, v

    def open_keys(self, head: int) -> Tensor:
        """Return the keys of a KV head in the open blocks, float32 ``[num_open, D]``."""
        return self.open_head(head)[0].float()

    def open_values(self, head: int) -> Tensor:
        """Return the values of a KV head in the open blocks, float32 ``[num_open, Dv]``."""
        return self.open_head(head)[1].float()


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """What stays of a layer."""

    sealed: Table
    """Entries of sealed blocks."""
    opened: Tensor | Merged
    """int64 ``[Hkv, m]``: tokens of the open ones; or how those share slots."""
    rope: RopeSpec | None = None
    """Of the layer."""

    def keys(self, head: int, keys: Tensor) -> Tensor:
        """Return what the slots of a KV head hold of the open tokens' ``keys [n, D]``, ``[m, D]``."""
        if isinstance(self.opened, Merged) and self.opened.moves is not None and self.rope is not None:
            moves, moved = self.opened.moves[head], keys.float()
            which = moves.nonzero()[:, 0]
            moved[which] = turned(moved[which], moves[which], self.rope)
            return self.rows(head, moved).to(keys.dtype)
        return self.rows(head, keys)

    def rows(self, head: int, rows: Tensor) -> Tensor:
        """Return what the slots of a KV head hold of the open tokens' ``rows [n, D]``, ``[m, D]``."""
        if isinstance(self.opened, Tensor):
            return rows[self.opened[head]]
        slots, weights = self.opened.slots[head], self.opened.weights[head]
        stays = slots >= 0
        merged = torch.zeros(int(slots.max()) + 1, rows.shape[1])
        merged.index_add_(0, slots[stays], weights[stays, None] * rows[stays].float())
        return merged.to(rows.dtype)

    def tokens(self, head: int) -> Tensor:
        """Return how many tokens each slot of a KV head stands for, int64 ``[m]``."""
        if isinstance(self.opened, Tensor):
            return torch.ones_like(self.opened[head])
        slots = self.opened.slots[head]
        return torch.bincount(slots[slots >= 0])


class Sealer:
    """Moves and seals what policies keep of a layer.

    Args:
        plan: who chooses tokens, KV heads and channels, and how strips are sealed.
    """

    def __init__(self, plan: BoundPlan) -> None:
        self._plan, self._heads = plan, plan.plan.heads
        self._policy, self._channels, self._layout = plan.policy, plan.plan.channels, plan.plan.layout

    def compact(self, compaction: Compaction, layer: int, spec: LayerSpec, place: OpenLayer) -> None:
        """Keep what the policy chooses of ``layer``, seal it if the prompt ends, and free the rest."""
        kept = self._choose(compaction, layer, spec, place)
        heads = self._choose_heads(compaction, layer, spec, place)
        sequence, num_tokens = compaction.sequence, compaction.num_tokens
        first = int(compaction.dropped_blocks[layer])
        middle = first + kept.sealed.size
        full = num_tokens // STRIP_TOKENS if compaction.ends_prompt else middle
        fresh = sequence.take_spare(layer, full - middle)
        tail_row = int(place.tail.rows[np.flatnonzero(place.main.rows == layer)[0]])
        targets = sequence.take_spare(tail_row, blocks_of(num_tokens) - full)
        waiting = self._write(place, kept, fresh.size, targets)
        if fresh.size:
            newest = compaction.newest(layer, spec, 0 if self._channels is None else self._channels.window)
            count = kept.tokens(0).numel()
            view = LayerView(layer, spec, newest, lambda head: kept.keys(head, place.open_keys(head)), count)
            self._describe(view, kept, heads, place, fresh)
            self._seal(place, waiting, fresh)
        compaction.queries.pop(layer, None)
        if compaction.open_after is not None and not compaction.ends_prompt:
            compaction.open_after[layer] = middle
        held = sequence.replace(layer, first, np.concatenate([kept.sealed, fresh]))
        place.main.pool.release(held[~np.isin(held, kept.sealed)])
        place.tail.pool.release(sequence.replace(tail_row, full, targets))

    def _choose(self, compaction: Compaction, layer: int, spec: LayerSpec, place: OpenLayer) -> Kept:
        """Return what stays: of the sealed blocks whole ones, of the open ones any tokens."""
        held, count = compaction.held_tokens(layer), place.num_sealed + place.num_open
        if held == count or self._policy is None:
            return Kept(place.sealed, torch.arange(place.num_open).expand(spec.num_kv_heads, -1))
        queries = compaction.newest(layer, spec, self._policy.window)
        adjacent = _num_adjacent(compaction, layer, count)
        view = LayerView(layer, spec, queries, _HeadKeys(self._layout, place), count, num_adjacent=adjacent)
        merger = self._policy if compaction.ends_prompt and isinstance(self._policy, MergePolicy) else None
        if merger is not None and not place.sealed.size:
            return Kept(place.sealed, merger.merge(view, held), spec.rope)
        chosen = checked_choice(self._policy, view, held)
        alive = heads_of(compaction.sequence.places[layer]) if compaction.sequence.places else slice(None)
        kept = _whole_blocks(chosen, place, chosen[alive], self._policy.window)
        slots = held - kept.sealed.size * STRIP_TOKENS
        if merger is not None and slots < place.num_open:
            adjacent = min(adjacent, place.num_open)
            newest = queries[-place.num_open :]
            view = LayerView(layer, spec, newest, place.open_keys, place.num_open, num_adjacent=adjacent)
            return Kept(kept.sealed, merger.merge(view, slots), spec.rope)
        return kept

    def _choose_heads(self, compaction: Compaction, layer: int, spec: LayerSpec, place: OpenLayer) -> Tensor:
        """Return the KV heads that stay, int64: behind a first prompt, of which nothing is sealed, those chosen now."""
        places = compaction.sequence.places
        if self._heads is None or places or not compaction.ends_prompt:
            return torch.from_numpy(heads_of(places[layer])) if places else torch.arange(spec.num_kv_heads)
        if compaction.heads is None:
            compaction.heads = HeadRun(self._plan.layers, self._plan.kept_heads, self._heads.cascades)
        queries = compaction.newest(layer, spec, self._heads.window)
        view = LayerView(layer, spec, queries, place.open_keys, place.num_open, open_values=place.open_values)
        return compaction.heads.choose(layer, self._heads.importance(view))

    def _write(self, place: OpenLayer, kept: Kept, num_full: int, targets: Table) -> Tensor:
        """Write what stays of the open tokens: the first ``num_full`` blocks to plain strips, which are returned."""
        fmt = place.tail.pool.fmt
        buffer = torch.zeros(num_full * fmt.strip_bytes, dtype=torch.uint8)
        strips = list(torch.split(buffer, fmt.strip_bytes)) if num_full else []
        strips += [place.tail.pool.strip(int(entry)) for entry in targets]
        views = [PLAIN.open(strip, fmt) for strip in strips]
        for head in range(fmt.num_kv_heads if strips else 0):
            keys, values = place.open_head(head)
            k = torch.split(kept.keys(head, keys), STRIP_TOKENS)
            v = torch.split(kept.rows(head, values), STRIP_TOKENS)
            for (keys, values), new_keys, new_values in zip(views, k, v, strict=True):
                keys[head, : new_keys.shape[0]] = new_keys
                values[head, : new_values.shape[0]] = new_values
        return buffer

    def _describe(self, view: LayerView, kept: Kept, heads: Tensor, place: OpenLayer, fresh: Table) -> None:
        """Write to ``fresh`` strips their KV heads, the channels of their keys and how many tokens slots stand for.

        Args:
            view: what stays of the open tokens.
            kept: the same.
            heads: KV heads that stay.
            place: the layer.
            fresh: entries of strips that are about to be sealed.
        """
        pool = place.main.pool
        strips = [pool.strip(int(entry)) for entry in fresh]
        for strip in strips if pool.fmt.kept_heads else ():
            kept_heads(strip, pool.fmt).copy_(heads)
        if self._channels is not None:
            chosen = self._channels.channels(view, pool.fmt.key_channels)[heads]
            for strip in strips:
                key_channels(strip, pool.fmt).copy_(chosen)
        if pool.fmt.counts:
            for number, head in enumerate(heads.tolist()):
                for strip, tokens in zip(strips, torch.split(kept.tokens(head), STRIP_TOKENS), strict=False):
                    slot_tokens(strip, pool.fmt)[number] = tokens.to(torch.uint8)

    def _seal(self, place: OpenLayer, buffer: Tensor, fresh: Table) -> None:
        """Seal the plain strips of ``buffer`` into ``fresh`` ones."""
        main, fmt = place.main, place.tail.pool.fmt
        nobody, nothing = np.empty((0, 0), dtype=np.uint32), np.empty(0, dtype=np.int64)
        units = np.arange(fresh.size, dtype=np.uint32) * np.uint32(fmt.strip_bytes // UNIT_BYTES)
        seals = Tail(table=nobody, first_blocks=nothing, base=buffer, fmt=fmt, full=units, sealed=fresh)
        strips = LayerStrips(StripStep.of_runs([]), nobody, main.pool.base, main.pool.fmt, self._layout, seals)
        attention.append(strips, *(torch.empty(0, fmt.num_kv_heads, width) for width in (fmt.head_dim, fmt.v_head_dim)))


class _HeadKeys:
    """Keys of a KV head, float32 ``[n, D]``: those of sealed strips as they are read, then open ones."""

    def __init__(self, codec: Codec, place: OpenLayer) -> None:
        self._codec, self._place = codec, place

    def __call__(self, head: int) -> Tensor:
        pool = self._place.main.pool
        strips: Rows[Tensor] = [pool.strip(int(entry)) for entry in self._place.sealed]
        # Copies: a view would keep the keys of all heads.
        sealed = [self._codec.open(strip, pool.fmt)[0][head].to(torch.float32, copy=True) for strip in strips]
        return torch.cat([*sealed, self._place.open_keys(head)])


def _whole_blocks(chosen: Tensor, place: OpenLayer, votes: Tensor, window: int) -> Kept:
    """Return what stays where sealed blocks stay whole or go, as many tokens as were ``chosen``, int64 ``[Hkv, m]``.

    ``votes`` are the rows of the KV heads that read sealed blocks. Tokens chosen of the open blocks stay. Sealed blocks
    share the rest: first the one that holds the first tokens (attention sinks), then those with the newest ``window``
    tokens, then those of which the most tokens were chosen. What does not fill a block goes to the newest.
    """
    held, num_sealed = chosen.shape[1], place.num_sealed
    is_open = chosen >= num_sealed
    count = min((held - int(is_open.sum(1).max())) // STRIP_TOKENS, place.sealed.size)
    marks = torch.zeros(max(place.sealed.size, 1), dtype=torch.int64)
    blocks = votes[votes < num_sealed] // STRIP_TOKENS
    marks.index_add_(0, blocks, torch.ones_like(blocks))
    marks[max(num_sealed + place.num_open - window, 0) // STRIP_TOKENS :] += chosen.numel()
    marks[0] += 2 * chosen.numel()
    best = marks.sort(descending=True, stable=True).indices[:count].sort().values
    rank = torch.arange(place.num_open).repeat(chosen.shape[0], 1)
    for head, (row, mine) in enumerate(zip(chosen, is_open, strict=True)):
        rank[head, row[mine] - num_sealed] += place.num_open
    opened = rank.topk(held - count * STRIP_TOKENS, dim=1).indices.sort(dim=1).values
    return Kept(place.sealed[best.numpy()], opened)


def _num_adjacent(compaction: Compaction, layer: int, count: int) -> int:
    """Return how many of the newest of ``count`` tokens have nothing dropped between them.

    What came behind the last choice is all there; before it the newest 64 always stay.
    """
    if not compaction.sequence.expired_blocks[layer]:
        return count
    return min(count, compaction.num_tokens - compaction.sequence.chosen_tokens + STRIP_TOKENS)


def open_layer(compaction: Compaction, layer: int, main: Lane, tail: Lane, tails: Tails) -> OpenLayer:
    """Return where ``layer`` lies while a step of ``compaction`` runs."""
    assert compaction.open_from is not None
    sequence, split = compaction.sequence, int(compaction.open_from[layer])
    sealed = sequence.table[layer, int(sequence.expired_blocks[layer]) : split]
    begin, end = int(tails.first_blocks[compaction.row]), blocks_of(compaction.num_tokens)
    opened = tails.tables[layer, compaction.row, split - begin : end - begin]
    return OpenLayer(main, tail, sealed, opened, compaction.num_tokens - split * STRIP_TOKENS)
