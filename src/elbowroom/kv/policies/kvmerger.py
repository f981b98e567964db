"""Policy ``kvmerger``: neighbouring tokens with similar keys share one slot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from elbowroom.core import STRIP_TOKENS, LayerSpec, RopeSpec
from elbowroom.errors import PlanError
from elbowroom.kernels.rope import turned
from elbowroom.kv.calibration import Calibration
from elbowroom.kv.policies.base import LayerView, Merged
from elbowroom.kv.policies.parameters import READING, check_budget, one_of, whole
from elbowroom.kv.policies.snapkv import SnapKVPolicy

_LEAST_SIMILAR = 0.6
_KERNEL = 5
"""Width of the average pooling of attention along the prompt, as in snapkv: what is read lies behind what is found."""


@dataclass(frozen=True, slots=True)
class KVMergerPolicy:
    """KVMerger (Wang et al., arXiv 2407.08454): runs of tokens with near-parallel keys become one slot.

    At a prompt's end, for each KV head: the newest tokens and those with the most attention are protected. Of the
    rest, neighbours whose keys have the greatest cosine are merged, no more than the budget asks for and none below
    0.6; where that is not enough, single tokens with the least attention are dropped. Key and value of a slot are the
    mean of its tokens with Gaussian weights around the token with the most attention; their width is the mean
    distance of the others over the root of 2. A slot of n tokens gets log n on its scores (``bias=on``), so that n
    equal tokens weigh what they weighed.

    Deviations: attention is that of the newest queries, smoothed over 5 neighbours as in snapkv; the threshold follows
    from the budget; sets are cut at ``longest``; between parts of a long prompt tokens are dropped as by snapkv, and
    merged at the end only. Formulas of the weights are those that secondary summaries agree on: the paper has no public
    code.

    With ``space=pre``, which is ours, keys are compared as they were before their rotation, and merged as if all tokens
    of a slot stood where the one with the most attention does: high frequencies do not cancel. Tokens behind a part of
    a long prompt that was chosen from stay alone then where the distance to their neighbours is not known.

    Args:
        tokens: most slots that a layer holds when a prompt has been read.
        w: newest tokens, which stay alone and whose queries tell what is looked at; at least 64.
        protect: share of the budget for tokens that stay alone for their attention, in percent.
        longest: most tokens of a slot, 2 to 64.
        bias: ``on`` or ``off``.
        space: ``post``, keys after their rotation (the paper's way), or ``pre``.
    """

    tokens: int | str = 512
    w: int | str = 64
    protect: int | str = 25
    longest: int | str = 8
    bias: str = "on"
    space: str = "post"
    name: ClassVar[str] = "kvmerger"
    needs_calibration: ClassVar[bool] = False
    cascades: ClassVar[bool] = False
    interval: ClassVar[int] = 0
    """Generated tokens stay: they are sealed block by block, and what is sealed is not merged."""

    def __post_init__(self) -> None:
        """Read the parameters as numbers."""
        whole(self, "tokens", "w", "protect", "longest")
        for field, least, most in (("w", STRIP_TOKENS, 2**31), ("protect", 1, 90), ("longest", 2, 64)):
            if not least <= getattr(self, field) <= most:
                raise PlanError(
                    f"KV policy 'kvmerger' cannot take {field}={getattr(self, field)}",
                    f"give {field} from {least} to {most}",
                )
        if self.bias not in ("on", "off"):
            raise PlanError(f"KV policy 'kvmerger' cannot take bias={self.bias}", "give bias=on or bias=off")
        one_of(self, "space", ("post", "pre"))
        check_budget(self.name, int(self.tokens), int(self.w))

    def calibrated(self, layers: Sequence[LayerSpec], calibration: Calibration | None) -> Self:
        """Return itself.

        Raises:
            PlanError: keys shall be merged before a rotation, which no layer has.
        """
        if self.space == "pre" and all(layer.rope is None for layer in layers):
            raise PlanError(
                "KV policy 'kvmerger' cannot merge with space=pre: the model does not rotate its keys",
                "leave out space=pre: without a rotation both are the same",
            )
        return self

    @property
    def window(self) -> int:
        """Newest queries that choose."""
        return int(self.w)

    def limit(self, layer: int, ends_prompt: bool) -> int:
        """Return the budget, four times of it within a prompt."""
        return int(self.tokens) * (1 if ends_prompt else READING)

    def select(self, view: LayerView, count: int) -> Tensor:
        """Return what snapkv keeps: behind a part of a prompt."""
        return SnapKVPolicy(w=self.w).select(view, count)

    def merge(self, view: LayerView, count: int) -> Merged:
        """Return how the tokens of a layer share ``count`` slots."""
        heads = [self._merge_head(view, head, count) for head in range(view.spec.num_kv_heads)]
        slots, weights, moves = (torch.stack(parts) for parts in zip(*heads, strict=True))
        return Merged(slots, weights, None if self._rope(view) is None else moves)

    def _rope(self, view: LayerView) -> RopeSpec | None:
        """Return the rotation that is taken back before keys are compared and merged."""
        return view.spec.rope if self.space == "pre" else None

    def _merge_head(self, view: LayerView, head: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        keys, mass = view.keys(head), smoothed(view.window_attention(head).sum((0, 1)))
        place = torch.arange(view.num_held)
        newest = place >= view.num_held - int(self.w)
        alone = newest.clone()
        protected = min(count * int(self.protect) // 100, count - int(self.w))
        alone[mass.masked_fill(newest, -1.0).topk(protected).indices] = True
        rope = self._rope(view)
        if rope is not None:
            keys = turned(keys, -place, rope)
            alone |= place < view.num_held - (view.num_held if view.num_adjacent is None else view.num_adjacent)
        joined = join_neighbours(keys, alone, view.num_held - count, int(self.longest))
        sets = torch.cat([torch.zeros(1, dtype=torch.int64), (~joined).cumsum(0)])
        dropped = _least_looked_at(sets, mass, newest, int(sets[-1]) + 1 - count)
        stays = ~torch.isin(sets, dropped)
        slots = torch.full_like(sets, -1)
        slots[stays] = torch.unique_consecutive(sets[stays], return_inverse=True)[1]
        weights, moves = torch.zeros_like(mass), torch.zeros_like(place)
        pivots = most_looked_at(mass[stays], slots[stays])
        weights[stays] = gaussian_weights(keys[stays], pivots, slots[stays])
        moves[stays] = place[stays][pivots] - place[stays]
        return slots, weights, moves


def smoothed(mass: Tensor) -> Tensor:
    """Return the mean of each token's attention ``[n]`` and its neighbours'."""
    return torch.nn.functional.avg_pool1d(mass[None], _KERNEL, stride=1, padding=_KERNEL // 2)[0]


def join_neighbours(keys: Tensor, alone: Tensor, wanted: int, longest: int) -> Tensor:
    """Return which tokens share a slot with the one before them, bool ``[n - 1]``: at most ``wanted``.

    Args:
        keys: float32 ``[n, D]``.
        alone: bool ``[n]``, tokens that share with nobody.
        wanted: slots to be saved.
        longest: most tokens of a slot.
    """
    cosine = torch.nn.functional.cosine_similarity(keys[1:], keys[:-1], dim=1)
    cosine[alone[1:] | alone[:-1]] = -1.0
    order = cosine.sort().values
    low, high = int(torch.searchsorted(order, _LEAST_SIMILAR)), order.numel() - 1
    if low > high:
        return torch.zeros_like(alone[1:])
    while low < high:  # the highest threshold that saves enough, or the lowest one
        middle = (low + high + 1) // 2
        if int(_runs(cosine >= order[middle], longest).sum()) >= wanted:
            low = middle
        else:
            high = middle - 1
    joined = _runs(cosine >= order[low], longest)
    excess = int(joined.sum()) - wanted
    if excess > 0:
        joined[cosine.masked_fill(~joined, 2.0).topk(excess, largest=False).indices] = False
    return joined


def _runs(similar: Tensor, longest: int) -> Tensor:
    """Return ``similar [n - 1]`` with runs cut so that none joins more than ``longest`` tokens."""
    place = torch.arange(1, similar.numel() + 1)
    start = torch.where(similar, 0, place).cummax(0).values
    return similar & ((place - start) % longest != 0)


def _least_looked_at(sets: Tensor, mass: Tensor, newest: Tensor, count: int) -> Tensor:
    """Return ``count`` of the ``sets`` that get the least attention, single tokens first; never a newest token."""
    if count <= 0:
        return sets[:0]
    number = int(sets[-1]) + 1
    total, size = torch.zeros(number).index_add_(0, sets, mass), torch.bincount(sets, minlength=number)
    total += (size > 1) * (1.0 + mass.sum())
    total[sets[newest]] = torch.inf
    return total.topk(count, largest=False).indices


def most_looked_at(mass: Tensor, slots: Tensor) -> Tensor:
    """Return for each token the one of its slot that gets the most attention, int64 ``[n]``: the pivot.

    Args:
        mass: attention that tokens get, ``[n]``.
        slots: ascending from 0, ``[n]``.
    """
    number = int(slots[-1]) + 1
    greatest = torch.zeros(number).scatter_reduce_(0, slots, mass, "amax", include_self=False)
    candidates = torch.nonzero(mass == greatest[slots]).flatten()
    pivots = torch.zeros(number, dtype=torch.int64).scatter_reduce_(0, slots[candidates], candidates, "amax")
    return pivots[slots]


def gaussian_weights(keys: Tensor, pivots: Tensor, slots: Tensor) -> Tensor:
    """Return each token's share of its slot, float32 ``[n]``.

    Args:
        keys: float32 ``[n, D]``.
        pivots: of each token's slot, ``[n]``.
        slots: ascending from 0, ``[n]``.
    """
    number = int(slots[-1]) + 1
    squared = (keys - keys[pivots]).square().sum(1)
    size = torch.bincount(slots, minlength=number)
    sigma = torch.zeros(number).index_add_(0, slots, squared.sqrt()) / (size - 1).clamp(min=1) / 2**0.5
    variance = sigma.square()[slots]
    raw = torch.where(variance > 0, (-squared / (2 * variance)).exp(), torch.ones_like(squared))
    return raw / torch.zeros(number).index_add_(0, slots, raw)[slots]
