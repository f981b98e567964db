"""A policy of tests, of which each layer keeps another number of tokens; and random lives for stores with policies."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

from torch import Tensor

from elbowroom.core import LayerSpec
from elbowroom.kv import KVHandle, KVPlan, KVStep, PagedStore
from elbowroom.kv.base import PromptPart
from elbowroom.kv.calibration import Calibration
from elbowroom.kv.codecs.plain import PlainCodec
from elbowroom.kv.policies import LayerView
from elbowroom.kv.policies.snapkv import SnapKVPolicy


@dataclass(frozen=True)
class TaperingPolicy:
    """What snapkv chooses; the first of three layers keeps ``tokens``, the next ones 70 more, and so on again."""

    tokens: int = 130
    interval: int = 0
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


class StoreWorld(Protocol):
    """A store and what it should hold; ``run`` checks it."""

    store: PagedStore
    held: Any
    """Handle -> what a sequence should hold, with ``copy()``."""

    def open(self) -> KVHandle:
        """Begin a sequence."""

    def step(self, *rows: tuple[KVHandle, int, PromptPart]) -> KVStep:
        """Return the step that appends tokens."""

    def run(self, *rows: tuple[KVHandle, int, PromptPart]) -> None:
        """Append tokens in one step."""

    def close_all(self) -> None:
        """Nothing may be left."""


def live_randomly(world: StoreWorld, rng: random.Random, num_actions: int) -> None:
    """Open, read, generate with and without choices, fork, close and abandon steps at random."""
    for _ in range(num_actions):
        action = rng.choice(["open", "run", "run", "run", "decode", "decode", "fork", "close", "abandon"])
        handles = list(world.held)
        if action == "open" or not handles:
            world.open()
        elif action == "close" and len(handles) > 3:
            handle = rng.choice(handles)
            world.store.close(handle)
            del world.held[handle]
        elif action == "fork" and len(handles) < 5:
            handle = rng.choice(handles)
            world.held[world.store.fork(handle)] = world.held[handle].copy()
        elif action == "abandon":
            part = rng.choice([PromptPart.END, PromptPart.CHOICE])
            world.store.reserve(world.step((rng.choice(handles), rng.randint(1, 400), part)))
        else:
            rows = rng.sample(handles, rng.randint(1, min(3, len(handles))))
            reads = action == "run"
            sizes = [1, 63, 64, 65, 130, 300] if reads else [1]
            parts = [PromptPart.PART, PromptPart.END] if reads else [PromptPart.NONE, PromptPart.CHOICE]
            for _ in range(1 if reads else rng.choice([1, 5, 12])):
                world.run(*((handle, rng.choice(sizes), rng.choice(parts)) for handle in rows))
    world.close_all()
