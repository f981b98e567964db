"""PrefixIndex: which token blocks are cached, in which slot, and which may be evicted next.

A tree with one node a block of 64 tokens. The node's key is a versioned hash over all tokens up to the end of its
block, so equal keys mean equal prefixes in every process. An *entry* is a stored slot that holds the path to its
deepest node; each node is owned by the entry that brought it. Only leaves are evicted, so an entry shrinks from its
end and is closed when it owns no node any more. Of bytes it knows only how many a node of an entry takes.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from elbowroom.core import STRIP_TOKENS
from elbowroom.engine.types import KVOp

_VERSION = b"elbowroom-prefix-1"


def root_key(namespace: bytes, salt: bytes = b"", adapter: str = "") -> bytes:
    """Return the key above the first block; ``namespace`` names model and KV plan."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (_VERSION, namespace, salt, adapter.encode()):
        digest.update(len(part).to_bytes(4, "little") + part)
    return digest.digest()


def block_keys(root: bytes, tokens: Sequence[int], num_blocks: int) -> list[bytes]:
    """Return the keys of the first ``num_blocks`` full blocks of ``tokens`` (hashed as little-endian int32)."""
    keys, parent = [], root
    data = np.asarray(tokens[: num_blocks * STRIP_TOKENS], dtype="<i4").tobytes()
    width = 4 * STRIP_TOKENS
    for block in range(num_blocks):
        parent = hashlib.blake2b(parent + data[block * width : (block + 1) * width], digest_size=16).digest()
        keys.append(parent)
    return keys


@dataclass(slots=True)
class Node:
    """One cached block."""

    key: bytes
    parent: Node | None
    depth: int
    """Blocks from the root to here, this one included."""
    slot: int
    """Entry that owns the block."""
    block_bytes: int
    """What it takes."""
    num_children: int = 0
    pins: int = 0
    """Pins here or anywhere below: sequences that share this block, and explicit pins."""
    soft_pins: int = 0
    """Those of the pins that their holders can give up at any time (parked sessions)."""
    last_used: int = 0
    tags: tuple[str, ...] = ()


