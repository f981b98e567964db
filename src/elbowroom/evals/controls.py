"""Controls of a run: targets whose score is known, and the target itself asked twice.

The oracle writes the references and must score 1, or the task, its limits or its scorer are wrong. Null is the target
without the context: what it scores can be guessed. Asked twice, the target must write the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace

from elbowroom.errors import IntegrityError
from elbowroom.evals.base import History, Reply, Sample, Target, TextTokenizer
from elbowroom.evals.retrieval import outcomes_of, run
from elbowroom.evals.run_plan import RunPlan

NUM_QUESTIONS = 16
"""Questions of each task that the controls ask, at least."""


class OracleSession:
    """Knows what a perfect model writes behind each prompt."""

    def __init__(self, answers: dict[str, str], tokenizer: TextTokenizer) -> None:
        self._answers, self._tokenizer = answers, tokenizer

    def ask(self, prompt: str, max_tokens: int) -> Reply:
        """Return the reference, as much of it as ``max_tokens`` allow."""
        token_ids = self._tokenizer.encode(self._answers[prompt])
        fits = len(token_ids) <= max_tokens
        text = self._answers[prompt] if fits else self._tokenizer.decode(token_ids[:max_tokens])
        return Reply(text, tuple(token_ids[:max_tokens]))

    def push(self, text: str) -> None:
        """Need no context."""

    def fork(self) -> OracleSession:
        """Return itself: nothing in it changes."""
        return self

    def close(self) -> None:
        """Hold nothing."""


class OracleTarget:
    """Answers from the references of the samples it was given."""

    def __init__(self, samples: Iterable[Sample], tokenizer: TextTokenizer) -> None:
        self._answers = {
            sample.opening: {sample.prompt(number): turn.reference for number, turn in enumerate(sample.turns)}
            for sample in samples
        }
        self._tokenizer = tokenizer

    def open(self, context: str) -> OracleSession:
        """Look up the answers of ``context``."""
        return OracleSession(self._answers[context], self._tokenizer)


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlResult:
    """What the controls of one task said."""

    num_queries: int
    oracle: float
    """Mean score of the references."""
    null: float
    """Mean score without the context."""
    num_differing: int
    """Replies that were not the same when the target was asked again."""

    def to_json(self) -> dict[str, object]:
        """Return plain numbers."""
        return asdict(self)


def run_controls(plan: RunPlan, target: Target, tokenizer: TextTokenizer) -> Iterator[tuple[str, ControlResult]]:
    """Yield the name and the controls of each task of ``plan``, on its first samples, one question at a time.

    Raises:
        IntegrityError: a control failed.
    """
    for task in plan.tasks:
        samples = list(_first_samples(plan.samples(task, tokenizer)))
        oracle, _ = run(OracleTarget(samples, tokenizer), samples)
        null, _ = run(target, [replace(sample, context="") for sample in samples])
        replies, again = (_replies(target, samples, plan.history) for _ in range(2))
        result = ControlResult(
            num_queries=oracle.num_queries,
            oracle=oracle.accuracy,
            null=null.accuracy,
            num_differing=sum(one != other for one, other in zip(replies, again, strict=True)),
        )
        _check(task, result)
        yield task, result


def _first_samples(samples: Iterator[Sample]) -> Iterator[Sample]:
    num_questions = 0
    for sample in samples:
        yield sample
        num_questions += len(sample.turns)
        if num_questions >= NUM_QUESTIONS:
            return


def _replies(target: Target, samples: list[Sample], history: History) -> list[tuple[str, tuple[int, ...]]]:
    return [
        (outcome.reply, outcome.token_ids) for sample in samples for outcome in outcomes_of(target, sample, history)
    ]


def _check(task: str, result: ControlResult) -> None:
    if result.oracle < 1.0:
        raise IntegrityError(
            f"{task}: the references score {result.oracle:.3f} instead of 1", "report this as a bug of the task"
        )
    if result.num_differing:
        raise IntegrityError(
            f"{task}: {result.num_differing} of {result.num_queries} replies changed when asked again",
            "no comparison of this target means anything; report this as a bug, with the model and --kv",
        )
