"""kv-speed: what do fewer bytes of keys and values do to attention, and to tokens a second?

Attention: in one process, for each plan a store with the layers of the model of 336 million parameters in bfloat16,
filled through imported spans with random keys and values. One decode row attends over all layers, with caches of the
cores that hold something else; plans take turns. End to end: one stream behind the same contexts, ours with plain and
with 2-bit keys and values, and transformers with its DynamicCache and its QuantizedCache (quanto). The ceiling is the
rate of plain if nothing but attention changed: 1 / (seconds of a token - attention of plain + attention of kivi).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from elbowroom.bench.base import BenchOptions, BenchResult, Claim, Row
from elbowroom.bench.child import run_child
from elbowroom.bench.kv_shapes import BF16, KIVI2, PLANS, QUICK_PLANS
from elbowroom.bench.machine import machine_info
from elbowroom.bench.pairs import MedianInterval, Run, Turns, median_ratio, ratio_claim
from elbowroom.bench.speed import OURS, OURS_KIVI, QUANTO2, QUANTO4, TRANSFORMERS, Contest, Load

CONTEXTS, QUICK_CONTEXTS = (2048, 8192, 32_768), (512,)
STREAM_CONTEXTS = (8192, 32_768)
CLAIMED = {"speed.kivi2_8k": (8192, 1.0), "speed.kivi2_32k": (32_768, 1.5)}
"""Claim -> context and target."""
NUM_ROUNDS, QUICK_ROUNDS = 9, 2
NEW_TOKENS, QUICK_TOKENS = 8, 4
SPARE_TOKENS = 64
RIVALS = (OURS_KIVI, TRANSFORMERS, QUANTO4, QUANTO2)
_SPEED = "passes_per_s"
_RATE = "tokens_per_s"


def run(options: BenchOptions) -> BenchResult:
    """Measure all plans and sides (quick: few plans, a small model, a short context, one quantized rival)."""
    machine, load = machine_info(), Load.of(options)
    bandwidth = 1e9 * float(str(machine["read_gb_per_s"]))
    contexts = QUICK_CONTEXTS if options.quick else CONTEXTS
    spec = {
        "size": load.size,
        "plans": QUICK_PLANS if options.quick else PLANS,
        "contexts": contexts,
        "num_rounds": QUICK_ROUNDS if options.quick else NUM_ROUNDS,
        "seed": options.seed,
    }
    measured = run_child(spec, timeout_s=1800.0, module="elbowroom.bench.kv_speed_child")["attention"]
    turns = attention_turns(measured)
    rows = [_attention_row(each, bandwidth) for each in measured]
    rows += [_attention_ratio(each, turns[each["context_tokens"]]) for each in measured if each["kv"] != BF16]
    claims = [_claim(name, turns, contexts) for name in CLAIMED]
    rows += _stream_rows(load, turns, options)
    return BenchResult(name="kv-speed", machine=machine, rows=list[Row](rows), claims=claims)


def attention_turns(measured: Sequence[Mapping[str, Any]]) -> dict[int, Turns]:
    """Return for each context what the plans did in every round, in passes a second over all layers."""
    turns: dict[int, Turns] = {}
    for each in measured:
        runs: list[Run] = [{_SPEED: 1 / seconds} for seconds in each["seconds"]]
        turns.setdefault(each["context_tokens"], Turns()).runs[each["kv"]] = runs
    return turns


def ceiling(rate: float, plain_s: float, fewer_s: float) -> float | None:
    """Return the tokens a second of a stream whose attention takes ``fewer_s`` in place of ``plain_s``.

    None: attention alone takes longer than a token was measured to take.
    """
    seconds = 1 / rate - plain_s + fewer_s
    return 1 / seconds if 1 / rate > plain_s else None


def _attention_row(measured: Mapping[str, Any], bandwidth: float) -> dict[str, Any]:
    num_bytes, seconds = measured["num_bytes"], MedianInterval.of(measured["seconds"])
    return {
        "context_tokens": measured["context_tokens"],
        "kv": measured["kv"],
        "seconds": seconds.median,
        "low": seconds.low,
        "high": seconds.high,
        "rounds": [round(each, 6) for each in measured["seconds"]],
        "other_cpu_share": measured["other_cpu_share"],
        "bytes_read": num_bytes,
        "gb_per_s": num_bytes / seconds.median / 1e9,
        "read_share": num_bytes / seconds.median / bandwidth,
    }


def _attention_ratio(measured: Mapping[str, Any], turns: Turns) -> dict[str, Any]:
    num_tokens, kv = measured["context_tokens"], measured["kv"]
    return _ratio(num_tokens, f"attention speed, {kv} / {BF16}", median_ratio(turns, kv, BF16, _SPEED))


def _ratio(num_tokens: int, what: str, ratio: MedianInterval | None) -> dict[str, Any]:
    found = {} if ratio is None else {"value": ratio.median, "low": ratio.low, "high": ratio.high}
    return {"context_tokens": num_tokens, "ratio": what, "value": None, **found}


def _claim(name: str, turns: Mapping[int, Turns], contexts: Sequence[int]) -> Claim:
    length, target = CLAIMED[name]
    length = length if length in contexts else contexts[-1]
    runs = turns[length].runs
    pair = Turns({"ours": runs[KIVI2], BF16: runs[BF16]})
    return ratio_claim(name, pair, BF16, _SPEED, target, f"x attention speed of {BF16} behind {length} tokens")


def _stream_rows(load: Load, attention: Mapping[int, Turns], options: BenchOptions) -> list[dict[str, Any]]:
    lengths = QUICK_CONTEXTS if options.quick else STREAM_CONTEXTS
    rivals, longest = RIVALS[:3] if options.quick else RIVALS, max(lengths) + SPARE_TOKENS
    new_tokens = QUICK_TOKENS if options.quick else NEW_TOKENS
    rows: list[dict[str, Any]] = []
    with Contest(load.size, 1, longest, rivals, prefix_cache=True, seed=options.seed) as contest:
        for length in lengths:
            contest.tell("fill", num_tokens=length, num_streams=1, seed=options.seed)
            turns = contest.rounds("extend", lambda _: {"new_tokens": new_tokens}, load.num_rounds)
            found = {side: {"context_tokens": length} | contest.rate_row(side, turns) for side in (OURS, *rivals)}
            found[OURS_KIVI] |= ceiling_of(found, attention[length])
            rows += found.values()
            for rival in (OURS, *rivals[1:]):
                ratio = median_ratio(turns, OURS_KIVI, rival, _RATE)
                rows.append(_ratio(length, f"tokens/s, {OURS_KIVI} / {rival}", ratio))
    return rows


def ceiling_of(found: Mapping[str, Mapping[str, Any]], attention: Turns) -> dict[str, Any]:
    """Return the ceiling of the side with fewer bytes, and which share of it was measured; nothing without rates."""
    plain, fewer = found[OURS][_RATE], found[OURS_KIVI][_RATE]
    if plain is None or fewer is None:
        return {}
    spent = {kv: 1 / MedianInterval.of(attention.figures(kv, _SPEED)).median for kv in (BF16, KIVI2)}
    most = ceiling(plain, spent[BF16], spent[KIVI2])
    share = None if most is None else fewer / most
    return {"attention_s": spent, "ceiling_tokens_per_s": most, "share_of_ceiling": share}
