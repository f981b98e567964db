"""The seam of kv/: what the engine and the model may ask of a store of keys and values.

The contract, in the order of a step: ``reserve(step)`` takes all bytes that the step will need (or names the
shortfall and changes nothing); then ``attend`` once per layer, which appends the new keys and values and allocates
and frees nothing; ``end_layer`` behind each layer; ``end_step`` makes the new lengths final and frees what expired.
Positions always come from the caller: the position of a token is its slot, whatever was forked, expired or rolled
back before.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from elbowroom.kernels import LayerStrips
from elbowroom.kv.read_count import ReadCount

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class KVHandle:
    """Names one stored sequence."""

    id: int
    plan: int = 0
    """Number of its plan, in a store that has several."""


class PromptPart(IntEnum):
    """What a row of a step has to do with a prompt: policies choose behind parts of it, and anew behind it."""

    NONE = 0
    PART = 1
    END = 2
    CHOICE = 3
    """No prompt: a token behind which the policy chooses as behind the end of one."""

    @property
    def settles(self) -> bool:
        """Whether layers keep behind the row what they may hold while tokens are generated."""
        return self in (PromptPart.END, PromptPart.CHOICE)


@dataclass(slots=True)
class KVStep:
    """Rows of one forward pass: which sequence each packed token belongs to, and where it stands in it.

    Tokens of row r are ``row_starts[r] .. row_starts[r + 1]`` of the packed axis (N tokens); ``positions`` is int64
    ``[N]``, ascending within a row.
    """

    handles: tuple[KVHandle, ...]
    row_starts: npt.NDArray[np.int32]
    positions: Positions
    prompts: npt.NDArray[np.int8] | None = None
    """int8 ``[R]``: what each row has to do with a prompt (``PromptPart``); None: nothing. No token count tells."""
    prepared: object | None = field(default=None, repr=False)
    """Whatever the store keeps between ``reserve`` and ``end_step``."""


@dataclass(frozen=True, slots=True)
class Shortfall:
    """Why ``reserve`` refused: bytes that the step needs on top, and bytes that could be had."""

    needed_bytes: int
    available_bytes: int


@dataclass(frozen=True, slots=True)
class Want:
    """Statistics that a query-aware policy asks ``attend`` for; each costs a second pass over the scores."""

    colsum: bool = False
    pmax: bool = False


@dataclass(slots=True)
class AttnOut:
    """Result of attention for N packed query rows."""

    out: Tensor
    """``[N, Hq, Dv]`` in the dtype of the queries."""
    lse: Tensor
    """float32 ``[N, Hq]``: log of the sum of exp(score)."""
    colsum: list[Tensor] | None = None
    """For each row, float32 ``[Hkv, slots]``: attention each slot received, summed over the row's queries."""
    pmax: Tensor | None = None
    """float32 ``[N, Hq]``: the largest attention probability of each query."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVReport:
    """What a store holds, in bytes as charged to the ledger and in tokens as seen by sequences."""

    live_bytes: int
    """Pages that hold strips of some sequence."""
    free_bytes: int
    """Pages that were freed and not yet given back to the operating system."""
    capacity_bytes: int
    num_sequences: int
    num_tokens: int
    """Tokens of all sequences, shared ones counted for each."""
    num_strips: int
    """Layer strips held, shared ones once."""
    num_shared_strips: int
    num_dropped: int
    """Tokens of sequences that a policy has dropped: the mean over the layers it chooses from."""
    bf16_bytes: int
    """What ``num_tokens`` would take in bfloat16 without sharing, expiry or compression."""
    reads: ReadCount | None = None
    """What decoding tokens have read of keys in planes and of their values; None: no plan to, or none has."""


class KVStore(Protocol):
    """Holds keys and values of sequences; the only writer of their bytes."""

    def open(self, plan: int = 0, expected_tokens: int = 0) -> KVHandle:
        """Return a new empty sequence, under one of the store's plans; ``expected_tokens`` is a hint: 0 is none."""

    def fork(self, handle: KVHandle, num_tokens: int | None = None) -> KVHandle:
        """Return a sequence that shares the first ``num_tokens`` (default all) of ``handle``, copy-on-write."""

    def truncate(self, handle: KVHandle, num_tokens: int) -> int:
        """Keep the first ``num_tokens`` and return the bytes freed."""

    def convert(self, handle: KVHandle, plan: int) -> KVHandle:
        """Return the sequence under another of the store's plans; ``handle`` is closed."""

    def close(self, handle: KVHandle) -> int:
        """Forget the sequence and return the bytes freed."""

    def num_tokens(self, handle: KVHandle) -> int:
        """Return how many tokens the sequence holds (its next position)."""

    def reserve(self, step: KVStep) -> Shortfall | None:
        """Take all bytes for ``step``; or return what is missing and change nothing."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, step: KVStep, want: Want) -> AttnOut:
        """Append ``k, v [N, Hkv, D]`` and return causal attention of ``q [N, Hq, D]``."""

    def strips(self, layer: int, step: KVStep) -> LayerStrips | None:
        """Return where ``layer`` lies when it needs nothing but appending, for code that attends by itself."""

    def end_layer(self, layer: int, step: KVStep) -> None:
        """Compact ``layer`` where the plan compresses at the end of a prompt."""

    def end_step(self, step: KVStep) -> None:
        """Make lengths final, seal full strips, free expired ones."""

    def accept(self, handle: KVHandle, kept: Positions) -> None:
        """Keep only ``kept`` of the last step's positions (tree verification); they move up to where the step began."""

    def overwrite(self, handle: KVHandle, positions: Positions) -> None:
        """Allow the next step to write again to ``positions`` that are already stored (chunk repair)."""

    def export_span(self, handle: KVHandle, start: int, stop: int) -> bytes:
        """Return tokens ``[start, stop)`` as one checksummed object; ``start`` is a multiple of the strip.

        Of layers with a sliding window it holds what later tokens can read.
        """

    def import_span(self, handle: KVHandle, span: bytes) -> int:
        """Append an exported span to a sequence that ends where the span starts; return the tokens added."""

    def resize(self, capacity_bytes: int) -> int:
        """Set the most bytes the store may hold; return how many it holds above that (to be reclaimed)."""

    def report(self) -> KVReport:
        """Return what is held."""

    def check_integrity(self) -> None:
        """Raise IntegrityError unless every reference count and charge agrees with the tables."""
