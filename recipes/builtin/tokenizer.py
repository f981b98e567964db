"""The built-in model's tokenizer: byte-level BPE of 2,048 entries over Python text and samples of the tasks.

Whole lines tokenize independently of each other, every word carries its leading space, digits go in groups of at
most two (a six-digit number with its space is three tokens).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from elbowroom.evals.facts import random_key, random_value
from recipes.builtin.data import training_texts

VOCAB_SIZE = 2048
SPECIAL_TOKENS = ("<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
PATTERN = r" ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|[\r\n]+|[^\S\r\n]+(?![^\s])|[^\S\r\n]+(?=[^\S\r\n]\S)|\s"
"""Word, digit pair, punctuation, each with one leading space; line breaks; indentation but its last space."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
NUM_FACT_LINES = 120_000
"""Synthetic lines in the tokenizer's training text: enough for nearly every pair of letters and of digits."""


def build_tokenizer() -> Tokenizer:
    """Train the tokenizer; the result depends on the interpreter's standard library only."""
    tokenizer = Tokenizer(models.BPE())
    splitter = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([splitter, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = np.random.default_rng(0)
    lines = [f" {random_key(rng)} {random_value(rng)}\n" for _ in range(NUM_FACT_LINES)]
    tokenizer.train_from_iterator([*training_texts(), *lines], trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` (with the chat template) into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 4096,
        "pad_token": "<|pad|>",
        "eos_token": "<|end|>",
        "additional_special_tokens": ["<|system|>", "<|user|>", "<|assistant|>"],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load ``folder``'s tokenizer, training and saving it first when there is none."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        save_tokenizer(build_tokenizer(), folder)
    return Tokenizer.from_file(str(path))
