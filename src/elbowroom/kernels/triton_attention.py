"""Attention over plain strips in Triton: for strips in the memory of a GPU, or interpreted (``TRITON_INTERPRET=1``).

Two launches. The first computes items (``plan_reads``): a tile of query vectors, of one or several sequences, against
strips that all of them hold, so a shared prefix is read once for its whole group (as Hydragen, arXiv 2402.05099, and
BatchLLM, arXiv 2412.03594, do with one level; here any tree of prefixes, in one launch). The second merges the parts of
each row by their log-sum-exp, the identity of online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867).

It knows plain strips. No GPU was at hand when it was written: it is tested in the interpreter alone, on the vectors of
the other backends, and nothing is known of its speed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from elbowroom.core import STRIP_TOKENS, LayerSpec
from elbowroom.kernels.base import PLAIN, UNIT_BYTES, LayerStrips, dtype_of
from elbowroom.kernels.shared_reads import Ints, plan_reads
from elbowroom.kernels.triton_programs import merge_parts, read_items, write_rows

_TILE = 64
"""Query vectors of an item, unless a KV head has more query heads than that."""
_LEAST = 16
"""What ``tl.dot`` needs in each dimension."""


class TritonKernels:
    """Plain strips on the device of their range; keys and queries lie there too."""

    def append(self, strips: LayerStrips, k: Tensor, v: Tensor) -> None:
        """Write rows ``k [N, Hkv, Dk]`` and ``v [N, Hkv, Dv]`` to their slots."""
        _check(strips)
        step, fmt = strips.step, strips.fmt
        if not step.num_rows:
            return
        owners = np.repeat(np.arange(step.num_sequences), np.diff(step.row_starts.numpy()))
        _check_range(strips, owners, step.positions.numpy() // STRIP_TOKENS)
        table, elements = _on(strips, strips.table.astype(np.int64)), _elements(strips)
        owner, positions = _on(strips, owners), step.positions.to(strips.base.device)
        first = 0
        for given in (k, v):
            rows, width = given.to(elements.dtype), given.shape[2]
            write_rows[step.num_rows, fmt.num_kv_heads](
                rows, elements, table, owner, positions, table.shape[1], rows.stride(0), rows.stride(1), first,
                WIDTH=width, WIDTH_2=_padded(width), SLOTS=STRIP_TOKENS, UNIT=UNIT_BYTES // elements.element_size(),
            )  # fmt: skip
            first += fmt.num_kv_heads * STRIP_TOKENS * width

    def attend(self, strips: LayerStrips, spec: LayerSpec, q: Tensor, out: Tensor) -> Tensor:
        """Write attention of ``q [N, Hq, Dk]`` to ``out [N, Hq, Dv]`` and return lse, float32 ``[N, Hq]``."""
        _check(strips)
        rows, heads, device = q.shape[0], spec.num_q_heads, q.device
        lse = torch.empty(rows, heads, dtype=torch.float32, device=device)
        if not rows:
            return lse
        low, high = _visible(strips, spec)
        group = triton.next_power_of_2(spec.group_size)
        tile = max(_TILE // group, 1)
        plan = plan_reads(strips.step, strips.table, low, high, tile, shares=strips.shares)
        _check_range(
            strips, np.repeat(plan.sequences, 2), np.stack([plan.blocks[:, 0], plan.blocks[:, 1] - 1], 1).ravel()
        )
        table, elements = _on(strips, strips.table.astype(np.int64)), _elements(strips)
        part_out = torch.empty(plan.num_parts, heads, spec.v_head_dim, dtype=torch.float32, device=device)
        part_top, part_sum = (torch.empty(plan.num_parts, heads, device=device) for _ in range(2))
        values = {"VALUES": spec.v_head_dim, "VALUES_2": _padded(spec.v_head_dim)}
        read_items[plan.num_items, spec.num_kv_heads](
            q, elements, table, *(_on(strips, each) for each in (plan.sequences, plan.blocks, plan.rows, plan.numbers)),
            _on(strips, low), _on(strips, high),
            part_out, part_top, part_sum, table.shape[1], q.stride(0), q.stride(1), heads, spec.scale,
            spec.softcap or 0.0, GROUP=spec.group_size, GROUP_2=max(group, _LEAST // tile), TILE=tile,
            KEYS=spec.head_dim, KEYS_2=_padded(spec.head_dim), **values, KV_HEADS=spec.num_kv_heads,
            SLOTS=STRIP_TOKENS, UNIT=UNIT_BYTES // elements.element_size(), CAPPED=spec.softcap is not None,
            EXACT=_is_exact(q.dtype, elements.dtype),
        )  # fmt: skip
        merge_parts[rows, heads](
            part_out, part_top, part_sum, _on(strips, plan.part_starts), out, lse, heads,
            out.stride(0), out.stride(1), **values,
        )  # fmt: skip
        return lse


def _check(strips: LayerStrips) -> None:
    fmt = strips.fmt
    is_plain = fmt.codec == "plain" and strips.layout is PLAIN and not fmt.digest_bytes
    if not is_plain or strips.tail is not None or strips.selection is not None:
        raise ValueError(
            f"the backend triton reads plain strips of the paged store whole, not codec {fmt.codec}, a choice, or rows "
            "of the contiguous store: leave ELBOWROOM_KERNELS unset"
        )


def _check_range(strips: LayerStrips, sequences: Any, blocks: Any) -> None:
    """Refuse strips outside their range.

    Raises:
        ValueError: names the strip.
    """
    starts = strips.table[sequences, blocks].astype(np.int64) * UNIT_BYTES
    if starts.max(initial=0) + strips.fmt.strip_bytes > strips.base.numel():
        raise ValueError(f"strip at byte {starts.max()} ends after the {strips.base.numel()} bytes of its range")


def _visible(strips: LayerStrips, spec: LayerSpec) -> tuple[Ints, Ints]:
    """Return the first and the last slot that each row reads, int32 ``[N]``."""
    step = strips.step
    counts = np.diff(step.row_starts.numpy())
    positions = step.positions.numpy()
    low = np.repeat(step.first_slots.numpy(), counts)
    if spec.window is not None:
        low = np.maximum(low, positions - spec.window + 1)
    high = np.minimum(positions, np.repeat(step.lengths.numpy(), counts) - 1)
    return low.astype(np.int32), high.astype(np.int32)


def _elements(strips: LayerStrips) -> Tensor:
    """Return the range as elements of its dtype."""
    return strips.base[: strips.base.numel() // UNIT_BYTES * UNIT_BYTES].view(dtype_of(strips.fmt))


def _on(strips: LayerStrips, values: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(strips.base.device)


def _is_exact(computed: torch.dtype, stored: torch.dtype) -> bool:
    """Return whether products are those of float32, rather than of 16-bit tensor cores.

    The interpreter of Triton 3.9 multiplies the bits of bfloat16 as if they were integers.
    """
    interpreted = bool(triton.knobs.runtime.interpret)
    return computed != stored or stored == torch.float32 or (interpreted and stored == torch.bfloat16)


def _padded(width: int) -> int:
    """Return the power of two that a tile of so many elements needs."""
    return max(int(triton.next_power_of_2(width)), _LEAST)


KERNELS = TritonKernels()
