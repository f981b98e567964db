"""The measured process of the memory benchmarks: one engine, one task, one JSON object on stdout.

``python -m elbowroom.bench.child '{"task": "budget", "model": null, "memory": 268435456, ...}'``. A process of its own,
because a peak can be measured once only and nothing that the benchmark holds may count.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from elbowroom.serve.preload import preload


def mixed_lengths(count: int, longest: int, most_new: int, seed: int) -> list[tuple[int, int]]:
    """Return ``count`` pairs of prompt and output lengths, long and short ones mixed, in tokens."""
    rng = random.Random(seed)
    prompts = [max(1, int(longest * rng.random() ** 2)) for _ in range(count)]
    return [(prompt, rng.randint(1, most_new)) for prompt in prompts]


def budget(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Run mixed requests inside ``memory`` bytes and return the peak, or the refusal and the minimum it names."""
    from elbowroom.engine.llm import LLM
    from elbowroom.engine.sampling_params import SamplingParams
    from elbowroom.errors import BudgetTooSmall, RequestError

    started = time.perf_counter()
    try:
        llm = LLM(spec["model"], memory=spec["memory"], kv=spec.get("kv"), max_sequences=spec.get("max_sequences", 64))
    except BudgetTooSmall as error:
        return {"refused": True, "minimum_bytes": error.minimum_bytes, "message": error.message}
    loaded = time.perf_counter()
    parts = llm.engine.parts
    rng = random.Random(spec.get("seed", 0))
    futures, too_large = [], 0
    for prompt, new in spec["lengths"]:
        ids = [rng.randrange(parts.config.vocab_size) for _ in range(prompt)]
        sampling = SamplingParams(max_tokens=new, temperature=rng.choice([0.0, 1.0]), top_p=0.9, ignore_eos=True)
        try:
            futures.append((new, llm.engine.generate(ids, sampling)))
        except RequestError:
            too_large += 1
    complete = sum(len(future.result().outputs[0].token_ids) == new for new, future in futures)
    llm.engine.check_integrity()
    stats = llm.engine.stats()
    result = {
        "refused": False,
        "num_complete": complete,
        "num_refused_requests": too_large,
        "preemptions": stats.preemptions,
        "peak_bytes": parts.meter.peak_over_baseline_bytes + parts.meter.baseline_bytes,
        "baseline_bytes": parts.meter.baseline_bytes,
        "ledger_peak_bytes": parts.ledger.peak("host"),
        "held_bytes": {owner: tiers["host"]["peak_bytes"] for owner, tiers in llm.engine.ledger().items()},
        "max_step_tokens": parts.memory.max_step_tokens,
        "max_sequences": parts.memory.max_sequences,
        "load_s": loaded - started,
        "run_s": time.perf_counter() - loaded,
    }
    llm.close()
    return result


TASKS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {"budget": budget}


def main(text: str) -> None:
    """Run the task that ``text`` (JSON) describes and print what it returns."""
    preload()
    spec = json.loads(text)
    print(json.dumps(TASKS[spec["task"]](spec)))


if __name__ == "__main__":
    main(sys.argv[1])
