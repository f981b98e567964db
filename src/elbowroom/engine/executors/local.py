"""TorchExecutor: computes steps in this process, with the decoder and the KV store."""

from __future__ import annotations

import itertools
import time

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from elbowroom.engine.executors.transfers import Transfers
from elbowroom.engine.sampler import SlotSampler, sample
from elbowroom.engine.types import KVOp, Row, SampledToken, StepPlan, StepResult
from elbowroom.errors import IntegrityError, OutOfBudget
from elbowroom.kernels import LayerStrips
from elbowroom.kv.base import KVHandle, KVStep, KVStore, Want
from elbowroom.models.base import Scratch, StepModel
from elbowroom.models.thinking import ThinkingMarks
from elbowroom.weights.base import StepInfo, WeightProvider

_NO_STATISTICS = Want()


class StoreContext:
    """The AttentionContext of an engine step: keys and values live in the store."""

    def __init__(self, store: KVStore, step: KVStep) -> None:
        self._store, self._step = store, step
        self._positions = torch.from_numpy(step.positions)

    @property
    def positions(self) -> Tensor:
        """int64 ``[N]``."""
        return self._positions

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return attention ``[N, Hq, Dv]`` over everything stored."""
        return self._store.attend(layer, q, k, v, self._step, _NO_STATISTICS).out

    def strips(self, layer: int) -> LayerStrips | None:
        """Return where the store keeps the layer, if it is plain."""
        return self._store.strips(layer, self._step)

    def end_layer(self, layer: int) -> None:
        """Let the store compact the layer."""
        self._store.end_layer(layer, self._step)


class TorchExecutor:
    """Runs each step at once in ``submit``.

    Args:
        model: what runs the passes.
        weights: its weights, which hear of every step.
        store: its keys and values.
        scratch: where large activations live.
        transfers: who saves and loads sequences, where plans may ask for that.
        marks: between which the model thinks, if it does.
    """

    def __init__(
        self,
        model: StepModel,
        weights: WeightProvider,
        store: KVStore,
        scratch: Scratch,
        transfers: Transfers | None = None,
        marks: ThinkingMarks | None = None,
    ) -> None:
        self._model, self._weights, self.store, self._scratch = model, weights, store, scratch
        self._transfers, self._marks = transfers, marks
        self._torch_threads = torch.get_num_threads()
        self._handles: dict[int, KVHandle] = {} if transfers is None else transfers.handles
        self._samplers: dict[int, SlotSampler] = {}
        self._results: dict[int, StepResult] = {}
        self._next_ticket = 0

    def submit(self, plan: StepPlan) -> int:
        """Apply the plan's changes and compute its rows.

        Raises:
            ModelError: the model gives logits that are not finite.
        """
        started = time.perf_counter()
        stranded = tuple([op.slot for op in plan.ops if not self._apply(op)])
        rows = tuple([row for row in plan.rows if row.slot not in stranded]) if stranded else plan.rows
        if self._transfers is not None:
            self._transfers.settle(row.slot for row in rows)
            rows = tuple([row for row in rows if row.slot in self._handles])  # without those that failed to load
        tokens, shortfall = self._run(rows) if rows else ({}, 0)
        moved = () if self._transfers is None else self._transfers.take_ended(plan.waits)
        self._next_ticket += 1
        seconds = time.perf_counter() - started
        self._results[self._next_ticket] = StepResult(tokens, 1, seconds, shortfall, stranded, moved=moved)
        return self._next_ticket

    def collect(self, ticket: int) -> StepResult:
        """Return the finished step."""
        return self._results.pop(ticket)

    def reset(self) -> None:
        """Close every sequence (after a failed step)."""
        if self._transfers is not None:
            self._transfers.reset()
        for handle in self._handles.values():
            self.store.close(handle)
        self._handles.clear()
        self._samplers.clear()

    def _apply(self, op: KVOp) -> bool:
        """Apply a change; False if a sequence could not go over to another plan for lack of memory."""
        if op.kind in ("save", "load", "forget"):
            self._transfer(op)
            return True
        if self._transfers is not None:
            self._transfers.before(op)
        if op.kind == "open":
            self._handles[op.slot] = self.store.open(op.plan, op.num_tokens)
        elif op.kind == "fork":
            self._handles[op.slot] = self.store.fork(self._handles[op.source], op.num_tokens)
        elif op.kind == "truncate":
            self.store.truncate(self._handles[op.slot], op.num_tokens)
        elif op.kind == "convert":
            try:
                self._handles[op.slot] = self.store.convert(self._handles[op.slot], op.plan)
            except OutOfBudget:
                return False
        elif op.slot in self._handles or self._transfers is None:  # a slot that failed to load is closed already
            self.store.close(self._handles.pop(op.slot))
            self._samplers.pop(op.slot, None)
        return True

    def _transfer(self, op: KVOp) -> None:
        if self._transfers is None:
            raise IntegrityError(f"a step asks for {op.kind!r}, and there is no place to swap to", "set --swap")
        self._transfers.apply(op)

    @torch.inference_mode()
    def _run(self, rows: tuple[Row, ...]) -> tuple[dict[int, list[SampledToken]], int]:
        rows = self._by_plan(rows)
        step = self._kv_step(rows)
        shortfall = self.store.reserve(step)
        if shortfall is not None:
            return {}, max(shortfall.needed_bytes - shortfall.available_bytes, 1)
        num_tokens = len(step.positions)
        self._share_threads(num_tokens)
        is_decode = all(row.kind == "decode" for row in rows)
        self._weights.begin(StepInfo(num_tokens=num_tokens, phase="decode" if is_decode else "prefill"))
        try:
            return self._sample(rows, step), 0
        finally:
            self._weights.end()

    def _by_plan(self, rows: tuple[Row, ...]) -> tuple[Row, ...]:
        """Return the rows with those of a KV plan together, as the store wants them."""
        plans = [self._handles[row.slot].plan for row in rows]
        if len(set(plans)) == 1:
            return rows
        return tuple(sorted(rows, key=lambda row: self._handles[row.slot].plan))

    def _share_threads(self, num_tokens: int) -> None:
        """Two pools that want the same cores cost several times what they gain: give them to one."""
        threads = self._torch_threads if self._model.runs_on_torch(num_tokens) else 1
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)

    def _kv_step(self, rows: tuple[Row, ...]) -> KVStep:
        counts = [row.num_tokens for row in rows]
        starts = np.fromiter(itertools.accumulate(counts, initial=0), dtype=np.int32, count=len(rows) + 1)
        positions = np.array([row.start for row in rows], dtype=np.int64)
        if max(counts) > 1:
            positions = np.repeat(positions - starts[:-1], counts) + np.arange(starts[-1])
        handles = tuple([self._handles[row.slot] for row in rows])
        return KVStep(handles, starts, positions, _prompts(rows))

    def _tokens(self, rows: tuple[Row, ...]) -> Tensor:
        ids: list[int] = []
        for row in rows:
            if row.tokens is None:
                ids.append(self._samplers[row.slot].last_token)
            else:
                ids.extend(row.tokens)
        return torch.tensor(ids, dtype=torch.int64)

    def _sample(self, rows: tuple[Row, ...], step: KVStep) -> dict[int, list[SampledToken]]:
        """Run the pass and draw a token for every row that wants one."""
        chosen = [index for index, row in enumerate(rows) if row.sample is not None]
        last = torch.from_numpy(step.row_starts[1:].astype(np.int64))[chosen] - 1
        logits = self._model.step(self._tokens(rows), StoreContext(self.store, step), last, self._scratch)
        self.store.end_step(step)
        if not chosen:
            return {}
        states = [self._sampler(rows[index]) for index in chosen]
        results = sample(logits, states)
        return {rows[index].slot: [result] for index, result in zip(chosen, results, strict=True)}

    def _sampler(self, row: Row) -> SlotSampler:
        spec = row.sample
        if spec is None:
            raise IntegrityError("a row without sampling has no sampler")
        if spec.history is not None:
            self._samplers[row.slot] = SlotSampler.start(spec, self._marks)
        return self._samplers[row.slot]


def _prompts(rows: tuple[Row, ...]) -> npt.NDArray[np.int8] | None:
    """Return what each row has to do with a prompt; None where all decode."""
    return np.array([row.prompt for row in rows], dtype=np.int8) if any(row.prompt for row in rows) else None
