"""The columns of the matrix: what is asked of every plan, and how a cell becomes a number with an interval."""

from __future__ import annotations

import math
from dataclasses import dataclass

from elbowroom.bench.kv_matrix.compared import Compared
from elbowroom.evals.comparison.plan import PERPLEXITY
from elbowroom.evals.comparison.quality import Scores, less_is_better
from elbowroom.evals.stats import bootstrap_interval, mean_interval

KEYS = 4
"""Questions about each context."""


@dataclass(frozen=True, slots=True)
class Column:
    """A task, or some turns of it."""

    name: str
    task: str
    turns: range | None = None
    """None: all."""

    @property
    def less_is_better(self) -> bool:
        """Whether a smaller score is the better one."""
        return less_is_better(self.task)

    def scores(self, compared: Compared, text: str) -> Scores:
        """Return the scores of a plan, by question or window."""
        return compared.scores(text, self.task, self.turns)

    def cell(self, compared: Compared, text: str) -> dict[str, object]:
        """Return mean, interval and number; the mean is None where nothing was measured."""
        values = list(self.scores(compared, text).values())
        if not values:
            return {"score": None, "interval": None, "num": 0}
        interval = bootstrap_interval(values) if self.less_is_better else mean_interval(values)
        return {"score": math.fsum(values) / len(values), "interval": list(interval), "num": len(values)}


COLUMNS = (
    Column("bits_per_byte", PERPLEXITY),
    Column("question_seen", "first_seen", range(1)),
    Column("question_hidden", "retrieval"),
    Column("later_turns", "first_seen", range(1, KEYS)),
)
"""Held-out text; a question read with the prompt; one that comes when the prompt is cut; the turns behind a first."""
TASKS = tuple(dict.fromkeys(column.task for column in COLUMNS))
