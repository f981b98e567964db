"""A real trained checkpoint: its greedy text is published with llama2.c."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.support.llama2c import STORIES, convert, vocabulary

from elbowroom.models.dense import DenseContext
from elbowroom.models.loader import load_model

pytestmark = pytest.mark.skipif(not STORIES.exists(), reason=f"no checkpoint at {STORIES} (set ELBOWROOM_DATA)")

BOS = 1
TEXT = b"Once upon a time, there was a little girl named Lily. She loved to play outside in the park"


def test_greedy_text_is_the_published_one(tmp_path: Path) -> None:
    convert(STORIES / "stories260K.bin", tmp_path)
    decoder = load_model(tmp_path, torch.float32)
    tokens, vocab = [BOS], vocabulary(STORIES / "tok512.bin", decoder.config.vocab_size)
    text = b""
    while len(text) <= len(TEXT):
        context = DenseContext(decoder.config.layers, 1, len(tokens))
        with torch.no_grad():
            hidden = decoder(torch.tensor(tokens), context)
            tokens.append(int(decoder.logits(hidden[-1:]).argmax()))
        text = b"".join(vocab[token] for token in tokens[1:]).lstrip()
    assert text.startswith(TEXT)
