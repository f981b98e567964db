"""The seam of token policies: a small pure object decides which tokens stay; the store moves the bytes.

When a prompt ends, a part of a long one has been read or ``interval`` tokens were generated, and a layer holds more
tokens than ``limit`` says, the store drops whole blocks' worth: the tokens that stay move up to the end of the
sequence, so that later tokens keep their places and nothing that was rotated is rotated again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from elbowroom.core import LayerSpec
from elbowroom.kv.calibration import Calibration

NO_LIMIT = 2**40
"""A limit that no sequence reaches: the layer drops nothing."""


@dataclass(frozen=True, eq=False)
class Cascade:
    """What a layer of a cascade knows of its n tokens: from the layers before it, and what those behind it hold."""

    importance: Tensor
    """float32 ``[n]``: mean of ``received`` over the layers until now, this one included, and over earlier choices."""
    alive: Tensor
    """bool ``[n]``: whether the layer before keeps the token."""
    floors: tuple[tuple[Tensor, int], ...]
    """Of layers from the last one back to this one: which tokens it holds, bool ``[n]``, and how many of these stay.

    Earlier choices left deeper layers fewer tokens to choose from, so some of them must stay here too.
    """

    def best(self, ranks: Tensor) -> Tensor:
        """Return the best tokens by ``ranks [n]`` that leave every layer enough, ascending, int64 ``[m]``.

        Deeper layers hold subsets, so taking what the last one needs first, then what the one before it needs on top,
        and so on, gives the greatest sum.
        """
        chosen = torch.zeros_like(self.alive)
        for held, count in self.floors:
            missing = count - int(chosen.sum())
            if missing > 0:
                open_ranks = ranks.masked_fill(chosen | ~held | ~self.alive, -math.inf)
                chosen[open_ranks.topk(missing).indices] = True
        return chosen.nonzero()[:, 0]


@dataclass(frozen=True, eq=False)
class LayerView:
    """What a policy may look at: one layer of one sequence, as attention reads it."""

    layer: int
    spec: LayerSpec
    queries: Tensor
    """float32 ``[W, Hq, D]``: the newest queries, the last one behind all keys; W is at most what the policy asked."""
    keys: Callable[[int], Tensor]
    """Decodes the keys of a KV head, float32 ``[n, D]``: one head at a time, for the memory that it takes."""
    num_held: int
    """Tokens n that are held now."""
    cascade: Cascade | None = None
    """What a cascade knows; None where the policy is none."""
    num_adjacent: int | None = None
    """Newest tokens between which none was dropped, so that positions go up by one; None: all of them."""
    open_values: Callable[[int], Tensor] | None = None
    """Decodes the values of a KV head, float32 ``[n, Dv]``; None: this choice does not look at them."""

    def values(self, head: int) -> Tensor:
        """Return the values of a KV head, float32 ``[n, Dv]``, where a policy may look at them."""
        assert self.open_values is not None
        return self.open_values(head)

    def received(self) -> Tensor:
        """Return the attention that each token receives, float32 ``[n]``: of all heads, the mean over the queries."""
        heads = [self.window_attention(head).sum((0, 1)) for head in range(self.spec.num_kv_heads)]
        return torch.stack(heads).sum(0) / self.queries.shape[0]

    def window_attention(self, head: int, members: Sequence[int] | None = None) -> Tensor:
        """Return attention ``[G, W, n]`` of a KV head's newest queries, causal, with the layer's scale and softcap.

        Args:
            head: the KV head.
            members: which of its query heads, counted from its first; by default all.
        """
        spec, count = self.spec, self.queries.shape[0]
        group = self.queries[:, head * spec.group_size : (head + 1) * spec.group_size].transpose(0, 1)
        if members is not None:
            group = group[list(members)]
        scores = (group @ self.keys(head).t()).mul_(spec.scale)
        if spec.softcap is not None:
            scores = torch.tanh(scores / spec.softcap) * spec.softcap
        hidden = torch.ones(count, self.num_held, dtype=torch.bool).triu(self.num_held - count + 1)
        return scores.masked_fill_(hidden, -math.inf).softmax(-1)


@dataclass(frozen=True, eq=False)
class Merged:
    """How the tokens of a layer share slots."""

    slots: Tensor
    """int64 ``[Hkv, n]``: the slot of each token, ascending from 0; -1: it is dropped."""
    weights: Tensor
    """float32 ``[Hkv, n]``: its share of the slot's key and value; those of a slot add up to 1."""
    moves: Tensor | None = None
    """int64 ``[Hkv, n]``: tokens by which its key is moved, in the layer's RoPE, before it is merged; None: by none."""


