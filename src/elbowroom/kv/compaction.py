"""Compaction: behind a layer of a step, a policy chooses which tokens stay, and their bytes move up.

Tokens that stay take the last places of the prompt: of n tokens m stay in the slots n - m .. n - 1, with n - m a whole
number of blocks. So positions go on as before, and what was dropped looks like what a sliding window left behind.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from elbowroom.core import STRIP_TOKENS, LayerSpec
from elbowroom.errors import IntegrityError
from elbowroom.kernels.digest import write_digest
from elbowroom.kv.cascade import CascadeRun
from elbowroom.kv.codecs import TokenCodec
from elbowroom.kv.heads import HeadRun
from elbowroom.kv.holding import blocks_of
from elbowroom.kv.layout import Lane
from elbowroom.kv.policies import LayerView, TokenPolicy
from elbowroom.kv.sequence import Sequence


@dataclass(slots=True)
class Compaction:
    """A row of a step whose layers hold too many tokens behind it."""

    row: int
    sequence: Sequence
    dropped_blocks: npt.NDArray[np.int64]
    """``[num_layers]``: blocks' worth of tokens that each layer will have dropped."""
    num_tokens: int
    """Tokens of the sequence behind the step."""
    ends_prompt: bool
    open_from: npt.NDArray[np.int64] | None = None
    """``[num_layers]``: where blocks are sealed, the first one of each layer that waits for the prompt's end."""
    open_after: npt.NDArray[np.int64] | None = None
    """The same behind the step."""
    queries: dict[int, Tensor] = field(default_factory=dict)
    """Layer -> the newest queries."""
    cascade: CascadeRun | None = None
    """Where the policy is a cascade: what it has chosen until now."""
    heads: HeadRun | None = None
    """Where KV heads are chosen, behind a first prompt: what was chosen until now."""

    def note(self, layer: int, queries: Tensor, window: int) -> None:
        """Remember the newest ``window`` of a row's ``queries [n, Hq, D]`` of a layer."""
        self.queries[layer] = queries[-window:].to(torch.float32, copy=True)

    def newest(self, layer: int, spec: LayerSpec, window: int) -> Tensor:
        """Return at most ``window`` of the queries noted for a layer, float32 ``[W, Hq, D]``."""
        noted = self.queries.get(layer)
        return torch.empty(0, spec.num_q_heads, spec.head_dim) if noted is None or not window else noted[-window:]

    def num_fresh(self, lane: Lane) -> npt.NDArray[np.int64]:
        """Return the most single strips of ``lane`` that each of its users needs for the tokens that stay."""
        if not lane.users.size:
            return lane.users
        layers = lane.users % self.dropped_blocks.size
        first, end = self.dropped_blocks[layers], blocks_of(self.num_tokens)
        if self.open_from is None:
            return end - first
        open_from, full = self.open_from[layers], self.num_tokens // STRIP_TOKENS
        # Where nothing goes all that was sealed stays; else that may go as well.
        sealed = np.where(first == self.sequence.expired_blocks[layers], open_from - first, 0)
        if not self.ends_prompt:
            return (end - first - sealed) * (lane.holding.part == "staging")
        if lane.holding.part != "fresh":
            return np.full(layers.size, end - full)
        return np.minimum(full - first - sealed, end - open_from)  # open tokens fill no more than they took

    def held_tokens(self, layer: int) -> int:
        """Return the tokens of a layer that stay."""
        return self.num_tokens - int(self.dropped_blocks[layer]) * STRIP_TOKENS


