"""KVAccount: who holds which slots and bytes, in integers; the memory half of the scheduler's state.

Each sequence has one of the engine's KV plans and pays by its prices; all plans share one capacity. Private blocks of
running and parked sequences are counted in ``used_bytes``; cached prefix blocks are paid by the index, once, however
many sequences share them. Every change is also written down as a ``KVOp`` for the executor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from elbowroom.core import STRIP_TOKENS
from elbowroom.engine.accounting import Dropped, KVPricing, num_blocks
from elbowroom.engine.prefix import Node, PrefixIndex, block_keys, root_key
from elbowroom.engine.sequence import KeptStem, Parked, Saved, SeqState, StemKey, Stowed
from elbowroom.engine.types import KVOp, Request
from elbowroom.kv.conversion import RUN_BLOCKS

EXPECTED_TOKENS = 256
"""Generated tokens for which the store is asked to keep room side by side (a hint; it costs nothing)."""


@dataclass(slots=True)
class KVAccount:
    """Slots, bytes, cached prefixes and parked sessions."""

    pricings: tuple[KVPricing, ...]
    """Of the plans that sequences can have."""
    capacity_bytes: int
    caches_prefixes: bool
    relief_plan: int | None = None
    """Number of the plan that running sequences can be turned into when memory is short."""
    index: PrefixIndex = field(default_factory=PrefixIndex)
    parked: dict[int, Parked] = field(default_factory=dict)
    stems: dict[StemKey, KeptStem] = field(default_factory=dict)
    """Prefixes that live requests, or some to come, begin with; see ``stems``."""
    stowed: dict[int, Stowed] = field(default_factory=dict)
    """Sessions that only the swap tier holds, the longest there first."""
    used_bytes: int = 0
    ops: list[KVOp] = field(default_factory=list)
    evicted_blocks: int = 0
    lacking_bytes: int = 0
    """What the store turned out to have less than ``capacity_bytes``, for the time being."""
    next_slot: int = 0
    _clock: int = 0

    def emptied(self) -> KVAccount:
        """Return books of the same plans that hold nothing; the numbers of slots go on."""
        return KVAccount(
            self.pricings, self.capacity_bytes, self.caches_prefixes, self.relief_plan, next_slot=self.next_slot
        )

    # Bytes

    @property
    def cached_bytes(self) -> int:
        """Bytes of cached prefix blocks."""
        return self.index.cached_bytes

    @property
    def transient_bytes(self) -> int:
        """On top while a step runs; its tokens may be of any plan."""
        return sum([pricing.transient_bytes for pricing in self.pricings]) + self.conversion_bytes

    @property
    def conversion_bytes(self) -> int:
        """What a sequence that goes over takes before it frees anything; 0 without a relief plan."""
        return 0 if self.relief_plan is None else self.pricings[self.relief_plan].conversion_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes that nothing holds; negative after the capacity was lowered."""
        return self.usable_bytes - self.used_bytes - self.cached_bytes

    @property
    def usable_bytes(self) -> int:
        """Bytes that sequences and cached prefixes may hold between steps."""
        return self.capacity_bytes - self.lacking_bytes - self.transient_bytes

    def shared_bytes(self, seq: SeqState) -> int:
        """Return the bytes of blocks that ``seq`` shares and does not pay for."""
        return 0 if seq.shared is None else seq.shared.depth * seq.shared.block_bytes

    @property
    def reclaimable_bytes(self) -> int:
        """Bytes of cached prefixes and parked sessions that no running sequence shares."""
        parked = sum(self.private_bytes(each.paid_bytes, each.shared) for each in self.parked.values())
        return self.index.reclaimable_bytes + parked

    def attainable_bytes(self, keep: Parked | None = None) -> int:
        """Return the bytes that would be free if all was given up but ``keep`` and what running sequences share."""
        kept = 0
        if keep is not None:
            kept = self.private_bytes(keep.paid_bytes, keep.shared) + self.index.softly_held_bytes(keep.shared)
        return self.free_bytes + self.reclaimable_bytes - kept

    def private_bytes(self, paid_bytes: int, shared: Node | None) -> int:
        """Return what a sequence of ``paid_bytes`` pays itself."""
        return paid_bytes if shared is None else paid_bytes - shared.depth * shared.block_bytes

    def evict_one(self, keep: Parked | None = None) -> bool:
        """Give up the least recently used cached block, else the least recently used parked session."""
        op = self.index.evict()
        if op is not None:
            self.ops.append(op)
            self.evicted_blocks += 1
            return True
        candidates = [(each.last_used, key) for key, each in self.parked.items() if each is not keep]
        if candidates:
            self.drop_parked(min(candidates)[1])
        return bool(candidates)

    def reclaim(self, num_bytes: int) -> int:
        """Give up caches and parked sessions until ``num_bytes`` came free; return the bytes."""
        before = self.free_bytes
        while self.free_bytes - before < num_bytes and self.evict_one():
            pass
        return self.free_bytes - before

    # Sequences

    def open(self, seq: SeqState, node: Node | None) -> None:
        """Give ``seq`` a slot that shares the prefix down to ``node`` (pinned by the caller), and pay."""
        self._choose_plan(seq, seq.request.plan)
        seq.slot, seq.shared, seq.dropped = self.new_slot(), node, ()
        seq.num_computed = 0 if node is None else node.depth * STRIP_TOKENS
        self._pay_all(seq)
        if node is None:
            expected = seq.num_prompt + min(seq.max_new_tokens, EXPECTED_TOKENS)
            self.ops.append(KVOp("open", seq.slot, num_tokens=expected, plan=seq.plan))
        else:
            self.ops.append(KVOp("fork", seq.slot, node.slot, seq.num_computed))

    def load(self, seq: SeqState, saved: Saved, *, is_async: bool) -> None:
        """Give ``seq`` a slot for what is saved of it, and pay for all tokens that it knows."""
        self._choose_plan(seq, saved.plan)
        seq.slot, seq.shared, seq.num_computed, seq.dropped = self.new_slot(), None, saved.num_tokens, ()
        self._pay_all(seq)
        op = KVOp("load", seq.slot, num_tokens=saved.num_tokens, plan=saved.plan, key=saved.key, is_async=is_async)
        self.ops.append(op)

    def _choose_plan(self, seq: SeqState, plan: int) -> None:
        seq.plan, seq.pricing = plan, self.pricings[plan]

    def branch(self, seq: SeqState, parent: Parked, node: Node | None, keep: int) -> None:
        """Give ``seq`` a slot that shares the first ``keep`` tokens of a parked sequence; ``node`` is pinned."""
        self._choose_plan(seq, parent.plan)
        # Blocks that the parent holds privately are paid again here: an upper bound, exact once one is written.
        seq.slot, seq.shared, seq.num_computed, seq.dropped = self.new_slot(), node, keep, parent.dropped
        self._pay_all(seq)
        self.ops.append(KVOp("fork", seq.slot, parent.slot, keep))

    def _pay_all(self, seq: SeqState) -> None:
        """Let ``seq`` pay for all tokens it knows, in a slot of its own."""
        seq.num_blocks, seq.paid_bytes = seq.pricing.admission(
            len(seq.tokens), seq.dropped, seq.num_computed, seq.num_generated
        )
        self.used_bytes += self.private_bytes(seq.paid_bytes, seq.shared)

    def grow(self, seq: SeqState, blocks: int, paid_bytes: int) -> None:
        """Let ``seq`` have paid ``paid_bytes`` in all, for ``blocks``."""
        self.used_bytes += max(paid_bytes - seq.paid_bytes, 0)
        seq.num_blocks, seq.paid_bytes = max(seq.num_blocks, blocks), max(seq.paid_bytes, paid_bytes)

    def shrink(self, seq: SeqState, dropped: Dropped) -> None:
        """Note what the plan's policy has dropped of ``seq`` and pay only for what is left."""
        self._settle(seq, num_blocks(seq.num_computed), dropped)

    def _settle(self, seq: SeqState, blocks: int, dropped: Dropped) -> None:
        """Let ``seq`` pay what ``blocks`` cost, no more."""
        paid = seq.pricing.price(blocks, dropped)
        self.used_bytes += paid - seq.paid_bytes
        seq.num_blocks, seq.paid_bytes, seq.dropped = blocks, paid, dropped

    def convert(self, seq: SeqState, plan: int) -> None:
        """Keep the tokens of ``seq`` under another plan from now on; nothing of it is shared any more."""
        self.used_bytes -= self.private_bytes(seq.paid_bytes, seq.shared)
        if seq.shared is not None:
            self.index.unpin(seq.shared)
        self._choose_plan(seq, plan)
        seq.shared, seq.paid_bytes = None, seq.pricing.price(seq.num_blocks)
        self.used_bytes += seq.paid_bytes
        self.ops.append(KVOp("convert", seq.slot, plan=plan))

    def conversion_gain(self, seq: SeqState, plan: int) -> tuple[int, int]:
        """Return what ``convert`` would free in the end, and what it takes before it frees anything.

        Blocks that others share stay where they are and are written anew.
        """
        pricing = self.pricings[plan]
        gain = self.private_bytes(seq.paid_bytes, seq.shared) - pricing.price(seq.num_blocks)
        return gain, pricing.price(min(seq.shared_blocks + RUN_BLOCKS, seq.num_blocks))

    def give_back(self, seq: SeqState) -> None:
        """Close the sequence's slot."""
        self.used_bytes -= self.private_bytes(seq.paid_bytes, seq.shared)
        if seq.shared is not None:
            self.index.unpin(seq.shared)
        self.ops.append(KVOp("close", seq.slot))
        self._choose_plan(seq, seq.request.plan)
        seq.slot, seq.shared, seq.num_blocks, seq.paid_bytes, seq.num_computed, seq.dropped = -1, None, 0, 0, 0, ()

    # Parked sessions

    def park(self, seq: SeqState, key: int) -> None:
        """Keep the sequence's slot for the next request of its session."""
        if key in self.parked:
            self.drop_parked(key)
        self._settle(seq, num_blocks(seq.num_computed), seq.dropped)
        self._clock += 1
        tokens = seq.tokens[: seq.num_computed]
        self.parked[key] = Parked(
            slot=seq.slot,
            asked_plan=seq.request.plan,
            plan=seq.plan,
            pricing=seq.pricing,
            tokens=tokens,
            shared=seq.shared,
            num_blocks=seq.num_blocks,
            paid_bytes=seq.paid_bytes,
            dropped=seq.dropped,
            last_used=self._clock,
            saved=seq.saved,
        )
        seq.saved = None
        if seq.shared is not None:
            self.index.soften(seq.shared)
        seq.slot, seq.shared, seq.num_blocks, seq.paid_bytes = -1, None, 0, 0

    def drop_parked(self, key: int) -> None:
        """Close a parked session; it is prefilled again if it ever goes on, or read back where it is saved."""
        parked = self.parked.pop(key)
        if parked.saved is not None:
            self.drop_stowed(key)  # two requests of a session were under way at once
            self.stowed[key] = Stowed(parked.asked_plan, parked.tokens, parked.saved)
        self.used_bytes -= self.private_bytes(parked.paid_bytes, parked.shared)
        if parked.shared is not None:
            self.index.soften(parked.shared, -1)
            self.index.unpin(parked.shared)
        self.ops.append(KVOp("close", parked.slot))

    def drop_stowed(self, key: int) -> None:
        """Delete what the swap tier holds of a session."""
        stowed = self.stowed.pop(key, None)
        if stowed is not None:
            self.ops.append(KVOp("forget", -1, key=stowed.saved.key))

    def use_parked(self, key: int | None) -> Parked | None:
        """Return a parked session, marked as used now."""
        parked = None if key is None else self.parked.get(key)
        if parked is not None:
            self._clock += 1
            parked.last_used = self._clock
        return parked

    def take_over(self, seq: SeqState, key: int) -> None:
        """Let ``seq`` go on in the slot of its parked session, cut back to the tokens they have in common."""
        parked = self.parked.pop(key)
        seq.saved = parked.saved
        if parked.shared is not None:
            self.index.soften(parked.shared, -1)
        self._choose_plan(seq, parked.plan)
        seq.slot, seq.shared, seq.dropped = parked.slot, parked.shared, parked.dropped
        seq.num_blocks, seq.paid_bytes = parked.num_blocks, parked.paid_bytes
        keep = self.num_kept(parked, seq)
        if keep == len(parked.tokens):
            seq.num_computed = keep
        elif keep > 0:
            self._cut(seq, keep)
        else:
            self.used_bytes -= self.private_bytes(seq.paid_bytes, seq.shared)
            if seq.shared is not None:
                self.index.unpin(seq.shared)
            self._choose_plan(seq, seq.request.plan)
            self.ops += [KVOp("close", seq.slot), KVOp("open", seq.slot, plan=seq.plan)]
            seq.shared, seq.num_blocks, seq.paid_bytes, seq.num_computed, seq.dropped = None, 0, 0, 0, ()
        self.grow(seq, *seq.pricing.admission(len(seq.tokens), seq.dropped, seq.num_computed))

    def num_kept(self, parked: Parked, seq: SeqState) -> int:
        """Return how many tokens of a parked session ``seq`` can go on from; one at least is left to compute."""
        return self.resume_point(parked.tokens, parked.pricing, seq)

    def resume_point(self, tokens: list[int], pricing: KVPricing, seq: SeqState) -> int:
        """Return how many of ``tokens``, as they are stored, ``seq`` can go on from."""
        keep = min(common_prefix(tokens, seq.tokens), len(seq.tokens) - 1)
        # What an earlier position needs may have left a sliding window or been sealed.
        return pricing.resume_point(keep, len(tokens))

    def take_over_bytes(self, parked: Parked, seq: SeqState) -> int:
        """Return what ``take_over`` and growing to all tokens of ``seq`` would add to ``used_bytes``."""
        keep = self.num_kept(parked, seq)
        node, dropped = self.ancestor(parked.shared, keep), parked.dropped if keep else ()
        pricing = parked.pricing if keep else self.pricings[seq.request.plan]
        after = self.private_bytes(pricing.admission(len(seq.tokens), dropped, keep)[1], node)
        return after - self.private_bytes(parked.paid_bytes, parked.shared)

    def ancestor(self, node: Node | None, num_tokens: int) -> Node | None:
        """Return the deepest node at or above ``node`` whose blocks lie within ``num_tokens``."""
        while node is not None and node.depth * STRIP_TOKENS > num_tokens:
            node = node.parent
        return node

    def _cut(self, seq: SeqState, num_tokens: int) -> None:
        self.used_bytes -= self.private_bytes(seq.paid_bytes, seq.shared)
        node = self.ancestor(seq.shared, num_tokens)
        if node is not seq.shared:
            if node is not None:
                self.index.pin(node)
            if seq.shared is not None:
                self.index.unpin(seq.shared)
        seq.shared, seq.num_computed = node, num_tokens
        self.used_bytes += self.private_bytes(seq.paid_bytes, node)
        self._settle(seq, num_blocks(num_tokens), seq.dropped)
        self.ops.append(KVOp("truncate", seq.slot, num_tokens=num_tokens))

    # Cached prefixes

    def keys(self, request: Request) -> list[bytes]:
        """Return the block keys of a prompt; empty where prefixes are not shared."""
        if not self.caches(request.plan) or request.stems == ():
            return []
        if request.block_keys is not None:
            space = self.pricings[request.plan].namespace
            return [root_key(space, key) if request.plan else key for key in request.block_keys]
        tokens = request.prompt_token_ids
        return block_keys(self._root(request), tokens, len(tokens) // STRIP_TOKENS)

    def match(self, seq: SeqState) -> Node | None:
        """Return the deepest cached node that ``seq`` can share; one token at least is left to compute."""
        return self.index.match(seq.keys[: (len(seq.tokens) - 1) // STRIP_TOKENS])

    def cache(self, seq: SeqState, count: int) -> None:
        """Hand the first ``count`` blocks of a running sequence to the index, unless somebody else brought them."""
        if seq.request.stems is not None:  # what nobody will ask for is not kept
            count = min(count, max((stem.num_tokens for stem in seq.request.stems), default=0) // STRIP_TOKENS)
        if not self.caches(seq.plan) or seq.is_relieved or count <= seq.shared_blocks:
            return
        self._extend_keys(seq, count)
        new = seq.keys[seq.shared_blocks : count]
        if len(new) < count - seq.shared_blocks or new[0] in self.index.nodes:
            return
        slot = self.new_slot()
        self.ops.append(KVOp("fork", slot, seq.slot, count * STRIP_TOKENS))
        node = self.index.insert(seq.shared, new, slot, seq.pricing.block_bytes, seq.request.tags)
        assert node is not None, "at least one block is new"
        self.used_bytes -= self.private_bytes(seq.paid_bytes, seq.shared)
        self.index.pin(node)
        if seq.shared is not None:
            self.index.unpin(seq.shared)
        seq.shared = node
        self.used_bytes += self.private_bytes(seq.paid_bytes, node)

    def explain(self, tokens: Sequence[int], salt: bytes = b"") -> str:
        """Return one line on how far a prompt is cached under the first plan."""
        keys = block_keys(root_key(self.pricings[0].namespace, salt), tokens, len(tokens) // STRIP_TOKENS)
        return self.index.explain(keys)

    def check(self, running: Iterable[SeqState]) -> None:
        """Assert that the books agree (tests, and when idle)."""
        held = sum(self.private_bytes(seq.paid_bytes, seq.shared) for seq in running)
        stems = [stem.stored for stem in self.stems.values() if stem.stored is not None]
        held += sum(self.private_bytes(each.paid_bytes, each.shared) for each in (*self.parked.values(), *stems))
        assert held == self.used_bytes, f"used {self.used_bytes}, sequences hold {held}"
        self.index.check()

    def _extend_keys(self, seq: SeqState, count: int) -> None:
        known = len(seq.keys)
        if known < count and seq.request.block_keys is None:
            parent = seq.keys[-1] if known else self._root(seq.request)
            seq.keys += block_keys(parent, seq.tokens[known * STRIP_TOKENS :], count - known)

    def _root(self, request: Request) -> bytes:
        return root_key(self.pricings[request.plan].namespace, request.salt, request.adapter)

    def caches(self, plan: int) -> bool:
        """Return whether sequences of a plan share prefixes."""
        return self.caches_prefixes and self.pricings[plan].can_share

    def new_slot(self) -> int:
        """Return the number of a slot that was never used."""
        self.next_slot += 1
        return self.next_slot


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the common prefix."""
    limit = min(len(a), len(b))
    if list(a[:limit]) == list(b[:limit]):
        return limit
    return next(i for i in range(limit) if a[i] != b[i])
