"""Codec ``kivi``: keys of 2 or 4 bits scaled by channel, values of 2 or 4 bits scaled by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from elbowroom.core import STRIP_TOKENS, LayerSpec, PageFormat
from elbowroom.kv.codecs.rows import as_bytes, whole_number

_BITS = range(2, 5, 2)
_GROUPS = range(32, 65, 32)
_QUAD = 4
_RUN = 32


@dataclass(frozen=True, slots=True)
class KiviCodec:
    """KIVI (Liu et al., arXiv 2402.02750): ``x = scale * code + minimum`` with codes ``0 .. 2^bits - 1``.

    Keys have a few channels that are large in all tokens, so a key's scale belongs to one channel and g tokens;
    values do not, so a value's belongs to one token and g channels. A block of 64 tokens is sealed when it is full;
    a query reads its own block as it was computed and earlier ones sealed. Scale and minimum are float16:
    bits + 32 / g bits an element.

    Deviations from the paper: the full-precision tail is the unfinished block (0 to 63 tokens) for values as for keys;
    a prompt is read like everything else, so that what a query reads depends on its position alone.

    Args:
        k: bits of a key, 2 or 4.
        v: bits of a value, 2 or 4.
        g: tokens (keys) or channels (values) that share a scale, 32 or 64.
    """

    k: int | str = 4
    v: int | str = 4
    g: int | str = 32
    name: ClassVar[str] = "kivi"
    lossless: ClassVar[bool] = False
    seals: ClassVar[bool] = True
    sorts: ClassVar[bool] = False
    order: ClassVar[None] = None

    def __post_init__(self) -> None:
        """Read the parameters as numbers."""
        for field, allowed in (("k", _BITS), ("v", _BITS), ("g", _GROUPS)):
            object.__setattr__(self, field, whole_number(self.name, field, getattr(self, field), allowed))

    def page_format(self, layer: LayerSpec, dtype: str) -> PageFormat:
        """Return the layout of a sealed strip: one head behind the other, as ``_parts`` cuts it."""
        sizes = self._sizes(layer.head_dim, layer.v_head_dim)
        return PageFormat(
            codec=self.name,
            dtype="uint8",
            num_kv_heads=layer.num_kv_heads,
            head_dim=layer.head_dim,
            v_head_dim=layer.v_head_dim,
            payload_bytes=layer.num_kv_heads * (sizes[0] + sizes[3]),
            overhead_bytes=layer.num_kv_heads * (sum(sizes) - sizes[0] - sizes[3]),
            key_bits=int(self.k),
            value_bits=int(self.v),
            block=int(self.g),
            sealed=self.seals,
        )

    def store(self, strip: Tensor, fmt: PageFormat, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Seal a strip: encode all 64 slots of ``k [Hkv, 64, Dk]`` and ``v [Hkv, 64, Dv]``."""
        group = int(self.g)
        for number, (keys, values) in enumerate(zip(k.float(), v.float(), strict=True)):
            parts = self._parts(strip, fmt, number)
            channels = torch.zeros(_up(fmt.head_dim, _QUAD), STRIP_TOKENS)
            channels[: fmt.head_dim] = keys.t()
            codes, scale, low = encode_groups(torch.unflatten(channels, 1, (-1, group)), int(self.k))
            _fill(parts[:3], _pack(codes.flatten(1), int(self.k)), scale.t(), low.t())
            wide = torch.nn.functional.pad(values, (0, _up(fmt.v_head_dim, group) - fmt.v_head_dim))
            wide[:, fmt.v_head_dim :] = values[:, -1:]  # a shorter last group has the range of its own values
            codes, scale, low = encode_groups(torch.unflatten(wide, 1, (-1, group)), int(self.v))
            codes = codes.flatten(1)[:, : _up(fmt.v_head_dim, _RUN)]
            codes[:, fmt.v_head_dim :] = 0
            _fill(parts[3:], _pack(codes, int(self.v)), scale.t(), low.t())

    def open(self, strip: Tensor, fmt: PageFormat) -> tuple[Tensor, Tensor]:
        """Return keys and values of a sealed strip in float32."""
        heads = [self._open_head(strip, fmt, number) for number in range(fmt.num_kv_heads)]
        return torch.stack([keys for keys, _ in heads]), torch.stack([values for _, values in heads])

    def bounds(self, strip: Tensor, fmt: PageFormat) -> tuple[Tensor, Tensor]:
        """Return the keys of the least and the greatest codes of each group: minima, and scales above them."""
        parts = [self._parts(strip, fmt, number) for number in range(fmt.num_kv_heads)]
        scale, low = (torch.stack([head[index].float() for head in parts])[..., : fmt.head_dim] for index in (1, 2))
        return low, low + (2 ** int(self.k) - 1) * scale

    def _open_head(self, strip: Tensor, fmt: PageFormat, number: int) -> tuple[Tensor, Tensor]:
        packed_k, scale_k, low_k, packed_v, scale_v, low_v = self._parts(strip, fmt, number)
        codes = torch.unflatten(_unpack(packed_k, STRIP_TOKENS, int(self.k)).float(), 1, (scale_k.shape[0], -1))
        keys = (codes * scale_k.t()[..., None] + low_k.t()[..., None]).flatten(1)
        codes = _unpack(packed_v, _up(fmt.v_head_dim, _RUN), int(self.v)).float()[:, : fmt.v_head_dim]
        group = torch.arange(fmt.v_head_dim) // int(self.g)
        return keys.t()[:, : fmt.head_dim], codes * scale_v.t()[:, group] + low_v.t()[:, group]

    def _sizes(self, head_dim: int, v_head_dim: int) -> list[int]:
        """Return the bytes of a head's codes, scales and minima: keys, then values."""
        channels, groups = _up(head_dim, _QUAD), _up(v_head_dim, int(self.g)) // int(self.g)
        keys = STRIP_TOKENS // int(self.g) * channels * 2
        values = groups * STRIP_TOKENS * 2
        codes = channels * STRIP_TOKENS * int(self.k) // 8, STRIP_TOKENS * _up(v_head_dim, _RUN) * int(self.v) // 8
        return [codes[0], keys, keys, codes[1], values, values]

    def _parts(self, strip: Tensor, fmt: PageFormat, number: int) -> list[Tensor]:
        """Return views of a head, keys then values: codes, scales and minima ``[groups, channels or tokens]``."""
        sizes = self._sizes(fmt.head_dim, fmt.v_head_dim)
        parts = list(torch.split(strip[number * sum(sizes) : (number + 1) * sum(sizes)], sizes))
        for index in (1, 2, 4, 5):
            groups = STRIP_TOKENS // int(self.g) if index < 3 else sizes[4] // (2 * STRIP_TOKENS)
            parts[index] = parts[index].view(torch.float16).view(groups, -1)
        return parts


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


