"""Forward passes of a transformers model over a store: the first layer opens a step, the last one ends it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from elbowroom.core import LayerSpec
from elbowroom.errors import PlanError, RequestError
from elbowroom.kv.adapters.hf_batch import PaddedBatch, PaddedStep
from elbowroom.kv.adapters.hf_mask import PaddingMask
from elbowroom.kv.base import KVStore, PromptPart, Want
from elbowroom.memory.arena import Arena

_NO_STATISTICS = Want()
_HARMLESS = frozenset({"position_ids", "cache_position"})
"""Tensors that attention functions are given and that change nothing here."""
_HINT = "generate without past_key_values: this model's attention cannot be kept by a KV plan"


class Passes:
    """Attention of one batch, layer by layer.

    Args:
        store: where keys and values go.
        layers: what the plan was bound to; each call of attention is checked against its layer.
        batch: the rows.
        arena: where the store's pages are; those that stay free are given back between passes.
    """

    def __init__(self, store: KVStore, layers: tuple[LayerSpec, ...], batch: PaddedBatch, arena: Arena) -> None:
        self.batch = batch
        self.closed = False
        self._store, self._layers, self._arena = store, layers, arena
        self._step: PaddedStep | None = None
        self._next = 0

    def enter(self, layer: int) -> None:
        """Note that ``layer`` has new keys; layer 0 begins a pass, whatever became of the one before.

        Raises:
            RequestError: the cache is closed.
            PlanError: an earlier layer's attention did not come here.
        """
        if self.closed:
            raise RequestError("the cache is closed", "make another one by KVPlan.for_hf(model)")
        if layer == 0:
            self.drop()
        elif layer != self._next:
            raise PlanError(
                f"layer {layer} has new keys before layer {self._next} attended to its own",
                "the model's attention must stay 'elbowroom' while the cache is open (model.set_attn_implementation)",
            )

    def drop(self) -> None:
        """Forget a pass that did not end."""
        self._step, self._next = None, 0
        self.batch.abandon()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: PaddingMask, options: dict[str, Any]) -> Tensor:
        """Store the new tokens' ``k, v [B, Hkv, T, D]`` and return attention of ``q [B, Hq, T, D]``.

        Args:
            layer: which one.
            q, k, v: of all columns; those of padding are ignored.
            mask: which columns are tokens.
            options: all else that the model told its attention function.

        Returns:
            ``[B, T, Hq, Dv]``, zeros where there is padding.

        Raises:
            PlanError: the model asks for attention other than its configuration says.
            RequestError: gradients or attention weights are wanted, or the batch does not continue the stored one.
            OutOfBudget: the tokens do not fit. After any error the cache is as it was before the pass.
        """
        if layer != self._next:
            raise PlanError(f"layer {layer} attends more than once in a pass, or out of turn", _HINT)
        check_call(layer, self._layers[layer], q, k, v, mask, options)
        if self._step is None:
            self._step = self.batch.begin(mask.is_token, q.shape[2])
        step = self._step
        if step.kv is None:
            out = q.new_zeros(*step.is_token.shape, q.shape[1], v.shape[3])
        else:
            packed = self._store.attend(layer, step.pack(q), step.pack(k), step.pack(v), step.kv, _NO_STATISTICS)
            self._store.end_layer(layer, step.kv)
            out = step.unpack(packed.out)
        self._next += 1
        if self._next == len(self._layers):
            self._step, self._next = None, 0
            self.batch.end()
            if step.chooses and step.part is PromptPart.END:
                self._arena.trim(0.0)  # what a prompt took while it was read comes back with the next one
            else:
                self._arena.trim()
        return out


def check_call(
    layer: int, spec: LayerSpec, q: Tensor, k: Tensor, v: Tensor, mask: PaddingMask, options: dict[str, Any]
) -> None:
    """Refuse a call of attention that the store would answer wrongly.

    Raises:
        PlanError: it is not the attention that ``spec`` describes.
        RequestError: gradients or attention weights are wanted.
    """
    if q.requires_grad and torch.is_grad_enabled():
        raise RequestError("a KV cache gives no gradients", "call the model under torch.no_grad()")
    if options.get("output_attentions"):
        raise RequestError("a KV cache gives no attention weights", "leave output_attentions out")
    shape = (spec.num_q_heads, spec.num_kv_heads, spec.num_kv_heads, spec.head_dim, spec.head_dim, spec.v_head_dim)
    found = (*(x.shape[1] for x in (q, k, v)), *(x.shape[3] for x in (q, k, v)))
    _agree(layer, "heads and widths of queries, keys and values", shape, found)
    scale = options.get("scaling")
    if not math.isclose(spec.scale, spec.head_dim**-0.5 if scale is None else scale, rel_tol=1e-6):
        _agree(layer, "a scale", spec.scale, scale)
    _agree(layer, "a softcap", spec.softcap, options.get("softcap"))
    _agree(layer, "a window", spec.window, mask.window)
    _agree(layer, "a window", spec.window, options.get("sliding_window", spec.window))
    _agree(layer, "dropout", 0.0, options.get("dropout") or 0.0)
    if not mask.is_causal or options.get("is_causal") is False:
        raise PlanError(f"layer {layer} attends by a mask that is not causal or not only of padding", _HINT)
    unknown = [key for key, value in options.items() if isinstance(value, Tensor) and key not in _HARMLESS]
    if unknown:
        raise PlanError(f"layer {layer} gives its attention {', '.join(unknown)}, which no KV plan knows", _HINT)


def _agree(layer: int, what: str, expected: object, found: object) -> None:
    if expected != found:
        raise PlanError(f"layer {layer} has {what} of {found}; its configuration says {expected}", _HINT)
