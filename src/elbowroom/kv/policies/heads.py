"""Head policy ``heads``: the KV heads whose output is large at a prompt's end; the others go, in deeper layers too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from elbowroom.core import LayerSpec
from elbowroom.errors import PlanError
from elbowroom.kv.policies.base import LayerView
from elbowroom.kv.policies.parameters import one_of, whole

_RANKS = ("cascade", "layer")


@dataclass(frozen=True, slots=True)
class HeadsPolicy:
    """SpAtten's cascade head pruning (Wang et al., HPCA 2021, arXiv 2012.09852) at the end of a first prompt.

    A head's importance is the magnitude of its output ``sum |P V|`` (before W_o), summed over the layers so far; each
    layer keeps the most important of the heads that the layer before it keeps. What is gone stays gone: the rest of
    the sequence does not read it, and the output of its query heads is 0.

    Deviations: KV heads go, each with all its query heads, for only then its keys and values can be freed; the last
    queries vote instead of all; the prompt itself is read with all heads; the tail, of up to 63 tokens, holds them all.

    Args:
        keep: share of the KV heads that the first layer behind ``skip`` keeps.
        last: share that the last layer keeps, linear between; 0: ``keep``.
        skip: leading layers that keep all heads; their heads are looked at as well.
        w: newest queries that vote.
        rank: ``cascade``, or ``layer``: each layer chooses by itself (for comparison).
    """

    keep: float | str = 0.5
    last: float | str = 0.0
    skip: int | str = 2
    w: int | str = 32
    rank: str = "cascade"
    name: ClassVar[str] = "heads"

    def __post_init__(self) -> None:
        """Read the parameters as numbers."""
        whole(self, "w")
        whole(self, "skip", least=0)
        one_of(self, "rank", _RANKS)
        keep = _share(self.keep)
        if not 0.0 < keep < 1.0:
            raise PlanError(f"KV policy 'heads' cannot take keep={self.keep}", "give keep between 0 and 1")
        last = _share(self.last)
        if not 0.0 <= last <= keep:
            raise PlanError(f"KV policy 'heads' cannot take last={self.last}", f"give last up to keep, {keep}")
        object.__setattr__(self, "keep", keep)
        object.__setattr__(self, "last", last)

    @property
    def window(self) -> int:
        """Newest queries that vote."""
        return int(self.w)

    @property
    def cascades(self) -> bool:
        """Whether layers choose from what the layer before keeps."""
        return self.rank == "cascade"

    def kept(self, layers: Sequence[LayerSpec]) -> tuple[int, ...]:
        """Return the KV heads that stay in each layer: at least one, all in layers that nothing is chosen from.

        Raises:
            PlanError: none goes, layers that depend on each other differ, or layers read the keys of others, behind
                which they choose.
        """
        chosen = [index for index, spec in enumerate(layers) if spec.window is None and spec.kv_source is None]
        if self.cascades:
            self._check_cascade(layers, chosen)
        kept, skip = [spec.num_kv_heads for spec in layers], int(self.skip)
        behind, keep = [index for index in chosen if index >= skip], float(self.keep)
        fall = (keep - (float(self.last) or keep)) / max(len(behind) - 1, 1)
        for depth, index in enumerate(behind):
            kept[index] = max(round(kept[index] * (keep - fall * depth)), 1)
        if all(count == spec.num_kv_heads for count, spec in zip(kept, layers, strict=True)):
            raise PlanError(
                f"KV policy 'heads' with keep={keep} and skip={skip} drops nothing of {len(layers)} layers with "
                f"{max(spec.num_kv_heads for spec in layers)} KV heads",
                "lower keep or skip, or leave heads out of the plan",
            )
        return tuple(kept)

    def importance(self, view: LayerView) -> Tensor:
        """Return the magnitude of the output of each KV head's query heads, float32 ``[Hkv]``."""
        heads = range(view.spec.num_kv_heads)
        return torch.stack([(view.window_attention(head) @ view.values(head)).abs().sum() for head in heads])

    def _check_cascade(self, layers: Sequence[LayerSpec], chosen: Sequence[int]) -> None:
        if len({layers[index].num_kv_heads for index in chosen}) > 1:
            raise PlanError(
                "KV policy 'heads' goes from layer to layer, but layers differ in their number of KV heads",
                "use rank=layer",
            )
        late = [spec.kv_source for spec in layers if spec.kv_source in chosen]
        if late:
            raise PlanError(
                f"KV policy 'heads' goes from layer to layer, but later layers read the keys of layer {late[0]}",
                "use rank=layer",
            )


def _share(value: float | str) -> float:
    try:
        return float(value)
    except ValueError:
        return -1.0
