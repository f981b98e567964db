"""Converts a llama2.c checkpoint into a Hugging Face directory, and reads its tokenizer.

Layout: seven int32 (dim, hidden, layers, heads, KV heads, vocab, seq; a negative vocab means an untied head), then
float32: token embedding, then each kind of weight for all layers, the final norm, and cos and sin tables.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from elbowroom.bench.shared_data import DATA

STORIES = DATA / "models/stories260K"
TRANSPOSED_ROUNDS = {"9414d5a285453a7eab631713d171753232c978f6f97654211469aff8be93c8d6": 5}
"""Copies (by SHA-256) whose matrices some program transposed in place, once for each of the five layers.

Undoing that gives the bytes of the copy in DaveBben/esp32-llm (b0a507e7...), which has the published text.
"""


def half_split(matrix: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reorder the rows of each head from interleaved rotary pairs ``(2i, 2i+1)`` to ``(i, i + D/2)``."""
    rows, columns = matrix.shape
    return matrix.view(num_heads, rows // num_heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _restored(flat: torch.Tensor, rounds: int) -> torch.Tensor:
    """Return the matrix behind ``rounds`` transposes that each took the result for one of the same shape again."""
    for _ in range(rounds):
        flat = flat.t().reshape(flat.shape).contiguous()
    return flat


def convert(source: Path, target: Path) -> None:
    """Write ``source`` (a llama2.c .bin) as config.json and model.safetensors into ``target``."""
    data = source.read_bytes()
    rounds = TRANSPOSED_ROUNDS.get(hashlib.sha256(data).hexdigest(), 0)
    dim, hidden, layers, heads, kv_heads, vocab, seq = struct.unpack("<7i", data[:28])
    values = torch.from_numpy(np.frombuffer(data, dtype=np.float32, offset=28).copy())
    position = 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal position
        count = int(np.prod(shape))
        part = values[position : position + count].view(*shape)
        position += count
        return part.clone()

    kv_dim = dim // heads * kv_heads
    tensors = {"model.embed_tokens.weight": take(abs(vocab), dim)}
    kinds = {
        "input_layernorm": (dim,),
        "self_attn.q_proj": (dim, dim),
        "self_attn.k_proj": (kv_dim, dim),
        "self_attn.v_proj": (kv_dim, dim),
        "self_attn.o_proj": (dim, dim),
        "post_attention_layernorm": (dim,),
        "mlp.gate_proj": (hidden, dim),
        "mlp.down_proj": (dim, hidden),
        "mlp.up_proj": (hidden, dim),
    }
    for kind, shape in kinds.items():
        for layer, stored in enumerate(take(layers, *shape)):
            weight = _restored(stored, rounds) if stored.dim() == 2 else stored
            turned = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads}.get(kind)
            tensors[f"model.layers.{layer}.{kind}.weight"] = (
                weight.clone() if turned is None else half_split(weight, turned)
            )
    tensors["model.norm.weight"] = take(dim)
    if vocab < 0:
        take(2, seq, dim // heads // 2)
        tensors["lm_head.weight"] = take(-vocab, dim)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": abs(vocab),
        "max_position_embeddings": seq,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": vocab > 0,
        "torch_dtype": "float32",
    }
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(config))
    save_file(tensors, target / "model.safetensors")


def vocabulary(path: Path, size: int) -> list[bytes]:
    """Return the text of every token of a llama2.c tokenizer file."""
    data, offset, tokens = path.read_bytes(), 4, []
    for _ in range(size):
        (length,) = struct.unpack_from("<i", data, offset + 4)  # behind the float32 score
        tokens.append(data[offset + 8 : offset + 8 + length])
        offset += 8 + length
    return tokens
