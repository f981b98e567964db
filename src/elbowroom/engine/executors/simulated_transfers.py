"""SimTransfers: saves and loads of the simulated executor, priced: one device moves one transfer after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from elbowroom.core import STRIP_TOKENS
from elbowroom.engine.types import KVOp, Moved, Row, StepPlan, TransferKind
from elbowroom.memory.swap_cost import SwapCost

_ROUNDING_S = 1e-9


@dataclass(frozen=True, slots=True)
class SwapShape:
    """What sequences look like to a tier.

    ``run_tokens / num_parts`` tokens are one copy: a store that keeps 1,000 tokens side by side has ``(1000, 1)``; one
    that moves 16 tokens of each layer's keys and values alone has ``(16, 2 * layers)``.
    """

    token_bytes: float
    run_tokens: int = 16 * STRIP_TOKENS
    num_parts: int = 1
    capacity_bytes: float = float("inf")
    keeps_copies: bool = True
    """Whether what an object holds already is not written again."""

    def num_copies(self, num_tokens: int) -> int:
        """Return the copies that so many tokens are moved as."""
        return -(-num_tokens // self.run_tokens) * self.num_parts


@dataclass(slots=True)
class _Transfer:
    moved: Moved
    ends_s: float


class SimTransfers:
    """Prices transfers. Time is the executor's own: what its steps lasted.

    Args:
        cost: of bytes and copies.
        shape: of sequences.
    """

    def __init__(self, cost: SwapCost, shape: SwapShape) -> None:
        self._cost, self._shape = cost, shape
        self.moved_bytes = self.num_copies = 0
        """In all transfers that began."""
        self._now_s = 0.0
        self._free_s = 0.0
        """When the device has done all that it was given."""
        self._objects: dict[str, int] = {}
        """Key -> tokens."""
        self._same: dict[int, dict[str, int]] = {}
        """Slot -> key -> tokens that both hold."""
        self._under_way: list[_Transfer] = []
        self._ended: list[Moved] = []
        self._absent: set[int] = set()
        """Slots that could not be loaded."""
        self._began_s = 0.0
        """When the step began."""

    def begin(self, plan: StepPlan) -> tuple[tuple[Row, ...], float]:
        """Apply what ``plan`` changes; return the rows that can be computed, and the seconds that this waits for."""
        before_s = self._now_s
        for op in plan.ops:
            self._apply(op)
        slots = {row.slot for row in plan.rows}
        self._settle(lambda each: each.moved.slot in slots)
        rows = plan.rows
        if slots & self._absent:
            rows = tuple([row for row in rows if row.slot not in self._absent])
        self._began_s = before_s
        return rows, self._now_s - before_s

    def end(self, seconds: float) -> tuple[Moved, ...]:
        """End a step that lasted ``seconds`` in all; return the transfers that have ended."""
        self._pass(max(self._began_s + seconds - self._now_s, 0.0))
        ended, self._ended = tuple(self._ended), []
        return ended

    def next_end_s(self) -> float | None:
        """Return the seconds until a transfer ends; None: none is under way."""
        return None if not self._under_way else max(self._under_way[0].ends_s - self._now_s, 0.0)

    def _apply(self, op: KVOp) -> None:
        """Begin what an operation asks for, or note what it changes; time passes where it must wait."""
        if op.kind in ("save", "load", "forget"):
            self._settle(lambda each: each.moved.key == op.key)
            self._transfer(op)
            return
        self._absent.discard(op.slot)
        slots = {op.slot, op.source} if op.kind == "fork" else {op.slot}
        self._settle(lambda each: each.moved.slot in slots)
        shared = self._same.get(op.source if op.kind == "fork" else op.slot, {})
        if op.kind in ("fork", "truncate"):
            self._same[op.slot] = {key: min(tokens, op.num_tokens) for key, tokens in shared.items()}
        else:
            self._same.pop(op.slot, None)

    def _transfer(self, op: KVOp) -> None:
        if op.kind == "forget":
            self._objects.pop(op.key, None)
            return
        kind: TransferKind = "save" if op.kind == "save" else "load"
        tokens, error = self._tokens(op)
        num_bytes, copies = tokens * self._shape.token_bytes, self._shape.num_copies(tokens)
        seconds = self._cost.write_seconds if kind == "save" else self._cost.read_seconds
        begins_s = max(self._now_s, self._free_s)
        self._free_s = begins_s + (0.0 if error else seconds(num_bytes, copies))
        lasted_s = self._free_s - self._now_s
        moved = Moved(kind, op.slot, op.key, op.num_tokens, lasted_s, int(num_bytes), copies, error)
        self.moved_bytes += moved.num_bytes
        self.num_copies += copies
        self._under_way.append(_Transfer(moved, self._free_s))
        if not op.is_async:
            self._pass(lasted_s)

    def _tokens(self, op: KVOp) -> tuple[int, str | None]:
        """Return the tokens that are moved, and why not."""
        held = self._objects.get(op.key)
        if op.kind == "load":
            if held is None or held < op.num_tokens:
                self._absent.add(op.slot)
                return 0, f"no object {op.key!r} holds {op.num_tokens} tokens"
            self._same[op.slot] = {op.key: op.num_tokens}
            return op.num_tokens, None
        if (sum(self._objects.values()) - (held or 0) + op.num_tokens) * self._shape.token_bytes > (
            self._shape.capacity_bytes
        ):
            self._objects.pop(op.key, None)
            return 0, "swap is full"
        same = self._same.get(op.slot, {}).get(op.key, 0) if held is not None and self._shape.keeps_copies else 0
        for marks in self._same.values():
            marks.pop(op.key, None)
        self._objects[op.key] = op.num_tokens
        self._same.setdefault(op.slot, {})[op.key] = op.num_tokens
        return op.num_tokens - min(same, op.num_tokens) // STRIP_TOKENS * STRIP_TOKENS, None

    def _settle(self, concerns: Callable[[_Transfer], bool]) -> None:
        last = max((each.ends_s for each in self._under_way if concerns(each)), default=0.0)
        self._pass(max(last - self._now_s, 0.0))

    def _pass(self, seconds: float) -> None:
        self._now_s += seconds
        while self._under_way and self._under_way[0].ends_s <= self._now_s + _ROUNDING_S:
            self._ended.append(self._under_way.pop(0).moved)
