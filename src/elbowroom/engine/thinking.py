"""Thinking: where a stream of tokens reasons and where it answers, and the tokens that end it at its budget.

What is due is a function of prompt, parameters and the tokens so far alone, so a budget holds exactly under every
schedule: chunked, batched, preempted and computed again, behind a cached prefix or not.
"""

from __future__ import annotations

from collections.abc import Sequence

from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.engine.types import Phase, SampleSpec
from elbowroom.errors import RequestError
from elbowroom.models.thinking import ThinkingMarks


class MarkFinder:
    """Splits text that comes in pieces at the marks of thinking.

    Text that could be the beginning of a mark is held back until it is decided. A mark that ends thinking once more,
    right behind the one that did, is dropped: models repeat it when it was forced upon them.

    Args:
        marks: of the model.
        inside: whether the text begins inside the thinking.
    """

    def __init__(self, marks: ThinkingMarks, inside: bool) -> None:
        self._marks, self.inside = marks, inside
        self.pending = ""
        """Text that is held back."""
        self._may_repeat = False

    def push(self, text: str) -> list[tuple[bool, str]]:
        """Return what ``text`` settles: runs of text, and whether they are thinking."""
        parts: list[tuple[bool, str]] = []
        text = self.pending + text
        while (hit := self._first(text)) is not None:
            at, mark = hit
            self._put(parts, text[:at])
            if self.inside or self._may_repeat or mark == self._marks.begin:
                self._may_repeat = mark == self._marks.end
                self.inside = mark == self._marks.begin
            else:
                self._put(parts, mark)
            text = text[at + len(mark) :]
        held = max((_overlap(text, mark) for mark in self._sought()), default=0)
        self._put(parts, text[: len(text) - held])
        self.pending = text[len(text) - held :]
        return parts

    def flush(self) -> list[tuple[bool, str]]:
        """Return what was held back; the text ends here."""
        parts: list[tuple[bool, str]] = []
        self._put(parts, self.pending)
        self.pending = ""
        return parts

    def _sought(self) -> tuple[str, ...]:
        begin, end = self._marks.begin, self._marks.end
        if self.inside:
            return (end,)
        return (begin, end) if self._may_repeat else (begin,)

    def _first(self, text: str) -> tuple[int, str] | None:
        return min(((at, mark) for mark in self._sought() if (at := text.find(mark)) >= 0), default=None)

    def _put(self, parts: list[tuple[bool, str]], text: str) -> None:
        if text:
            self._may_repeat = self._may_repeat and text.isspace()
            parts.append((self.inside, text))


class ThinkingTracker:
    """Follows the tokens of one sample: how many of them were thinking, and which one must come next.

    Tokens that make up a mark are not counted as thinking.

    Args:
        marks: of the model.
        prompt: token ids of the prompt; its end says whether thinking is open already.
        budget: most tokens of thinking; None: any number.
        last_token: number of output tokens at which thinking must begin to end; None: none.
    """

    def __init__(
        self, marks: ThinkingMarks, prompt: Sequence[int], budget: int | None = None, last_token: int | None = None
    ) -> None:
        self._marks, self._budget, self._last_token = marks, budget, last_token
        self._finder = MarkFinder(marks, marks.opened_by(prompt))
        self.num_reasoning = 0
        self._num_tokens = self._num_held = self._num_forced = 0

    @classmethod
    def limited(cls, marks: ThinkingMarks | None, spec: SampleSpec) -> ThinkingTracker | None:
        """Return the state behind ``spec.history``, or None where nothing limits the thinking."""
        params, history = spec.params, spec.history or ()
        if marks is None or not params.limits_thinking:
            return None
        last = None
        if params.answer_reserve and spec.max_new_tokens is not None:
            last = spec.max_new_tokens - params.answer_reserve - len(marks.end_ids)
        made = cls(marks, history[: spec.num_prompt_tokens], params.thinking_budget, last)
        for token in history[spec.num_prompt_tokens :]:
            made.push(token)
        return made

    @property
    def phase(self) -> Phase:
        """What the next token belongs to, as far as one can tell."""
        return "reasoning" if self._finder.inside else "answer"

    def due(self) -> int | None:
        """Return the token that must come next, or None if the model may choose."""
        if not self._finder.inside:
            return None
        is_spent = self._budget is not None and self.num_reasoning >= self._budget
        if is_spent or (self._last_token is not None and self._num_tokens >= self._last_token):
            return self._marks.end_ids[self._num_forced]
        return None

    def push(self, token_id: int) -> None:
        """Take in the next output token."""
        ids, was_inside, piece = self._marks.end_ids, self._finder.inside, self._marks.piece(token_id)
        self._num_forced = (self._num_forced + 1) % len(ids) if token_id == self.due() else 0
        self._finder.push(piece)
        self._num_tokens += 1
        if was_inside and self._finder.inside:
            self.num_reasoning += 1
        elif was_inside:
            self.num_reasoning -= self._num_held
        if not self._finder.inside:
            self._num_forced = 0
        pending = len(self._finder.pending)
        self._num_held = 0 if pending == 0 else 1 if pending <= len(piece) else self._num_held + 1


def check_thinking(params: SamplingParams, marks: ThinkingMarks | None) -> None:
    """Check that a request's limits on thinking can be kept.

    Raises:
        RequestError: it has some, and the model has no marks of thinking.
    """
    if params.limits_thinking and marks is None:
        name = "answer_reserve" if params.thinking_budget is None else "thinking_budget"
        raise RequestError(
            f"{name} was given, and this model has no marks of thinking that are known",
            "say which they are with thinking_marks='<think>,</think>' (--thinking-marks), or leave it out",
        )


def _overlap(text: str, mark: str) -> int:
    """Return how many characters at the end of ``text`` are the beginning of ``mark`` (never all of it)."""
    for count in range(min(len(text), len(mark) - 1), 0, -1):
        if mark.startswith(text[-count:]):
            return count
    return 0
