"""Digests of strips: bounds on their keys, by which a query can tell which strips matter to it without reading them.

Behind the payload of a strip lie, for each KV head and each run of tokens, the least and the greatest key of every
channel, float16 ``[Hkv, runs, 2, Dk]``, of the keys as they read back, rounded outwards. Where a key is not finite the
bounds are infinite, so that it is always read. Short runs have bounds that say more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from elbowroom.core import STRIP_TOKENS, PageFormat


def digest_bytes(num_kv_heads: int, head_dim: int, run_tokens: int) -> int:
    """Return the bytes of a digest with bounds for each run of ``run_tokens``."""
    return num_kv_heads * STRIP_TOKENS // run_tokens * 2 * head_dim * 2


def read_digest(strip: Tensor, fmt: PageFormat) -> tuple[Tensor, Tensor]:
    """Return the least and the greatest keys, float32 ``[Hkv, runs, Dk]``, that the digest of a strip allows."""
    stored = _stored(strip, fmt).float()
    return stored[:, :, 0], stored[:, :, 1]


def write_digest(strip: Tensor, fmt: PageFormat, keys: Tensor, first: int, stop: int, held: int) -> None:
    """Bring the digest of a strip up to date behind writing.

    Runs of which the first slot was written get bounds of their own, others are widened.

    Args:
        strip: its bytes.
        fmt: how they lie.
        keys: ``[Hkv, 64, Dk]``, as they read back.
        first: first slot that was written.
        stop: end of those slots.
        held: end of the slots that hold tokens.
    """
    stored = _stored(strip, fmt)
    size = STRIP_TOKENS // stored.shape[1]
    for run in range(first // size, -(-stop // size)):
        begin, end = run * size, (run + 1) * size
        fresh = first <= begin
        low, high = _bounds(keys[:, begin : min(end, held)] if fresh else keys[:, first : min(end, stop)])
        if not fresh:
            low, high = torch.minimum(low, stored[:, run, 0]), torch.maximum(high, stored[:, run, 1])
        stored[:, run, 0], stored[:, run, 1] = low, high


def _bounds(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return bounds, float16 ``[Hkv, Dk]``, on ``keys [Hkv, n, Dk]``."""
    keys = keys.float()
    low, high, finite = keys.amin(1), keys.amax(1), keys.isfinite().all(1)
    low, high = low.masked_fill(~finite, -torch.inf), high.masked_fill(~finite, torch.inf)
    return _outwards(low, -torch.inf), _outwards(high, torch.inf)


def _stored(strip: Tensor, fmt: PageFormat) -> Tensor:
    """Return a view float16 ``[Hkv, runs, 2, Dk]``."""
    start = fmt.payload_bytes + fmt.overhead_bytes
    return strip[start : start + fmt.digest_bytes].view(torch.float16).view(fmt.num_kv_heads, -1, 2, fmt.head_dim)


def _outwards(x: Tensor, limit: float) -> Tensor:
    """Return float16 numbers next to ``x`` on the side of ``limit``."""
    near = x.half()
    short = near.float() < x if limit > 0 else near.float() > x
    return torch.where(short, torch.nextafter(near, torch.full_like(near, limit)), near)
