"""Runs a plan against a target: samples that are asked already are skipped, errors are noted and the run goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from elbowroom.errors import ElbowroomError, EngineClosed, IntegrityError
from elbowroom.evals.base import History, Sample, Target, TextTokenizer
from elbowroom.evals.parallel import in_order
from elbowroom.evals.retrieval import Outcome, RetrievalResult, outcomes_of, summarize
from elbowroom.evals.run_directory import AskedSample, RunDirectory
from elbowroom.evals.run_plan import RunPlan

Advance = Callable[[int, int], None]
"""Is told the questions that are answered and those of the whole run."""


def run_plan(
    plan: RunPlan,
    target: Target,
    tokenizer: TextTokenizer,
    *,
    num_parallel: int = 1,
    directory: RunDirectory | None = None,
    advance: Advance | None = None,
) -> dict[str, RetrievalResult]:
    """Ask all questions of ``plan`` and return the result of each task.

    Args:
        plan: what is asked.
        target: who is asked.
        tokenizer: counts the tokens of contexts.
        num_parallel: contexts at a time.
        directory: where outcomes are kept and looked for; None keeps them in memory only.
        advance: told after each context.

    Raises:
        RequestError: samples of the wanted size cannot be made; found out before the first question.
    """
    for task in plan.tasks:
        next(plan.samples(task, tokenizer))
    kept = {} if directory is None else directory.asked
    total = sum(map(plan.num_questions, plan.tasks))
    done = 0
    results: dict[str, RetrievalResult] = {}
    for task in plan.tasks:
        asked: list[AskedSample] = []
        work = partial(_ask, task, target, plan.history, kept)
        for each in in_order(work, plan.samples(task, tokenizer), num_parallel):
            if directory is not None and each.key not in kept:
                directory.append(each)
            asked.append(each.without_replies())
            done += len(each.outcomes)
            if advance is not None:
                advance(done, total)
        longest = max(each.num_tokens for each in asked)
        results[task] = summarize((outcome for each in asked for outcome in each.outcomes), longest)
    return results


def _ask(
    task: str, target: Target, history: History, kept: dict[tuple[str, str], AskedSample], sample: Sample
) -> AskedSample:
    return kept.get((task, sample.id)) or AskedSample.of(task, sample, attempt(target, sample, history))


def attempt(target: Target, sample: Sample, history: History) -> Iterator[Outcome]:
    """Yield the outcomes of ``sample``; when a question fails, that one and those behind it have its error."""
    num_done = 0
    try:
        for outcome in outcomes_of(target, sample, history):
            num_done += 1
            yield outcome
    except (EngineClosed, IntegrityError):
        raise  # whatever is asked next fails as well
    except Exception as error:  # noqa: BLE001  one sample must not end the run; what it raised is written down
        message = error.message if isinstance(error, ElbowroomError) else str(error)
        for number, turn in enumerate(sample.turns[num_done:], start=num_done):
            reason = f"{type(error).__name__}: {message}"
            yield Outcome(sample.id, turn.target, "", 0.0, turn.depth, number, error=reason)
