"""Reads Hugging Face's config.json, as transformers 4 and 5 write it, into a ModelConfig.

One reader for all families; what differs between them is in ``hf_families``. Imports neither torch nor transformers.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import get_args

from elbowroom.core import DTYPE_BYTES, LayerSpec, RopeSpec
from elbowroom.errors import ConfigError, RequestError, UnknownArchitecture
from elbowroom.models.config import Activation, ModelConfig
from elbowroom.models.fields import Fields, read_object
from elbowroom.models.hf_families import FAMILIES, Family
from elbowroom.models.hf_rope import extended_positions, read_rope

AUTO_DTYPE = "auto"

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_MAX_LAYERS = 10_000


def read_config(path: Path) -> ModelConfig:
    """Return the configuration of a model.

    Args:
        path: a model directory, or its config.json. A generation_config.json beside it overrides the stop tokens.

    Raises:
        UnknownArchitecture: no supported family has that architecture.
        ConfigError: the file is missing, malformed, contradictory, or asks for something that is not supported.
    """
    file = path / "config.json" if path.is_dir() else path
    values = read_object(file)
    name = _family_name(values, str(file))
    family = FAMILIES[name]
    fields = Fields(values, str(file), family.defaults)
    _refuse_unsupported(fields)
    layers = _layers(fields, family)
    hidden_size = fields.integer("hidden_size")
    return ModelConfig(
        family=name,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        layers=layers,
        max_positions=_max_positions(fields, layers),
        norm_eps=fields.number("rms_norm_eps"),
        activation=_activation(fields, family.activation_key),
        norm_offset=family.norm_offset,
        qkv_bias=_bias(fields, family.qkv_bias),
        o_bias=_bias(fields, family.o_bias),
        mlp_bias=family.has_mlp_bias and fields.flag("mlp_bias"),
        qk_norm=family.qk_norm,
        post_norms=family.post_norms,
        embed_scale=math.sqrt(hidden_size) if family.scaled_embeddings else 1.0,
        tie_embeddings=fields.flag("tie_word_embeddings"),
        final_softcap=fields.optional_number("final_logit_softcapping") if family.has_softcaps else None,
        bos_token_id=next(iter(fields.token_ids("bos_token_id")), None),
        eos_token_ids=_eos_token_ids(fields, file.with_name("generation_config.json")),
    )


def read_dtype(path: Path) -> str | None:
    """Return the dtype that the weights were saved in ("float32", "bfloat16", "float16"), None when not stated.

    Args:
        path: a model directory, or its config.json.

    Raises:
        ConfigError: the file is missing or malformed, or names another dtype.
    """
    file = path / "config.json" if path.is_dir() else path
    fields = Fields(read_object(file), str(file))
    key = "dtype" if "dtype" in fields else "torch_dtype"
    if key not in fields:
        return None
    name = fields.text(key).removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise fields.wrong(key, f"one of: {', '.join(DTYPE_BYTES)}")
    return name


def check_dtype(name: str) -> None:
    """Refuse a name that ``choose_dtype`` does not know.

    Raises:
        RequestError: neither a dtype nor ``auto``.
    """
    if name != AUTO_DTYPE and name not in DTYPE_BYTES:
        raise RequestError(f"unknown dtype {name!r}", f"choose one of: {', '.join((*DTYPE_BYTES, AUTO_DTYPE))}")


def choose_dtype(name: str, path: Path) -> str:
    """Return ``name``, or for ``auto`` the dtype that the model at ``path`` was saved in (not stated: float32)."""
    return (read_dtype(path) or "float32") if name == AUTO_DTYPE else name


def _family_name(values: dict[str, object], where: str) -> str:
    fields = Fields(values, where)
    architectures = fields.strings("architectures")
    model_type = fields.text("model_type") if "model_type" in fields else None
    names = {family.architecture: name for name, family in FAMILIES.items()}
    asked = architectures[0] if architectures else model_type
    found = names.get(asked or "") if architectures else model_type
    if asked is None:
        raise ConfigError(f"{where} names neither architectures nor model_type", "give a model directory of a decoder")
    if found is None or found not in FAMILIES:
        raise UnknownArchitecture(f"{where}: architecture {asked!r} is not supported", f"supported: {', '.join(names)}")
    if model_type not in (None, found):
        raise ConfigError(
            f"{where}: architecture {asked!r} contradicts model_type {model_type!r}",
            f"set model_type to {found!r} if the architecture is right",
        )
    return found


def _refuse_unsupported(fields: Fields) -> None:
    if fields.get("quantization_config") is not None:
        raise fields.wrong("quantization_config", "none: quantised checkpoints are not read", "use the original model")
    if fields.get("use_bidirectional_attention"):
        raise fields.wrong("use_bidirectional_attention", "false: only causal decoders are supported")


def _layers(fields: Fields, family: Family) -> tuple[LayerSpec, ...]:
    num_q_heads = fields.integer("num_attention_heads", high=2**20)
    num_kv_heads = fields.optional_integer("num_key_value_heads") or num_q_heads
    if num_q_heads % num_kv_heads:
        raise fields.wrong("num_key_value_heads", f"a divisor of num_attention_heads ({num_q_heads})")
    head_dim = _head_dim(fields, num_q_heads)
    window = None if family.windows == "none" else _window(fields)
    types = _layer_types(fields, family, window)
    softcap = fields.optional_number("attn_logit_softcapping") if family.has_softcaps else None
    scalar = fields.number("query_pre_attn_scalar") if family.has_query_scalar else head_dim
    max_positions = fields.integer("max_position_embeddings")
    ropes: dict[str, RopeSpec] = {
        kind: read_rope(fields, kind, max_positions, local_rope=family.local_rope) for kind in set(types)
    }
    specs = {
        kind: LayerSpec(
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            v_head_dim=head_dim,
            scale=scalar**-0.5,
            rope=ropes[kind],
            window=window if kind == "sliding_attention" else None,
            softcap=softcap,
        )
        for kind in ropes
    }
    return tuple(specs[kind] for kind in types)


def _head_dim(fields: Fields, num_q_heads: int) -> int:
    head_dim = fields.optional_integer("head_dim")
    if head_dim is None:
        if fields.integer("hidden_size") % num_q_heads:
            raise fields.wrong("hidden_size", f"a multiple of num_attention_heads ({num_q_heads}), or a head_dim")
        head_dim = fields.integer("hidden_size") // num_q_heads
    if head_dim % 8:
        raise ConfigError(
            f"{fields.where}: heads are {head_dim} wide, expected a multiple of 8",
            "choose a model whose head_dim (or hidden_size / num_attention_heads) is a multiple of 8",
        )
    return head_dim


def _window(fields: Fields) -> int | None:
    if "use_sliding_window" in fields and not fields.flag("use_sliding_window"):
        return None
    return fields.optional_integer("sliding_window")


def _layer_types(fields: Fields, family: Family, window: int | None) -> list[str]:
    """Return ``full_attention`` or ``sliding_attention`` for every layer."""
    count = fields.integer("num_hidden_layers", high=_MAX_LAYERS)
    if family.windows in ("none", "all"):  # these families do not read layer_types
        return ["full_attention" if window is None else "sliding_attention"] * count
    types = fields.strings("layer_types") or _implied_types(fields, family, count, window)
    if len(types) != count or not set(types) <= {"full_attention", "sliding_attention"}:
        raise fields.wrong("layer_types", f"{count} times full_attention or sliding_attention")
    if window is None and "sliding_attention" in types:
        raise fields.wrong("sliding_window", "a number of tokens, as layer_types names sliding layers")
    return types


def _implied_types(fields: Fields, family: Family, count: int, window: int | None) -> list[str]:
    if family.windows == "late":
        first = count if window is None else fields.integer("max_window_layers", low=0)
        return ["sliding_attention" if index >= first else "full_attention" for index in range(count)]
    # Transformers 5 keeps the old key with an underscore.
    key = "_sliding_window_pattern" if "_sliding_window_pattern" in fields else "sliding_window_pattern"
    pattern = fields.integer(key)
    return ["sliding_attention" if (index + 1) % pattern else "full_attention" for index in range(count)]


def _max_positions(fields: Fields, layers: tuple[LayerSpec, ...]) -> int:
    positions = fields.integer("max_position_embeddings")
    return max(extended_positions(layer.rope, positions) for layer in layers if layer.rope is not None)


def _activation(fields: Fields, key: str) -> Activation:
    name = fields.text(key)
    if name not in _ACTIVATIONS:
        raise fields.wrong(key, f"one of: {', '.join(_ACTIVATIONS)} ({' and '.join(get_args(Activation))})")
    return _ACTIVATIONS[name]


def _bias(fields: Fields, fixed: bool | None) -> bool:
    return fields.flag("attention_bias") if fixed is None else fixed


def _eos_token_ids(fields: Fields, generation_file: Path) -> tuple[int, ...]:
    if generation_file.is_file():
        generation = Fields(read_object(generation_file), str(generation_file))
        if "eos_token_id" in generation:
            return generation.token_ids("eos_token_id")
    return fields.token_ids("eos_token_id")
