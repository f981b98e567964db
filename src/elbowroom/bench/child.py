"""The measured process of the memory benchmarks: one engine, one task, one JSON object on stdout.

``python -m elbowroom.bench.child '{"task": "budget", "model": null, "memory": 268435456, ...}'``. A process of its own,
because a peak can be measured once only and nothing that the benchmark holds may count.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from elbowroom.engine.session import Session
from elbowroom.errors import ElbowroomError
from elbowroom.memory.meter import peak_rss_bytes, reset_peak, rss_bytes
from elbowroom.serve.preload import preload

_GIVEN_BACK_S = 2.0
"""By then an idle engine has given freed pages back to the system."""


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


def release(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Fill the KV cache and free it again; return what the ledger freed and what RSS fell by, in bytes.

    ``cleared``: finished requests leave cached prefixes, ``clear_cache`` drops them. ``interleaved``: sequences that
    grew in turns, every second one closed. Each is read one second later.
    """
    from elbowroom.engine.llm import LLM
    from elbowroom.engine.sampling_params import SamplingParams

    result: dict[str, Any] = {}
    with LLM(spec["model"], memory=spec["memory"]) as llm:
        vocab, short = llm.engine.parts.config.vocab_size, SamplingParams(max_tokens=1, temperature=0.0)
        for name in ("warm", "cleared"):  # the first round touches workspace and libraries
            prompts = [[(97 * i + 31 * t) % vocab for t in range(spec["tokens"])] for i in range(spec["sequences"])]
            llm.generate([{"prompt_token_ids": ids} for ids in prompts], short)
            held = llm.engine.kv_report().live_bytes
            result[name] = {"freed_bytes": held} | _fall(llm.clear_cache)
    with LLM(spec["model"], memory=spec["memory"], prefix_cache=False) as llm:
        sessions = [llm.session([i % vocab] * 64) for i in range(spec["sequences"])]
        for turn in range(1, spec["tokens"] // 64):
            for session in sessions:
                session.push([turn % vocab] * 64)
        held = llm.engine.kv_report().live_bytes
        fall = _fall(lambda: _close(sessions[::2]))
        result["interleaved"] = {"freed_bytes": held - llm.engine.kv_report().live_bytes} | fall
        charged = llm.engine.parts.ledger.total("host") - llm.engine.parts.memory.runtime_bytes
        result["closed"] = {"freed_bytes": charged} | _fall(llm.close)
    return result


def hold(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Hold a session for each held-out prompt but the first, a warm-up; return the store's bytes and RSS's growth."""
    from elbowroom.engine.llm import LLM
    from elbowroom.evals.comparison.perplexity import windows
    from elbowroom.evals.engine_target import PlainTokenizer

    with LLM(spec["model"], memory=spec["memory"], kv=spec["kv"], prefix_cache=False) as llm:
        first, *prompts = windows(PlainTokenizer(llm.tokenizer), spec["length"], spec["num_prompts"])
        llm.session(first).close()
        _fall(lambda: None)
        before = rss_bytes()
        reset_peak()
        sessions = [llm.session(prompt) for prompt in prompts]
        held, peak = llm.engine.kv_report(), peak_rss_bytes()
        time.sleep(_GIVEN_BACK_S)
        rest = rss_bytes()
        if held.num_sequences < len(prompts):
            raise ElbowroomError(f"{held.num_sequences} of {len(prompts)} sessions are held", "raise the memory")
        _close(sessions)
    return {"tensor_bytes": held.live_bytes, "rest_bytes": rest - before, "peak_bytes": peak - before}


def _close(sessions: Sequence[Session]) -> None:
    for session in sessions:
        session.close()


def _fall(free: Callable[[], object]) -> dict[str, int]:
    """Return by how many bytes RSS is lower one second after ``free``."""
    before = rss_bytes()
    free()
    time.sleep(1.0)
    return {"rss_bytes": before - rss_bytes()}


TASKS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {"budget": budget, "hold": hold, "release": release}


def run_child(
    spec: Mapping[str, Any], timeout_s: float = 900.0, module: str = "elbowroom.bench.child"
) -> dict[str, Any]:
    """Run a task in a fresh process and return what it printed.

    Raises:
        ElbowroomError: the process failed; the message ends with what it wrote to stderr.
    """
    command = [sys.executable, "-m", module, json.dumps(dict(spec))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    if done.returncode != 0:
        raise ElbowroomError(f"the measured process failed: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main(text: str) -> None:
    """Run the task that ``text`` (JSON) describes and print what it returns."""
    preload()
    spec = json.loads(text)
    print(json.dumps(TASKS[spec["task"]](spec)))


if __name__ == "__main__":
    main(sys.argv[1])
