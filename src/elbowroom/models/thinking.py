"""Marks of thinking: the texts between which a model reasons before it answers, such as ``<think>``, ``</think>``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from elbowroom.errors import RequestError
from elbowroom.models.tokenizer import Tokenizer

KNOWN_MARKS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<thinking>", "</thinking>"),
    ("<seed:think>", "</seed:think>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)
"""Marks of models that exist: DeepSeek-R1, Qwen3 and many more; Magistral; Seed-OSS; Sky-T1."""
_OPENING_TOKENS = 16
"""Tokens at the end of a prompt in which a mark that opens the answer's thinking is looked for."""


@dataclass(frozen=True)
class ThinkingMarks:
    """Where a model's thinking begins and ends, and how its tokens read.

    Args:
        begin: text in front of the thinking.
        end: text behind it.
        tokenizer: of the model.

    Raises:
        RequestError: a mark is empty, or both are the same.
    """

    begin: str
    end: str
    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        """Check the marks."""
        if not self.begin or not self.end or self.begin == self.end:
            raise RequestError(
                f"thinking marks are two different texts, not {self.begin!r} and {self.end!r}",
                "write thinking_marks='<think>,</think>' (--thinking-marks)",
            )
        if self.end not in "".join(map(self.piece, self.end_ids)):
            raise RequestError(
                f"the model's tokenizer cannot write the thinking mark {self.end!r}", "name a mark that it knows"
            )

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens of the mark behind the thinking: what is forced when a budget is used up."""
        return tuple(self.tokenizer.encode(self.end, add_special_tokens=False))

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Special tokens among the marks: they have to be decoded, or nobody would see where thinking ends."""
        special = self.tokenizer.special_ids
        return special & {*self.end_ids, *self.tokenizer.encode(self.begin, add_special_tokens=False)}

    @cached_property
    def _pieces(self) -> dict[int, str]:
        return {}

    def piece(self, token_id: int) -> str:
        """Return the text of one token by itself."""
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self.tokenizer.decode([token_id], skip_special_tokens=False)
        return piece

    def opened_by(self, prompt: Sequence[int]) -> bool:
        """Return whether ``prompt`` ends with the mark in front of the thinking, as some chat templates do.

        Marks further up are text of earlier turns or of users and do not count.
        """
        return "".join(map(self.piece, prompt[-_OPENING_TOKENS:])).rstrip().endswith(self.begin)


def find_marks(tokenizer: Tokenizer, asked: str | None = None) -> ThinkingMarks | None:
    """Return the marks of a model, or None if it does not think as far as one can see.

    Args:
        tokenizer: of the model; known marks are found among its added tokens, or in its chat template.
        asked: ``BEGIN,END`` to say which they are, ``none`` for none; by default they are found.

    Raises:
        RequestError: ``asked`` is malformed, or the model has no tokenizer to read it with.
    """
    if asked == "none" or (asked is None and not tokenizer.available):
        return None
    if asked is not None:
        begin, _, end = asked.partition(",")
        if not tokenizer.available:
            raise RequestError("thinking marks need a tokenizer, and the model has none", "leave thinking_marks out")
        return ThinkingMarks(begin.strip(), end.strip(), tokenizer)
    added = {token.content for token in tokenizer.backend.get_added_tokens_decoder().values()}
    for begin, end in KNOWN_MARKS:
        if {begin, end} <= added or tokenizer.chat_template.mentions(end):
            return ThinkingMarks(begin, end, tokenizer)
    return None
