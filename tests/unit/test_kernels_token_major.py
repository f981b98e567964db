"""Strips that lie token by token: attention over them is bit for bit that over plain strips."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from tests.support.kv_world import make_spec
from torch import Tensor

from elbowroom.core import LayerSpec
from elbowroom.kernels import LayerStrips, StripStep, append, attend, backend_name
from elbowroom.kernels.attention import BACKENDS
from elbowroom.kernels.base import AttentionKernels
from elbowroom.kernels.token_major import BY_TOKEN
from elbowroom.kv.codecs.plain import PlainCodec

SPECS = [
    make_spec(q_heads=4, kv_heads=2, dim=64, v_dim=64),
    make_spec(q_heads=6, kv_heads=3, dim=20, v_dim=12, window=70, softcap=5.0),
    make_spec(q_heads=1, kv_heads=1, dim=8, v_dim=40),
]


def run(
    backend: AttentionKernels, spec: LayerSpec, dtype: str, by_token: bool, runs: list[list[tuple[int, int]]]
) -> list[tuple[Tensor, Tensor]]:
    """Append and attend in some steps; sequence r has consecutive strips."""
    fmt, random = PlainCodec().page_format(spec, dtype), torch.Generator().manual_seed(3)
    num, width = len(runs[0]), 6
    table = np.arange(num * width, dtype=np.uint32).reshape(num, width) * np.uint32(fmt.strip_bytes // 64)
    base = torch.full((num * width * fmt.strip_bytes,), 255, dtype=torch.uint8)  # NaN where nothing was written
    results = []
    for step in map(StripStep.of_runs, runs):
        strips = LayerStrips(step, table, base, fmt)
        if by_token:
            strips = dataclasses.replace(strips, layout=BY_TOKEN)
        heads = (
            (spec.num_q_heads, spec.head_dim),
            (spec.num_kv_heads, spec.head_dim),
            (spec.num_kv_heads, spec.v_head_dim),
        )
        q, k, v = (torch.randn(step.num_rows, *each, generator=random) for each in heads)
        append(strips, k, v, backend=backend)
        results.append(attend(strips, spec, q, backend=backend))
    return results


RUNS = [[(0, 100), (0, 5)], [(100, 1), (5, 1)], [(101, 90), (6, 60)], [(191, 1), (66, 2)], [(192, 3), (68, 200)]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("spec", SPECS, ids=["wide", "odd", "narrow"])
def test_native_attention_does_not_depend_on_the_layout(isa: str, spec: LayerSpec, dtype: str) -> None:
    """Prompts and single tokens, of every width and type, read the same numbers in the same order."""
    native = BACKENDS.get("native")
    plain, ours = (run(native, spec, dtype, by_token, RUNS) for by_token in (False, True))
    for expected, made in zip(plain, ours, strict=True):
        assert torch.isfinite(made[0]).all()
        assert torch.equal(made[0], expected[0])
        assert torch.equal(made[1], expected[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spec", SPECS, ids=["wide", "odd", "narrow"])
def test_readable_attention_does_not_depend_on_the_layout(spec: LayerSpec, dtype: str) -> None:
    """The oracle knows the layout as well."""
    reference = BACKENDS.get("reference")
    plain, ours = (run(reference, spec, dtype, by_token, RUNS) for by_token in (False, True))
    for expected, made in zip(plain, ours, strict=True):
        torch.testing.assert_close(made[0], expected[0])
        torch.testing.assert_close(made[1], expected[1])


def test_a_run_of_strips_is_one_plain_tensor() -> None:
    """Torch's attention over the views of a whole sequence gives what our kernels give."""
    if backend_name() != "native":
        pytest.skip("the native module was not built")
    spec = SPECS[0]
    fmt = PlainCodec().page_format(spec, "float32")
    base, step = torch.zeros(3 * fmt.strip_bytes, dtype=torch.uint8), StripStep.of_runs([(0, 150)])
    table = np.arange(3, dtype=np.uint32)[None] * np.uint32(fmt.strip_bytes // 64)
    strips = LayerStrips(step, table, base, fmt, BY_TOKEN)
    q, k, v = (torch.randn(150, heads, 64) for heads in (4, 2, 2))
    append(strips, k, v)
    keys, values = (part[:, :150] for part in BY_TOKEN.open(base, fmt))
    assert torch.equal(keys.transpose(0, 1), k)
    out = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None], keys[None], values[None], is_causal=True, enable_gqa=True, scale=spec.scale
    )
    torch.testing.assert_close(attend(strips, spec, q)[0], out[0].transpose(0, 1), rtol=1e-4, atol=1e-5)


def test_layout_without_digests_has_no_bounds() -> None:
    """Rows cannot select among strips of this layout."""
    fmt = PlainCodec().page_format(SPECS[0], "float32")
    with pytest.raises(ValueError, match="no digests"):
        BY_TOKEN.bounds(torch.zeros(fmt.strip_bytes, dtype=torch.uint8), fmt)
