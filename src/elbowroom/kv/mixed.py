"""MixedStore: sequences under different plans in one arena and one capacity, side by side in a step."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from elbowroom.errors import IntegrityError
from elbowroom.kernels import LayerStrips
from elbowroom.kv.base import AttnOut, KVHandle, KVReport, KVStep, Positions, Shortfall, Want
from elbowroom.kv.conversion import convert
from elbowroom.kv.moving import HeldBlock
from elbowroom.kv.paged import PagedStore
from elbowroom.kv.read_count import sum_reads


@dataclass(frozen=True, slots=True)
class _Part:
    """The rows of a step that have one plan, which lie together."""

    store: PagedStore
    step: KVStep
    tokens: slice
    """Of the packed axis."""


class MixedStore:
    """One paged store for each plan; a handle says which one is meant.

    Rows of a step that have the same plan must lie together, so that each store gets a slice of the packed tokens.

    Args:
        stores: of the same model, arena and capacity, the usual plan first.
    """

    def __init__(self, stores: Sequence[PagedStore]) -> None:
        self.stores = tuple(stores)

    @property
    def fingerprint(self) -> bytes:
        """Of the first plan."""
        return self.stores[0].fingerprint

    # Sequences

    def open(self, plan: int = 0, expected_tokens: int = 0) -> KVHandle:
        """Return a new empty sequence under a plan."""
        return replace(self.stores[plan].open(0, expected_tokens), plan=plan)

    def fork(self, handle: KVHandle, num_tokens: int | None = None) -> KVHandle:
        """Return a sequence that shares the first ``num_tokens`` of ``handle``, copy-on-write."""
        return replace(self._of(handle).fork(handle, num_tokens), plan=handle.plan)

    def truncate(self, handle: KVHandle, num_tokens: int) -> int:
        """Keep the first ``num_tokens`` and return the bytes freed."""
        return self._of(handle).truncate(handle, num_tokens)

    def convert(self, handle: KVHandle, plan: int) -> KVHandle:
        """Return the sequence under another plan; ``handle`` is closed, and its bytes are freed on the way.

        Raises:
            PlanError: one of the plans chooses among tokens.
            OutOfBudget: there is no room to begin with; nothing changes then.
        """
        return replace(convert(self._of(handle), handle, self.stores[plan]), plan=plan)

    def close(self, handle: KVHandle) -> int:
        """Forget the sequence and return the bytes freed."""
        return self._of(handle).close(handle)

    def num_tokens(self, handle: KVHandle) -> int:
        """Return how many tokens the sequence holds."""
        return self._of(handle).num_tokens(handle)

    def _of(self, handle: KVHandle) -> PagedStore:
        return self.stores[handle.plan]

    # A step

    def reserve(self, step: KVStep) -> Shortfall | None:
        """Take all bytes for ``step``; or return what is missing and change nothing.

        Raises:
            IntegrityError: rows or positions are not what the sequences can take, or rows of one plan lie apart;
                nothing changes then.
        """
        parts = _parts(step, self.stores)
        for number, part in enumerate(parts):
            shortfall: Shortfall | None = None
            try:
                shortfall = part.store.reserve(part.step)
            except IntegrityError:
                _undo(parts[:number])
                raise
            if shortfall is not None:
                _undo(parts[:number])
                return shortfall
        step.prepared = parts
        return None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, step: KVStep, want: Want) -> AttnOut:
        """Append ``k, v`` of ``layer`` and return attention; needs a successful ``reserve(step)`` before."""
        found = [
            part.store.attend(layer, q[part.tokens], k[part.tokens], v[part.tokens], part.step, want)
            for part in _prepared(step)
        ]
        return found[0] if len(found) == 1 else _joined(found)

    def strips(self, layer: int, step: KVStep) -> LayerStrips | None:
        """Return where the layer's strips lie, if all rows have one plan and it lets others attend."""
        parts = _prepared(step)
        return parts[0].store.strips(layer, parts[0].step) if len(parts) == 1 else None

    def end_layer(self, layer: int, step: KVStep) -> None:
        """Let policies choose among the tokens of rows that read prompts."""
        for part in _prepared(step):
            part.store.end_layer(layer, part.step)

    def end_step(self, step: KVStep) -> None:
        """Make the new lengths final, seal full strips, free expired ones."""
        for part in _prepared(step):
            part.store.end_step(part.step)
        step.prepared = None

    def accept(self, handle: KVHandle, kept: Positions) -> None:
        """Keep only ``kept`` of the last step's positions; they move up to where the step began."""
        self._of(handle).accept(handle, kept)

    def overwrite(self, handle: KVHandle, positions: Positions) -> None:
        """Allow the next step to write ``positions`` again."""
        self._of(handle).overwrite(handle, positions)

    # Moving

    def lend(self, handle: KVHandle, num_tokens: int) -> list[HeldBlock]:
        """Return where the bytes of the first ``num_tokens`` lie; they are those until the sequence changes."""
        return self._of(handle).lend(handle, num_tokens)

    def admit(self, num_tokens: int, plan: int = 0) -> KVHandle:
        """Return a new sequence of ``num_tokens`` under a plan; its bytes are to be written where ``lend`` says."""
        return replace(self.stores[plan].admit(num_tokens), plan=plan)

    def export_span(self, handle: KVHandle, start: int, stop: int) -> bytes:
        """Return tokens ``[start, stop)`` as one checksummed object."""
        return self._of(handle).export_span(handle, start, stop)

    def import_span(self, handle: KVHandle, span: bytes) -> int:
        """Append a span that was exported under the same plan; return the tokens added."""
        return self._of(handle).import_span(handle, span)

    # Bytes

    def resize(self, capacity_bytes: int) -> int:
        """Set the most bytes that all plans may hold; return how many are held above that."""
        return self.stores[0].resize(capacity_bytes)

    def report(self) -> KVReport:
        """Return what is held under all plans."""
        reports = [store.report() for store in self.stores]
        names = [each.name for each in fields(KVReport) if each.name not in ("capacity_bytes", "reads")]
        sums = {name: sum(getattr(report, name) for report in reports) for name in names}
        reads = sum_reads([report.reads for report in reports if report.reads is not None])
        return KVReport(**sums, capacity_bytes=reports[0].capacity_bytes, reads=reads)

    def check_integrity(self) -> None:
        """Raise IntegrityError unless the books of each plan agree."""
        for store in self.stores:
            store.check_integrity()

    def close_all(self) -> None:
        """Close every sequence and give all pages back."""
        for store in self.stores:
            store.close_all()


