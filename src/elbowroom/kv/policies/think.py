"""Channel policy ``think``: which channels of the keys the end of a prompt looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from elbowroom.errors import PlanError
from elbowroom.kv.policies.base import LayerView
from elbowroom.kv.policies.parameters import whole


@dataclass(frozen=True, slots=True)
class ThinKPolicy:
    """ThinK (Xu et al., arXiv 2407.21018): of the keys of a prompt, the channels with the largest share of the scores.

    A channel counts by ``mean(q_i^2) * mean(k_i^2)`` over the newest queries and the keys that stay, for each KV head
    with the mean over its own query heads (the official code repeats keys for each query head). Channels are chosen
    once a prompt, behind a token policy and before the codec, and really dropped; a strip keeps its own list.

    Deviations: the tokens that keep all channels are those of the unfinished block (0 to 63, the paper: the newest 32);
    the width is rounded to a multiple of 8; generated tokens, when they fill a block, lose the channels of the prompt
    before them, as in the paper's variant for KIVI.

    Args:
        cut: share of the channels that is dropped, from 0.1 to 0.8.
        w: newest queries that choose.
    """

    cut: float | str = 0.4
    w: int | str = 32
    name: ClassVar[str] = "think"

    def __post_init__(self) -> None:
        """Read the parameters as numbers."""
        whole(self, "w")
        try:
            cut = float(self.cut)
        except ValueError:
            cut = -1.0
        if not 0.1 <= cut <= 0.8:
            raise PlanError(f"KV policy 'think' cannot take cut={self.cut}", "give cut from 0.1 to 0.8")
        object.__setattr__(self, "cut", cut)

    @property
    def window(self) -> int:
        """Newest queries that choose."""
        return int(self.w)

    @property
    def share(self) -> float:
        """Share of the channels that stays."""
        return 1.0 - float(self.cut)

    def channels(self, view: LayerView, width: int) -> Tensor:
        """Return the channels that stay of each KV head, ascending, uint8 ``[Hkv, width]``."""
        group, queries = view.spec.group_size, view.queries.square().mean(0)
        scores = [
            queries[head * group : (head + 1) * group].mean(0) * view.keys(head).square().mean(0)
            for head in range(view.spec.num_kv_heads)
        ]
        return torch.stack(scores).topk(width, dim=1).indices.sort(dim=1).values.to(torch.uint8)
