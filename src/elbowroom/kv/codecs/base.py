"""The seam of codecs: how the keys and values of one layer lie in a strip."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from elbowroom.core import LayerSpec, PageFormat
from elbowroom.kernels.base import StripLayout


class Codec(StripLayout, Protocol):
    """One dataclass, one file a codec; parameters are its fields. ``store`` and ``open`` are the readable path."""

    @property
    def name(self) -> str:
        """Name in plans."""

    @property
    def lossless(self) -> bool:
        """Whether reading gives back every bit that the model wrote."""

    @property
    def seals(self) -> bool:
        """Whether a strip is encoded whole, when it is full, so that new tokens wait for it in a plain one.

        Otherwise a token can be written, moved and dropped alone.
        """

    @property
    def sorts(self) -> bool:
        """Whether the channels of keys are to be sorted by magnitude (see ``OrderedCodec``)."""

    def page_format(self, layer: LayerSpec, dtype: str) -> PageFormat:
        """Return the strip layout for ``layer`` of a model whose activations are ``dtype``.

        Raises:
            PlanError: the layer or the dtype does not suit the codec.
        """


class TokenCodec(Codec, Protocol):
    """A codec that does not seal."""

    def fields(self, strip: Tensor, fmt: PageFormat) -> tuple[Tensor, ...]:
        """Return views uint8 ``[Hkv, 64, bytes]`` of a strip, which hold all bytes of its tokens."""
