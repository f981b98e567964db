"""Reader: runs a resident model token by token on the readable path, past an observer of every layer's attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from elbowroom.core import STRIP_TOKENS, LayerSpec
from elbowroom.engine.executors.local import StoreContext
from elbowroom.engine.resident import ResidentModel
from elbowroom.errors import OutOfBudget
from elbowroom.kernels import LayerStrips
from elbowroom.kernels.base import strip_at
from elbowroom.kv.base import KVHandle, KVStep
from elbowroom.kv.policies import LayerView
from elbowroom.weights.base import StepInfo


@dataclass(frozen=True, slots=True, eq=False)
class LayerSight:
    """One layer in one pass: what attention read and what was written."""

    layer: int
    spec: LayerSpec
    queries: Tensor
    """``[n, Hq, D]``, rotated."""
    written: Tensor
    """``[n, Hkv, D]``: the keys of the pass, rotated."""
    strips: LayerStrips
    num_tokens: int
    """Tokens that are stored behind the pass."""

    def keys(self, head: int) -> Tensor:
        """Return all keys of a KV head, float32 ``[num_tokens, D]``; only of layers without a window."""
        return self._stored(0, head)

    def values(self, head: int) -> Tensor:
        """Return all values of a KV head, float32 ``[num_tokens, Dv]``; only of layers without a window."""
        return self._stored(1, head)

    def view(self, queries: Tensor) -> LayerView:
        """Return the layer as policies see it, with ``queries [W, Hq, D]``, the last one behind all keys."""
        return LayerView(self.layer, self.spec, queries.float(), self.keys, self.num_tokens)

    def _stored(self, part: int, head: int) -> Tensor:
        strips, blocks = self.strips, -(-self.num_tokens // STRIP_TOKENS)
        opened = (strip_at(strips.base, strips.fmt, int(unit)) for unit in strips.table[0, :blocks])
        parts = [strips.layout.open(strip, strips.fmt)[part][head] for strip in opened]
        return torch.cat(parts)[: self.num_tokens].float()


Observe = Callable[[LayerSight], None]


class _Context(StoreContext):
    """The context of an engine step, which shows each layer behind its attention."""

    def __init__(self, model: ResidentModel, step: KVStep, observe: Observe) -> None:
        super().__init__(model.store, step)
        self._model, self._observe, self._end = model, observe, int(step.positions[-1]) + 1

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return attention, after which the observer looks."""
        out = super().attend(layer, q, k, v)
        strips = self.strips(layer)
        assert strips is not None, "the plan is plain"
        self._observe(LayerSight(layer, self._model.config.layers[layer], q, k, strips, self._end))
        return out


class Reader:
    """Reads and generates, one sequence at a time.

    Args:
        model: with a plain KV plan and the readable path.
    """

    def __init__(self, model: ResidentModel) -> None:
        self.model = model
        self.eos_token_ids = {*model.config.eos_token_ids, *model.tokenizer.eos_token_ids}

    def open(self) -> KVHandle:
        """Return an empty sequence."""
        return self.model.store.open()

    def fork(self, handle: KVHandle) -> KVHandle:
        """Return a copy that shares what was read."""
        return self.model.store.fork(handle)

    def close(self, handle: KVHandle) -> None:
        """Forget the sequence."""
        self.model.store.close(handle)

    @torch.inference_mode()
    def read(self, handle: KVHandle, token_ids: Sequence[int], observe: Observe | None = None) -> int:
        """Append ``token_ids``, in as many passes as the workspace asks for, and return the most likely next token.

        Args:
            handle: the sequence.
            token_ids: at least one.
            observe: shown every layer of every pass.

        Raises:
            OutOfBudget: keys and values do not fit the memory.
        """
        most, best = self.model.memory.max_step_tokens, 0
        for first in range(0, len(token_ids), most):
            best = self._pass(handle, token_ids[first : first + most], observe)
        return best

    def _pass(self, handle: KVHandle, token_ids: Sequence[int], observe: Observe | None) -> int:
        model, count = self.model, len(token_ids)
        start = model.store.num_tokens(handle)
        step = KVStep((handle,), np.array([0, count], dtype=np.int32), np.arange(start, start + count))
        if model.store.reserve(step) is not None:
            raise OutOfBudget(f"{start + count} tokens do not fit the memory", "raise --memory")
        context = StoreContext(model.store, step) if observe is None else _Context(model, step, observe)
        model.decoder.weights.begin(StepInfo(num_tokens=count, phase="prefill" if count > 1 else "decode"))
        try:
            logits = model.decoder.step(torch.tensor(token_ids), context, torch.tensor([count - 1]), model.workspace)
        finally:
            model.decoder.weights.end()
        model.store.end_step(step)
        return int(logits[0].argmax())
