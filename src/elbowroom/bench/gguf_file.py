"""A Llama as a GGUF file in float16, written with the package ``gguf``: what the rival llama.cpp reads.

llama.cpp rotates neighbouring elements of a Llama's heads, Hugging Face's layout the two halves of each; so the rows of
query and key projections change places. Matrices are float16, norms float32, and there is no vocabulary.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from elbowroom.errors import ConfigError, ElbowroomError
from elbowroom.models.config import ModelConfig
from elbowroom.models.hf_config import read_config

_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(directory: Path, file: Path) -> Path:
    """Write the Llama of ``directory`` (one safetensors file) to ``file`` and return it.

    Raises:
        ElbowroomError: the package ``gguf`` is not installed.
        ConfigError: the model is no plain Llama.
    """
    try:
        gguf: Any = importlib.import_module("gguf")
    except ModuleNotFoundError as missing:
        raise ElbowroomError(f"the package {missing.name} is not installed", "`make bench` installs it") from missing
    config = read_config(directory)
    _check(config)
    writer = gguf.GGUFWriter(file, "llama")
    _describe(writer, config, int(gguf.LlamaFileType.MOSTLY_F16))
    with safe_open(directory / "model.safetensors", "pt") as weights:
        for name in weights.keys():  # noqa: SIM118  safe_open is no mapping
            tensor = _arranged(name, weights.get_tensor(name), config)
            writer.add_tensor(_gguf_name(name), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def interleaved(rows: Tensor, num_heads: int) -> Tensor:
    """Return a projection ``[H * D, d]`` whose heads pair elements 2i and 2i + 1 where they paired i and i + D/2."""
    halves = rows.view(num_heads, 2, -1, rows.shape[1])
    return halves.transpose(1, 2).reshape(rows.shape)


def _check(config: ModelConfig) -> None:
    rope = config.layers[0].rope
    if config.family != "llama" or rope is None or rope.kind != "default" or config.qkv_bias or config.tie_embeddings:
        raise ConfigError(
            f"a {config.family} model cannot be written as a plain Llama",
            "give a Llama with default RoPE, without biases and with a head of its own",
        )


def _describe(writer: Any, config: ModelConfig, file_type: int) -> None:
    layer = config.layers[0]
    assert layer.rope is not None
    writer.add_file_type(file_type)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(layer.num_q_heads)
    writer.add_head_count_kv(layer.num_kv_heads)
    writer.add_key_length(layer.head_dim)
    writer.add_value_length(layer.v_head_dim)
    writer.add_rope_dimension_count(layer.head_dim)
    writer.add_rope_freq_base(layer.rope.theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")


def _gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in _WHOLE:
        return f"{_WHOLE[stem]}.weight"
    _, _, number, part = stem.split(".", 3)
    return f"blk.{number}.{_IN_LAYER[part]}.weight"


def _arranged(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    if tensor.dim() == 1:
        return tensor.float()
    layer = config.layers[0]
    if name.endswith("q_proj.weight"):
        tensor = interleaved(tensor, layer.num_q_heads)
    elif name.endswith("k_proj.weight"):
        tensor = interleaved(tensor, layer.num_kv_heads)
    return tensor.to(torch.float16)
