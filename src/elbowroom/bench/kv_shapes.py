"""What the benchmarks of KV plans share: the plans, and layers of equal shape to keep keys and values for."""

from __future__ import annotations

from elbowroom.bench.random_model import SHAPES
from elbowroom.core import LayerSpec

BF16, KIVI2 = "plain(bf16)", "kivi(2,2,64)"
PLANS = (BF16, "fp8", "int8", "bfp", "kivi(4,4,32)", "kivi(4,4,64)", "kivi(2,2,32)", KIVI2)
"""The first one is what the others are compared with."""
QUICK_PLANS = (BF16, "kivi(2,2,32)", KIVI2)


def equal_layers(num_layers: int, num_q_heads: int, num_kv_heads: int, head_dim: int) -> tuple[LayerSpec, ...]:
    """Return layers of one shape, without sliding windows."""
    layer = LayerSpec(
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        v_head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=None,
    )
    return (layer,) * num_layers


def layers_of(size: str) -> tuple[LayerSpec, ...]:
    """Return the layers of the random model of ``size``, a key of ``SHAPES``."""
    shape = SHAPES[size]
    heads = shape["num_attention_heads"]
    width = shape["hidden_size"] // heads
    return equal_layers(shape["num_hidden_layers"], heads, shape["num_key_value_heads"], width)
