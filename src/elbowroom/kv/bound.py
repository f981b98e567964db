"""BoundPlan: a plan for one model's layers, priced in bytes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from elbowroom.core import STRIP_TOKENS, LayerSpec, PageFormat
from elbowroom.kv.cascade import CASCADE_BYTES
from elbowroom.kv.codecs.ordered import Order
from elbowroom.kv.holding import ROLLBACK_TOKENS
from elbowroom.kv.policies import NO_LIMIT, ChannelPolicy, HeadPolicy, TokenPolicy

if TYPE_CHECKING:
    from elbowroom.kv.plan import KVPlan


_TOGETHER = 2**18
"""Weights of rows that kernels work on together, unless one alone has more."""


@dataclass(frozen=True, slots=True)
class KVCurve:
    """Bytes of one sequence: resident after each length, and on top while a step runs."""

    resident_bytes: npt.NDArray[np.int64]
    """One value for every asked length."""
    transient_bytes: int
    """Extra bytes while a step appends ``step_tokens``: windows expire, strips are sealed, tokens chosen behind it."""


@dataclass(frozen=True, slots=True)
class BoundPlan:
    """A plan and the model it is for."""

    plan: KVPlan
    layers: tuple[LayerSpec, ...]
    formats: tuple[PageFormat, ...]
    tails: tuple[PageFormat, ...] = ()
    """Formats of the strip that is not full yet, where full ones are sealed; else empty."""
    policy: TokenPolicy | None = None
    """The plan's policy, calibrated for the model."""
    orders: tuple[Order, ...] = ()
    """Order of the channels of keys in each layer; empty where they lie as they come."""
    kept_heads: tuple[int, ...] = ()
    """KV heads that stay in each layer behind a sequence's first prompt; empty: nothing is chosen among them."""

    def selects(self, layer: int) -> bool:
        """Return whether decoding tokens choose what they read in ``layer``."""
        return self.plan.selects(self.layers, layer)

    @property
    def block_bytes(self) -> int:
        """Bytes of one token block (64 tokens) over all layers."""
        return sum(fmt.strip_bytes for layer, fmt in zip(self.layers, self.formats, strict=True) if owns_kv(layer))

    @property
    def tail_bytes(self) -> int:
        """Bytes of the one strip a layer of each sequence that is not sealed; 0 where tokens are written one by one."""
        return sum(fmt.strip_bytes for layer, fmt in zip(self.layers, self.tails, strict=False) if owns_kv(layer))

    @property
    def chosen_bytes(self) -> int:
        """Bytes of one token block over the layers that a policy chooses from."""
        pairs = zip(self.layers, self.formats, strict=True)
        return sum(fmt.strip_bytes for layer, fmt in pairs if is_chosen(layer))

    @property
    def _parts(self) -> tuple[TokenPolicy | HeadPolicy | ChannelPolicy | None, ...]:
        return self.policy, self.plan.heads, self.plan.channels

    @property
    def chooses(self) -> bool:
        """Whether something is chosen when a prompt ends."""
        return any(part is not None for part in self._parts)

    @property
    def window(self) -> int:
        """Newest queries that are looked at then."""
        return max([part.window for part in self._parts if part is not None], default=0)

    @property
    def interval(self) -> int:
        """Generated tokens behind which a policy chooses anew; 0: never."""
        return 0 if self.policy is None else self.policy.interval

    @property
    def chosen_layers(self) -> list[int]:
        """Layers that policies choose from; empty without one."""
        if not self.chooses:
            return []
        return [index for index, layer in enumerate(self.layers) if is_chosen(layer)]

    @property
    def defers(self) -> bool:
        """Whether a prompt's blocks wait for its end to be sealed: a policy chooses before the codec rounds."""
        return bool(self.tails) and self.chooses

    @property
    def cascade_layers(self) -> list[int]:
        """Layers that a cascade goes through: of those chosen from, the ones that have a limit."""
        if self.policy is None or not self.policy.cascades:
            return []
        return [layer for layer in self.chosen_layers if self.policy.limit(layer, ends_prompt=True) < NO_LIMIT]

    @property
    def has_windows(self) -> bool:
        """Whether some layer forgets tokens behind a sliding window."""
        return any(layer.window is not None for layer in self.layers)

    @property
    def shares_prefixes(self) -> bool:
        """Whether a prefix means the same to every sequence: no window expires it, no policy chose from it."""
        return not self.has_windows and not self.chooses

    @property
    def rollback_grain(self) -> int:
        """A sequence can always go back to multiples of so many tokens; 0: only to its beginning."""
        if not self.shares_prefixes:
            return 0
        return STRIP_TOKENS if self.tails else 1

    def curve(
        self, prompt_tokens: int, total_tokens: npt.NDArray[np.int64], step_tokens: int = 1, *, renews: bool = True
    ) -> KVCurve:
        """Return the bytes of a sequence at each of ``total_tokens``.

        Args:
            prompt_tokens: length of its prompt (plans that compress at the prompt's end depend on it).
            total_tokens: int64 ``[n]``, prompt and generated tokens.
            step_tokens: most tokens that one step appends.
            renews: whether the policy chooses among generated tokens as the plan says; else nothing of them goes.
        """
        interval = self.interval if renews else 0
        totals = np.asarray(total_tokens, dtype=np.int64)
        resident = (totals % STRIP_TOKENS > 0) * self.tail_bytes
        transient = self._staging_bytes(step_tokens)
        for index, (layer, fmt) in enumerate(zip(self.layers, self.formats, strict=True)):
            if not owns_kv(layer):
                continue
            kept = self._kept_tokens(index, prompt_tokens, totals, interval)
            if self.defers and is_chosen(layer):
                waiting = np.minimum(totals, self._most_read(index, prompt_tokens))
                strips = -(-waiting // STRIP_TOKENS) * self.tails[index].strip_bytes
                sealed = kept // STRIP_TOKENS * fmt.strip_bytes
                resident = resident + np.where(totals > prompt_tokens, sealed, strips)
                continue
            blocks = kept // STRIP_TOKENS if self.tails else -(-kept // STRIP_TOKENS)
            if layer.window is not None:
                # A step that ends at n leaves blocks from (n - ROLLBACK_TOKENS - window + 1) // 64 on.
                blocks = np.minimum(blocks, (layer.window + ROLLBACK_TOKENS + STRIP_TOKENS - 3) // STRIP_TOKENS + 1)
                transient += fmt.strip_bytes * -(-step_tokens // STRIP_TOKENS)
            resident = resident + blocks * fmt.strip_bytes
        return KVCurve(resident, transient)

    def limits(self, *, ends_prompt: bool) -> npt.NDArray[np.int64]:
        """Return the most tokens that each layer holds behind a step which reads a prompt, or ends one.

        Layers from which nothing is chosen have a limit that no sequence reaches.
        """
        count = len(self.layers)
        return np.asarray([self.limit(index, ends_prompt=ends_prompt) for index in range(count)], dtype=np.int64)

    def limit(self, index: int, *, ends_prompt: bool) -> int:
        """Return the same of one layer."""
        policy = self.policy
        if policy is None or not is_chosen(self.layers[index]):
            return NO_LIMIT
        return policy.limit(index, ends_prompt)

    def dropped_blocks(
        self, dropped: npt.NDArray[np.int64], num_tokens: int, *, ends_prompt: bool
    ) -> npt.NDArray[np.int64]:
        """Return the blocks' worth of tokens that each layer has given up behind a step that reads a prompt.

        Args:
            dropped: int64 ``[num_layers]``, those before the step.
            num_tokens: tokens of the sequence behind it.
            ends_prompt: whether the step ends the prompt.
        """
        if self.policy is None:
            return dropped
        above = num_tokens - STRIP_TOKENS * dropped - self.limits(ends_prompt=ends_prompt)
        gone: npt.NDArray[np.int64] = dropped + np.maximum(-(-above // STRIP_TOKENS), 0)
        return gone

    def _kept_tokens(
        self, index: int, prompt_tokens: int, totals: npt.NDArray[np.int64], interval: int
    ) -> npt.NDArray[np.int64]:
        """Return the tokens that a layer holds at each of ``totals``: while a prompt is read and behind it.

        Where it chooses while tokens are generated, that is what it holds before the choice and what it writes anew.
        """
        if not self.chooses or not is_chosen(self.layers[index]):
            return totals
        most = self._most_read(index, prompt_tokens)
        generated = np.maximum(totals - prompt_tokens, 0)
        chosen_at = prompt_tokens + generated // max(interval, 1) * interval
        end_limit = self.limit(index, ends_prompt=True)
        stays = totals - _dropped_tokens(end_limit, chosen_at)
        before = np.maximum(chosen_at - interval, prompt_tokens)
        least = int(self.limits(ends_prompt=True).min())  # if this layer drops tokens, all are written anew
        renews = (chosen_at == totals) & (_dropped_tokens(least, chosen_at) > _dropped_tokens(least, before))
        written = np.full_like(stays, STRIP_TOKENS) if self.defers else stays
        behind = np.where(renews, totals - _dropped_tokens(end_limit, before) + written, stays)
        return np.where(totals > prompt_tokens, behind, np.minimum(totals, most))

    def _most_read(self, index: int, prompt_tokens: int) -> int:
        """Return the most tokens of a chosen layer while a prompt is read: what stays, and where it is written anew."""
        if prompt_tokens <= self.limit(index, ends_prompt=True) and not self.defers:
            return prompt_tokens
        limit = self.limit(index, ends_prompt=False)
        if prompt_tokens > limit:
            return 2 * (limit + STRIP_TOKENS)
        return prompt_tokens + min(prompt_tokens, self.limit(index, ends_prompt=True)) + STRIP_TOKENS

    def choice_bytes(self, step_tokens: int, max_tokens: int) -> int:
        """Return the most temporary bytes while something is chosen in one layer of a prompt.

        Keys of a head in float32 and as they are stored, three times the scores of the window's queries, the strips'
        bytes on their way, and attention, whose output then lies outside the workspace. A cascade adds its books of
        tokens; layers without a limit are moved strip by strip, unless they are sealed. A later prompt of a session
        begins behind all that was generated; where that is sealed it is looked at and not moved.

        Args:
            step_tokens: most tokens of a step.
            max_tokens: most tokens of a sequence.
        """
        if not self.chooses:
            return 0
        policy, heads, most = self.policy, self.plan.heads, 0
        for index, layer in enumerate(self.layers):
            limit = self.limit(index, ends_prompt=False)
            if not is_chosen(layer) or (limit >= NO_LIMIT and not self.defers):
                continue
            generated = self.limit(index, ends_prompt=True) + self.interval if self.interval else NO_LIMIT
            read, held = (
                min(count, max_tokens) + step_tokens + STRIP_TOKENS for count in (limit, max(limit, generated))
            )
            scores = 0
            if policy is not None:
                scores = (12 * layer.group_size + 1) * policy.window + CASCADE_BYTES * policy.cascades
            if heads is not None:  # behind the tokens' scores; and values of a head
                scores = max(scores, (12 * layer.group_size + 1) * heads.window + 8 * layer.v_head_dim)
            width = 8 * (layer.head_dim + layer.v_head_dim)
            moved = read * width * layer.num_kv_heads if self.defers else held * width
            most = max(most, held * (scores + 8 * layer.head_dim) + moved)
        return most + max(4 * step_tokens * layer.num_q_heads * (layer.v_head_dim + 1) for layer in self.layers)

    def reading_bytes(self, max_tokens: int) -> int:
        """Return the most temporary bytes of rows that read plane by plane: a weight for each query head and token.

        Kernels take several rows together up to 2^18 weights; sums of blocks and pieces of values come on top.
        """
        reads = self.plan.reads
        if reads is None or reads.digest_run is not None:
            return 0
        most = 0
        for layer in self.layers:
            num_blocks = max(-(-max_tokens // STRIP_TOKENS), _TOGETHER // (layer.num_q_heads * STRIP_TOKENS))
            most = max(most, num_blocks * layer.num_q_heads * 4 * (STRIP_TOKENS + 4 + layer.v_head_dim))
        return most

    def _staging_bytes(self, step_tokens: int) -> int:
        """Return what a step holds on top: blocks that wait, in one layer a pool, to be sealed or chosen from."""
        if self.chooses:
            formats = self.tails or self.formats
            pairs = zip(self.layers, formats, self._alone, strict=True)
            chosen = {(fmt, alone) for layer, fmt, alone in pairs if layer.window is None}
            staging = (-(-step_tokens // STRIP_TOKENS) + 1) * sum(fmt.strip_bytes for fmt, _ in chosen)
            return staging + self._passing_bytes(step_tokens)
        return self._passing_bytes(step_tokens)

    @property
    def _alone(self) -> list[int | None]:
        """For each layer its number if others read it later: then it shares staging with none."""
        read_later = {layer.kv_source for layer in self.layers}
        return [index if index in read_later else None for index in range(len(self.layers))]

    def _passing_bytes(self, step_tokens: int) -> int:
        """Return the bytes of blocks that a step fills and seals at once, in one layer a pool."""
        parts = zip(self.layers, self.formats, self._alone, self.tails, strict=False)
        staged = {(fmt, layer.window, alone, tail) for layer, fmt, alone, tail in parts}
        passing = step_tokens // STRIP_TOKENS if step_tokens > ROLLBACK_TOKENS else 0
        return passing * sum(tail.strip_bytes for *_, tail in staged)

    def fingerprint(self) -> bytes:
        """Return 16 bytes that differ whenever stored strips would not be interchangeable."""
        digest = hashlib.blake2b(digest_size=16)
        kept = f"{self.formats}|{self.tails}|{self.layers}|{self.orders}"
        digest.update(f"v1|{self.plan.text}|{self.policy}|{kept}".encode())
        return digest.digest()


def _dropped_tokens(limit: int, num_tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the tokens, in whole blocks, that a layer has dropped when it chose to hold ``limit`` of some."""
    above = np.maximum(num_tokens - limit, 0)
    dropped: npt.NDArray[np.int64] = -(-above // STRIP_TOKENS) * STRIP_TOKENS
    return dropped


def owns_kv(layer: LayerSpec) -> bool:
    """Return whether ``layer`` stores keys and values of its own."""
    return layer.kv_source is None


def is_chosen(layer: LayerSpec) -> bool:
    """Return whether policies choose among the tokens of ``layer``."""
    return owns_kv(layer) and layer.window is None
