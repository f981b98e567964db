"""Transfers: sequences on their way between the store and objects of a tier, and what those objects hold.

A save writes only what the object lacks: full blocks that both hold already stay, the last block that is not full is
written again at the end. While a transfer is under way nothing may change its sequence: whoever wants to waits for that
transfer, and no other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from elbowroom.engine.types import KVOp, Moved, TransferKind
from elbowroom.errors import ElbowroomError, IntegrityError
from elbowroom.kv.base import KVHandle, KVStore
from elbowroom.kv.moving import HeldBlock, count_copies
from elbowroom.memory.objects import Completion, ObjectTier, Part

WAIT_S = 0.1
"""Seconds after which a wait is given up, so that the engine sees new requests."""


class MovableStore(KVStore, Protocol):
    """A store whose sequences can be written and read where they lie."""

    def lend(self, handle: KVHandle, num_tokens: int) -> list[HeldBlock]:
        """Return where the bytes of the first ``num_tokens`` lie; they are those until the sequence changes."""

    def admit(self, num_tokens: int, plan: int = 0) -> KVHandle:
        """Return a new sequence of ``num_tokens``; its bytes are to be written where ``lend`` says."""


@dataclass(frozen=True, slots=True)
class _Stored:
    """Where an object holds a block."""

    offset: int
    num_bytes: int
    checksum: int


@dataclass(slots=True)
class _Object:
    plan: int
    num_tokens: int = 0
    blocks: dict[tuple[int, int], _Stored] = field(default_factory=dict)
    """(lane, block) -> its place."""


@dataclass(frozen=True, slots=True)
class _Transfer:
    kind: TransferKind
    slot: int
    key: str
    num_tokens: int
    num_copies: int
    made: _Object
    """What the object holds in the end."""
    new: tuple[tuple[int, int], ...] = ()
    """Blocks that are written, in their order."""


class Transfers:
    """Writes and reads sequences of a store; knows which transfers are under way and what objects hold.

    Args:
        store: of the sequences.
        tier: of the objects.
    """

    def __init__(self, store: MovableStore, tier: ObjectTier) -> None:
        self._store, self._tier = store, tier
        self.handles: dict[int, KVHandle] = {}
        """Slot -> sequence, those that are being loaded included; shared with the executor."""
        self._objects: dict[str, _Object] = {}
        self._under_way: dict[int, _Transfer] = {}
        self._same: dict[int, dict[str, int]] = {}
        """Slot -> key -> tokens that slot and object have in common."""
        self._ended: list[Moved] = []

    def apply(self, op: KVOp) -> None:
        """Begin what ``save``, ``load`` or ``forget`` asks for, and end it unless it is asynchronous."""
        self.settle(key=op.key)
        if op.kind == "forget":
            self._drop(op.key)
            return
        try:
            ticket = self._save(op) if op.kind == "save" else self._load(op)
        except ElbowroomError as error:
            kind: TransferKind = "save" if op.kind == "save" else "load"
            self._ended.append(Moved(kind, op.slot, op.key, op.num_tokens, 0.0, 0, 0, error.message))
            self._drop(op.key)
            return
        while ticket in self._under_way and not op.is_async:
            self._poll(WAIT_S)

    def before(self, op: KVOp) -> None:
        """Note that ``op`` changes sequences, once the transfers of their slots have ended."""
        if op.kind == "fork":
            self.settle(slots=(op.slot, op.source))
            shared = self._same.get(op.source, {})
            self._same[op.slot] = {key: min(tokens, op.num_tokens) for key, tokens in shared.items()}
            return
        self.settle(slots=(op.slot,))
        if op.kind == "truncate":
            shared = self._same.get(op.slot, {})
            self._same[op.slot] = {key: min(tokens, op.num_tokens) for key, tokens in shared.items()}
        else:
            self._same.pop(op.slot, None)

    def settle(self, slots: Iterable[int] = (), key: str | None = None) -> None:
        """Wait for the transfers of some slots, or of an object; others go on."""
        if not self._under_way:
            return
        wanted = set(slots)
        while any(each.slot in wanted or each.key == key for each in self._under_way.values()):
            self._poll(WAIT_S)

    def take_ended(self, waits: bool) -> tuple[Moved, ...]:
        """Return the transfers that have ended since the last call; ``waits``: give one ``WAIT_S`` to end."""
        if self._under_way:
            self._poll(WAIT_S if waits and not self._ended else 0.0)
        ended, self._ended = tuple(self._ended), []
        return ended

    def reset(self) -> None:
        """Wait for everything and forget all objects."""
        while self._under_way:
            self._poll(WAIT_S)
        for key in list(self._objects):
            self._drop(key)
        self._same.clear()
        self._ended.clear()

    def _save(self, op: KVOp) -> int:
        handle = self.handles.get(op.slot)
        if handle is None:
            raise IntegrityError(f"there is no slot {op.slot} to save")
        held = self._store.lend(handle, op.num_tokens)
        old = self._objects.get(op.key)
        same = 0 if old is None else min(self._same.get(op.slot, {}).get(op.key, 0), op.num_tokens)
        kept = {} if old is None or not same else _unchanged(old, held, same)
        new = [each for each in held if (each.lane, each.block) not in kept]
        new.sort(key=lambda each: not each.is_full(op.num_tokens))  # what will be written again comes last
        made = _Object(handle.plan, op.num_tokens, kept)
        for marks in self._same.values():
            marks.pop(op.key, None)  # the object is this sequence's now
        end = max((each.offset + each.num_bytes for each in kept.values()), default=0)
        ticket = self._tier.submit_put(op.key, [each.views for each in new], end)
        names = tuple([(each.lane, each.block) for each in new])
        for each in new:
            made.blocks[each.lane, each.block] = _Stored(end, each.num_bytes, 0)
            end += each.num_bytes
        self._objects[op.key] = made
        self._under_way[ticket] = _Transfer("save", op.slot, op.key, op.num_tokens, count_copies(new), made, names)
        return ticket

    def _load(self, op: KVOp) -> int:
        stored = self._objects.get(op.key)
        if stored is None or stored.plan != op.plan or stored.num_tokens < op.num_tokens:
            raise IntegrityError(f"no object {op.key!r} holds {op.num_tokens} tokens under plan {op.plan}")
        handle = self._store.admit(op.num_tokens, op.plan)
        try:
            held = self._store.lend(handle, op.num_tokens)
            ticket = self._tier.submit_get(op.key, _parts(op, stored, held))
        except BaseException:
            self._store.close(handle)
            raise
        self.handles[op.slot] = handle
        self._under_way[ticket] = _Transfer("load", op.slot, op.key, op.num_tokens, count_copies(held), stored)
        return ticket

    def _poll(self, timeout_s: float) -> None:
        for done in self._tier.poll(timeout_s):
            self._end(self._under_way.pop(done.ticket), done)

    def _end(self, each: _Transfer, done: Completion) -> None:
        """Note what a transfer has left."""
        for name, checksum in zip(each.new, done.checksums, strict=False):
            place = each.made.blocks[name]
            each.made.blocks[name] = _Stored(place.offset, place.num_bytes, checksum)
        if done.error is None:
            self._same.setdefault(each.slot, {})[each.key] = each.num_tokens
        else:
            self._drop(each.key)
            if each.kind == "load":
                self._store.close(self.handles.pop(each.slot))
        moved = Moved(each.kind, each.slot, each.key, each.num_tokens, done.seconds, done.num_bytes, each.num_copies)
        self._ended.append(moved._replace(error=done.error))

    def _drop(self, key: str) -> None:
        self._tier.delete(key)
        self._objects.pop(key, None)
        for marks in self._same.values():
            marks.pop(key, None)


def _parts(op: KVOp, stored: _Object, held: Iterable[HeldBlock]) -> list[Part]:
    """Return where an object holds the blocks of a sequence that is to be loaded.

    Raises:
        IntegrityError: it holds one as it was later, or not at all.
    """
    made = []
    for each in held:
        at = stored.blocks.get((each.lane, each.block))
        if at is None or at.num_bytes != each.num_bytes:
            raise IntegrityError(
                f"object {op.key!r} holds {stored.num_tokens} tokens, and no longer block {each.block} as it was at "
                f"{op.num_tokens}"
            )
        made.append(Part(at.offset, each.views, at.checksum))
    return made


def _unchanged(old: _Object, held: Iterable[HeldBlock], same_tokens: int) -> dict[tuple[int, int], _Stored]:
    """Return the blocks of an object that a save can leave; none if they are less than half of what would stay."""
    names = [(each.lane, each.block) for each in held if each.is_full(same_tokens)]
    kept = {name: old.blocks[name] for name in names if name in old.blocks}
    num_bytes = sum(each.num_bytes for each in kept.values())
    end = max((each.offset + each.num_bytes for each in kept.values()), default=0)
    return kept if 2 * num_bytes >= end else {}
