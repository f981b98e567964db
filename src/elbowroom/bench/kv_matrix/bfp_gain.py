"""[bfp.gain]: does sorting the channels of keys help block floating point, and only where there is more than one block?

The built-in model with injected outlier channels (``outliers``), keys as BFP with 4-bit mantissas in blocks of 16, 32
and 64 channels (a whole head), values in 8 bits, channels as they come or sorted in either order of
``sorted_channels``, calibrated on another window of text. The store holds the codec of plans; sorting stands in front.

``bfp.gain``: bits per byte that the paper's order, by magnitude, saves in blocks of 32, lower end of the interval over
windows of held-out text and draws of the outlier channels; an order that helps in one draw may hurt in another.
``bfp.none``: what it changes where a block is the whole head: nothing but the order of a sum.
"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from elbowroom.bench.base import BenchOptions, Claim, Row
from elbowroom.bench.forced import window_bits
from elbowroom.bench.kv_matrix.part import Part, claimed
from elbowroom.bench.outliers import FACTOR, NUM_PAIRS, write_with_outliers
from elbowroom.bench.sorted_channels import Order, channel_orders, sorting
from elbowroom.engine.executors.local import StoreContext
from elbowroom.evals.comparison.perplexity import windows
from elbowroom.evals.engine_target import PlainTokenizer
from elbowroom.evals.stats import PairedDifference, paired_difference
from elbowroom.kv.plan import KVPlan
from elbowroom.models.directory import find_model
from elbowroom.models.loader import load_model
from elbowroom.models.tokenizer import Tokenizer

GAIN, NONE = "bfp.gain", "bfp.none"
BLOCKS, CLAIMED, WHOLE = (16, 32, 64), 32, 64
CLAIMED_ORDER: Order = "magnitude"
UNSORTED = "unsorted"
DRAWS = 3
"""Of outlier channels."""
NOTHING = 1e-3
"""Bits per byte that a sum in another order may change."""
GAIN_CLAIM = claimed(GAIN, ">=", 0.0, f"bits per byte that sorting by {CLAIMED_ORDER} saves in blocks of {CLAIMED}")
NONE_CLAIM = claimed(NONE, "<=", NOTHING, f"bits per byte that sorting changes where a block is a head of {WHOLE}")

Bits = dict[tuple[int, str, int], float]
"""Bits per byte by draw and window."""


@torch.inference_mode()
def measure(options: BenchOptions) -> Part:
    """Measure every block size in 3 draws of outliers, on 6 windows (quick: two sizes, one draw, 2 windows)."""
    source, length, count = find_model(None), 256 if options.quick else 1024, 2 if options.quick else 6
    tokenizer = PlainTokenizer(Tokenizer.from_directory(source))
    *tested, calibration = windows(tokenizer, length, count + 1)
    found: dict[tuple[int, str], Bits] = {}
    for draw in range(1 if options.quick else DRAWS):
        with tempfile.TemporaryDirectory() as scratch:
            large = write_with_outliers(source, Path(scratch) / "model", seed=options.seed + draw)
            decoder = load_model(large, torch.float32)
        contexts = {UNSORTED: StoreContext} | {
            name: sorting(order) for name, order in channel_orders(decoder, calibration).items()
        }
        for block in BLOCKS[1:] if options.quick else BLOCKS:
            for name, made in contexts.items():
                bits = window_bits(decoder, _plan(block), tokenizer, tested, made)
                found.setdefault((block, name), {}).update({(draw, *key): value for key, value in bits.items()})
        sys.stderr.write(f"    draw {draw} of outlier channels\n")
    saved = {
        (block, name): paired_difference(found[block, UNSORTED], bits)
        for (block, name), bits in found.items()
        if name != UNSORTED
    }
    rows = [_row(block, name, found, gain) for (block, name), gain in saved.items()]
    return Part(rows, [_gain(saved[CLAIMED, CLAIMED_ORDER]), _none(saved[WHOLE, CLAIMED_ORDER])])


def _plan(block: int) -> KVPlan:
    return KVPlan.parse(f"bfp(4,8,{block})")


def _row(block: int, name: str, found: Mapping[tuple[int, str], Bits], gain: PairedDifference) -> Row:
    unsorted, ordered = found[block, UNSORTED], found[block, name]
    return {
        "claim": GAIN,
        "kv": _plan(block).text,
        "block": block,
        "order": name,
        "factor": FACTOR,
        "pairs": NUM_PAIRS,
        "unsorted_bits_per_byte": math.fsum(unsorted.values()) / len(unsorted),
        "sorted_bits_per_byte": math.fsum(ordered.values()) / len(ordered),
        "saved": gain.difference,
        "interval": list(gain.interval),
        "saved_by_draw": _by_draw(unsorted, ordered),
        "num_windows": gain.num_pairs,
    }


def _by_draw(unsorted: Bits, ordered: Bits) -> list[float]:
    draws = sorted({draw for draw, *_ in unsorted})
    gains = {key: unsorted[key] - ordered[key] for key in unsorted}
    return [statistics.fmean(gain for key, gain in gains.items() if key[0] == draw) for draw in draws]


def _gain(saved: PairedDifference) -> Claim:
    low, high = saved.interval
    return replace(
        GAIN_CLAIM,
        value=low,
        num_runs=saved.num_pairs,
        low=low,
        high=high,
        reason=f"mean {saved.difference:.4f}; the value is the lower end of its 95 % interval over windows and draws",
    )


def _none(saved: PairedDifference) -> Claim:
    return replace(
        NONE_CLAIM,
        value=abs(saved.difference),
        num_runs=saved.num_pairs,
        low=saved.interval[0],
        high=saved.interval[1],
        reason="low and high are the 95 % bootstrap interval of what it saves",
    )