def encode_groups(groups: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, uint8, with scale and minimum, float16, of ``[rows, groups, elements]``."""
    levels = 2**bits - 1
    low, high = groups.amin(-1), groups.amax(-1)
    minimum, scale = low.half(), ((high - low) / levels).half()
    divisor = scale.float().masked_fill(scale == 0, 1.0)
    codes = ((groups - minimum.float()[..., None]) / divisor[..., None]).round().clamp(0, levels)
    return codes.nan_to_num(0.0).to(torch.uint8), scale, minimum


def _fill(parts: list[Tensor], *contents: Tensor) -> None:
    for part, content in zip(parts, contents, strict=True):
        part.copy_(content)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Return the bytes of codes ``[contraction, outputs]`` in the order that one instruction multiplies.

    Four rows lie side by side (code 4 * output + row), in groups of 32 outputs; runs of 32 codes share 32 bytes, the
    first one in the lowest bits.
    """
    quads = codes.view(-1, _QUAD, codes.shape[1]).transpose(1, 2)
    runs = quads.reshape(-1, 8 // bits, _RUN)
    shifts = torch.arange(8 // bits, dtype=torch.uint8)[:, None] * bits
    return as_bytes((runs << shifts).sum(1, dtype=torch.uint8)).flatten()


def _unpack(packed: Tensor, outputs: int, bits: int) -> Tensor:
    """Return codes ``[contraction, outputs]``."""
    shifts = torch.arange(8 // bits, dtype=torch.uint8)[:, None] * bits
    runs = (packed.view(-1, 1, _RUN) >> shifts) & (2**bits - 1)
    codes: Tensor = runs.reshape(-1, outputs, _QUAD).transpose(1, 2).reshape(-1, outputs)
    return codes
