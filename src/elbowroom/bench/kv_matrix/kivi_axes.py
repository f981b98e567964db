"""[kivi.axes]: which axis should the scales of keys and values follow, on a model whose keys have outlier channels?

Keys and values are rounded to 2 and 4 bits with scales by channel or by token, all four ways, with groups of equal size
and thus equal bytes. Only one of the four is a plan of the product (codec ``kivi``), so all of them run as a codec of
this benchmark with packed codes, on the readable path and with exact queries. The built-in model is measured as it is,
and with outlier channels injected into its keys that change no logit (``outliers``): a small model has few of its own.

The claims are about 2 bits on the injected model, in bits per byte on the same windows of held-out text; of intervals
the lower end counts. ``kivi.axes``: by how much keys by channel with values by token are better than the closest of
the three others. ``kivi.axes.keys``: by how much keys by channel are better than keys by token, values by token.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from elbowroom.bench.axis_codec import AXES, AxisCodec
from elbowroom.bench.base import BenchOptions, Claim, Row
from elbowroom.bench.forced import READABLE, ForcedTask, answered, as_forced, window_bits
from elbowroom.bench.kv_matrix.part import Part, claimed
from elbowroom.bench.outliers import FACTOR, NUM_PAIRS, write_with_outliers
from elbowroom.bench.paged_logits import paged_logits
from elbowroom.core import STRIP_TOKENS
from elbowroom.errors import IntegrityError
from elbowroom.evals import samples
from elbowroom.evals.comparison.perplexity import windows
from elbowroom.evals.engine_target import PlainTokenizer
from elbowroom.evals.samples import TaskSpec
from elbowroom.evals.stats import PairedDifference, bootstrap_interval, mean_interval, paired_difference
from elbowroom.kv.plan import KVPlan
from elbowroom.models.decoder import Decoder
from elbowroom.models.directory import find_model
from elbowroom.models.loader import load_model
from elbowroom.models.tokenizer import Tokenizer

NAME = "kivi.axes"
KIVI = ("channel", "token")
BITS, CLAIMED_BITS, GROUP = (2, 4), 2, 32
_SETTING = f"({CLAIMED_BITS} bits, outlier channels)"
AXES_CLAIM, KEYS_CLAIM = (
    claimed(name, ">=", 0.0, f"bits per byte by which K by channel, V by token beats {other} {_SETTING}")
    for name, other in ((NAME, "the closest other way"), (f"{NAME}.keys", "K by token, V by token"))
)
LENGTH, NUM_FACTS = 1024, 8
INJECTED, NATURAL = "injected", "natural"
SAME_LOGITS = 1e-5

Values = dict[tuple[str, int], float]


@dataclass(frozen=True, slots=True)
class Load:
    """What is predicted."""

    windows: list[list[int]]
    tasks: Mapping[str, ForcedTask]
    tokenizer: PlainTokenizer

    @classmethod
    def of(cls, directory: Path, options: BenchOptions) -> Load:
        """Return 12 windows and 80 facts of a model's tokens (quick: 2 and 4)."""
        tokenizer = PlainTokenizer(Tokenizer.from_directory(directory))
        length, facts, num_queries = (256, 2, 4) if options.quick else (LENGTH, NUM_FACTS, 80)
        spec = TaskSpec(context_tokens=length, num_queries=num_queries, num_facts=facts, seed=options.seed)
        tasks = {each.id: as_forced(tokenizer, each) for each in samples.follow_ups(tokenizer, spec)}
        return cls(windows(tokenizer, length, 2 if options.quick else 12), tasks, tokenizer)


