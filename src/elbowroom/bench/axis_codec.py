"""A codec of benchmarks: keys and values of 2 or 4 bits, each scaled by channel or by token, for the ablation of KIVI.

Plans name only KIVI's own choice of axes (codec ``kivi``). This one is handed to a plan as an object; codes are packed
and strips have their true bytes, but kernels do not know it, so it runs on the readable path.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from elbowroom.core import STRIP_TOKENS, LayerSpec, PageFormat
from elbowroom.errors import PlanError
from elbowroom.kv.codecs.kivi import encode_groups

Axis = Literal["channel", "token"]
AXES: tuple[Axis, Axis] = ("channel", "token")


@dataclass(frozen=True, slots=True)
class AxisCodec:
    """``x = scale * code + minimum``, both float16, over g tokens of a channel or g channels of a token.

    Args:
        k: axis that a scale of keys belongs to.
        v: likewise of values.
        bits: of a code, 2 or 4.
        g: elements that share a scale; divides 64 and the widths of heads.
    """

    k: Axis
    v: Axis
    bits: int
    g: int
    name: ClassVar[str] = "axes"
    lossless: ClassVar[bool] = False
    seals: ClassVar[bool] = True
    sorts: ClassVar[bool] = False
    order: ClassVar[None] = None

    def bounds(self, strip: Tensor, fmt: PageFormat) -> tuple[Tensor, Tensor]:
        """Return the least and the greatest key of each channel, as one run."""
        keys, _ = self.open(strip, fmt)
        return keys.amin(1, keepdim=True), keys.amax(1, keepdim=True)

    def page_format(self, layer: LayerSpec, dtype: str) -> PageFormat:
        """Return the layout of a sealed strip: codes, scales and minima of keys, then of values.

        Raises:
            PlanError: ``g`` does not divide the width of a head.
        """
        if layer.head_dim % self.g or layer.v_head_dim % self.g:
            raise PlanError(f"groups of {self.g} do not divide heads of {layer.head_dim} and {layer.v_head_dim}")
        elements = layer.num_kv_heads * STRIP_TOKENS * (layer.head_dim + layer.v_head_dim)
        return PageFormat(
            codec=self.name,
            dtype="uint8",
            num_kv_heads=layer.num_kv_heads,
            head_dim=layer.head_dim,
            v_head_dim=layer.v_head_dim,
            payload_bytes=elements * self.bits // 8,
            overhead_bytes=elements // self.g * 4,
            key_bits=self.bits,
            value_bits=self.bits,
            block=self.g,
            sealed=self.seals,
        )

    def store(self, strip: Tensor, fmt: PageFormat, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Seal a strip: encode all 64 slots of ``k [Hkv, 64, Dk]`` and ``v [Hkv, 64, Dv]``."""
        for part, x, axis in zip(self._halves(strip, fmt), (k, v), (self.k, self.v), strict=True):
            codes, scales, minima = self._fields(part)
            groups = torch.unflatten(x.float().transpose(1, 2) if axis == "channel" else x.float(), 2, (-1, self.g))
            code, scale, minimum = encode_groups(groups, self.bits)
            shifts = torch.arange(0, 8, self.bits, dtype=torch.uint8)
            codes.copy_((code.reshape(-1, 8 // self.bits) << shifts).sum(1, dtype=torch.uint8))
            scales.copy_(scale.flatten())
            minima.copy_(minimum.flatten())

    def open(self, strip: Tensor, fmt: PageFormat) -> tuple[Tensor, Tensor]:
        """Return keys and values of a sealed strip in float32."""
        keys, values = self._halves(strip, fmt)
        heads = fmt.num_kv_heads
        return self._opened(keys, heads, fmt.head_dim, self.k), self._opened(values, heads, fmt.v_head_dim, self.v)

    def _opened(self, part: Tensor, num_heads: int, width: int, axis: Axis) -> Tensor:
        packed, scales, minima = self._fields(part)
        shifts = torch.arange(0, 8, self.bits, dtype=torch.uint8)
        codes = ((packed[:, None] >> shifts) & (2**self.bits - 1)).view(-1, self.g).float()
        rows: Tensor = (codes * scales.float()[:, None] + minima.float()[:, None]).view(num_heads, -1)
        if axis == "token":
            return rows.view(num_heads, STRIP_TOKENS, width)
        return rows.view(num_heads, width, STRIP_TOKENS).transpose(1, 2)

    def _halves(self, strip: Tensor, fmt: PageFormat) -> tuple[Tensor, Tensor]:
        """Return the bytes of keys and of values."""
        keys, values = (fmt.num_kv_heads * STRIP_TOKENS * width for width in (fmt.head_dim, fmt.v_head_dim))
        cut, end = (elements * self.bits // 8 + elements // self.g * 4 for elements in (keys, keys + values))
        return strip[:cut], strip[cut:end]

    def _fields(self, part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes uint8, scales and minima float16, one behind the other."""
        groups = part.numel() // (self.g * self.bits // 8 + 4)
        codes, scales, minima = torch.split(part, [groups * self.g * self.bits // 8, 2 * groups, 2 * groups])
        return codes, scales.view(torch.float16), minima.view(torch.float16)
