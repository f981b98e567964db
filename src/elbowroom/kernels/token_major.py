"""Strips whose tokens lie one behind the other: a sequence of consecutive ones is a plain tensor ``[S, Hkv, D]``.

A token takes the keys of all its KV heads and then their values. So 64 tokens take the bytes of any plain strip, and
the keys of a whole sequence are one tensor of even strides, as attention that knows no strips reads it.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from elbowroom.core import PageFormat
from elbowroom.kernels.base import dtype_of


class TokenMajorLayout:
    """K ``[Hkv, Dk]`` then V ``[Hkv, Dv]`` of each token, in the dtype of a plain format."""

    order: ClassVar[None] = None

    def store(self, strip: Tensor, fmt: PageFormat, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Copy rows to their slots, rounded to the dtype of the format."""
        for stored, rows in zip(self.open(strip, fmt), (k, v), strict=True):
            stored[:, slots] = rows.to(stored.dtype)

    def open(self, strip: Tensor, fmt: PageFormat) -> tuple[Tensor, Tensor]:
        """Return views ``[Hkv, n, D]`` of consecutive tokens, uint8: a strip, or a whole sequence."""
        heads = fmt.num_kv_heads
        tokens = strip.view(dtype_of(fmt)).view(-1, heads * (fmt.head_dim + fmt.v_head_dim))
        k, v = tokens[:, : heads * fmt.head_dim], tokens[:, heads * fmt.head_dim :]
        keys, values = k.view(-1, heads, fmt.head_dim), v.view(-1, heads, fmt.v_head_dim)
        return keys.transpose(0, 1), values.transpose(0, 1)

    def bounds(self, strip: Tensor, fmt: PageFormat) -> tuple[Tensor, Tensor]:
        """Refuse: strips of this layout have no digests.

        Raises:
            ValueError: always.
        """
        raise ValueError("strips that lie token by token have no digests: rows cannot select among them")


BY_TOKEN = TokenMajorLayout()
