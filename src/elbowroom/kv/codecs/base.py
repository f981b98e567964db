"""The seam of codecs: how the keys and values of one layer lie in a strip."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

from elbowroom.core import LayerSpec, PageFormat
from elbowroom.kernels.base import StripLayout


class Codec(StripLayout, Protocol):
    """One dataclass, one file a codec; parameters are its fields. ``store`` and ``open`` are the readable path."""

    name: str
    lossless: bool
    plain: bool
    """Whether strips hold K ``[Hkv, 64, Dk]`` then V ``[Hkv, 64, Dv]`` as they are (``kernels.base``)."""
    coupling: Literal["token", "strip"]
    """``token``: a token can be written alone. ``strip``: a strip is encoded whole when it is full (sealing)."""

    def page_format(self, layer: LayerSpec, dtype: str) -> PageFormat:
        """Return the strip layout for ``layer`` of a model whose activations are ``dtype``.

        Raises:
            PlanError: the layer or the dtype does not suit the codec.
        """

    def fields(self, strip: Tensor, fmt: PageFormat) -> tuple[Tensor, ...]:
        """Return views uint8 ``[Hkv, 64, bytes]`` of a strip, which hold all bytes of its tokens."""