def _parts(step: KVStep, stores: Sequence[PagedStore]) -> list[_Part]:
    """Cut a step where the plan changes.

    Raises:
        IntegrityError: rows of one plan lie apart.
    """
    plans = [handle.plan for handle in step.handles]
    cuts = [0, *(row for row in range(1, len(plans)) if plans[row] != plans[row - 1]), len(plans)]
    if len(cuts) - 1 > len(set(plans)):
        raise IntegrityError(f"rows of one plan lie apart in a step: {plans}", "order the rows by their plan")
    return [_part(step, stores[plans[begin]], begin, end) for begin, end in itertools.pairwise(cuts)]


def _part(step: KVStep, store: PagedStore, begin: int, end: int) -> _Part:
    starts: npt.NDArray[np.int32] = step.row_starts[begin : end + 1]
    tokens = slice(int(starts[0]), int(starts[-1]))
    prompts = None if step.prompts is None else step.prompts[begin:end]
    return _Part(store, KVStep(step.handles[begin:end], starts - starts[0], step.positions[tokens], prompts), tokens)


def _prepared(step: KVStep) -> list[_Part]:
    if not isinstance(step.prepared, list):
        raise IntegrityError("the step was not reserved")
    return step.prepared


def _undo(parts: Sequence[_Part]) -> None:
    """Give back what was taken for parts of a step that will not run."""
    for part in parts:
        for handle in part.step.handles:
            part.store.truncate(handle, part.store.num_tokens(handle))


def _joined(found: Sequence[AttnOut]) -> AttnOut:
    """Put the parts of a step behind one another."""
    colsum = [rows for each in found if each.colsum is not None for rows in each.colsum]
    pmax = [each.pmax for each in found if each.pmax is not None]
    return AttnOut(
        torch.cat([each.out for each in found]),
        torch.cat([each.lse for each in found]),
        colsum or None,
        torch.cat(pmax) if pmax else None,
    )
