"""What stores commit for sequences of real lengths, beside what their tokens take; part of ``stores``.

Pages are committed and charged as in an engine, but no token is computed: the ledger is what is looked at.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from elbowroom.bench.base import Row
from elbowroom.bench.shared_data import DATA
from elbowroom.kv.base import KVStep, KVStore
from elbowroom.kv.bound import BoundPlan
from elbowroom.kv.contiguous import ContiguousStore
from elbowroom.kv.paged import PagedStore
from elbowroom.memory.arena import Arena
from elbowroom.memory.ledger import Budget, Ledger
from elbowroom.memory.tiers import HostTier

MOST_TOKENS = 8192
GRAINS = (16, 32, 64, 128, 256, 512, 1024, 2048)
_LOOKS = 8
"""Lengths, on the way from a prompt to its last token, at which a sequence is looked at."""
_CAPACITY = 2**40


@dataclass(frozen=True, slots=True)
class Lengths:
    """Prompts and answers, in tokens."""

    source: str
    prompts: list[int]
    totals: list[int]


def read_lengths(count: int, seed: int) -> Lengths:
    """Return ``count`` requests of the Azure conversation trace of 2023, or, where it is absent, of a stand-in."""
    rng, path = np.random.default_rng(seed), DATA / "traces" / "azure_llm_2023_conv.csv"
    if path.is_file():
        with path.open() as file:
            pairs = [(int(each["ContextTokens"]), int(each["GeneratedTokens"])) for each in csv.DictReader(file)]
        chosen = [pairs[index] for index in rng.choice(len(pairs), count, replace=False)]
        source = f"{count} of {len(pairs)} requests of {path.name}"
    else:
        prompts, answers = rng.lognormal(6.4, 1.1, count), rng.lognormal(4.9, 1.0, count)
        chosen = list(zip(prompts.astype(int).tolist(), answers.astype(int).tolist(), strict=True))
        source = f"{count} requests drawn from two lognormal distributions: the trace is absent"
    lengths = [(max(prompt, 1), max(prompt, 1) + max(answer, 1)) for prompt, answer in chosen]
    fitting = [each for each in lengths if each[1] <= MOST_TOKENS]
    return Lengths(source, [prompt for prompt, _ in fitting], [total for _, total in fitting])


def waste_rows(plan: BoundPlan, lengths: Lengths) -> list[Row]:
    """Return committed and live bytes for each store, and what other grains of pages would come to."""
    stores: dict[str, Callable[[Arena], KVStore]] = {
        "paged": lambda arena: PagedStore(plan, arena, _CAPACITY),
        "contiguous": lambda arena: _contiguous(plan, arena),
        "static": lambda arena: _contiguous(plan, arena, static=True),
    }
    rows: list[Row] = [_run(name, make, plan, lengths) for name, make in stores.items()]
    looks = np.concatenate([_looks(*pair) for pair in zip(lengths.prompts, lengths.totals, strict=True)])
    for grain in GRAINS:
        ratio = float((-(-looks // grain) * grain).sum() / looks.sum())
        rows.append({"part": "waste", "store": f"grain {grain}", "how": "computed", "committed_over_live": ratio})
    return rows


def _contiguous(plan: BoundPlan, arena: Arena, static: bool = False) -> ContiguousStore:
    return ContiguousStore(plan, arena, _CAPACITY, num_rows=1, row_tokens=MOST_TOKENS, static=static)


def _looks(prompt: int, total: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.unique(np.linspace(prompt, total, _LOOKS).astype(np.int64))


def _run(name: str, make: Callable[[Arena], KVStore], plan: BoundPlan, lengths: Lengths) -> Row:
    """Let one sequence after the other grow, and sum up what it holds at each look."""
    arena = Arena(HostTier(), Ledger(Budget({})))
    store, token_bytes = make(arena), plan.block_bytes // 64
    page_a_layer = arena.tier.page_bytes * sum(layer.kv_source is None for layer in plan.layers)
    committed, live, worst = 0, 0, 0.0
    for prompt, total in zip(lengths.prompts, lengths.totals, strict=True):
        handle = store.open()
        for tokens in _looks(prompt, total).tolist():
            start = store.num_tokens(handle)
            positions = np.arange(start, tokens, dtype=np.int64)
            step = KVStep((handle,), np.asarray([0, tokens - start], dtype=np.int32), positions)
            assert store.reserve(step) is None, "the capacity is larger than any sequence"
            store.end_step(step)
            held = arena.ledger.held("kv", "host")
            committed, live = committed + held, live + tokens * token_bytes
            worst = max(worst, held / (tokens * token_bytes + page_a_layer) - 1)
        store.close(handle)
    arena.trim(0.0)
    return {
        "part": "waste",
        "store": name,
        "how": f"run: {lengths.source}",
        "committed_over_live": committed / live,
        "mean_tokens": sum(lengths.totals) / len(lengths.totals),
        "worst_over_live_and_a_page_a_layer": worst,
    }


def run_lengths(store: KVStore, step: KVStep, num_layers: int, blocks: Sequence[int]) -> list[float]:
    """Return for each row of a reserved step the mean bytes that lie side by side, when all of it is moved."""
    means = []
    for row, count in enumerate(blocks):
        units: list[tuple[int, int, int]] = []
        for layer in range(num_layers):
            strips = store.strips(layer, step)
            assert strips is not None, "plain strips are always named"
            base = strips.base.data_ptr()
            entries = strips.table[row, :count].astype(np.int64) * 64 + base
            units += [(int(start), strips.fmt.strip_bytes, layer) for start in entries]
        units.sort()
        runs = 1 + sum(a[0] + a[1] != b[0] for a, b in itertools.pairwise(units))
        means.append(sum(size for _, size, _ in units) / runs)
    return means
