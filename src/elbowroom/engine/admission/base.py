"""The seam of admission: may a waiting request begin beside those that run?

The scheduler asks only when the prompt itself fits; a policy looks further: what the sequences will hold before they
end. It sees bytes, as each sequence's KV plan prices them, and never tokens of memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from elbowroom.engine.admission.lengths import Kind
from elbowroom.engine.sequence import SeqState

Tokens = npt.NDArray[np.int64]


class Outlook(NamedTuple):
    """A sequence as admission sees it: what it holds, and what it would hold later."""

    num_tokens: int
    """Prompt and output until now."""
    num_generated: int
    kind: Kind
    """What is known of the request: answers of a kind are like one another."""
    most_new_tokens: int
    """Output tokens that it may have in all: its limit."""
    true_new_tokens: int | None
    """Output tokens that it will have, where a trace says so."""
    chunk_steps: int
    """Steps until its prompt is read."""
    prices: npt.NDArray[np.int64]
    """``[blocks + 1]``: bytes of a sequence of so many blocks."""
    most_bytes: int
    """That it never exceeds, whatever its length: a policy drops tokens while it generates."""
    spared_bytes: int
    """Not paid by it: prefix blocks that it shares, and what was dropped of it."""
    waited_s: float = 0.0
    """Seconds since it came; 0 for one that runs, or ran and had to go."""

    @classmethod
    def of(cls, seq: SeqState, step_tokens: int, shared_bytes: int, waited_s: float = 0.0) -> Outlook:
        """Return the outlook of a sequence of which prefix blocks of ``shared_bytes`` are paid by others.

        Args:
            seq: running or waiting.
            step_tokens: most tokens of a step.
            shared_bytes: of cached prefix blocks that it shares, or would.
            waited_s: since it came.
        """
        pricing, limit, gone = seq.pricing, seq.limit, 0
        if pricing.chooses:
            dropped = seq.dropped or pricing.dropped((), seq.num_prompt, ends_prompt=True)
            gone = pricing.price(0) - pricing.price(0, dropped)
        most = pricing.by_blocks[-1]
        if pricing.interval:
            most = pricing.generation_bytes(seq.num_prompt, limit) + gone
        return cls(
            num_tokens=len(seq.tokens),
            num_generated=seq.num_generated,
            kind=Kind.of(seq.request.tenant, seq.num_prompt),
            most_new_tokens=seq.max_new_tokens,
            true_new_tokens=seq.request.num_output_tokens,
            chunk_steps=-(-max(seq.num_prompt - seq.num_computed, 0) // step_tokens),
            prices=pricing.prices,
            most_bytes=most,
            spared_bytes=shared_bytes + gone,
            waited_s=waited_s,
        )


class AdmissionPolicy(Protocol):
    """One dataclass, one file a policy. Whatever it remembers is part of the scheduler's state."""

    @property
    def name(self) -> str:
        """Name on the command line and in reports."""

    @property
    def looks_ahead(self) -> bool:
        """Whether it wants to be asked at all."""

    @property
    def patience(self) -> int:
        """Steps for which a refusal stands, unless a sequence ends or gives way before."""

    @property
    def guards(self) -> bool:
        """Whether it lets in only who fits to its limit; such a sequence goes after all others when memory is short."""

    def admits(self, candidate: Outlook, running: Sequence[Outlook], room_bytes: int) -> bool:
        """Return whether ``candidate`` may begin now.

        Args:
            candidate: the first that waits.
            running: all that run.
            room_bytes: what ``running`` and ``candidate`` may hold together, prefixes of others taken off.
        """

    def ended(self, kind: Kind, num_generated: int) -> None:
        """Note that a sequence ended by itself or at its limit."""
