"""prefill: tokens a second of reading a prompt of 512 tokens, up to the first new token.

Model, sides and rounds are those of ``decode``. Arithmetic counts every multiplication and addition that the matrices
and causal attention need; its rate is compared with multiply-adds in registers (fma) and with torch's matmuls
of float32 and of bfloat16 on the same machine.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from elbowroom.bench.base import BenchOptions, BenchResult, Row
from elbowroom.bench.machine import gflop_per_s, machine_info, usable_threads
from elbowroom.bench.pairs import Turns
from elbowroom.bench.speed import ITEM_BYTES, Contest, Load, best_dtype_row, rival_claims
from elbowroom.models.config import ModelConfig

TARGETS = {"transformers": 0.95, "llamacpp": 1.3}


def run(options: BenchOptions) -> BenchResult:
    """Measure five rounds (quick: two, of a small model and a short prompt)."""
    machine, load = machine_info(), Load.of(options)
    machine["bf16_gflop_per_s"] = gflop_per_s(usable_threads(), torch.bfloat16)
    with Contest(load.size, 1, load.prompt_tokens + 1, seed=options.seed) as contest:

        def arguments(number: int) -> dict[str, object]:
            return {"prompt": contest.prompts(number, 1, load.prompt_tokens)[0]}

        turns = contest.rounds("prefill", arguments, load.num_rounds)
        peaks = {name: machine[f"{name}_gflop_per_s"] for name in ("fma", "fp32", "bf16")}
        rows = [_row(contest, side, turns, load.prompt_tokens, peaks) for side in ITEM_BYTES]
    rows.append(best_dtype_row(turns))
    return BenchResult(name="prefill", machine=machine, rows=rows, claims=rival_claims("prefill", turns, TARGETS))


def prompt_gflop(config: ModelConfig, num_tokens: int) -> float:
    """Return the arithmetic of reading ``num_tokens``, with logits of the last one only, in units of 1e9."""
    tables = config.vocab_size * config.hidden_size
    matrices = 2 * num_tokens * (config.num_parameters() - 2 * tables) + 2 * tables
    pairs = num_tokens * (num_tokens + 1) // 2
    attention = sum(2 * pairs * layer.num_q_heads * (layer.head_dim + layer.v_head_dim) for layer in config.layers)
    return (matrices + attention) / 1e9


def _row(contest: Contest, side: str, turns: Turns, num_tokens: int, peaks: Mapping[str, object]) -> Row:
    row = contest.rate_row(side, turns)
    rate = row["tokens_per_s"]
    if not isinstance(rate, float):
        return row
    done = rate / num_tokens * prompt_gflop(contest.config, num_tokens)
    return (
        row
        | {"gflop_per_s": done}
        | {f"share_of_{n}": done / peak for n, peak in peaks.items() if isinstance(peak, float)}
    )
