"""ModelConfig: what the decoder needs to know of a model, whatever file format described it.

Knows nothing of files; ``hf_config`` reads Hugging Face's ``config.json`` into it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from elbowroom.core import LayerSpec

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape and switches of one decoder-only model; families differ only in these values."""

    family: str
    """Name of the family ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: tuple[LayerSpec, ...]
    max_positions: int
    """Longest context in tokens."""
    norm_eps: float
    activation: Activation = "silu"
    norm_offset: float = 0.0
    """Added to every norm weight (Gemma stores weight - 1)."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMS norm over each query and key head before RoPE (Qwen3, Gemma 3)."""
    post_norms: bool = False
    """Norms on the outputs of attention and FFN as well (Gemma)."""
    embed_scale: float = 1.0
    tie_embeddings: bool = False
    final_softcap: float | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the name and shape of every weight, in loading order (names as in HF files, without ``model.``)."""
        shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        for index, layer in enumerate(self.layers):
            shapes.update({f"layers.{index}.{name}": shape for name, shape in self._layer_shapes(layer).items()})
        shapes["norm.weight"] = (self.hidden_size,)
        if not self.tie_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    def _layer_shapes(self, layer: LayerSpec) -> dict[str, tuple[int, ...]]:
        d, f = self.hidden_size, self.intermediate_size
        q, k = layer.num_q_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
        v, o = layer.num_kv_heads * layer.v_head_dim, layer.num_q_heads * layer.v_head_dim
        matrices = {
            "self_attn.q_proj": (q, d, self.qkv_bias),
            "self_attn.k_proj": (k, d, self.qkv_bias),
            "self_attn.v_proj": (v, d, self.qkv_bias),
            "self_attn.o_proj": (d, o, self.o_bias),
            "mlp.gate_proj": (f, d, self.mlp_bias),
            "mlp.up_proj": (f, d, self.mlp_bias),
            "mlp.down_proj": (d, f, self.mlp_bias),
        }
        shapes: dict[str, tuple[int, ...]] = {}
        for name, (rows, cols, bias) in matrices.items():
            shapes[f"{name}.weight"] = (rows, cols)
            if bias:
                shapes[f"{name}.bias"] = (rows,)
        if self.qk_norm:
            shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (layer.head_dim,)
        norms = ["input_layernorm", "post_attention_layernorm"]
        if self.post_norms:
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        shapes.update({f"{name}.weight": (d,) for name in norms})
        return shapes

    def num_parameters(self) -> int:
        """Return the number of weights (tied ones once)."""
        total = 0
        for shape in self.tensor_shapes().values():
            size = 1
            for extent in shape:
                size *= extent
            total += size
        return total
