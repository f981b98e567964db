"""long: tokens a second of one stream behind 2,048, 8,192 and 32,768 tokens of context, against transformers.

Nobody reads such a prompt here: caches are filled with random keys and values, ours by importing KV spans, the rival's
DynamicCache with tensors of the same shape. Attention's seconds are what a token takes longer than behind 64 tokens;
against them stand the bytes of keys and values that it read.
"""

from __future__ import annotations

from elbowroom.bench.base import BenchOptions, BenchResult, Claim, Row
from elbowroom.bench.machine import machine_info
from elbowroom.bench.pairs import Turns, ratio_claim
from elbowroom.bench.speed import ITEM_BYTES, OURS, TRANSFORMERS, TRANSFORMERS_FP32, Contest, Load, best_dtype_row
from elbowroom.models.config import ModelConfig

BASE_TOKENS = 64
LENGTHS = (2048, 8192, 32_768)
CLAIMED = 8192
QUICK_LENGTH = 512
TARGET = 1.5
NEW_TOKENS = 8


def run(options: BenchOptions) -> BenchResult:
    """Measure every length in five rounds (quick: one length of a small model, two rounds)."""
    machine, load = machine_info(), Load.of(options)
    lengths = (QUICK_LENGTH,) if options.quick else LENGTHS
    new_tokens = min(NEW_TOKENS, load.new_tokens)
    rivals, longest = (TRANSFORMERS, TRANSFORMERS_FP32), max(lengths) + BASE_TOKENS
    with Contest(load.size, 1, longest, rivals, prefix_cache=True, seed=options.seed) as contest:
        played = {}
        for length in (BASE_TOKENS, *lengths):
            contest.tell("fill", num_tokens=length, num_streams=1, seed=options.seed)
            played[length] = contest.rounds("extend", lambda _: {"new_tokens": new_tokens}, load.num_rounds)
        bandwidth = 1e9 * float(str(machine["read_gb_per_s"]))
        rows = [_row(contest, side, played, length, bandwidth) for length in played for side in (OURS, *rivals)]
    rows += [{"context_tokens": length, **best_dtype_row(turns)} for length, turns in played.items()]
    return BenchResult(name="long", machine=machine, rows=rows, claims=[_claim(played, lengths)])


def kv_bytes(config: ModelConfig, num_tokens: int, item_bytes: int) -> int:
    """Return the bytes of keys and values of ``num_tokens``."""
    width = sum(layer.num_kv_heads * (layer.head_dim + layer.v_head_dim) for layer in config.layers)
    return num_tokens * width * item_bytes


def _claim(played: dict[int, Turns], lengths: tuple[int, ...]) -> Claim:
    length = CLAIMED if CLAIMED in lengths else lengths[-1]
    unit = f"x tokens/s behind {length} tokens"
    return ratio_claim("long.vs_transformers", played[length], TRANSFORMERS, "tokens_per_s", TARGET, unit)


def _row(contest: Contest, side: str, played: dict[int, Turns], length: int, bandwidth: float) -> Row:
    row = {"context_tokens": length} | contest.rate_row(side, played[length])
    rate, base = row["tokens_per_s"], contest.rate_row(side, played[BASE_TOKENS])["tokens_per_s"]
    if not isinstance(rate, float) or not isinstance(base, float) or length == BASE_TOKENS:
        return row
    seconds = 1 / rate - 1 / base
    num_bytes = kv_bytes(contest.config, length, ITEM_BYTES[side])
    row |= {"attention_s_per_token": seconds, "kv_bytes_per_token": num_bytes}
    return row | (
        {"kv_bytes_per_s": num_bytes / seconds, "read_share": num_bytes / seconds / bandwidth} if seconds > 0 else {}
    )
