"""The baseline of every memory claim: this process with everything imported and warm, and no model loaded."""

from __future__ import annotations

import functools

import torch

from elbowroom.core import DTYPE_BYTES, LayerSpec
from elbowroom.kernels import attention
from elbowroom.kernels.base import LayerStrips, StripStep
from elbowroom.kv.codecs.plain import PlainCodec
from elbowroom.memory.malloc import limit_malloc_caching, trim_malloc
from elbowroom.memory.meter import Meter


@functools.cache
def warm_up() -> None:
    """Start thread pools and run each kernel once on tiny input; later calls do nothing."""
    limit_malloc_caching()
    with torch.inference_mode():
        for dtype in DTYPE_BYTES:
            _touch_kernels(dtype)
    trim_malloc()


def measure_baseline() -> Meter:
    """Warm up and return a meter that measures from here."""
    warm_up()
    return Meter.start()


def _touch_kernels(dtype: str) -> None:
    """Run matmul, norms, softmax and attention once, large enough to start torch's threads."""
    kind: torch.dtype = getattr(torch, dtype)
    x = torch.ones(64, 64, dtype=kind)
    torch.nn.functional.rms_norm(x @ x.t(), (64,), x[0])
    torch.nn.functional.silu(x.float()).softmax(-1).sort(-1)
    torch.mm(torch.ones(256, 256), torch.ones(256, 256))
    spec = LayerSpec(num_q_heads=2, num_kv_heads=1, head_dim=64, v_head_dim=64, scale=0.125, rope=None)
    fmt = PlainCodec().page_format(spec, dtype)
    base = torch.zeros(fmt.strip_bytes, dtype=torch.uint8)
    step = StripStep.of_runs([(0, 8)])
    table = torch.zeros(1, 1, dtype=torch.int32).numpy().view("uint32")
    k = torch.ones(8, 1, 64, dtype=kind)
    strips = LayerStrips(step, table, base, fmt)
    attention.append(strips, k, k)
    attention.attend(strips, spec, torch.ones(8, 2, 64, dtype=kind))
