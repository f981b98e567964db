"""Triton programs of ``triton_attention``: each is run once for every point of the grid that its caller names.

Names in capitals are known when a program is compiled; those that end in ``_2`` are the next power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def write_rows(
    rows, strips, table, owners, positions, num_blocks, row_stride, head_stride, first_element,
    WIDTH: tl.constexpr, WIDTH_2: tl.constexpr, SLOTS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Copy one head of one row to its slot."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(positions + row)
    unit = tl.load(table + tl.load(owners + row) * num_blocks + position // SLOTS)
    channels = tl.arange(0, WIDTH_2)
    taken = tl.load(rows + row * row_stride + head * head_stride + channels, mask=channels < WIDTH)
    target = strips + unit * UNIT + first_element + (head * SLOTS + position % SLOTS) * WIDTH
    tl.store(target + channels, taken, mask=channels < WIDTH)


@triton.jit
def read_items(
    q, strips, table, sequences, blocks, rows, numbers, low, high, part_out, part_top, part_sum,
    num_blocks, row_stride, head_stride, num_heads, scale, softcap,
    GROUP: tl.constexpr, GROUP_2: tl.constexpr, TILE: tl.constexpr, KEYS: tl.constexpr, KEYS_2: tl.constexpr,
    VALUES: tl.constexpr, VALUES_2: tl.constexpr, KV_HEADS: tl.constexpr, SLOTS: tl.constexpr, UNIT: tl.constexpr,
    CAPPED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Attend of one item and one KV head: the parts of its rows, in float32."""
    item, kv_head = tl.program_id(0), tl.program_id(1)
    vector = tl.arange(0, TILE * GROUP_2)
    place, member = item * TILE + vector // GROUP_2, vector % GROUP_2
    row = tl.load(rows + place).to(tl.int64)
    is_there = (row >= 0) & (member < GROUP)
    head = kv_head * GROUP + member
    keys, values, slot = tl.arange(0, KEYS_2), tl.arange(0, VALUES_2), tl.arange(0, SLOTS)
    q_at = q + row[:, None] * row_stride + head[:, None] * head_stride + keys[None, :]
    query = tl.load(q_at, mask=is_there[:, None] & (keys < KEYS)[None, :], other=0.0)
    first = tl.load(low + row, mask=is_there, other=1)
    last = tl.load(high + row, mask=is_there, other=0)
    # What no row reads may be anything, and 0 times that not 0.
    least = tl.min(tl.where(is_there, first, 2147483647), 0)
    most = tl.max(last, 0)
    top = tl.full([TILE * GROUP_2], float("-inf"), tl.float32)
    total = tl.zeros([TILE * GROUP_2], tl.float32)
    made = tl.zeros([TILE * GROUP_2, VALUES_2], tl.float32)
    entries = table + tl.load(sequences + item) * num_blocks
    for block in range(tl.load(blocks + 2 * item), tl.load(blocks + 2 * item + 1)):
        strip = strips + tl.load(entries + block) * UNIT
        slots = block * SLOTS + slot
        is_read = (slots >= least) & (slots <= most)
        k_at = strip + (kv_head * SLOTS + slot)[:, None] * KEYS + keys[None, :]
        k = tl.load(k_at, mask=is_read[:, None] & (keys < KEYS)[None, :], other=0.0)
        if EXACT:
            scores = tl.dot(query.to(tl.float32), tl.trans(k.to(tl.float32)), input_precision="ieee") * scale
        else:
            scores = tl.dot(query, tl.trans(k)) * scale
        if CAPPED:
            scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))
        visible = (slots[None, :] >= first[:, None]) & (slots[None, :] <= last[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights, rescale = tl.exp(scores - finite[:, None]), tl.exp(top - finite)
        v_at = strip + KV_HEADS * SLOTS * KEYS + (kv_head * SLOTS + slot)[:, None] * VALUES + values[None, :]
        v = tl.load(v_at, mask=is_read[:, None] & (values < VALUES)[None, :], other=0.0)
        if EXACT:
            weighted = tl.dot(weights, v.to(tl.float32), input_precision="ieee")
        else:
            weighted = tl.dot(weights.to(v.dtype), v)
        total = total * rescale + tl.sum(weights, 1)
        made = made * rescale[:, None] + weighted
        top = new_top
    part = tl.load(numbers + place).to(tl.int64) * num_heads + head
    tl.store(part_top + part, top, mask=is_there)
    tl.store(part_sum + part, total, mask=is_there)
    out_at = part_out + part[:, None] * VALUES + values[None, :]
    tl.store(out_at, made, mask=is_there[:, None] & (values < VALUES)[None, :])


@triton.jit
def merge_parts(
    part_out, part_top, part_sum, part_starts, out, lse, num_heads, row_stride, head_stride,
    VALUES: tl.constexpr, VALUES_2: tl.constexpr,
):  # fmt: skip
    """Merge the parts of one row and query head."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    values = tl.arange(0, VALUES_2)
    top, total = float("-inf"), 0.0
    made = tl.zeros([VALUES_2], tl.float32)
    for number in range(tl.load(part_starts + row), tl.load(part_starts + row + 1)):
        part = number * num_heads + head
        part_at = tl.load(part_top + part)
        new_top = tl.maximum(top, part_at)
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        old, new = tl.exp(top - finite), tl.exp(part_at - finite)
        taken = tl.load(part_out + part * VALUES + values, mask=values < VALUES, other=0.0)
        total = total * old + tl.load(part_sum + part) * new
        made = made * old + taken * new
        top = new_top
    result = made / tl.where(total == 0.0, 1.0, total)
    out_at = out + row * row_stride + head * head_stride + values
    tl.store(out_at, result.to(out.dtype.element_ty), mask=values < VALUES)
    tl.store(lse + row * num_heads + head, top + tl.log(total))
