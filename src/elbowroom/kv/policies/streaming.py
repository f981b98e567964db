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
from elbowroom.kv.policies.parameters import check_budget, whole


@dataclass(frozen=True, slots=True)
class StreamingPolicy:
    """StreamingLLM (Xiao et al., arXiv 2309.17453) at a prompt's end: attention sinks and a window of recent tokens.

    A baseline. Deviations: tokens that are generated stay, and keys keep the positions at which they were rotated.

    Args:
        tokens: most tokens that a layer holds when a prompt has been read.
        sinks: leading tokens that stay.
    """

    tokens: int | str = 512
    sinks: int | str = 4
    name: ClassVar[str] = "streaming"
    needs_calibration: ClassVar[bool] = False
    cascades: ClassVar[bool] = False
    window: ClassVar[int] = 0

    def __post_init__(self) -> None:
        """Read the parameters as numbers."""
        whole(self, "tokens", "sinks")
        check_budget(self.name, int(self.tokens), int(self.sinks) + 1)

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
