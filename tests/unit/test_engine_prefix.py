"""PrefixIndex against a naive oracle that looks at all nodes for every question."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from elbowroom.core import STRIP_TOKENS
from elbowroom.engine.prefix import Node, PrefixIndex, block_keys, root_key

BLOCK_BYTES = 100
PATHS = st.lists(st.sampled_from("ab"), min_size=1, max_size=5).map("".join)
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("insert"), PATHS),
        st.tuples(st.just("insert"), PATHS),
        st.tuples(st.just("pin"), PATHS),
        st.tuples(st.just("unpin"), st.integers(0, 9)),
        st.tuples(st.just("soften"), st.integers(0, 9)),
        st.tuples(st.just("evict"), st.just(None)),
        st.tuples(st.just("match"), PATHS),
        st.tuples(st.just("drop"), st.sampled_from("ab")),
    ),
    max_size=60,
)


def keys_of(path: str) -> list[bytes]:
    """Cumulative keys: a key names its whole prefix."""
    return [path[:end].encode() for end in range(1, len(path) + 1)]


class Oracle:
    """The index, next to a plain dict of what must be cached."""

    def __init__(self) -> None:
        self.index = PrefixIndex()
        self.entries: dict[int, int] = {}
        """Slot -> blocks stored."""
        self.pins: list[tuple[Node, bool]] = []
        self.cached: set[str] = set()
        self.next_slot = 0

    def insert(self, path: str) -> None:
        node = self.index.match(keys_of(path))
        new = keys_of(path)[0 if node is None else node.depth :]
        if new:
            self.next_slot += 1
            self.entries[self.next_slot] = len(path)
            made = self.index.insert(node, new, self.next_slot, BLOCK_BYTES, (path[0],))
            assert made.depth == len(path)
            self.cached |= {key.decode() for key in new}

    def match(self, path: str) -> Node | None:
        node = self.index.match(keys_of(path))
        depth = max((len(each) for each in self.cached if path.startswith(each)), default=0)
        assert depth == (0 if node is None else node.depth)
        if node is not None:
            assert self.entries[node.slot] >= node.depth, "the owner does not store the block"
        return node

    def pin(self, path: str) -> None:
        node = self.match(path)
        if node is not None:
            self.index.pin(node)
            self.pins.append((node, False))

    def unpin(self, number: int) -> None:
        if self.pins:
            node, soft = self.pins.pop(number % len(self.pins))
            if soft:
                self.index.soften(node, -1)
            self.index.unpin(node)

    def soften(self, number: int) -> None:
        if self.pins:
            node, soft = self.pins[number % len(self.pins)]
            self.pins[number % len(self.pins)] = node, not soft
            self.index.soften(node, -1 if soft else 1)

    def protected(self, soft_too: bool) -> set[str]:
        pinned = [node.key.decode() for node, soft in self.pins if soft_too or not soft]
        return {each for each in self.cached if any(path.startswith(each) for path in pinned)}

    def victims(self) -> list[str]:
        inner = {each[:-1] for each in self.cached}
        return sorted(self.cached - inner - self.protected(soft_too=True))

    def evict(self, _: None = None) -> bool:
        candidates = self.victims()
        op = self.index.evict()
        if op is None:
            assert not candidates, "there was something to evict"
            return False
        gone = self.apply(op)
        assert gone in candidates
        return True

    def apply(self, op: Any) -> str:
        gone = next(each for each in self.cached if each.encode() not in self.index.nodes)
        self.cached.remove(gone)
        if op.kind == "close":
            del self.entries[op.slot]
        else:
            assert op.num_tokens == (len(gone) - 1) * STRIP_TOKENS <= self.entries[op.slot] * STRIP_TOKENS
            self.entries[op.slot] = op.num_tokens // STRIP_TOKENS
        return gone

    def drop(self, tag: str) -> None:
        for op in self.index.drop(tag):
            if op.kind == "close":
                del self.entries[op.slot]
            else:
                self.entries[op.slot] = op.num_tokens // STRIP_TOKENS
        self.cached = {key.decode() for key in self.index.nodes}
        left = {each for each in self.cached if each[0] == tag}
        assert left == {each for each in self.protected(soft_too=True) if each[0] == tag}

    def check(self) -> None:
        self.index.check()
        assert {key.decode() for key in self.index.nodes} == self.cached
        assert self.index.evictable_bytes == BLOCK_BYTES * len(self.cached - self.protected(soft_too=True))
        assert self.index.reclaimable_bytes == BLOCK_BYTES * len(self.cached - self.protected(soft_too=False))
        assert set(self.entries) == {node.slot for node in self.index.nodes.values()}


@settings(max_examples=200, deadline=None)
@given(ACTIONS)
def test_the_index_answers_as_a_naive_one(actions: list[tuple[str, Any]]) -> None:
    """Matches, eviction, pins, tags and stored entries agree with a search over all cached prefixes."""
    oracle = Oracle()
    for name, argument in actions:
        getattr(oracle, name)(argument)
        oracle.check()
    while oracle.evict():
        oracle.check()
    assert oracle.cached == oracle.protected(soft_too=True)
    while oracle.pins:
        oracle.unpin(0)
    while oracle.evict():
        pass
    assert not oracle.index.nodes
    assert not oracle.entries


def test_the_least_recently_used_leaf_goes_first() -> None:
    """A prefix that was used again outlives one that was not."""
    oracle = Oracle()
    for path in ("a", "b", "ba"):
        oracle.insert(path)
    oracle.pin("a")
    oracle.unpin(0)
    order = []
    while (before := set(oracle.cached)) and oracle.evict():
        order += before - oracle.cached
    assert order[0] == "ba"
    assert sorted(order) == ["a", "b", "ba"]


def test_reuse_without_eviction_does_not_grow_the_index() -> None:
    """A hundred thousand hits of one cached prefix leave no trace behind."""
    oracle = Oracle()
    oracle.insert("ab")
    node = oracle.match("ab")
    assert node is not None
    for _ in range(100_000):
        oracle.index.pin(node)
        oracle.index.unpin(node)
    assert len(oracle.index._leaves) < 200
    assert oracle.evict()


def test_keys_depend_on_every_token_before_and_on_the_root() -> None:
    """Equal keys mean equal prefixes, and equal model, plan, salt and adapter."""
    tokens = list(range(200))
    root = root_key(b"model")
    keys = block_keys(root, tokens, 3)
    assert keys == block_keys(root, [*tokens, 5], 3)
    assert keys[2] == block_keys(keys[1], tokens[128:], 1)[0]
    changed = block_keys(root, [1, *tokens[1:]], 3)
    assert not set(keys) & set(changed)
    others = {root_key(b"model", b"salt"), root_key(b"model", b"", "adapter"), root_key(b"mode", b"l"), root}
    assert len(others) == 4
    # Stored caches of earlier versions would be read wrongly otherwise: a change needs another _VERSION.
    assert root.hex() == "aa5c6d1151742408b8277310b5699623"


def test_explain_says_how_far_a_prompt_matches() -> None:
    """The line names the blocks that match and the one that does not."""
    index = PrefixIndex()
    assert "0 of 2 full blocks match" in index.explain(keys_of("ab"))
    index.insert(None, keys_of("a"), 1, BLOCK_BYTES)
    assert "1 of 2 full blocks match (64 tokens); block 1" in index.explain(keys_of("ab"))
    assert index.explain(keys_of("a")) == "all 1 full blocks (64 tokens) are cached"
