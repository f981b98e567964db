"""The measured process of ``compare``: one method, whose results are files and whose progress is JSON on stdout.

``python -m elbowroom.commands.compare_child '{"kv": "int8()", ...}'``. A process of its own, because a peak can be
measured once only and nothing that the comparison holds may count.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elbowroom.commands.evaluate_run import EvalOptions, check_length, open_directory
from elbowroom.errors import ElbowroomError

if TYPE_CHECKING:
    from elbowroom.engine.llm import LLM
    from elbowroom.evals.engine_target import EngineTarget, PlainTokenizer
    from elbowroom.evals.run_directory import RunDirectory
    from elbowroom.evals.run_plan import RunPlan

Advance = Callable[[int, int], None]
Tell = Callable[[Mapping[str, object]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What one process measures."""

    questions: dict[str, Any]
    """Fields of a RunPlan: what the directory is for."""
    tasks: list[str]
    """Those of its tasks that are asked."""
    num_windows: int
    num_contexts: int
    kv: str
    out: str
    """Directory of the method."""
    model: str | None
    memory: str
    dtype: str
    retry_errors: bool

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def measured(self) -> dict[str, object]:
        """Return what ``measured.json`` says when all of the order is done."""
        return {"tasks": self.tasks, "num_windows": self.num_windows}


def measure(order: Order, tell: Tell) -> None:
    """Measure what the directory lacks: bytes and speeds first, then questions, then perplexity.

    Raises:
        ElbowroomError: the model does not load, the contexts do not fit, or the directory is of another kind.
    """
    from elbowroom.bench.footprint import measure_footprint
    from elbowroom.engine.llm import LLM
    from elbowroom.evals.comparison.plan import plan_from_json
    from elbowroom.evals.engine_target import EngineTarget, PlainTokenizer

    plan = plan_from_json(order.questions)
    options = EvalOptions(
        order.model, order.memory, order.kv, order.dtype, None, Path(order.out), retry_errors=order.retry_errors
    )
    llm = LLM(order.model, order.memory, order.kv, order.dtype, prefix_cache=False, progress=_stage(tell, "loading"))
    with llm:
        check_length(plan.context_tokens, llm)
        with open_directory(plan, llm, options) as directory:
            assert directory is not None  # the options name one
            if directory.read("footprint") is None:
                found = measure_footprint(llm, plan.context_tokens, order.num_contexts, _stage(tell, "measuring"))
                directory.write("footprint", found.to_json())
            target, tokenizer = EngineTarget(llm), PlainTokenizer(llm.tokenizer)
            _ask(replace(plan, tasks=tuple(order.tasks)), target, tokenizer, directory, _stage(tell, "asking"))
            if order.num_windows:
                _score(order, llm, tokenizer, directory, _stage(tell, "perplexity"))
            directory.write("measured", order.measured())


def _ask(
    plan: RunPlan, target: EngineTarget, tokenizer: PlainTokenizer, directory: RunDirectory, advance: Advance
) -> None:
    from elbowroom.evals.runner import run_plan

    if not plan.tasks:
        return
    num_parallel = target.num_parallel(plan.context_tokens)
    results = run_plan(plan, target, tokenizer, num_parallel=num_parallel, directory=directory, advance=advance)
    directory.write("summary", {"tasks": {name: result.to_json() for name, result in results.items()}})


def _score(order: Order, llm: LLM, tokenizer: PlainTokenizer, directory: RunDirectory, advance: Advance) -> None:
    from elbowroom.evals.comparison.perplexity import FILE, score_windows, windows

    every = windows(tokenizer, order.questions["context_tokens"], order.num_windows)
    score_windows(llm, tokenizer, every, directory.path / FILE, advance)


def _stage(tell: Tell, name: str) -> Advance:
    return lambda done, total: tell({"stage": name, "done": done, "total": total})


def _tell(message: Mapping[str, object]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def main(text: str) -> int:
    """Measure what ``text`` (JSON) orders; an error of ours is told, any other one is a traceback on stderr."""
    from elbowroom.serve.preload import preload

    preload()
    try:
        measure(Order(**json.loads(text)), _tell)
    except ElbowroomError as error:
        _tell({"error": error.message, "hint": error.hint, "exit_code": error.exit_code})
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
