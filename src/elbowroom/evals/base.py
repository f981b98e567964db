"""What every evaluation task is made of: samples with turns, targets with sessions, scores."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal, Protocol, Self

Mode = Literal["multi_turn", "multi_request"]
"""``multi_turn``: questions follow each other in one session; ``multi_request``: each has its own fork."""
History = Literal["gold", "own"]
"""What later turns of a session read as the answers before: the references, or what the model wrote itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One question about a context."""

    prompt: str
    """Text that follows the context (or the turn before)."""
    target: str
    """The answer; for the scorer ``first`` a number or a lowercase word."""
    reference: str
    """What a perfect model writes behind the prompt; for ``first`` with no other number (word) before ``target``."""
    max_new_tokens: int
    depth: float | None = None
    """Where the asked fact stands: tokens before it as a share of the context's tokens."""
    scorer: str = "first"
    """Name in ``scorers.SCORERS``."""
    more_targets: tuple[str, ...] = ()
    """Answers that are asked for together with ``target``."""
    rivals: tuple[str, ...] = ()
    """Wrong answers that the reply must resemble less than ``target`` (scorer ``function``)."""

    @property
    def targets(self) -> tuple[str, ...]:
        """All answers."""
        return self.target, *self.more_targets


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A context and its questions."""

    id: str
    context: str
    turns: tuple[Turn, ...]
    num_tokens: int
    """Tokens of the context with its longest prompt and answer."""
    follow_up: bool = False
    """The mode: turns follow each other in one session; otherwise each has its own fork of the context."""
    first_seen: bool = False
    """The first question is read together with the context, so that what chooses at a prompt's end sees it."""
    meta: dict[str, int | float | str] = field(default_factory=dict)

    @property
    def opening(self) -> str:
        """What a session reads first."""
        return self.context + self.turns[0].prompt if self.first_seen else self.context

    def prompt(self, number: int) -> str:
        """Return what a turn still has to read: nothing where the opening ended with its question."""
        return "" if self.first_seen and number == 0 else self.turns[number].prompt


@dataclass(frozen=True, slots=True)
class Reply:
    """What a target generated."""

    text: str
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Score:
    """Value in [0, 1] of one reply with the answer that was read out of it."""

    value: float
    answer: str
    why: str = ""
    """How the value came about, where value and answer do not say it."""


class Session(Protocol):
    """A context that a model has read, and everything asked and answered since."""

    def ask(self, prompt: str, max_tokens: int) -> Reply:
        """Append ``prompt``, generate greedily up to ``max_tokens`` tokens and keep both in the session."""

    def push(self, text: str) -> None:
        """Append ``text`` without generating."""

    def fork(self) -> Self:
        """Return an independent copy that shares what has been read so far."""

    def close(self) -> None:
        """Free the session; a fork is closed on its own."""


class Target(Protocol):
    """A model under evaluation."""

    def open(self, context: str) -> Session:
        """Read ``context`` into a new session."""


class TextTokenizer(Protocol):
    """The two calls of a tokenizer that tasks need."""

    def __hash__(self) -> int:
        """Tell tokenizers apart; ``object`` does."""

    def encode(self, text: str) -> list[int]:
        """Return token ids without adding any."""

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of token ids."""


def score_reply(text: str, target: str) -> Score:
    """Return 1 when the first number (for a number) or lowercase word (for a word) of ``text`` is ``target``."""
    found = re.search(r"\d+" if target.isdigit() else r"[a-z]+", text)
    answer = found.group() if found else ""
    return Score(float(answer == target), answer)
