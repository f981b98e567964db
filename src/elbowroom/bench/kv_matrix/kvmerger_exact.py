"""[kvmerger.exact]: do equal tokens that share a slot weigh what they weighed?

Every token of a prompt comes twice. Merged in pairs, with log n on the scores of a slot of n tokens, attention is what
it was; without that it is not (a row for each).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from elbowroom.bench.base import BenchOptions, Row
from elbowroom.bench.kv_matrix.one_layer import OneLayer, dense
from elbowroom.bench.kv_matrix.part import Part, claimed
from elbowroom.core import LayerSpec
from elbowroom.kv.base import PromptPart

NAME = "kvmerger.exact"
CLAIM = claimed(NAME, "<=", 1e-5, "greatest difference of the output, float32")
SPEC = LayerSpec(num_q_heads=8, num_kv_heads=2, head_dim=64, v_head_dim=64, scale=0.125, rope=None)
_TOKENS, _KEPT, _RUNS = 1024, 640, 8


def measure(options: BenchOptions) -> Part:
    """Compare merged attention with that of all tokens."""
    rows: list[Row] = []
    for bias in ("on", "off"):
        errors = [_error(bias, options.seed + run) for run in range(_RUNS)]
        rows.append({"part": NAME, "bias": bias, "tokens": _TOKENS, "slots": _KEPT, "greatest_error": max(errors)})
    claim = replace(
        CLAIM,
        value=float(str(rows[0]["greatest_error"])),
        num_runs=_RUNS,
        reason=f"without the count of tokens: {float(str(rows[1]['greatest_error'])):.2g}",
    )
    return Part(rows, [claim])


def _error(bias: str, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(_TOKENS // 2, 2, 64, generator=generator).repeat_interleave(2, dim=0) for _ in range(2))
    q = torch.randn(_TOKENS + 1, 8, 64, generator=generator)
    new_k, new_v = (torch.randn(1, 2, 64, generator=generator) for _ in range(2))
    layer = OneLayer(f"kvmerger(tokens={_KEPT},protect=1,longest=2,bias={bias}) | plain", SPEC)
    layer.run(q[:-1], k, v, PromptPart.END)
    made = layer.run(q[-1:], new_k, new_v)[0]
    expected = dense(SPEC, q[-1], torch.cat([k, new_k]), torch.cat([v, new_v]))
    return float((made - expected).abs().max())
