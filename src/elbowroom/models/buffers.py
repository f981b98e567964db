"""How large the buffers of one pass are: for the planner of the workspace, and for who takes them from it."""

from __future__ import annotations

from elbowroom.models.config import ModelConfig

PANEL_TOKENS = 16
"""Native code lays out the tokens of a longer pass in groups of so many."""
_ITEM_ROWS, _ITEM_DEPTH = 48, 256
"""Rows and columns of weights that a native thread widens at a time."""
_ATTENTION_FLOATS = 2**17
"""More than a native thread needs for one item of attention, packed heads of 256 channels included."""


def decoder_buffers(config: ModelConfig, num_tokens: int) -> dict[str, int]:
    """Return the elements (of the model's dtype) of every buffer of a pass of ``num_tokens`` on torch."""
    q, k, v, _ = _widths(config)
    return {
        "q": num_tokens * q,
        "k": num_tokens * k,
        "v": num_tokens * v,
        "block": num_tokens * config.hidden_size,
        "gate": num_tokens * config.intermediate_size,
        "up": num_tokens * config.intermediate_size,
    }


def native_buffers(config: ModelConfig, num_tokens: int) -> dict[str, int]:
    """Return the float32 elements of every buffer of a native pass, in the order in which C++ takes them."""
    q, k, v, out = _widths(config)
    padded, d = -(-num_tokens // PANEL_TOKENS) * PANEL_TOKENS, config.hidden_size
    return {
        "hidden": padded * d,
        "input": padded * max(d, out),
        "branch": padded * d,
        "projected": padded * (q + k + v),
        "q": num_tokens * q,
        "k": num_tokens * k,
        "v": num_tokens * v,
        "attention": num_tokens * out,
        "ffn": padded * config.intermediate_size,
        "angles": num_tokens * sum({(spec.rope, spec.head_dim): spec.head_dim for spec in config.layers}.values()),
    }


def native_scratch(config: ModelConfig, num_tokens: int) -> int:
    """Return the float32 elements that each thread of the native pool needs for a pass."""
    return max(_ITEM_ROWS * (num_tokens + _ITEM_DEPTH), PANEL_TOKENS * config.hidden_size, _ATTENTION_FLOATS)


def _widths(config: ModelConfig) -> tuple[int, int, int, int]:
    """Return the widest queries, keys, values and attention output of any layer."""
    layers = config.layers
    return (
        max(layer.num_q_heads * layer.head_dim for layer in layers),
        max(layer.num_kv_heads * layer.head_dim for layer in layers),
        max(layer.num_kv_heads * layer.v_head_dim for layer in layers),
        max(layer.num_q_heads * layer.v_head_dim for layer in layers),
    )
