"""Rivals compute the model that they are measured on: llama.cpp from our file agrees with transformers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from elbowroom.bench import gguf_file
from elbowroom.bench.families import write_family
from elbowroom.bench.gguf_file import write_gguf
from elbowroom.bench.side import SIDES, Side, rival_environment

missing = [name for name in ("gguf", "llama_cpp", "transformers") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}"),
    pytest.mark.filterwarnings("ignore"),
]

PROMPTS = [[(31 * place + 7 * stream + place**2) % 512 for place in range(40)] for stream in range(3)]
NEW_TOKENS = 24
TOLERANCE = 0.05
"""Of log-probabilities, which spread over about 20 here; float16 weights and activations."""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Path, Any]:
    """Return the directory of a Llama whose weights are large enough that every position counts, and the model."""
    directory = tmp_path_factory.mktemp("llama")
    return directory, write_family("llama", directory)


def loaded(directory: Path, file: Path) -> Side:
    write_gguf(directory, file)
    side = Side(SIDES / "llamacpp.py", rival_environment(1))
    side.ask("load", file=str(file), num_streams=3, stream_tokens=100, num_threads=1)
    return side


def largest_error(side: Side, model: Any) -> float:
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPTS[0]]), use_cache=False).logits[0, -1]
    scored = side.ask("score", prompt=PROMPTS[0], ids=list(range(512)))["logprobs"]
    return float((torch.tensor(scored) - logits.log_softmax(-1)).abs().max())


def greedy(side: Side) -> list[list[int]]:
    """Return the tokens behind the prompts, which do not depend on what was decoded and rewound before."""
    side.ask("read", prompts=PROMPTS)
    made, again = (side.ask("extend", new_tokens=NEW_TOKENS)["token_ids"] for _ in range(2))
    assert made == again
    return made


def test_llamacpp_agrees_with_transformers(world, tmp_path):
    """Log-probabilities of all tokens, and greedy tokens of three sequences that decode in one batch."""
    directory, model = world
    with loaded(directory, tmp_path / "model.gguf") as side:
        assert largest_error(side, model) < TOLERANCE
        made = greedy(side)
    with Side(SIDES / "hf.py", rival_environment(1)) as side:
        side.ask("load", directory=str(directory), dtype="float32", num_threads=1)
        expected = greedy(side)
    assert made == expected


def test_the_comparison_notices_heads_in_the_wrong_order(world, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_file, "interleaved", lambda rows, _num_heads: rows)
    directory, model = world
    with loaded(directory, tmp_path / "model.gguf") as side:
        assert largest_error(side, model) > 10 * TOLERANCE
