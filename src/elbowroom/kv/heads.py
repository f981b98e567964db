"""Heads: which KV heads of a sequence stay, chosen once, layer by layer, behind its first prompt."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from elbowroom.core import LayerSpec, PageFormat
from elbowroom.errors import IntegrityError
from elbowroom.kernels.extras import heads_at

Places: TypeAlias = tuple[npt.NDArray[np.int8], ...]
"""For each layer int8 ``[Hkv]``: place of a KV head in sealed strips, -1 if it is gone. Never changed: forks share it.

Empty: nothing was chosen yet.
"""


class HeadRun:
    """One choice of one sequence.

    Args:
        layers: of the model.
        kept: KV heads that stay in each of them.
        cascades: whether a layer keeps only heads that the one before keeps, and looks at both.
    """

    def __init__(self, layers: Rows[LayerSpec], kept: Rows[int], cascades: bool) -> None:
        self._kept, self._cascades = kept, cascades
        self._places = list(whole_places(layers))
        self._importance: Tensor | None = None
        self._alive: Tensor | None = None

    def choose(self, layer: int, seen: Tensor) -> Tensor:
        """Return the KV heads of ``layer`` that stay, ascending, int64, by what was ``seen [Hkv]`` of each.

        Of a cascade's layers all come here, in their order, also those that keep all heads.
        """
        if not self._cascades or self._importance is None or self._alive is None:
            self._importance, self._alive = torch.zeros_like(seen), torch.ones_like(seen, dtype=torch.bool)
        self._importance += seen.masked_fill(~self._alive, 0.0)
        ranks = self._importance.masked_fill(~self._alive, -torch.inf).nan_to_num(torch.inf, torch.inf, -torch.inf)
        best = ranks.argsort(descending=True, stable=True)[: self._kept[layer]].sort().values
        self._alive = torch.zeros_like(self._alive).index_fill_(0, best, True)
        self._places[layer] = places_of(self._alive.numpy())
        return best

    def finish(self) -> Places:
        """Return what was chosen."""
        return tuple(self._places)


def whole_places(layers: Rows[LayerSpec]) -> Places:
    """Return the places of KV heads that all stay."""
    return tuple(np.arange(spec.num_kv_heads, dtype=np.int8) for spec in layers)


def places_of(alive: npt.NDArray[np.bool_]) -> npt.NDArray[np.int8]:
    """Return the places of the KV heads ``alive [Hkv]`` in sealed strips."""
    return np.where(alive, np.cumsum(alive) - 1, -1).astype(np.int8)


def heads_of(places: npt.NDArray[np.int8]) -> npt.NDArray[np.int64]:
    """Return the KV heads that have places, ascending."""
    return np.flatnonzero(places >= 0)


def check_heads(strip: npt.NDArray[np.uint8], fmt: PageFormat, places: Places, layer: int) -> None:
    """Refuse the bytes of a sealed strip that holds other KV heads than stay of its sequence.

    Raises:
        IntegrityError: it does.
    """
    held = strip[heads_at(fmt) : heads_at(fmt) + fmt.kept_heads]
    if fmt.kept_heads and not (places and np.array_equal(held, heads_of(places[layer]))):
        raise IntegrityError(f"a strip of layer {layer} holds the KV heads {held.tolist()}, not those of its sequence")


def write_places(places: Places) -> bytes:
    """Return a byte for each KV head of each layer: whether it stays."""
    return b"".join((each >= 0).tobytes() for each in places)


def read_places(noted: bytes, start: int, layers: Rows[LayerSpec], kept: Rows[int]) -> Places:
    """Return the places of a span from their bytes; empty: nothing was chosen yet.

    Args:
        noted: made by ``write_places``.
        start: first token of the span.
        layers: of the model.
        kept: KV heads that stay in each of them.

    Raises:
        IntegrityError: they are not of such layers, or the span is to follow tokens that have their own.
    """
    if start:
        raise IntegrityError("a span cannot follow tokens behind which KV heads were chosen", "start at 0")
    if not noted:
        return ()
    flags = np.frombuffer(noted, dtype=np.uint8)
    ends = np.cumsum([spec.num_kv_heads for spec in layers])
    if flags.size != ends[-1] or flags.max() > 1:
        raise IntegrityError(f"{flags.size} bytes do not say which of {ends[-1]} KV heads stay")
    alive = np.split(flags != 0, ends[:-1])
    if [int(each.sum()) for each in alive] != list(kept):
        raise IntegrityError(f"a span keeps other numbers of KV heads than {list(kept)}")
    return tuple(places_of(each) for each in alive)
