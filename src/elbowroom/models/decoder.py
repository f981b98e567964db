"""One readable decoder for every family: Llama, Mistral, Qwen2, Qwen3, Gemma 3, in inference and in training.

Families differ by the switches of ``ModelConfig`` only. The decoder knows neither files nor formats (weights come
from a ``WeightProvider``) nor caches (attention goes through an ``AttentionContext``). Tokens of all sequences of a
step are packed along one axis.

Shapes: N tokens of the pass, d hidden size, Hq/Hkv query/KV heads, D head width, f FFN width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elbowroom.core import RopeSpec
from elbowroom.kernels.rope import RopeTable, rotate
from elbowroom.models.base import AttentionContext, Scratch, TorchScratch
from elbowroom.models.config import ModelConfig
from elbowroom.weights.base import WeightProvider

CosSin = dict[tuple[RopeSpec, int], tuple[Tensor, Tensor]]


class RMSNorm:
    """Root mean square norm ``x / rms(x) * (weight + offset)`` over the last axis, in float32 inside."""

    def __init__(self, weight: Tensor, eps: float, offset: float) -> None:
        self.weight, self.eps, self.offset = weight, eps, offset

    def __call__(self, x: Tensor) -> Tensor:
        """Return the normed ``x`` in its own dtype."""
        if self.offset == 0.0:
            return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        weight = self.weight.float() + self.offset
        return F.rms_norm(x.float(), (x.shape[-1],), weight, self.eps).to(x.dtype)


class Attention:
    """Projections, optional QK norm and RoPE of one layer around the context's attention."""

    def __init__(self, config: ModelConfig, weights: WeightProvider, index: int) -> None:
        prefix = f"layers.{index}.self_attn"
        self.index, self.spec = index, config.layers[index]
        self.q, self.k, self.v, self.o = (weights.linear(f"{prefix}.{part}_proj") for part in "qkvo")
        self.q_norm, self.k_norm = (
            RMSNorm(weights.vector(f"{prefix}.{part}_norm.weight"), config.norm_eps, config.norm_offset)
            if config.qk_norm
            else None
            for part in "qk"
        )

    def __call__(self, x: Tensor, context: AttentionContext, cos_sin: CosSin, scratch: Scratch) -> Tensor:
        """Return the attention output ``[N, d]`` of normed ``x [N, d]``."""
        spec, n = self.spec, x.shape[0]
        q_width, k_width = spec.num_q_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        q = self.q(x, scratch.take("q", (n, q_width), x.dtype)).view(n, spec.num_q_heads, spec.head_dim)
        k = self.k(x, scratch.take("k", (n, k_width), x.dtype)).view(n, spec.num_kv_heads, spec.head_dim)
        v_width = spec.num_kv_heads * spec.v_head_dim
        v = self.v(x, scratch.take("v", (n, v_width), x.dtype)).view(n, spec.num_kv_heads, spec.v_head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if spec.rope is not None:
            cos, sin = cos_sin[spec.rope, spec.head_dim]
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = context.attend(self.index, q, k, v).reshape(n, -1)
        return self.o(out, scratch.take("block", (n, x.shape[1]), x.dtype))


class Layer:
    """One decoder layer: attention and feed-forward block, each on a residual branch."""

    def __init__(self, config: ModelConfig, weights: WeightProvider, index: int) -> None:
        def norm(name: str) -> RMSNorm:
            weight = weights.vector(f"layers.{index}.{name}.weight")
            return RMSNorm(weight, config.norm_eps, config.norm_offset)

        self.attention = Attention(config, weights, index)
        self.ffn = weights.ffn(index)
        self.ffn_width = config.intermediate_size
        self.input_norm = norm("input_layernorm")
        if config.post_norms:
            self.attention_out_norm: RMSNorm | None = norm("post_attention_layernorm")
            self.ffn_norm = norm("pre_feedforward_layernorm")
            self.ffn_out_norm: RMSNorm | None = norm("post_feedforward_layernorm")
        else:
            self.ffn_norm = norm("post_attention_layernorm")
            self.attention_out_norm = self.ffn_out_norm = None

    def __call__(self, x: Tensor, context: AttentionContext, cos_sin: CosSin, scratch: Scratch) -> Tensor:
        """Return the residual stream ``[N, d]`` behind this layer."""
        y = self.attention(self.input_norm(x), context, cos_sin, scratch)
        x = _residual(x, y if self.attention_out_norm is None else self.attention_out_norm(y))
        h = self.ffn_norm(x)
        gate, up = (scratch.take(name, (x.shape[0], self.ffn_width), x.dtype) for name in ("gate", "up"))
        y = self.ffn(h, gate, up)
        return _residual(x, y if self.ffn_out_norm is None else self.ffn_out_norm(y))


class Decoder(nn.Module):
    """The decoder: embeddings, layers, final norm, and the output head on demand.

    Args:
        config: the model's shape and switches.
        weights: where matrices come from; when it is an ``nn.Module`` its parameters are the decoder's.
    """

    def __init__(self, config: ModelConfig, weights: WeightProvider) -> None:
        super().__init__()
        self.config = config
        self.weights = weights
        self.layers = [Layer(config, weights, index) for index in range(config.num_layers)]
        self.final_norm = RMSNorm(weights.vector("norm.weight"), config.norm_eps, config.norm_offset)
        self._ropes = {
            (layer.rope, layer.head_dim): RopeTable(layer.rope, layer.head_dim)
            for layer in config.layers
            if layer.rope is not None
        }

    def forward(self, tokens: Tensor, context: AttentionContext, scratch: Scratch | None = None) -> Tensor:
        """Return the final hidden states ``[N, d]`` (behind the last norm) of int64 ``tokens [N]``."""
        scratch = scratch or TorchScratch()
        x = self.weights.embed(tokens)
        if self.config.embed_scale != 1.0:
            x = x * torch.tensor(self.config.embed_scale, dtype=x.dtype)
        cos_sin = {key: table.cos_sin(context.positions, x.dtype) for key, table in self._ropes.items()}
        for index, layer in enumerate(self.layers):
            if index + 1 < len(self.layers):
                self.weights.prefetch(index + 1)
            x = layer(x, context, cos_sin, scratch)
            context.end_layer(index)
        return self.final_norm(x)

    def runs_on_torch(self, num_tokens: int) -> bool:
        """Return True: every product is torch's."""
        return True

    def step(self, tokens: Tensor, context: AttentionContext, rows: Tensor, scratch: Scratch) -> Tensor:
        """Run a pass and return the logits ``[M, V]`` of some of its tokens; see ``StepModel.step``."""
        picked = self(tokens, context, scratch)[rows]
        return self.logits(picked, scratch.take("logits", (rows.numel(), self.config.vocab_size), picked.dtype))

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the logits ``[M, V]`` of ``hidden [M, d]``."""
        logits = self.weights.head(hidden, out)
        cap = self.config.final_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap


def _residual(x: Tensor, y: Tensor) -> Tensor:
    """Return ``x + y``, in place where no gradient needs the old value."""
    return x + y if torch.is_grad_enabled() else x.add_(y)
