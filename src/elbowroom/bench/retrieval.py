"""retrieval: can the built-in model find keyed facts in held-out source text? Length x number of facts.

Every context is read once inside the budget and every fact is asked in its own fork, greedily; an answer counts when
all its tokens are right. Later comparisons of lossy methods are valid only where this dense score is high.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time
from collections.abc import Mapping

import torch
import torch.nn.functional as F

from elbowroom.bench.base import BenchOptions, BenchResult, Claim, Row
from elbowroom.bench.machine import machine_info
from elbowroom.engine.llm import LLM
from elbowroom.evals import samples
from elbowroom.evals.bits_per_byte import bits_per_byte
from elbowroom.evals.engine_target import EngineTarget, PlainTokenizer, run_parallel
from elbowroom.evals.retrieval import RetrievalResult
from elbowroom.evals.samples import TaskSpec
from elbowroom.models.dense import DenseContext
from elbowroom.models.directory import find_model
from elbowroom.models.loader import load_model
from elbowroom.models.tokenizer import Tokenizer

LENGTHS = (512, 1024, 2048)
TARGETS = {1: 0.95, 4: 0.85}
"""Facts in a context -> accuracy to reach at every length."""
DECILE_SHARE = 0.9
"""Every tenth of the depth must reach this share of the mean."""
MEMORY = "256MiB"
OTHER_CELLS = (
    ("retrieval", TaskSpec(context_tokens=4000, num_queries=100)),
    ("retrieval", TaskSpec(context_tokens=4000, num_queries=200, num_facts=4)),
    ("chat", TaskSpec(context_tokens=1024, num_queries=200, num_facts=4)),
    ("follow_ups", TaskSpec(context_tokens=1024, num_queries=200, num_facts=4)),
    ("chains", TaskSpec(context_tokens=1024, num_queries=200, num_facts=4)),
    ("chains", TaskSpec(context_tokens=1024, num_queries=200, num_facts=4, hops=2)),
    ("many_shot", TaskSpec(context_tokens=1024, num_queries=200, num_facts=16)),
)
"""Also measured, without a claim: nearly the whole context, and the other tasks of the recipe."""


def run(options: BenchOptions) -> BenchResult:
    """Measure every cell of a claim with 400 questions, the others with fewer (quick: 20, at 512 tokens only)."""
    machine = machine_info()
    lengths = LENGTHS[:1] if options.quick else LENGTHS
    cells: dict[tuple[int, int], RetrievalResult] = {}
    rows: list[Row] = []
    with LLM(memory=MEMORY) as llm:
        target, tokenizer = EngineTarget(llm), PlainTokenizer(llm.tokenizer)
        for facts, length in itertools.product(TARGETS, lengths):
            num_queries = 20 if options.quick else 400
            spec = TaskSpec(context_tokens=length, num_queries=num_queries, num_facts=facts, seed=options.seed)
            cells[facts, length] = _measure(target, tokenizer, "retrieval", spec, rows)
        for task, spec in () if options.quick else OTHER_CELLS:
            _measure(target, tokenizer, task, dataclasses.replace(spec, seed=options.seed), rows)
    rows.append(_bits_per_byte(4 if options.quick else 60))
    claims = [each for facts in TARGETS for each in _claims(facts, {n: cells[facts, n] for n in lengths})]
    return BenchResult(name="retrieval", machine=machine, rows=rows, claims=claims)


def _measure(
    target: EngineTarget, tokenizer: PlainTokenizer, task: str, spec: TaskSpec, rows: list[Row]
) -> RetrievalResult:
    started = time.perf_counter()
    made = getattr(samples, task)(tokenizer, spec)
    result = run_parallel(target, made, target.num_parallel(spec.context_tokens), lambda _: None)
    sys.stderr.write(f"  {task}, {spec.context_tokens} tokens, {spec.num_facts} facts: {result.accuracy:.3f}\n")
    rows.append(
        {
            "task": task,
            "context_tokens": spec.context_tokens,
            "num_facts": spec.num_facts,
            "hops": spec.hops,
            "accuracy": result.accuracy,
            "interval": list(result.interval),
            "num_queries": result.num_queries,
            "lowest_decile": result.lowest_decile(),
            "seconds": round(time.perf_counter() - started, 1),
        }
    )
    return result


def _claims(num_facts: int, by_length: Mapping[int, RetrievalResult]) -> list[Claim]:
    """Return the claim on the worst length, and the one on the weakest tenth of the depth."""
    name = "retrieval.single" if num_facts == 1 else "retrieval.four"
    length, worst = min(by_length.items(), key=lambda item: item[1].accuracy)
    shares = {n: (result.lowest_decile() or 0.0) / max(result.accuracy, 1e-9) for n, result in by_length.items()}
    weakest = min(shares, key=lambda n: shares[n])
    num_runs = sum(result.num_queries for result in by_length.values())
    return [
        Claim(
            id=name,
            value=worst.accuracy,
            op=">=",
            target=TARGETS[num_facts],
            unit="share of exact answers",
            num_runs=num_runs,
            low=worst.interval[0],
            high=worst.interval[1],
            reason=f"worst of {', '.join(map(str, by_length))} tokens: {length}; bounds are its 95 % Wilson interval",
        ),
        Claim(
            id=f"{name}.deciles",
            value=shares[weakest],
            op=">=",
            target=DECILE_SHARE,
            unit="accuracy of the weakest tenth of the depth over the mean",
            num_runs=num_runs,
            reason=f"weakest at {weakest} tokens",
        ),
    ]


def _bits_per_byte(num_windows: int) -> Row:
    """Return the bits per byte of the built-in model on held-out Python text, without any cache."""
    directory = find_model(None)
    decoder = load_model(directory, torch.float32)
    tokenizer = PlainTokenizer(Tokenizer.from_directory(directory))

    @torch.inference_mode()
    def log_probs(tokens: list[int]) -> list[float]:
        ids = torch.tensor(tokens)
        hidden = decoder(ids, DenseContext(decoder.config.layers, 1, len(tokens)))
        losses = F.cross_entropy(decoder.logits(hidden[:-1]), ids[1:], reduction="none")
        return [-float(loss) for loss in losses]

    result = bits_per_byte(log_probs, tokenizer, num_windows=num_windows)
    return {"task": "bits_per_byte", "bits_per_byte": result.bits_per_byte, "num_bytes": result.num_bytes}
