"""Incremental detokenisation: the text that each further token adds.

The pieces joined are exactly the text of all tokens decoded at once, and no piece holds half a character. A piece is
held back while what comes next can still change it: an unfinished UTF-8 sequence of byte-level BPE, or a run of byte
tokens (``<0xE4>``), which the library decodes as a whole.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from elbowroom.models.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_LONGEST_WINDOW = 32
"""Tokens after which a window that never settles (bytes that are no text) is cut."""


class StreamDecoder:
    """Decodes one sequence token by token, in time independent of its length.

    A short window is decoded: one settled token, because decoders treat the first token of a text differently
    (leading spaces), then the tokens whose text is not wholly emitted.

    Args:
        tokenizer: of the model.
        skipped: tokens that give no text.
    """

    def __init__(self, tokenizer: Tokenizer, *, skipped: frozenset[int] = frozenset()) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._byte_fallback = '"ByteFallback"' in _decoder_state(tokenizer)
        self._window: list[int] = []
        self._num_emitted = 0
        self._longest = _LONGEST_WINDOW

    def push(self, token_id: int) -> str:
        """Return the text that is certain now and was not before; may be empty.

        Raises:
            RequestError: ``token_id`` is negative or above 32 bits.
        """
        if not 0 <= token_id < 2**32:
            return self._decode([token_id])  # raises
        token = self._tokenizer.backend.id_to_token(token_id)
        if token is None or token_id in self._skipped:
            return ""
        self._window.append(token_id)
        if self._byte_fallback and _BYTE_TOKEN.fullmatch(token):
            return ""
        text = self._decode(self._window)
        # An unfinished UTF-8 sequence decodes to one replacement character at the end.
        settled = text.removesuffix(_REPLACEMENT) if text.endswith(_REPLACEMENT) else text
        piece = settled[self._num_emitted :]
        self._num_emitted += len(piece)
        if settled is text:
            self._restart()
        elif len(self._window) >= self._longest:
            self._cut(text)
        return piece

    def flush(self) -> str:
        """Return what was held back; the sequence ends here."""
        piece = self._decode(self._window)[self._num_emitted :]
        self._window, self._num_emitted = [], 0
        return piece

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _restart(self) -> None:
        """Keep the last token as context: all is emitted."""
        self._window = self._window[-1:]
        self._num_emitted = len(self._decode(self._window))
        self._longest = _LONGEST_WINDOW

    def _cut(self, text: str) -> None:
        """Drop the tokens before the last place where the text falls into two independent halves."""
        for start in range(len(self._window) - 1, 0, -1):
            head, tail = self._decode(self._window[:start]), self._decode(self._window[start:])
            if tail and head + tail == text:
                self._window = self._window[start:]
                self._num_emitted = max(0, self._num_emitted - len(head))
                return
        self._longest *= 2  # no such place; look again much later


def _decoder_state(tokenizer: Tokenizer) -> str:
    decoder = tokenizer.backend.decoder
    return "" if decoder is None else decoder.__getstate__().decode()
