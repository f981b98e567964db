"""The seam of codecs: how the keys and values of one layer lie in a strip, and how attention reads them there."""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from elbowroom.core import LayerSpec, PageFormat
from elbowroom.kernels.base import StripStep

Table = npt.NDArray[np.uint32]


class Codec(Protocol):
    """One dataclass, one file a codec; parameters are its fields."""

    name: str
    lossless: bool
    plain: bool
    """Whether strips hold K ``[Hkv, 64, Dk]`` then V ``[Hkv, 64, Dv]`` as they are (``kernels.base``)."""
    coupling: Literal["token", "strip"]
    """``token``: a token can be written alone. ``strip``: a strip is encoded whole when it is full (sealing)."""

    def page_format(self, layer: LayerSpec, dtype: str) -> PageFormat:
        """Return the strip layout for ``layer`` of a model whose activations are ``dtype``."""

    def write(self, step: StripStep, table: Table, base: Tensor, fmt: PageFormat, k: Tensor, v: Tensor) -> None:
        """Store ``k, v [N, Hkv, D]`` at the step's positions."""

    def attend(
        self, step: StripStep, table: Table, base: Tensor, fmt: PageFormat, layer: LayerSpec, q: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return ``out [N, Hq, Dv]`` and float32 ``lse [N, Hq]``, reading strips in place."""

    def open(self, strip: Tensor, fmt: PageFormat) -> tuple[Tensor, Tensor]:
        """Return ``k, v [Hkv, slots, D]`` of one strip (uint8 ``[strip_bytes]``); the exact inverse path."""