@torch.inference_mode()
def measure(options: BenchOptions) -> Part:
    """Measure the four ways in 2 bits on both models, in 4 bits on the injected one (quick: on that, in 2 bits)."""
    source = find_model(None)
    load = Load.of(source, options)
    with tempfile.TemporaryDirectory() as scratch:
        large = write_with_outliers(source, Path(scratch) / "model", seed=options.seed)
        decoders = {INJECTED: load_model(large, torch.float32), NATURAL: load_model(source, torch.float32)}
    difference = largest_difference(list(decoders.values()), load.windows[0])
    if difference > SAME_LOGITS:
        raise IntegrityError(f"outlier channels changed a logit by {difference:.1e}", "report this as a bug")
    rows, found = [], {}
    for model in (INJECTED,) if options.quick else (INJECTED, NATURAL):
        bits = BITS if model == INJECTED and not options.quick else (CLAIMED_BITS,)
        for row, values in _rows(model, decoders[model], load, bits):
            rows.append(row | {"logit_difference": difference})
            if model == INJECTED and row["bits"] == CLAIMED_BITS:
                found[str(row["k"]), str(row["v"])] = values
    return Part(list[Row](rows), claims_of(found))


def largest_difference(decoders: list[Decoder], tokens: list[int]) -> float:
    """Return the largest difference of any logit between two models without a codec, over the largest logit."""
    one, other = (paged_logits(each, tokens, len(tokens), READABLE) for each in decoders)
    return float((one - other).abs().max() / one.abs().max())


def _rows(
    model: str, decoder: Decoder, load: Load, bits: tuple[int, ...]
) -> Iterator[tuple[dict[str, object], Values]]:
    """Yield a row and the bits per byte of its windows: without a codec, then each way in each number of bits."""
    about = {"claim": NAME, "model": model, "factor": FACTOR if model == INJECTED else 1.0, "pairs": NUM_PAIRS}
    plain = KVPlan.parse("plain")
    values, row = _quality(decoder, plain, load)
    yield about | {"k": "plain", "v": "plain", "bits": 32} | row, values
    for number in bits:
        for k in AXES:
            for v in AXES:
                plan = KVPlan(AxisCodec(k, v, number, GROUP))
                values, row = _quality(decoder, plan, load)
                sys.stderr.write(f"    {model} K by {k}, V by {v}, {number} bits: {row['bits_per_byte']:.4f}\n")
                yield about | {"k": k, "v": v, "bits": number} | row, values


def _quality(decoder: Decoder, plan: KVPlan, load: Load) -> tuple[Values, dict[str, object]]:
    values = window_bits(decoder, plan, load.tokenizer, load.windows)
    answers = list(answered(decoder, plan, load.tasks).values())
    layers = decoder.config.layers
    elements = STRIP_TOKENS * sum(layer.num_kv_heads * (layer.head_dim + layer.v_head_dim) for layer in layers)
    return values, {
        "bits_per_element": 8 * plan.bind(layers, "float32").block_bytes / elements,
        "bits_per_byte": math.fsum(values.values()) / len(values),
        "bits_interval": list(bootstrap_interval(list(values.values()))),
        "retrieval": math.fsum(answers) / len(answers),
        "retrieval_interval": list(mean_interval(answers)),
        "num_windows": len(values),
        "num_questions": len(answers),
    }


def claims_of(found: Mapping[tuple[str, str], Values]) -> list[Claim]:
    """Return the claims from the bits per byte of the four ways."""
    gains: dict[tuple[str, str], PairedDifference] = {
        way: paired_difference(values, found[KIVI]) for way, values in found.items() if way != KIVI
    }
    closest = min(gains, key=lambda way: gains[way].interval[0])
    others = ", ".join(f"K {k} V {v} +{each.difference:.4f}" for (k, v), each in sorted(gains.items()))
    reason = f"closest: K by {closest[0]}, V by {closest[1]}; mean differences: {others}"
    return [_claim(AXES_CLAIM, gains[closest], reason), _claim(KEYS_CLAIM, gains["token", "token"], "")]


def _claim(claim: Claim, gain: PairedDifference, reason: str) -> Claim:
    what = f"mean {gain.difference:.4f}; the value is the lower end of the 95 % bootstrap interval over windows"
    return replace(
        claim,
        value=gain.interval[0],
        num_runs=gain.num_pairs,
        low=gain.interval[0],
        high=gain.interval[1],
        reason="; ".join(filter(None, [what, reason])),
    )
