"""Cascades: choices in which each layer keeps only tokens that the layer before it keeps.

A token is then held by the first layers up to some depth. So one number for each token that the first layer holds says
which token every slot of every layer holds: slots go by position, and layer i holds the tokens whose depth is above i.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from elbowroom.core import STRIP_TOKENS
from elbowroom.errors import IntegrityError
from elbowroom.kv.holding import Extent
from elbowroom.kv.policies import Cascade

CASCADE_BYTES = 128
"""Most temporary bytes for each token that the first layer holds, while a cascade chooses."""
_TOKEN_BYTES = 10
_FADING = 0.5
"""What earlier choices weigh beside the next one, each time."""


@dataclass(frozen=True, eq=False, slots=True)
class TokenHistory:
    """What a sequence knows of its tokens from its last choice: 10 bytes for each that the first layer holds.

    Later tokens are held by all layers and nothing was seen of them. Never changed, so that forks share it.
    """

    depths: Tensor
    """int16 ``[n]``: layers of the cascade that hold the token."""
    importance: Tensor
    """float32 ``[n]``: mean of what was noted in these layers, newer choices weighing more."""
    weights: Tensor
    """float32 ``[n]``: what that mean weighs."""

    def to_bytes(self) -> bytes:
        """Return the three arrays one behind the other."""
        return b"".join(part.numpy().tobytes() for part in (self.depths, self.importance, self.weights))

    def fits(self, held: Rows[int]) -> bool:
        """Return whether the layers of a cascade hold so many tokens, those since the last choice included."""
        newer = held[0] - self.depths.numel()
        return newer >= 0 and all(
            int((self.depths > number).sum()) + newer == count for number, count in enumerate(held)
        )


def check_history(history: TokenHistory | None, extent: Extent, layers: Rows[int]) -> None:
    """Refuse a history that is not of what ``layers``, those of a cascade, hold.

    Raises:
        IntegrityError: it is not.
    """
    expected = bool(layers and extent.dropped)
    held = [extent.num_tokens - STRIP_TOKENS * extent.dropped[layer] for layer in layers if extent.dropped]
    if expected != (history is not None) or (history is not None and not history.fits(held)):
        raise IntegrityError(f"the history of a sequence is not that of layers which hold {held} tokens")


def read_history(noted: bytes, extent: Extent, layers: Rows[int]) -> TokenHistory | None:
    """Return a history from its bytes; None: nothing was noted.

    Args:
        noted: made by ``TokenHistory.to_bytes``, or empty.
        extent: how the sequence is held.
        layers: those of a cascade.

    Raises:
        IntegrityError: it is of other tokens.
    """
    made, count = None, len(noted) // _TOKEN_BYTES
    if noted and len(noted) == _TOKEN_BYTES * count:
        depths = torch.from_numpy(np.frombuffer(noted, np.int16, count).copy())
        numbers = torch.from_numpy(np.frombuffer(noted, np.float32, 2 * count, 2 * count).copy())
        made = TokenHistory(depths, numbers[:count], numbers[count:])
    check_history(made, extent, layers)
    return made


class CascadeRun:
    """One choice of one sequence, layer by layer.

    Args:
        history: of the sequence, or None before its first choice.
        held: tokens that each layer of the cascade holds before the choice.
        staying: tokens that each of them keeps.

    Raises:
        IntegrityError: a layer holds or keeps more than the one before it.
    """

    def __init__(self, history: TokenHistory | None, held: Rows[int], staying: Rows[int]) -> None:
        if sorted(held, reverse=True) != list(held) or sorted(staying, reverse=True) != list(staying):
            raise IntegrityError(
                f"layers of a cascade hold {list(held)} tokens and keep {list(staying)}: they must fall"
            )
        self._held, self._staying = held, staying
        depths, importance, weights = torch.empty(0, dtype=torch.int16), torch.empty(0), torch.empty(0)
        if history is not None:
            depths, importance, weights = history.depths, history.importance, history.weights * _FADING
        newer = held[0] - depths.numel()
        self._depths = torch.cat([depths, torch.full((newer,), len(held), dtype=torch.int16)])
        self._importance = torch.cat([importance, torch.zeros(newer)])
        self._weights = torch.cat([weights, torch.zeros(newer)])
        self._alive = torch.ones(held[0], dtype=torch.bool)
        self._chosen_depths = torch.zeros(held[0], dtype=torch.int16)

    def note(self, number: int, seen: Tensor) -> Cascade:
        """Add what was ``seen [n]`` of the tokens that layer ``number`` holds; return what its choice may look at."""
        members = self._members(number)
        self._weights[members] += 1
        self._importance[members] += (seen - self._importance[members]) / self._weights[members]
        depths = self._depths[members]
        # Of layers that hold the same tokens, the first one keeps most.
        apart = [
            deeper
            for deeper in reversed(range(number, len(self._held)))
            if deeper == number or self._held[deeper] != self._held[deeper - 1]
        ]
        floors = tuple((depths > deeper, self._staying[deeper]) for deeper in apart)
        return Cascade(self._importance[members], self._alive[members], floors)

    def keep(self, number: int, chosen: Tensor) -> None:
        """Take over what layer ``number`` keeps of its slots, int64 ``[Hkv, m]``, all rows alike.

        Raises:
            IntegrityError: they differ, the layer before does not keep all of it, or deeper ones are left too few.
        """
        if (chosen != chosen[:1]).any():
            raise IntegrityError(f"layer {number} of a cascade keeps other tokens for one KV head than for another")
        tokens = self._members(number)[chosen[0]]
        alive = torch.zeros_like(self._alive)
        alive[tokens] = self._alive[tokens]
        left = [int(alive[self._members(deeper)].sum()) for deeper in range(number, len(self._held))]
        if left[0] != chosen.shape[1] or any(
            have < need for have, need in zip(left, self._staying[number:], strict=True)
        ):
            raise IntegrityError(
                f"layer {number} of a cascade keeps tokens that the layer before dropped, or leaves {left} to itself "
                f"and the layers behind it, of which {list(self._staying[number:])} must stay"
            )
        self._alive = alive
        self._chosen_depths[tokens] = number + 1

    def finish(self) -> TokenHistory:
        """Return what is known behind the last layer."""
        kept = self._chosen_depths > 0
        return TokenHistory(self._chosen_depths[kept], self._importance[kept], self._weights[kept])

    def _members(self, number: int) -> Tensor:
        return (self._depths > number).nonzero()[:, 0]
