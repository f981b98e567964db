"""Policy ``streaming``: the first tokens and the newest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from elbowroom.core import LayerSpec
from elbowroom.kv.calibration import Calibration
from elbowroom.kv.policies.base import LayerView
from elbowroom.kv.policies.parameters import check_budget, check_interval, whole


@dataclass(frozen=True, slots=True)
class StreamingPolicy:
    """StreamingLLM (Xiao et al., arXiv 2309.17453): attention sinks and a window of recent tokens.

    A baseline. Deviations: tokens go behind parts and ends of prompts and behind ``every`` generated ones, not one by
    one, and keys keep the positions at which they were rotated.

    Args:
        tokens: most tokens that a layer holds when a prompt has been read.
        sinks: leading tokens that stay.
        every: generated tokens behind which the window moves on, a multiple of 64; 0: what is generated stays.
    """

    tokens: int | str = 512
    sinks: int | str = 4
    every: int | str = 64
    name: ClassVar[str] = "streaming"
    needs_calibration: ClassVar[bool] = False
    cascades: ClassVar[bool] = False
    window: ClassVar[int] = 0

    def __post_init__(self) -> None:
        """Read the parameters as numbers."""
        whole(self, "tokens", "sinks")
        check_budget(self.name, int(self.tokens), int(self.sinks) + 1)
        check_interval(self)

    @property
    def interval(self) -> int:
        """Generated tokens from choice to choice."""
        return int(self.every)

    def calibrated(self, layers: Sequence[LayerSpec], calibration: Calibration | None) -> Self:
        """Return itself."""
        return self

    def limit(self, layer: int, ends_prompt: bool) -> int:
        """Return the budget: what has left the window is not missed."""
        return int(self.tokens)

    def select(self, view: LayerView, count: int) -> Tensor:
        """Return the sinks and the newest tokens."""
        sinks = int(self.sinks)
        newest = torch.arange(view.num_held - (count - sinks), view.num_held)
        return torch.cat([torch.arange(sinks), newest])[None]
