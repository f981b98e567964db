"""Text to token ids and back: a thin wrapper over the ``tokenizers`` library, special tokens and the chat template.

A directory without tokenizer.json is usable with token ids alone; only asking it for text is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from elbowroom.errors import RequestError, TokenizerError
from elbowroom.models.chat import ChatTemplate, Message
from elbowroom.models.fields import Fields, read_object
from elbowroom.models.stream import StreamDecoder

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """Encodes and decodes for one model.

    Args:
        backend: the tokenizer of the ``tokenizers`` library, or None when the model has none.
        special_tokens: text of ``bos_token``, ``eos_token``, ``unk_token`` and ``pad_token``, as far as there are any.
        eos_token_ids: ids at which generation stops; by default the id of ``eos_token``.
        chat_template: by default none.
        source: where it came from, for error messages.
    """

    def __init__(
        self,
        backend: Backend | None,
        special_tokens: Mapping[str, str] | None = None,
        eos_token_ids: Sequence[int] = (),
        chat_template: ChatTemplate | None = None,
        source: str = "this model",
    ) -> None:
        self._backend, self._source = backend, source
        self.special_tokens = dict(special_tokens or {})
        eos = self._special_id("eos_token")
        self.eos_token_ids = tuple(eos_token_ids) or (() if eos is None else (eos,))
        self.bos_token_id = self._special_id("bos_token")
        self.chat_template = chat_template or ChatTemplate({}, self.special_tokens, source)

    @classmethod
    def from_directory(cls, directory: Path) -> Tokenizer:
        """Return the tokenizer and chat template of a model directory.

        Reads tokenizer.json, special tokens from tokenizer_config.json or special_tokens_map.json, and stop tokens
        from generation_config.json; each may be absent.

        Raises:
            TokenizerError: one of the files is malformed.
        """
        special_tokens = _special_tokens(directory)
        generation = _optional_fields(directory / "generation_config.json")
        return cls(
            _load_backend(directory / "tokenizer.json"),
            special_tokens,
            generation.token_ids("eos_token_id"),
            ChatTemplate.from_directory(directory, special_tokens),
            str(directory),
        )

    @property
    def available(self) -> bool:
        """Whether text can be encoded and decoded."""
        return self._backend is not None

    @property
    def backend(self) -> Backend:
        """The tokenizer of the ``tokenizers`` library.

        Raises:
            TokenizerError: the model has none.
        """
        if self._backend is None:
            raise TokenizerError(
                f"{self._source} has no tokenizer.json, and text was given or asked for",
                "pass token ids, or put the model's tokenizer.json into the directory",
            )
        return self._backend

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that ``skip_special_tokens`` leaves out."""
        return frozenset(id_ for id_, token in self.backend.get_added_tokens_decoder().items() if token.special)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of ``text``; a rendered chat template has its special tokens already.

        Raises:
            TokenizerError: the model has no tokenizer.
            RequestError: the text is not valid Unicode.
        """
        backend = self.backend
        try:
            text.encode()
        except UnicodeEncodeError as reason:
            raise RequestError(f"the text is not valid Unicode: {reason.reason}", "remove lone surrogates") from reason
        ids: list[int] = backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of ``ids``; ids without a token give no text, incomplete UTF-8 gives U+FFFD.

        Raises:
            TokenizerError: the model has no tokenizer.
            RequestError: an id is negative or above 32 bits.
        """
        backend = self.backend
        try:
            text: str = backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        except (OverflowError, TypeError) as reason:
            raise RequestError("token ids must be whole numbers from 0 to 2^32 - 1", "check the ids") from reason
        return text

    def stream_decoder(
        self, *, skip_special_tokens: bool = True, shown: frozenset[int] = frozenset()
    ) -> StreamDecoder | None:
        """Return a decoder of one sequence token by token, or None when the model has no tokenizer.

        Special tokens are skipped but for those in ``shown``.
        """
        if not self.available:
            return None
        return StreamDecoder(self, skipped=self.special_ids - shown if skip_special_tokens else frozenset())

    def check_ids(self, ids: Sequence[int], vocab_size: int) -> None:
        """Check token ids that a user gave against the model's ``vocab_size``; needs no tokenizer.

        Raises:
            RequestError: an id has no embedding.
        """
        for id_ in ids and (min(ids), max(ids)):
            if not 0 <= id_ < vocab_size:
                raise RequestError(
                    f"token id {id_} is not one of the model's {vocab_size}", "use the tokenizer of this model"
                )

    def apply_chat_template(self, messages: Sequence[Message], **options: Any) -> str:
        """Return the prompt of a conversation; options and errors as in ``ChatTemplate.render``."""
        return self.chat_template.render(messages, **options)

    def _special_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        if self._backend is None or text is None:
            return None
        id_: int | None = self._backend.token_to_id(text)
        return id_


def _load_backend(path: Path) -> Backend | None:
    if not path.exists():
        return None
    try:
        backend = Backend.from_file(str(path))
    except Exception as reason:  # the library raises bare Exception for every malformed file
        raise TokenizerError(f"{path} cannot be read: {reason}", "download the file again") from reason
    backend.no_truncation()  # a file may have been saved with training's settings
    backend.no_padding()
    return backend


def _optional_fields(path: Path) -> Fields:
    values = read_object(path, TokenizerError) if path.exists() else {}
    return Fields(values, str(path), error=TokenizerError)


def _special_tokens(directory: Path) -> dict[str, str]:
    tokens: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):  # the later one counts
        fields = _optional_fields(directory / file)
        for name in _SPECIAL_NAMES:
            value = fields.get(name)
            if isinstance(value, dict):
                value = value.get("content")
            if isinstance(value, str):
                tokens[name] = value
            elif value is not None:
                raise fields.wrong(name, "a token's text")
    return tokens
