"""[kvmerger.exact]: do equal tokens that share a slot weigh what they weighed?

Every token of a prompt comes twice. Merged in pairs, with log n on the scores of a slot of n tokens, attention is what
it was; without that it is not (a row for each).

With ``space=pre`` tokens are equal before their rotation, so the two of a pair score differently, and one slot cannot
say both: it stands for two tokens at the place of one of them. So attention is held against that of all tokens, with
the keys of each pair moved there.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch import Tensor

from elbowroom.bench.base import BenchOptions, Row
from elbowroom.bench.kv_matrix.one_layer import OneLayer, dense
from elbowroom.bench.kv_matrix.part import Part, claimed
from elbowroom.core import LayerSpec, RopeSpec
from elbowroom.kv.base import PromptPart
from elbowroom.kv.policies.base import LayerView
from elbowroom.kv.policies.kvmerger import KVMergerPolicy

NAME = "kvmerger.exact"
CLAIM = claimed(NAME, "<=", 1e-5, "greatest difference of the output, float32")
SPEC = LayerSpec(num_q_heads=8, num_kv_heads=2, head_dim=64, v_head_dim=64, scale=0.125, rope=None)
ROPE = RopeSpec()
_TOKENS, _KEPT, _RUNS = 1024, 640, 8


def measure(options: BenchOptions) -> Part:
    """Compare merged attention with that of all tokens, in both spaces (quick: 2 draws of each)."""
    rows: list[Row] = []
    num_runs = 2 if options.quick else _RUNS
    worst = {"on": 0.0, "off": 0.0}
    for space, bias in itertools.product(("post", "pre"), worst):
        error = max(_error(space, bias, options.seed + run) for run in range(num_runs))
        about = {"part": NAME, "space": space, "bias": bias, "tokens": _TOKENS, "slots": _KEPT}
        rows.append(about | {"greatest_error": error})
        worst[bias] = max(worst[bias], error)
    reason = f"without the count of tokens: {worst['off']:.2g}"
    return Part(rows, [replace(CLAIM, value=worst["on"], num_runs=2 * num_runs, reason=reason)])


def _error(space: str, bias: str, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(_TOKENS // 2, 2, 64, generator=generator).repeat_interleave(2, dim=0) for _ in range(2))
    q = torch.randn(_TOKENS + 1, 8, 64, generator=generator)
    new_k, new_v = (torch.randn(1, 2, 64, generator=generator) for _ in range(2))
    places, text = torch.arange(_TOKENS), f"tokens={_KEPT},protect=1,longest=2,bias={bias},space={space}"
    spec = SPEC if space == "post" else replace(SPEC, rope=ROPE)
    keys = k if spec.rope is None else rotated(k, places[:, None].expand(-1, 2)).float()
    layer = OneLayer(f"kvmerger({text}) | plain", spec)
    layer.run(q[:-1], keys, v, PromptPart.END)
    made = layer.run(q[-1:], new_k, new_v)[0]
    if spec.rope is not None:
        policy = KVMergerPolicy(tokens=_KEPT, protect=1, longest=2, space=space)
        view = LayerView(0, spec, q[:-1][-policy.window :], lambda head: keys[:, head], _TOKENS)
        moves = policy.merge(view, _KEPT).moves
        assert moves is not None
        k = rotated(k, places[:, None] + moves.t())
    expected = dense(spec, q[-1], torch.cat([k, new_k]), torch.cat([v, new_v]))
    return float((made - expected).abs().max())


def rotated(x: Tensor, places: Tensor) -> Tensor:
    """Return ``x [n, H, D]`` rotated to ``places [n, H]`` by ``ROPE``: the plain way, as complex numbers in float64."""
    half = x.shape[-1] // 2
    steps = ROPE.theta ** (-torch.arange(half, dtype=torch.float64) / half)
    turns = torch.polar(torch.ones((), dtype=torch.float64), places.double()[..., None] * steps)
    z = torch.complex(x[..., :half].double(), x[..., half:].double()) * turns
    return torch.cat([z.real, z.imag], dim=-1)
