"""Trace layout ``mooncake``: Kimi's traces (FAST 2025), with a hash for every 512 tokens of a prompt, as JSON lines."""

from __future__ import annotations

from pathlib import Path

from elbowroom.core import STRIP_TOKENS
from elbowroom.workloads.base import TimedRequest, Workload
from elbowroom.workloads.traces.base import Fields, TraceOptions, by_arrival, json_keys, json_rows, read_rows

HASHED_TOKENS = 512
_KEYS = {"timestamp", "input_length", "output_length", "hash_ids"}


class MooncakeLayout:
    """One object a request; equal hashes mean equal beginnings up to there."""

    name = "mooncake"
    description = "JSON lines with the keys timestamp (ms), input_length, output_length, hash_ids"

    def matches(self, path: Path, head: str) -> bool:
        """Return whether all four keys are there."""
        return json_keys(head) >= _KEYS

    def read(self, path: Path, options: TraceOptions) -> Workload:
        """Return the workload with block keys."""
        return by_arrival(path.stem, read_rows(path, json_rows(path), 1, _request, options.num_requests))


def _request(row: Fields) -> TimedRequest | None:
    prompt, output = int(row["input_length"]), int(row["output_length"])
    if prompt == 0 or output == 0:
        return None
    keys = _block_keys([int(key) for key in row["hash_ids"]], prompt)
    return TimedRequest(float(row["timestamp"]) / 1000, prompt, output, block_keys=keys)


def _block_keys(hashes: list[int], prompt_tokens: int) -> tuple[bytes, ...]:
    """Return a key for each block of ours inside theirs; what no hash covers has none."""
    blocks = min(prompt_tokens // STRIP_TOKENS, len(hashes) * (HASHED_TOKENS // STRIP_TOKENS))
    per_hash = HASHED_TOKENS // STRIP_TOKENS
    return tuple(hashes[block // per_hash].to_bytes(8, "little") + bytes([block % per_hash]) for block in range(blocks))
