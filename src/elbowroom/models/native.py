"""NativeDecoder: a step of the decoder in C++, where every matrix is dense and resident.

Computes what ``Decoder`` computes (its oracle), with activations in float32 whatever the dtype of the weights. Layers
whose keys and values lie in strips that it reads run in one call; any other context is asked layer by layer, between
the two halves of the layer. Buffers and threads are the engine's own: nothing here runs on torch's threads.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from elbowroom import _native
from elbowroom.core import LayerSpec, RopeSpec
from elbowroom.kernels import LayerStrips
from elbowroom.kernels.native import DTYPE_CODES, is_native, selection_tuple, spec_tuple, strips_tuple, tail_tuple
from elbowroom.kernels.rope import inverse_frequencies
from elbowroom.models.base import AttentionContext, Scratch
from elbowroom.models.buffers import native_buffers
from elbowroom.models.config import ModelConfig
from elbowroom.models.decoder import Decoder
from elbowroom.weights.base import LinearDescriptor, WeightProvider

_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}


class NativeDecoder:
    """Runs passes of one model.

    Args:
        config: the model.
        weights: where its matrices lie; they must stay there.

    Raises:
        LookupError: a matrix is not dense and resident.
    """

    def __init__(self, config: ModelConfig, weights: WeightProvider) -> None:
        self.config = config
        self.weights = weights
        self._kept: list[Tensor] = []
        self._last: tuple[Scratch, int, list[Tensor], list[int]] | None = None
        """Buffers of the last pass, with what they were taken from and for how many tokens."""
        ropes = _ropes(config)
        self._native = _native.Decoder(
            embed=self._matrix(weights.linear("embed_tokens").descriptor()),
            head=self._matrix(weights.linear("embed_tokens" if config.tie_embeddings else "lm_head").descriptor()),
            final_norm=self._norm("norm"),
            embed_scale=_rounded(config.embed_scale, weights.vector("embed_tokens.weight").dtype),
            eps=config.norm_eps,
            final_softcap=config.final_softcap or 0.0,
            activation=_ACTIVATIONS[config.activation],
            ropes=[self._frequencies(spec, width) for spec, width in ropes],
        )
        for index, layer in enumerate(config.layers):
            self._add_layer(index, layer, ropes.index((layer.rope, layer.head_dim)) if layer.rope else -1)

    @classmethod
    def of(cls, decoder: Decoder) -> NativeDecoder | None:
        """Return the native twin of ``decoder``, or None where a matrix is not plain."""
        try:
            return cls(decoder.config, decoder.weights)
        except LookupError:
            return None

    def runs_on_torch(self, num_tokens: int) -> bool:
        """Return False: the native pool has all threads."""
        return False

    def step(self, tokens: Tensor, context: AttentionContext, rows: Tensor, scratch: Scratch) -> Tensor:
        """Return the logits, float32 ``[M, V]``, of the tokens ``rows`` of a pass; see ``StepModel.step``."""
        count, vocab = rows.numel(), self.config.vocab_size
        buffers, addresses = self._buffers(tokens.numel(), scratch)
        tokens, rows, positions = tokens.contiguous(), rows.contiguous(), context.positions.contiguous()
        # Held until the pass ends: native code gets addresses only.
        strips = [_known(context.strips(layer)) for layer in range(self.config.num_layers)]
        self._native.begin(tokens.data_ptr(), positions.data_ptr(), tokens.numel(), addresses)
        for plain, layers in itertools.groupby(enumerate(strips), lambda each: each[1] is not None):
            if plain:
                run = [(layer, self._layer_step(layer, found)) for layer, found in layers if found is not None]
                self._native.layers(run[0][0], [each for _, each in run])
            else:
                for layer, _ in layers:
                    self._layer(layer, context, buffers, tokens.numel())
        out = scratch.take("logits", (count, vocab), torch.float32)
        out = torch.empty(count, vocab, dtype=torch.float32) if out is None else out
        if count:
            self._native.logits(rows.data_ptr(), count, out.data_ptr())
        return out

    def _layer_step(self, layer: int, found: LayerStrips) -> _native.LayerStep:
        owns_kv = self.config.layers[layer].kv_source is None
        where = strips_tuple(found), tail_tuple(found), selection_tuple(found)
        return found.step.num_sequences, found.step.addresses, *where, found.shares, owns_kv

    def _layer(self, layer: int, context: AttentionContext, buffers: list[Tensor], n: int) -> None:
        """Run one layer whose attention is not ours."""
        spec = self.config.layers[layer]
        self._native.project(layer)
        q, k, v, out = (
            buffer[: n * heads * width].view(n, heads, width)
            for buffer, heads, width in (
                (buffers[4], spec.num_q_heads, spec.head_dim),
                (buffers[5], spec.num_kv_heads, spec.head_dim),
                (buffers[6], spec.num_kv_heads, spec.v_head_dim),
                (buffers[7], spec.num_q_heads, spec.v_head_dim),
            )
        )
        out.copy_(context.attend(layer, q, k, v))
        context.end_layer(layer)
        self._native.finish(layer)

    def _buffers(self, num_tokens: int, scratch: Scratch) -> tuple[list[Tensor], list[int]]:
        """Return the buffers of a pass and their addresses; those of the last pass where it was as long."""
        if self._last is None or self._last[0] is not scratch or self._last[1] != num_tokens:
            sizes = native_buffers(self.config, num_tokens)
            taken = [scratch.take(name, (size,), torch.float32) for name, size in sizes.items()]
            buffers = [
                torch.empty(size, dtype=torch.float32) if buffer is None else buffer
                for buffer, size in zip(taken, sizes.values(), strict=True)
            ]
            self._last = scratch, num_tokens, buffers, [buffer.data_ptr() for buffer in buffers]
        return self._last[2], self._last[3]

    def _add_layer(self, index: int, spec: LayerSpec, rope: int) -> None:
        prefix, config = f"layers.{index}", self.config
        names = [f"{prefix}.self_attn.{part}_proj" for part in "qkvo"]
        matrices = [self._matrix(self.weights.linear(name).descriptor()) for name in names]
        matrices += [self._matrix(each) for each in self.weights.ffn(index).descriptors() or (None,)]
        formats = [matrix[4] for matrix in matrices]
        if len(set(formats[:3])) > 1 or formats[4] != formats[5]:
            raise LookupError("matrices that share their input differ in dtype")
        norms = ["input_layernorm", "post_attention_layernorm", None, None]
        if config.post_norms:
            norms = [norms[0], "pre_feedforward_layernorm", norms[1], "post_feedforward_layernorm"]
        norms += ["self_attn.q_norm", "self_attn.k_norm"] if config.qk_norm else [None, None]
        self._native.add_layer(
            matrices=matrices,
            norms=[(0, 0) if name is None else self._norm(f"{prefix}.{name}") for name in norms],
            spec=spec_tuple(spec),
            heads=(spec.num_kv_heads, spec.head_dim, spec.v_head_dim, rope),
        )

    def _matrix(self, found: LinearDescriptor | None) -> _native.Matrix:
        if found is None or found.format not in DTYPE_CODES:
            raise LookupError("a matrix is not dense and resident")
        bias = 0 if found.bias is None else self._keep(found.bias)[0]
        return (
            found.weight_address,
            found.out_features,
            found.in_features,
            found.row_stride_bytes,
            DTYPE_CODES[found.format],
            bias,
        )

    def _norm(self, name: str) -> _native.Vector:
        return self._keep(self.weights.vector(f"{name}.weight").float() + self.config.norm_offset)

    def _frequencies(self, spec: RopeSpec, width: int) -> tuple[_native.Vector, float]:
        frequencies, factor = inverse_frequencies(spec, width)
        return self._keep(frequencies), factor

    def _keep(self, vector: Tensor) -> _native.Vector:
        """Return address and length of ``vector`` in float32, alive as long as this object."""
        kept = vector.detach().float().contiguous()
        self._kept.append(kept)
        return kept.data_ptr(), kept.numel()


def _known(found: LayerStrips | None) -> LayerStrips | None:
    """Return strips in a format that native code reads."""
    return found if found is not None and is_native(found.fmt) else None


def _ropes(config: ModelConfig) -> list[tuple[RopeSpec, int]]:
    """Return every rotation of the model once, with its head width."""
    return list(dict.fromkeys((layer.rope, layer.head_dim) for layer in config.layers if layer.rope is not None))


def _rounded(value: float, dtype: torch.dtype) -> float:
    """Return ``value`` as a tensor of ``dtype`` holds it: Gemma's checkpoints were trained with a rounded scale."""
    return float(torch.tensor(value, dtype=dtype))