class Compactor:
    """Moves what a policy keeps of a layer.

    Args:
        policy: who chooses.
        codecs: how tokens lie in strips of each layer.
        cascade_layers: layers that a cascade goes through, in order; empty without one.
    """

    def __init__(self, policy: TokenPolicy, codecs: Rows[TokenCodec], cascade_layers: Rows[int] = ()) -> None:
        self._policy, self._codecs, self._cascade_layers = policy, codecs, cascade_layers

    def compact(
        self, compaction: Compaction, layer: int, spec: LayerSpec, lane: Lane, table: npt.NDArray[np.uint32]
    ) -> None:
        """Keep what the policy chooses of ``layer`` and free the rest.

        Args:
            compaction: the row.
            layer: a layer with keys of its own.
            spec: its shape.
            lane: where its strips lie.
            table: ``[blocks]``, where the step finds the sequence's blocks.
        """
        sequence = compaction.sequence
        first = int(sequence.expired_blocks[layer])
        end = blocks_of(compaction.num_tokens)
        strips = [lane.pool.strip(int(entry)) for entry in table[first:end]]
        count = compaction.num_tokens - first * STRIP_TOKENS
        chosen = self._choose(compaction, layer, spec, lane, strips, count)
        dropped = int(compaction.dropped_blocks[layer])
        targets = sequence.take_spare(layer, end - dropped)
        places = [lane.pool.strip(int(entry)) for entry in targets]
        if chosen.shape[1] < count:
            self._move(layer, lane, strips, places, chosen)
        else:
            for place, strip in zip(places, strips, strict=True):
                place.copy_(strip)
        lane.pool.release(sequence.replace(layer, dropped, targets))
        compaction.queries.pop(layer, None)

    def _choose(
        self, compaction: Compaction, layer: int, spec: LayerSpec, lane: Lane, strips: Rows[Tensor], count: int
    ) -> Tensor:
        """Return the tokens that stay of ``count``, int64 ``[Hkv, m]``, checked."""

        def keys(head: int) -> Tensor:
            parts = [self._codecs[layer].open(strip, lane.pool.fmt)[0][head] for strip in strips]
            return torch.cat(parts)[:count].float()

        held = compaction.held_tokens(layer)
        queries = compaction.newest(layer, spec, self._policy.window)
        view = LayerView(layer, spec, queries, keys, count)
        if layer not in self._cascade_layers:
            return self._select(view, held)
        number = self._cascade_layers.index(layer)
        if compaction.cascade is None:
            compaction.cascade = self._begin(compaction)
        chosen = self._select(replace(view, cascade=compaction.cascade.note(number, view.received())), held)
        compaction.cascade.keep(number, chosen)
        return chosen

    def _begin(self, compaction: Compaction) -> CascadeRun:
        """Return a choice of a cascade, in which no layer has chosen yet."""
        sequence, layers = compaction.sequence, self._cascade_layers
        held = [compaction.num_tokens - int(sequence.expired_blocks[layer]) * STRIP_TOKENS for layer in layers]
        return CascadeRun(sequence.history, held, [compaction.held_tokens(layer) for layer in layers])

    def _select(self, view: LayerView, held: int) -> Tensor:
        """Return the ``held`` tokens that stay, int64 ``[Hkv, held]``."""
        if held == view.num_held:  # other layers hold too many
            return torch.arange(held).expand(view.spec.num_kv_heads, -1)
        return checked_choice(self._policy, view, held)

    def _move(self, layer: int, lane: Lane, strips: Rows[Tensor], targets: Rows[Tensor], chosen: Tensor) -> None:
        """Copy the bytes of the ``chosen`` tokens from ``strips`` to ``targets``, field by field."""
        fmt, codec = lane.pool.fmt, self._codecs[layer]
        sources = [codec.fields(strip, fmt) for strip in strips]
        places = [codec.fields(strip, fmt) for strip in targets]
        for number, head in itertools.product(range(len(sources[0])), range(fmt.num_kv_heads)):
            whole = torch.cat([fields[number][head] for fields in sources])
            kept = torch.split(whole[chosen[head]], STRIP_TOKENS)
            for place, part in zip(places, kept, strict=True):
                place[number][head, : part.shape[0]] = part
        if fmt.digest_bytes:
            for strip, part in zip(targets, torch.split(chosen, STRIP_TOKENS, dim=1), strict=True):
                write_digest(strip, fmt, codec.open(strip, fmt)[0], 0, part.shape[1], part.shape[1])


def checked_choice(policy: TokenPolicy, view: LayerView, count: int) -> Tensor:
    """Return the ``count`` tokens that ``policy`` keeps of a layer, int64 ``[Hkv, count]``.

    Raises:
        IntegrityError: they are not that many, not ascending, or lack the newest.
    """
    chosen = policy.select(view, count)
    rising = chosen.dim() == 2 and bool((chosen.diff(dim=1) > 0).all())
    shape = chosen.shape[0] in (1, view.spec.num_kv_heads) and chosen.shape[1:] == (count,)
    if not (rising and shape and chosen[:, 0].min() >= 0 and (chosen[:, -1] == view.num_held - 1).all()):
        raise IntegrityError(
            f"policy {policy.name!r} must keep {count} of {view.num_held} tokens in their order, the newest among them"
        )
    return chosen.expand(view.spec.num_kv_heads, -1)
