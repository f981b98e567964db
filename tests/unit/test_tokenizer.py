"""Text to ids and back, at once and token by token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from elbowroom.errors import RequestError, TokenizerError
from elbowroom.models.stream import StreamDecoder
from elbowroom.models.tokenizer import Tokenizer

BYTE_CHARS = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ["<s>", "</s>"]


def with_specials(backend: Backend) -> Backend:
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    backend.add_tokens([AddedToken("<plain>", special=False)])
    return backend


def byte_level() -> Backend:
    """All 256 bytes, and merged tokens that start and end inside a character."""
    merged = ["Ġthe", "Ġa", "é", "\u00e4\u00b8", "Ńæ", "ðŁ", "ðŁĺ", "ï¿", "ï¿½"]
    backend = Backend(models.BPE({text: id_ for id_, text in enumerate([*BYTE_CHARS, *merged])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return with_specials(backend)


def sentencepiece() -> Backend:
    """Leading-space pieces with byte tokens for the rest, as in Llama 2."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", "▁the", "▁a", "b", "c", "é", "�", "▁▁", "中"]
    backend = Backend(models.BPE({text: id_ for id_, text in enumerate(pieces)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return with_specials(backend)


def word_list(decoder: object) -> Backend:
    words = ["▁the", "▁a", "▁", "cat", "##s", ".", "n't", "x</w>", "y", "�"]
    backend = Backend(models.WordLevel({text: id_ for id_, text in enumerate(words)}, unk_token="▁"))
    if decoder is not None:
        backend.decoder = decoder
    return with_specials(backend)


BACKENDS = {
    "byte_level": byte_level(),
    "sentencepiece": sentencepiece(),
    "metaspace": word_list(decoders.Metaspace()),
    "wordpiece": word_list(decoders.WordPiece()),
    "bpe_suffix": word_list(decoders.BPEDecoder()),
    "none": word_list(None),
}


def pieces_of(tokenizer: Tokenizer, ids: list[int], *, skip: bool = True) -> list[str]:
    decoder = StreamDecoder(tokenizer, skipped=tokenizer.special_ids if skip else frozenset())
    return [*(decoder.push(token) for token in ids), decoder.flush()]


@pytest.mark.parametrize("name", BACKENDS)
@given(data=st.data(), skip=st.booleans())
@settings(max_examples=150, deadline=None)
def test_pieces_joined_are_the_whole_text(name: str, data: st.DataObject, skip: bool) -> None:
    tokenizer = Tokenizer(BACKENDS[name])
    size = tokenizer.vocab_size
    tokens = st.integers(0, size + 1) | st.integers(max(0, size - 14), size - 1)  # two ids beyond the vocabulary
    ids = data.draw(st.lists(tokens, max_size=80))
    assert "".join(pieces_of(tokenizer, ids, skip=skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40).filter(lambda text: "\ufffd" not in text))
@settings(max_examples=150, deadline=None)
def test_no_piece_holds_half_a_character(name: str, text: str) -> None:
    tokenizer = Tokenizer(BACKENDS[name])
    if name == "byte_level":
        ids = tokenizer.encode(text)
    else:  # every byte its own token
        ids = [tokenizer.backend.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
    pieces = pieces_of(tokenizer, ids)
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == tokenizer.decode(ids)


def test_characters_are_not_kept_back_longer_than_needed() -> None:
    tokenizer = Tokenizer(BACKENDS["byte_level"])
    assert pieces_of(tokenizer, tokenizer.encode("a b中")) == ["a", " ", "b", "", "", "中", ""]


@pytest.mark.parametrize("tokens", ["Ķ", "ä", "ðŁĺ"])
def test_the_window_stays_short_even_for_bytes_that_are_no_text(tokens: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(BACKENDS["byte_level"])
    ids = [tokenizer.backend.token_to_id(token) for token in tokens] * 200
    whole = tokenizer.decode(ids)
    work = []
    decode = Tokenizer.decode

    def counted(self: Tokenizer, some: list[int], *, skip_special_tokens: bool = True) -> str:
        work.append(len(some))
        return decode(self, some, skip_special_tokens=skip_special_tokens)

    monkeypatch.setattr(Tokenizer, "decode", counted)
    assert "".join(pieces_of(tokenizer, ids)) == whole
    assert max(work) <= 32
    assert sum(work) <= 40 * len(ids)


def test_a_directory_gives_ids_special_tokens_and_stops(tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(2)
    backend.enable_padding()
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": "<plain>"}')
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}, "pad_token": null}')
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    eos = tokenizer.backend.token_to_id("</s>")
    assert tokenizer.eos_token_ids == (eos,)
    assert tokenizer.bos_token_id == tokenizer.backend.token_to_id("<s>")
    assert tokenizer.decode(tokenizer.encode("longer than two")) == "longer than two"
    assert tokenizer.decode([eos]) == ""
    assert tokenizer.decode([eos], skip_special_tokens=False) == "</s>"
    for written, expected in ((5, (5,)), ([5, 6], (5, 6)), (None, (eos,))):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": written}))
        assert Tokenizer.from_directory(tmp_path).eos_token_ids == expected


def test_a_model_without_tokenizer_takes_ids_and_refuses_text(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert not tokenizer.available
    assert tokenizer.stream_decoder() is None
    tokenizer.check_ids([0, 9], 10)
    for use in (lambda: tokenizer.encode("text"), lambda: tokenizer.decode([1]), lambda: tokenizer.vocab_size):
        with pytest.raises(TokenizerError, match=r"no tokenizer\.json") as error:
            use()
        assert "token ids" in str(error.value.hint)


@pytest.mark.parametrize("ids", [[10], [3, -1], [2**40]])
def test_ids_without_embedding_are_refused(ids: list[int]) -> None:
    with pytest.raises(RequestError, match="not one of the model's 10"):
        Tokenizer(None).check_ids(ids, 10)
    Tokenizer(None).check_ids([], 10)


def test_impossible_requests() -> None:
    tokenizer = Tokenizer(BACKENDS["byte_level"])
    with pytest.raises(RequestError, match="not valid Unicode"):
        tokenizer.encode("a\ud800")
    for token in (-1, 2**32):
        with pytest.raises(RequestError, match="whole numbers"):
            tokenizer.decode([token])
        with pytest.raises(RequestError, match="whole numbers"):
            StreamDecoder(tokenizer).push(token)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", '{"version": "1.0", "mod'),
        ("tokenizer.json", "[]"),
        ("tokenizer_config.json", '{"eos_token": 3}'),
        ("special_tokens_map.json", "nothing"),
        ("generation_config.json", '{"eos_token_id": "</s>"}'),
        ("generation_config.json", "[1]"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, file: str, content: str) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(TokenizerError, match=file):
        Tokenizer.from_directory(tmp_path)


def test_a_pattern_decoder_is_streamed_with_its_context() -> None:
    backend = word_list(decoders.Sequence([decoders.Replace(Regex("▁"), " "), decoders.Fuse()]))
    tokenizer = Tokenizer(backend)
    ids = [tokenizer.backend.token_to_id(text) for text in ("▁the", "cat", "▁", "▁a")]
    assert pieces_of(tokenizer, ids) == [" the", "cat", " ", " a", ""]