@dataclass(slots=True)
class PrefixIndex:
    """The tree; ``clock`` counts uses, so that eviction is least recently used and reproducible."""

    nodes: dict[bytes, Node] = field(default_factory=dict)
    clock: int = 0
    _owned: dict[int, int] = field(default_factory=dict)
    """Entry slot -> nodes it owns."""
    cached_bytes: int = 0
    """Bytes of all nodes."""
    _pinned_bytes: int = 0
    _held_bytes: int = 0
    """Bytes of nodes with pins that are not soft."""
    _leaves: list[tuple[int, bytes]] = field(default_factory=list)
    """Heap of (last use, key) of unpinned leaves; stale items are skipped when popped."""

    @property
    def num_blocks(self) -> int:
        """Cached blocks."""
        return len(self.nodes)

    def match(self, keys: Sequence[bytes]) -> Node | None:
        """Return the deepest cached node along ``keys``."""
        found: Node | None = None
        for key in keys:
            node = self.nodes.get(key)
            if node is None:
                break
            found = node
        return found

    def explain(self, keys: Sequence[bytes]) -> str:
        """Return one line that says how far ``keys`` match and why the match ends."""
        node = self.match(keys)
        depth = 0 if node is None else node.depth
        if depth == len(keys):
            return f"all {depth} full blocks ({depth * STRIP_TOKENS} tokens) are cached"
        return (
            f"{depth} of {len(keys)} full blocks match ({depth * STRIP_TOKENS} tokens); "
            f"block {depth} ({keys[depth].hex()[:8]}) was never stored, was evicted, or differs in an earlier token"
        )

    def pin(self, node: Node, count: int = 1) -> None:
        """Protect ``node`` and all above it from eviction; a negative count undoes that."""
        self._pin(node, count, 0)
        self._touch(node)

    def unpin(self, node: Node, count: int = 1) -> None:
        """Undo a pin."""
        self.pin(node, -count)

    def soften(self, node: Node, count: int = 1) -> None:
        """Turn a pin into a soft one: its holder can give it up at any time; a negative count undoes that."""
        self._pin(node, 0, count)

    def _pin(self, node: Node, pins: int, soft_pins: int) -> None:
        step: Node | None = node
        while step is not None:
            pinned, held = step.pins > 0, step.pins > step.soft_pins
            step.pins += pins
            step.soft_pins += soft_pins
            self._pinned_bytes += ((step.pins > 0) - pinned) * step.block_bytes
            self._held_bytes += ((step.pins > step.soft_pins) - held) * step.block_bytes
            step = step.parent

    def softly_held_bytes(self, node: Node | None) -> int:
        """Return the bytes of the blocks from ``node`` upwards that only soft pins protect."""
        held = 0
        while node is not None and node.pins == node.soft_pins:
            held, node = held + node.block_bytes, node.parent
        return held

    def firmly_held_bytes(self, node: Node | None) -> int:
        """Return the bytes of the blocks from ``node`` upwards that somebody holds who does not give them up."""
        held = 0
        while node is not None:
            held, node = held + (node.pins > node.soft_pins) * node.block_bytes, node.parent
        return held

    def insert(
        self, parent: Node | None, keys: Sequence[bytes], slot: int, block_bytes: int, tags: tuple[str, ...] = ()
    ) -> Node | None:
        """Add nodes for ``keys`` below ``parent``, owned by entry ``slot``; none of the keys may be cached yet."""
        for key in keys:
            depth = 1 if parent is None else parent.depth + 1
            node = Node(key, parent, depth, slot, block_bytes, tags=tags)
            if parent is not None:
                parent.num_children += 1
            self.nodes[key] = node
            parent = node
        self._owned[slot] = self._owned.get(slot, 0) + len(keys)
        self.cached_bytes += len(keys) * block_bytes
        if parent is not None:
            self._touch(parent)
        return parent

    def evict(self) -> KVOp | None:
        """Drop the least recently used unpinned leaf; return the change to its entry, or None if nothing can go."""
        while self._leaves:
            last_used, key = heapq.heappop(self._leaves)
            node = self.nodes.get(key)
            if node is not None and node.last_used == last_used and self._is_free_leaf(node):
                return self._remove(node)
        return None

    def drop(self, tag: str) -> list[KVOp]:
        """Drop every unpinned leaf path that carries ``tag``; return the changes to entries."""
        tagged = sorted((node for node in self.nodes.values() if tag in node.tags), key=lambda node: -node.depth)
        # Deepest first, and checked one by one: a parent becomes a leaf when its last child goes.
        return [self._remove(node) for node in tagged if self._is_free_leaf(node)]

    def discard(self, node: Node | None) -> list[KVOp]:
        """Drop ``node`` and those above it, up to the first that others need; return the changes to entries."""
        ops = []
        while node is not None and self._is_free_leaf(node):
            ops.append(self._remove(node))
            node = node.parent
        return ops

    @property
    def held_bytes(self) -> int:
        """Bytes of the blocks that somebody holds who does not give them up."""
        return self._held_bytes

    @property
    def evictable_bytes(self) -> int:
        """Bytes of the blocks that could be evicted now: all but pinned ones."""
        return self.cached_bytes - self._pinned_bytes

    @property
    def reclaimable_bytes(self) -> int:
        """Bytes of the blocks that could be evicted once every soft pin were given up."""
        return self.cached_bytes - self._held_bytes

    def _is_free_leaf(self, node: Node) -> bool:
        return node.num_children == 0 and node.pins == 0

    def _touch(self, node: Node) -> None:
        self.clock += 1
        node.last_used = self.clock
        if self._is_free_leaf(node):
            self._push(node)

    def _push(self, leaf: Node) -> None:
        if len(self._leaves) > 2 * len(self.nodes) + 64:  # mostly stale: every reuse of a prefix leaves one behind
            self._leaves = [(each.last_used, each.key) for each in self.nodes.values() if self._is_free_leaf(each)]
            heapq.heapify(self._leaves)
        heapq.heappush(self._leaves, (leaf.last_used, leaf.key))

    def _remove(self, node: Node) -> KVOp:
        del self.nodes[node.key]
        self.cached_bytes -= node.block_bytes
        parent = node.parent
        if parent is not None:
            parent.num_children -= 1
            if self._is_free_leaf(parent):
                self._push(parent)
        self._owned[node.slot] -= 1
        if self._owned[node.slot] == 0:
            del self._owned[node.slot]
            return KVOp("close", node.slot)
        return KVOp("truncate", node.slot, num_tokens=(node.depth - 1) * STRIP_TOKENS)

    def check(self) -> None:
        """Assert that counts and ownership agree with the tree (tests and idle time)."""
        children: dict[bytes, int] = {}
        owned: dict[int, int] = {}
        for node in self.nodes.values():
            owned[node.slot] = owned.get(node.slot, 0) + 1
            if node.parent is not None:
                assert self.nodes.get(node.parent.key) is node.parent, "a node's parent is gone"
                children[node.parent.key] = children.get(node.parent.key, 0) + 1
        nodes = self.nodes.values()
        assert self.cached_bytes == sum(node.block_bytes for node in nodes), "bytes of blocks"
        assert self._pinned_bytes == sum(node.block_bytes for node in nodes if node.pins > 0), "bytes of pinned blocks"
        held = sum(node.block_bytes for node in nodes if node.pins > node.soft_pins)
        assert held == self._held_bytes, "bytes of held blocks"
        assert all(0 <= node.soft_pins <= node.pins for node in self.nodes.values()), "soft pins"
        assert owned == self._owned, "entry ownership is wrong"
        assert all(node.num_children == children.get(key, 0) for key, node in self.nodes.items()), "child counts"
