"""The tasks in whose wording the built-in model was trained: what comparisons of methods on it use."""

from __future__ import annotations

from elbowroom.evals import samples
from elbowroom.evals.samples import MANY_SHOT_QUESTIONS, TaskSpec
from elbowroom.evals.tasks.base import Task


def _some_items(spec: TaskSpec) -> int:
    return min(MANY_SHOT_QUESTIONS, spec.num_facts)


RETRIEVAL = Task(asks="the code of a key, in Python source text", samples=samples.retrieval)
CHAT = Task(asks="the code of a key, as a chat in the special tokens of the built-in model", samples=samples.chat)
FOLLOW_UPS = Task(
    asks="the codes of keys, one question after the other in one session", samples=samples.follow_ups, mode="multi_turn"
)
FIRST_SEEN = Task(
    asks="the same, the first question read with the context (SCBench's multi-turn mode)",
    samples=samples.first_seen,
    mode="multi_turn",
)
CHAINS = Task(asks="the number that a chain of variables (--hops) leads back to", samples=samples.chains)
MANY_SHOT = Task(
    asks="the label of an item among labelled items (SCBench's kind; up to 4 are asked)",
    samples=samples.many_shot,
    num_questions=_some_items,
)
