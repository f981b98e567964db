"""Runs context tasks against a target and reports accuracy with its interval, by depth and by turn.

Questions are asked greedily, each in its own fork of the context or one after the other in one session, as the sample
says; the scorer that a turn names turns the reply into a score.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

from elbowroom.evals.base import History, Reply, Sample, Session, Target
from elbowroom.evals.samples import NUM_DECILES
from elbowroom.evals.scorers import score_turn
from elbowroom.evals.stats import mean_interval


@dataclass(frozen=True, slots=True)
class Outcome:
    """One asked question."""

    sample_id: str
    target: str
    answer: str
    value: float
    """Score in [0, 1]."""
    depth: float | None
    turn: int = 0
    reply: str = ""
    """All that the target wrote."""
    token_ids: tuple[int, ...] = ()
    """Its tokens."""
    why: str = ""
    """What the scorer has to say beside the value."""
    error: str | None = None
    """Why there is no reply; the value is 0 and counts nowhere then."""

    @property
    def correct(self) -> bool:
        """Whether the reply is entirely right."""
        return self.value == 1.0


@dataclass(frozen=True, slots=True)
class Bin:
    """Accuracy of some of the questions."""

    num_queries: int
    accuracy: float | None
    """None without queries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalResult:
    """Accuracy of one cell."""

    num_queries: int
    num_correct: int
    """Questions with a score of 1."""
    accuracy: float
    """Mean score."""
    interval: tuple[float, float]
    """Of the mean, 95 %: Wilson's, or a bootstrap where some scores lie between 0 and 1."""
    by_depth: tuple[Bin, ...]
    """Tenths of the context from its beginning to its end; empty when the task has no depths."""
    max_tokens: int
    """Tokens of the longest context with its prompt and answer."""
    by_turn: tuple[Bin, ...] = ()
    """First, second, ... question about a context; empty where there is only one."""
    num_errors: int = 0
    """Questions without a reply; they are not among ``num_queries``."""
    errors: tuple[str, ...] = ()
    """What went wrong, each message once; at most five."""

    def lowest_decile(self) -> float | None:
        """Return the lowest accuracy among the depth bins that have queries."""
        return min((part.accuracy for part in self.by_depth if part.accuracy is not None), default=None)

    def to_json(self) -> dict[str, object]:
        """Return plain lists, dicts and numbers."""
        return asdict(self)


def run(target: Target, samples: Iterable[Sample]) -> tuple[RetrievalResult, list[Outcome]]:
    """Ask every question of ``samples`` and return the summary with the single outcomes."""
    outcomes: list[Outcome] = []
    max_tokens = 0
    for sample in samples:
        max_tokens = max(max_tokens, sample.num_tokens)
        outcomes += outcomes_of(target, sample)
    return summarize(outcomes, max_tokens), outcomes


def outcomes_of(target: Target, sample: Sample, history: History = "own") -> Iterator[Outcome]:
    """Read the context of ``sample`` and yield the outcome of each question as soon as there is one.

    Args:
        target: who is asked.
        sample: context and questions.
        history: what stands behind the earlier questions of a session: with ``gold`` the references, so that errors
            do not pile up and all targets are asked the same.
    """
    session = target.open(sample.opening)
    try:
        for number, turn in enumerate(sample.turns):
            reply = _ask(session, sample, number, history)
            score = score_turn(turn, reply.text)
            yield Outcome(
                sample.id,
                turn.target,
                score.answer,
                score.value,
                turn.depth,
                number,
                reply.text,
                reply.token_ids,
                score.why,
            )
    finally:
        session.close()


def _ask(session: Session, sample: Sample, number: int, history: History) -> Reply:
    turn, prompt = sample.turns[number], sample.prompt(number)
    if sample.follow_up and history == "own":
        return session.ask(prompt, turn.max_new_tokens)
    fork = session.fork()
    try:
        reply = fork.ask(prompt, turn.max_new_tokens)
    finally:
        fork.close()
    if sample.follow_up and turn is not sample.turns[-1]:
        if prompt:
            session.push(prompt)
        session.push(turn.reference)
    return reply


def summarize(outcomes: Iterable[Outcome], max_tokens: int) -> RetrievalResult:
    """Return accuracy, interval, depth and turn bins of ``outcomes``; their order makes no difference."""
    every = list(outcomes)
    asked = [outcome for outcome in every if outcome.error is None]
    depths: list[list[float]] = [[] for _ in range(NUM_DECILES)]
    turns: list[list[float]] = [[] for _ in range(1 + max((outcome.turn for outcome in asked), default=0))]
    for outcome in asked:
        turns[outcome.turn].append(outcome.value)
        if outcome.depth is not None:
            depths[min(int(outcome.depth * NUM_DECILES), NUM_DECILES - 1)].append(outcome.value)
    values = [outcome.value for outcome in asked]
    return RetrievalResult(
        num_queries=len(asked),
        num_correct=sum(outcome.correct for outcome in asked),
        accuracy=_bin(values).accuracy or 0.0,
        interval=mean_interval(values),
        by_depth=tuple(map(_bin, depths)) if any(depths) else (),
        max_tokens=max_tokens,
        by_turn=tuple(map(_bin, turns)) if len(turns) > 1 else (),
        num_errors=len(every) - len(asked),
        errors=tuple(sorted({outcome.error for outcome in every if outcome.error is not None})[:5]),
    )


def _bin(values: list[float]) -> Bin:
    return Bin(len(values), math.fsum(values) / len(values) if values else None)
