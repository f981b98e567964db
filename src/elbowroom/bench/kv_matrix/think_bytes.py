"""[think.bytes]: are the channels that ThinK drops really gone, and is attention that of keys without them?

Strips of a prompt are counted in the store, with the lists of channels that they carry; attention on packed keys is
held against attention on keys whose dropped channels are 0.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from elbowroom.bench.base import BenchOptions, Row
from elbowroom.bench.kv_matrix.kvmerger_exact import SPEC
from elbowroom.bench.kv_matrix.one_layer import OneLayer, dense
from elbowroom.bench.kv_matrix.part import Part, claimed
from elbowroom.kv.base import PromptPart
from elbowroom.kv.policies.base import LayerView
from elbowroom.kv.policies.think import ThinKPolicy

NAME = "think.bytes"
BYTES = claimed(NAME, "<=", 0.01, "share of key bytes that is dropped, less the cut")
PACKED = claimed("think.packed", "<=", 1e-4, "greatest difference of the output, float32")
_TOKENS, _CUTS = 1024, (0.25, 0.5, 0.75)


def measure(options: BenchOptions) -> Part:
    """Count bytes of keys and compare outputs for some cuts."""
    rows = [_row(cut, options.seed) for cut in _CUTS]
    bytes_claim = replace(
        BYTES,
        value=max(abs(float(str(row["dropped"])) - float(str(row["cut"]))) for row in rows),
        num_runs=len(rows),
    )
    packed = replace(
        PACKED,
        value=max(float(str(row["greatest_error"])) for row in rows),
        num_runs=len(rows),
    )
    return Part(list[Row](rows), [bytes_claim, packed])


def _row(cut: float, seed: int) -> dict[str, object]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(_TOKENS + 1, heads, 64, generator=generator) for heads in (8, 2, 2))
    layer, whole = (OneLayer(text, SPEC) for text in (f"think({cut}) | plain", "plain"))
    for each in (layer, whole):
        each.run(q[:-1], k[:-1], v[:-1], PromptPart.END)
    made = layer.run(q[-1:], k[-1:], v[-1:])[0]
    expected = dense(SPEC, q[-1], _without(ThinKPolicy(cut), q, k), v)
    key_bytes = _TOKENS // 64 * whole.bound.formats[0].strip_bytes // 2
    saved = _TOKENS // 64 * whole.bound.formats[0].strip_bytes - layer.strip_bytes()
    return {
        "part": NAME,
        "cut": cut,
        "key_bytes": key_bytes,
        "dropped": saved / key_bytes,
        "greatest_error": float((made - expected).abs().max()),
    }


def _without(policy: ThinKPolicy, q: Tensor, k: Tensor) -> Tensor:
    """Return keys in which the channels that ``policy`` drops of the prompt are 0; the new token keeps all."""
    newest, width = q[:-1][-policy.window :], round(SPEC.head_dim * policy.share / 8) * 8
    chosen = policy.channels(LayerView(0, SPEC, newest, lambda head: k[:-1, head], _TOKENS), width).long()
    kept = torch.zeros(SPEC.num_kv_heads, SPEC.head_dim).scatter_(1, chosen, 1.0)
    return torch.cat([k[:-1] * kept, k[-1:]])
