"""A policy of tests: each layer keeps another number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from elbowroom.core import LayerSpec
from elbowroom.kv import KVPlan
from elbowroom.kv.calibration import Calibration
from elbowroom.kv.codecs.plain import PlainCodec
from elbowroom.kv.policies import LayerView
from elbowroom.kv.policies.snapkv import SnapKVPolicy


@dataclass(frozen=True)
class TaperingPolicy:
    """What snapkv chooses; the first of three layers keeps ``tokens``, the next ones 70 more, and so on again."""

    tokens: int = 130
    name: ClassVar[str] = "tapering"
    window: ClassVar[int] = 20
    needs_calibration: ClassVar[bool] = False
    cascades: ClassVar[bool] = False

    def calibrated(self, layers: Sequence[LayerSpec], calibration: Calibration | None) -> Self:
        """Return itself."""
        return self

    def limit(self, layer: int, ends_prompt: bool) -> int:
        """Return the budget of a layer."""
        return (self.tokens + 70 * (layer % 3)) * (1 if ends_prompt else 2)

    def select(self, view: LayerView, count: int) -> Tensor:
        """Return what snapkv chooses."""
        return SnapKVPolicy(w=self.window).select(view, count)


TAPERING = KVPlan(PlainCodec(), TaperingPolicy())
