"""shared-prefix: what does it save to read strips that several sequences share once for all of them?

Attention: sequences that are forks of one prefix of random keys and values, with a block of their own each, decode a
token; all layers attend, with caches of the cores that hold something else. Once shared strips are read together, once
by each sequence for itself, in turns. The floor is what the machine cannot do faster: the bytes of all strips once at
the rate of reading memory, or the multiplications at their peak, whichever takes longer. Decoding: a running engine
whose requests continue one cached prefix, in the same two ways.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from elbowroom.bench.base import BenchOptions, BenchResult, Claim, Row
from elbowroom.bench.filled_cache import fill_prefix, import_random
from elbowroom.bench.kv_shapes import BF16, equal_layers, layers_of
from elbowroom.bench.kv_speed_child import Flush
from elbowroom.bench.machine import machine_info
from elbowroom.bench.pairs import MedianInterval, Play, Run, Turns, median_ratio, take_turns
from elbowroom.bench.patching import replaced
from elbowroom.bench.random_model import write_random_model
from elbowroom.bench.sides.ours import Stream
from elbowroom.core import STRIP_TOKENS, LayerSpec
from elbowroom.engine.llm import LLM
from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.kernels import LayerStrips, attention
from elbowroom.kv.base import KVStep
from elbowroom.kv.paged import PagedStore
from elbowroom.kv.plan import KVPlan
from elbowroom.memory.arena import Arena
from elbowroom.memory.ledger import Budget, Ledger
from elbowroom.memory.tiers import HostTier

TOGETHER, APART = "together", "apart"
MEMBERS, QUICK_MEMBERS = (1, 2, 4, 8, 16, 32), (1, 4)
PREFIXES, QUICK_PREFIXES = (2048, 8192), (512,)
PLANS = (BF16, "plain(fp32)", "int8", "kivi(4,4,32)")
NUM_ROUNDS, QUICK_ROUNDS = 7, 2
CLAIMED = {"336M": ("prefix.attention", 1.2), "20M": ("prefix.attention", 1.2), "MHA": ("prefix.attention_mha", 2.0)}
"""Shape -> claim and target, for the most members behind the longest prefix; 20M is the quick form."""
_SPEED = "passes_per_s"
_RATE = "tokens_per_s"


@dataclass(frozen=True, slots=True)
class Machine:
    """What this machine can do."""

    bytes_per_s: float
    flop_per_s: float

    def floor_s(self, num_bytes: float, flops: float) -> float:
        """Return the least seconds for so many bytes and operations."""
        return max(num_bytes / self.bytes_per_s, flops / self.flop_per_s)


class Family:
    """A store with forks of one random prefix, each about to decode a token.

    Args:
        layers: of the model.
        kv: plan.
        prefix: tokens that all share, a multiple of 64.
        members: sequences.
        seed: of keys, values and queries.
    """

    def __init__(self, layers: tuple[LayerSpec, ...], kv: str, prefix: int, members: int, seed: int) -> None:
        plan = KVPlan.parse(kv).bind(layers, "bfloat16")
        blocks, layer = prefix // STRIP_TOKENS, layers[0]
        capacity = (2 * blocks + 4 * members + 8) * (plan.block_bytes + plan.tail_bytes)
        self.store, self._layers = PagedStore(plan, Arena(HostTier(), Ledger(Budget({}))), capacity), layers
        parent = self.store.open()
        import_random(self.store, parent, plan, self.store.fingerprint, prefix, seed)
        handles = tuple(self.store.fork(parent) for _ in range(members))
        starts = np.arange(members + 1, dtype=np.int32)
        step = KVStep(handles, starts, np.full(members, prefix, dtype=np.int64))
        assert self.store.reserve(step) is None, "room for all was made"
        found = (self.store.strips(index, step) for index in range(len(layers)))
        self._strips = [strips for strips in found if strips is not None]
        generator = torch.Generator().manual_seed(seed + 1)
        heads = (layer.num_q_heads, layer.num_kv_heads, layer.num_kv_heads)
        self._q, k, v = (torch.randn(members, each, layer.head_dim, generator=generator) for each in heads)
        self._out = torch.empty(members, layer.num_q_heads, layer.v_head_dim)
        for strips in self._strips:
            attention.append(strips, k, v)
        self.prefix_bytes = blocks * plan.block_bytes
        self.flops = 4.0 * members * prefix * len(layers) * layer.num_q_heads * layer.head_dim

    def attend(self, shares: bool) -> float:
        """Return the seconds of attention over all layers."""
        strips = [replace(each, shares=shares) for each in self._strips]
        started = time.perf_counter()
        for each, layer in zip(strips, self._layers, strict=True):
            attention.attend(each, layer, self._q, self._out)
        return time.perf_counter() - started


def run(options: BenchOptions) -> BenchResult:
    """Measure attention and decoding (quick: small models, a short prefix, few members)."""
    info = machine_info()
    flops = info["fma_gflop_per_s"]
    machine = Machine(
        1e9 * float(str(info["read_gb_per_s"])), float("inf") if flops is None else 1e9 * float(str(flops))
    )
    rows, claims = attention_rows(options, machine)
    with tempfile.TemporaryDirectory() as directory:
        size = "20M" if options.quick else "336M"
        write_random_model(Path(directory), size, torch.bfloat16, options.seed)
        rows += decode_rows(size, directory, options)
    return BenchResult(name="shared-prefix", machine=info, rows=list[Row](rows), claims=claims)


def attention_rows(options: BenchOptions, machine: Machine) -> tuple[list[dict[str, object]], list[Claim]]:
    """Return what attention takes together and apart, and the claim that together is faster."""
    shapes = {"20M": layers_of("20M")} if options.quick else {"336M": layers_of("336M"), "MHA": _without_groups()}
    members, prefixes = (QUICK_MEMBERS, QUICK_PREFIXES) if options.quick else (MEMBERS, PREFIXES)
    rows, claims, flush = list[dict[str, object]](), list[Claim](), Flush()
    for shape, layers in shapes.items():
        for kv in PLANS:
            for prefix in prefixes if kv == BF16 else prefixes[-1:]:
                for count in members:
                    turns, made = _attention(Family(layers, kv, prefix, count, options.seed), flush, machine, options)
                    head = {"part": "attention", "shape": shape, "kv": kv, "prefix_tokens": prefix, "members": count}
                    rows += [head | row for row in made]
                    if (kv, prefix, count) == (BF16, prefixes[-1], members[-1]):
                        claims.append(_claim(shape, turns, count, prefix))
                sys.stderr.write(f"  {shape}, {kv}, {prefix} tokens\n")
    return rows, claims


def _without_groups() -> tuple[LayerSpec, ...]:
    """Return layers in which each query head has keys of its own."""
    return equal_layers(8, 16, 16, 64)


def _attention(
    family: Family, flush: Flush, machine: Machine, options: BenchOptions
) -> tuple[Turns, list[dict[str, object]]]:
    def side(shares: bool) -> Play:
        def play(_: int) -> Run:
            flush()
            return {_SPEED: 1 / family.attend(shares)}

        return play

    sides = {TOGETHER: side(True), APART: side(False)}
    turns = take_turns(sides, QUICK_ROUNDS if options.quick else NUM_ROUNDS)
    family.store.close_all()
    floor = machine.floor_s(family.prefix_bytes, family.flops)
    rows = []
    for name in sides:
        seconds = MedianInterval.of([1 / speed for speed in turns.figures(name, _SPEED)])
        rows.append(
            {
                "read": name,
                "seconds": seconds.median,
                "low": seconds.low,
                "high": seconds.high,
                "bytes_shared": family.prefix_bytes,
                "gflop_per_s": family.flops / seconds.median / 1e9,
                "floor_s": floor,
                "floor_share": floor / seconds.median,
            }
            | (_ratio(turns, _SPEED) if name == TOGETHER else {})
        )
    return turns, rows


def decode_rows(model: str, directory: str, options: BenchOptions) -> list[dict[str, object]]:
    """Return the tokens a second of requests that continue one cached prefix."""
    members, prefixes = (QUICK_MEMBERS, QUICK_PREFIXES) if options.quick else (MEMBERS, PREFIXES)
    new_tokens, rows = 4 if options.quick else 8, list[dict[str, object]]()
    llm = LLM(directory, "4GiB", kv=BF16, dtype="bfloat16", max_sequences=members[-1])
    try:
        for prefix in prefixes:
            tokens = [token % llm.engine.parts.config.vocab_size for token in range(prefix)]
            llm.clear_cache()
            fill_prefix(llm.engine, tokens, options.seed)
            for count in members:
                turns = _decode(llm, tokens, count, new_tokens, options)
                head = {"part": "decode", "shape": model, "kv": BF16, "prefix_tokens": prefix, "members": count}
                for name in (TOGETHER, APART):
                    rate = MedianInterval.of(turns.figures(name, _RATE))
                    row = {"read": name, _RATE: rate.median, "low": rate.low, "high": rate.high}
                    rows.append(head | row | (_ratio(turns, _RATE) if name == TOGETHER else {}))
            sys.stderr.write(f"  decoding behind {prefix} tokens\n")
    finally:
        llm.close()
    return rows


def _decode(llm: LLM, prefix: list[int], members: int, new_tokens: int, options: BenchOptions) -> Turns:
    sampling = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)

    def side(shares: bool) -> Play:
        def play(_: int) -> Run:
            with _reading(llm, shares):
                streams = [Stream() for _ in range(members)]
                submit: Callable[..., object] = llm.engine.submit
                with ThreadPoolExecutor(members) as clients:
                    list(clients.map(lambda each: submit([*prefix, 1], sampling, each), streams))
                for stream in streams:
                    stream.wait()
            begin, end = max(each.times[0] for each in streams), min(each.times[-1] for each in streams)
            tokens = sum(begin < at <= end for each in streams for at in each.times)
            return {_RATE: tokens / (end - begin)}

        return play

    return take_turns({TOGETHER: side(True), APART: side(False)}, 2 if options.quick else 3)


@contextlib.contextmanager
def _reading(llm: LLM, shares: bool) -> Iterator[None]:
    """Let the engine's store say whether shared strips are read together."""
    store = llm.engine.parts.store
    strips = store.strips

    def say(layer: int, step: KVStep) -> LayerStrips | None:
        found = strips(layer, step)
        return None if found is None else replace(found, shares=shares)

    with replaced(store, "strips", say):
        yield


def _ratio(turns: Turns, figure: str) -> dict[str, object]:
    ratio = median_ratio(turns, TOGETHER, APART, figure)
    return {} if ratio is None else {"times_apart": ratio.median}


def _claim(shape: str, turns: Turns, members: int, prefix: int) -> Claim:
    name, target = CLAIMED[shape]
    ratio = median_ratio(turns, TOGETHER, APART, _SPEED)
    return Claim(
        id=name,
        value=None if ratio is None else ratio.median,
        op=">=",
        target=target,
        unit=f"x attention speed of {members} sequences behind {prefix} shared tokens",
        num_runs=0 if ratio is None else ratio.num_runs,
        low=None if ratio is None else ratio.low,
        high=None if ratio is None else ratio.high,
    )
