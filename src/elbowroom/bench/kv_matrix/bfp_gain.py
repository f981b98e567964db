"""[bfp.gain]: does sorting the channels of keys help block floating point, and only where there is more than one block?

The built-in model with injected outlier channels (``outliers``), keys as BFP with 4-bit mantissas in blocks of 16, 32
and 64 channels (a whole head), values in 8 bits, channels as they come or sorted by magnitude (``sorted_channels``,
calibrated on another window of text). The store holds the codec of plans; sorting stands in front of it.

``bfp.gain``: bits per byte that sorting saves in blocks of 32, lower end of the interval over windows of held-out text.
``bfp.none``: what it changes where a block is the whole head: nothing but the order of a sum.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from elbowroom.bench.base import BenchOptions, Claim, Row
from elbowroom.bench.forced import window_bits
from elbowroom.bench.kv_matrix.part import Part
from elbowroom.bench.outliers import FACTOR, NUM_PAIRS, write_with_outliers
from elbowroom.bench.sorted_channels import channel_order, sorting
from elbowroom.evals.comparison.perplexity import windows
from elbowroom.evals.engine_target import PlainTokenizer
from elbowroom.evals.stats import PairedDifference, paired_difference
from elbowroom.kv.plan import KVPlan
from elbowroom.models.directory import find_model
from elbowroom.models.loader import load_model
from elbowroom.models.tokenizer import Tokenizer

GAIN, NONE = "bfp.gain", "bfp.none"
BLOCKS, CLAIMED, WHOLE = (16, 32, 64), 32, 64
NOTHING = 1e-3
"""Bits per byte that a sum in another order may change."""


@torch.inference_mode()
def measure(options: BenchOptions) -> Part:
    """Measure every block size both ways, on 12 windows (quick: two sizes, 2 windows)."""
    source, length, count = find_model(None), 256 if options.quick else 1024, 2 if options.quick else 12
    tokenizer = PlainTokenizer(Tokenizer.from_directory(source))
    *tested, calibration = windows(tokenizer, length, count + 1)
    with tempfile.TemporaryDirectory() as scratch:
        large = write_with_outliers(source, Path(scratch) / "model", seed=options.seed)
        decoder = load_model(large, torch.float32)
    order = channel_order(decoder, calibration)
    rows: list[Row] = []
    gains: dict[int, PairedDifference] = {}
    for block in BLOCKS[1:] if options.quick else BLOCKS:
        plan = KVPlan.parse(f"bfp(4,8,{block})")
        unsorted = window_bits(decoder, plan, tokenizer, tested)
        ordered = window_bits(decoder, plan, tokenizer, tested, sorting(order))
        gains[block] = paired_difference(unsorted, ordered)
        rows.append(
            {
                "claim": GAIN,
                "kv": plan.text,
                "block": block,
                "factor": FACTOR,
                "pairs": NUM_PAIRS,
                "unsorted_bits_per_byte": sum(unsorted.values()) / len(unsorted),
                "sorted_bits_per_byte": sum(ordered.values()) / len(ordered),
                "saved": gains[block].difference,
                "interval": list(gains[block].interval),
                "num_windows": gains[block].num_pairs,
            }
        )
        sys.stderr.write(f"    blocks of {block}: sorting saves {gains[block].difference:.4f} bits per byte\n")
    return Part(rows, [_gain(gains[CLAIMED]), _none(gains[WHOLE])])


def _gain(saved: PairedDifference) -> Claim:
    low, high = saved.interval
    return Claim(
        id=GAIN,
        value=low,
        op=">=",
        target=0.0,
        unit=f"bits per byte that sorting saves in blocks of {CLAIMED}",
        num_runs=saved.num_pairs,
        low=low,
        high=high,
        reason=f"mean {saved.difference:.4f}; the value is the lower end of its 95 % bootstrap interval",
    )


def _none(saved: PairedDifference) -> Claim:
    return Claim(
        id=NONE,
        value=abs(saved.difference),
        op="<=",
        target=NOTHING,
        unit=f"bits per byte that sorting changes where a block is a head of {WHOLE}",
        num_runs=saved.num_pairs,
        low=saved.interval[0],
        high=saved.interval[1],
        reason="low and high are the 95 % bootstrap interval of what it saves",
    )
