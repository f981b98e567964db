"""Policy ``snapkv``: the tokens that the end of a prompt looks at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from elbowroom.core import LayerSpec
from elbowroom.errors import PlanError
from elbowroom.kv.calibration import Calibration
from elbowroom.kv.policies.base import LayerView
from elbowroom.kv.policies.parameters import READING, check_budget, check_interval, whole
from elbowroom.kv.policies.voting import best_and_newest


@dataclass(frozen=True, slots=True)
class SnapKVPolicy:
    """SnapKV (Li et al., arXiv 2404.14469): attention of the last queries, smoothed along the prompt, for each KV head.

    The scores of a KV head are the mean over its own query heads (a public baseline averages across groups). While a
    long prompt is read in parts, four times the budget stays behind each part. With ``every``, which the paper does not
    have, it chooses while tokens are generated, too, by the query of one token.

    Args:
        tokens: most tokens that a layer holds when a prompt has been read.
        w: newest tokens, which stay and whose queries choose.
        kernel: width of the average pooling along the prompt; odd.
        every: generated tokens behind which it chooses anew, a multiple of 64; 0: never, as in the paper.
    """

    tokens: int | str = 512
    w: int | str = 32
    kernel: int | str = 5
    every: int | str = 0
    name: ClassVar[str] = "snapkv"
    needs_calibration: ClassVar[bool] = False
    cascades: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Read the parameters as numbers."""
        whole(self, "tokens", "w", "kernel")
        if int(self.kernel) % 2 == 0:
            raise PlanError(f"KV policy 'snapkv' cannot centre kernel={self.kernel} on a token", "give an odd kernel")
        check_budget(self.name, int(self.tokens), int(self.w))
        check_interval(self)

    @property
    def window(self) -> int:
        """Newest queries that choose."""
        return int(self.w)

    @property
    def interval(self) -> int:
        """Generated tokens from choice to choice."""
        return int(self.every)

    def calibrated(self, layers: Sequence[LayerSpec], calibration: Calibration | None) -> Self:
        """Return itself."""
        return self

    def limit(self, layer: int, ends_prompt: bool) -> int:
        """Return the budget, four times of it within a prompt: its end may ask for something else."""
        return int(self.tokens) * (1 if ends_prompt else READING)

    def select(self, view: LayerView, count: int) -> Tensor:
        """Return the best of the older tokens for each KV head, and the newest ones."""
        kept = min(int(self.w), view.num_held)
        older = view.num_held - kept
        heads = [view.window_attention(head)[..., :older].sum(1).mean(0) for head in range(view.spec.num_kv_heads)]
        return best_and_newest(torch.stack(heads), view.num_held, count, int(self.kernel))