class TokenPolicy(Protocol):
    """One dataclass, one file a policy; parameters are its fields."""

    @property
    def name(self) -> str:
        """Name in plans."""

    @property
    def window(self) -> int:
        """Newest queries that ``select`` looks at; 0: none."""

    @property
    def interval(self) -> int:
        """Generated tokens behind which it chooses anew, each time; a multiple of 64, or 0: never.

        Then the newest query alone looks at what is held (W is 1), in every schedule.
        """

    @property
    def needs_calibration(self) -> bool:
        """Whether ``calibrated`` needs measurements of the model."""

    @property
    def cascades(self) -> bool:
        """Whether a layer keeps only tokens that the layer before it keeps, of layers that have a limit.

        Then ``select`` chooses for all heads alike and with ``LayerView.cascade``, and limits fall from layer to layer.
        """

    def calibrated(self, layers: Sequence[LayerSpec], calibration: Calibration | None) -> Self:
        """Return the policy for a model of ``layers``; itself where all models are alike to it.

        Raises:
            PlanError: it does not suit them, or the measurements that it needs are missing or of another model.
        """

    def limit(self, layer: int, ends_prompt: bool) -> int:
        """Return the most tokens that ``layer`` holds behind a step which reads a prompt, or ends one.

        Behind one that chooses while tokens are generated it holds what it may behind a prompt's end.
        """

    def select(self, view: LayerView, count: int) -> Tensor:
        """Return the tokens that stay, ascending, int64 ``[Hkv, count]``, or ``[1, count]`` for all heads alike.

        The newest token always stays.
        """


@runtime_checkable
class MergePolicy(TokenPolicy, Protocol):
    """A policy that, at a prompt's end, lets several tokens share a slot; ``select`` is asked before."""

    @property
    def bias(self) -> str:
        """``on``: scores of a slot of n tokens get log n."""

    def merge(self, view: LayerView, count: int) -> Merged:
        """Return how the tokens of a layer share ``count`` slots. The newest 64 stay alone."""


class HeadPolicy(Protocol):
    """Which KV heads of a sequence stay behind its first prompt; one dataclass, one file a policy."""

    @property
    def name(self) -> str:
        """Name in plans."""

    @property
    def window(self) -> int:
        """Newest queries that ``importance`` looks at."""

    @property
    def cascades(self) -> bool:
        """Whether a layer keeps only heads that the layer before it keeps, by the sum of what both have seen."""

    def kept(self, layers: Sequence[LayerSpec]) -> tuple[int, ...]:
        """Return the KV heads that stay in each layer; all where nothing is chosen.

        Raises:
            PlanError: it does not suit a model of ``layers``.
        """

    def importance(self, view: LayerView) -> Tensor:
        """Return what the heads of a layer are worth, float32 ``[Hkv]``, from queries, keys and values."""


class ChannelPolicy(Protocol):
    """Which channels the keys of a prompt keep; one dataclass, one file a policy."""

    @property
    def name(self) -> str:
        """Name in plans."""

    @property
    def window(self) -> int:
        """Newest queries that ``channels`` looks at."""

    @property
    def share(self) -> float:
        """Share of the channels that stays."""

    def channels(self, view: LayerView, width: int) -> Tensor:
        """Return the channels that stay of each KV head, ascending, uint8 ``[Hkv, width]``."""
