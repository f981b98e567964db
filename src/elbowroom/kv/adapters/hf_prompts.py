"""Where prompts end among calls of a transformers model, which do not say it themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from elbowroom.errors import RequestError
from elbowroom.kv.base import PromptPart


class Prompts:
    """What each call on a cache has to do with a prompt.

    A call of several columns, and the first call on an empty cache, reads a prompt and ends it; calls of one column
    decode. Calls inside ``reading`` read parts, and the next call behind it ends the prompt, however short it is.
    Inside ``generating`` the prompt ends at a column that is known beforehand.

    Args:
        chosen_layers: layers from which something is chosen when a prompt ends; empty where nothing is.
        interval: decoded columns behind which is chosen anew; 0: never.
    """

    def __init__(self, chosen_layers: Sequence[int] = (), interval: int = 0) -> None:
        self.chosen_layers, self.interval = tuple(chosen_layers), interval
        self._ended = 0
        """Columns when the last prompt ended."""
        self.begun: int | None = None
        """Columns before the first part of a prompt that was read in part; None: there is none."""
        self._is_reading = False
        self._until: int | None = None

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Let calls read parts of a prompt meanwhile.

        Raises:
            RequestError: they do already, or ``generate`` is running.
        """
        if self._is_reading or self._until is not None:
            raise RequestError(
                "a prompt is being read already", "open cache.reading() once for each prompt, outside generate"
            )
        self._is_reading = True
        try:
            yield
        finally:
            self._is_reading = False

    @contextmanager
    def generating(self, until: int) -> Iterator[None]:
        """Let the prompt end at column ``until`` meanwhile, in as many calls as it takes.

        Raises:
            RequestError: it is called inside ``reading``.
        """
        if self._is_reading:
            raise RequestError(
                "generate ends the prompt that it reads, so it cannot run inside cache.reading()",
                "read parts by model(..., past_key_values=cache) inside it, and generate behind it",
            )
        before, self._until = self._until, until
        try:
            yield
        finally:
            self._until = before

    def part(self, num_columns: int, num_new: int) -> PromptPart:
        """Return what a call of ``num_new`` columns behind ``num_columns`` has to do with a prompt.

        Raises:
            RequestError: it holds tokens of a prompt and drafts, or several drafts: what is chosen behind a prompt
                could not be taken back with them.
        """
        if self._is_reading:
            return PromptPart.PART
        end = num_columns + num_new
        if self._until is not None and end <= self._until:
            return PromptPart.END if end == self._until else PromptPart.PART
        if self._until is not None and num_new > 1 and self.chosen_layers:
            raise RequestError(
                f"{num_new} tokens in one pass go beyond the prompt of {self._until} columns: drafts of assisted "
                "generation, which a plan with a policy does not keep apart from prompts",
                "generate without assistant_model and prompt_lookup_num_tokens, or by a plan without a policy",
            )
        if self._until is None and (num_new > 1 or not num_columns or self.begun is not None):
            return PromptPart.END
        if self.interval and (end - self._ended) % self.interval == 0:
            return PromptPart.CHOICE
        return PromptPart.NONE

    def end(self, part: PromptPart, num_columns: int, num_new: int) -> None:
        """Note that a call of ``num_new`` columns behind ``num_columns`` is done."""
        if part is PromptPart.PART and self.begun is None:
            self.begun = num_columns
        elif part is PromptPart.END:
            self.begun, self._ended = None, num_columns + num_new

    def cut(self, num_columns: int) -> None:
        """Note that only the first ``num_columns`` are left."""
        if self.begun is not None and num_columns <= self.begun:
            self.begun = None
        self._ended = min(self._ended, num_columns)

    def fork(self) -> Prompts:
        """Return those of a copy of the cache, which no ``with`` block of this one is about."""
        twin = Prompts(self.chosen_layers, self.interval)
        twin.begun, twin._ended = self.begun, self._ended
        return twin
