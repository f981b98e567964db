"""decode: tokens a second of one stream, against transformers and llama.cpp on the same random weights.

A Llama of 336 million parameters, 128 new tokens behind 512, timed from the first new token to the last. What stands
in the caches is random and put there once (llama.cpp reads a random prompt): reading is the business of ``prefill``.
Ours and transformers hold bfloat16, llama.cpp float16; transformers in float32 is an extra row, since a CPU without
bfloat16 emulates it. Every step reads all weights, so each row says which share of the read bandwidth that is.
"""

from __future__ import annotations

from collections.abc import Mapping

from elbowroom.bench.base import BenchOptions, BenchResult, Row
from elbowroom.bench.machine import machine_info
from elbowroom.bench.pairs import Turns
from elbowroom.bench.speed import ITEM_BYTES, Contest, Load, best_dtype_row, rival_claims, streamed_bytes

TARGETS = {"transformers": 2.5, "llamacpp": 0.9}


def run(options: BenchOptions) -> BenchResult:
    """Measure five rounds (quick: two, of a small model)."""
    return measure("decode", 1, TARGETS, options)


def measure(name: str, num_streams: int, targets: Mapping[str, float], options: BenchOptions) -> BenchResult:
    """Let all sides decode ``num_streams`` sequences at once, in turns."""
    machine, load = machine_info(), Load.of(options)
    longest = load.prompt_tokens + 1 + load.new_tokens
    with Contest(load.size, num_streams, longest, prefix_cache=True, seed=options.seed) as contest:
        contest.tell("fill", num_tokens=load.prompt_tokens, num_streams=num_streams, seed=options.seed)
        turns = contest.rounds("extend", lambda _: {"new_tokens": load.new_tokens}, load.num_rounds)
        bandwidth = 1e9 * float(str(machine["read_gb_per_s"]))
        rows = [_row(contest, side, turns, num_streams, bandwidth) for side in ITEM_BYTES]
    rows.append(best_dtype_row(turns))
    return BenchResult(name=name, machine=machine, rows=rows, claims=rival_claims(name, turns, targets))


def _row(contest: Contest, side: str, turns: Turns, num_streams: int, bandwidth: float) -> Row:
    row = contest.rate_row(side, turns)
    per_token = streamed_bytes(contest.config, ITEM_BYTES[side]) / num_streams
    rate = row["tokens_per_s"]
    share = {"read_share": rate * per_token / bandwidth} if isinstance(rate, float) else {}
    return row | {"num_streams": num_streams, "weight_bytes_per_token": per_token} | share
