"""Runs context tasks against a target and reports accuracy with its interval and by depth.

Each question is asked in its own fork of the prefix (follow-ups: one after the other in one session), greedily;
a reply counts when its first number (or label) is exactly the asked one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from elbowroom.evals.base import Sample, Session, Target, Turn, score_reply
from elbowroom.evals.samples import NUM_DECILES
from elbowroom.evals.stats import wilson_interval


@dataclass(frozen=True, slots=True)
class Outcome:
    """One asked question."""

    sample_id: str
    target: str
    answer: str
    correct: bool
    depth: float | None


@dataclass(frozen=True, slots=True)
class DepthBin:
    """Accuracy of the facts in one tenth of the context."""

    num_queries: int
    accuracy: float | None
    """None without queries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalResult:
    """Accuracy of one cell."""

    num_queries: int
    num_correct: int
    accuracy: float
    interval: tuple[float, float]
    """Wilson interval, 95 %."""
    by_depth: tuple[DepthBin, ...]
    """Tenths of the context from its beginning to its end; empty when the task has no depths."""
    max_tokens: int
    """Tokens of the longest context with its prompt and answer."""

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
        session = target.open(sample.context)
        try:
            outcomes += [_ask(session, sample, turn) for turn in sample.turns]
        finally:
            session.close()
    return summarize(outcomes, max_tokens), outcomes


def _ask(session: Session, sample: Sample, turn: Turn) -> Outcome:
    asked = session if sample.follow_up else session.fork()
    try:
        reply = asked.ask(turn.prompt, turn.max_new_tokens)
    finally:
        if asked is not session:
            asked.close()
    score = score_reply(reply.text, turn.target)
    return Outcome(sample.id, turn.target, score.answer, score.value == 1.0, turn.depth)


def summarize(outcomes: list[Outcome], max_tokens: int) -> RetrievalResult:
    """Return accuracy, interval and depth bins of ``outcomes``."""
    num_correct = sum(outcome.correct for outcome in outcomes)
    bins: list[list[bool]] = [[] for _ in range(NUM_DECILES)]
    for outcome in outcomes:
        if outcome.depth is not None:
            bins[min(int(outcome.depth * NUM_DECILES), NUM_DECILES - 1)].append(outcome.correct)
    by_depth = tuple(DepthBin(len(part), sum(part) / len(part) if part else None) for part in bins)
    return RetrievalResult(
        num_queries=len(outcomes),
        num_correct=num_correct,
        accuracy=num_correct / len(outcomes) if outcomes else 0.0,
        interval=wilson_interval(num_correct, len(outcomes)),
        by_depth=by_depth if any(bins) else (),
        max_tokens=max_tokens,
    )
