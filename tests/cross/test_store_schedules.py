"""Stores under every schedule: the greedy tokens of a plain loop, wherever keys and values lie."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.support.families import CASES

from elbowroom.bench.schedules import SCHEDULES, Difference, Subject, reference_tokens
from elbowroom.kernels import backend_name
from elbowroom.models.decoder import Decoder
from elbowroom.models.loader import load_model
from elbowroom.models.path import ANY, ComputePath

pytest.importorskip("transformers", reason="the reference implementation is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

NAMES = ("llama", "mistral-window", "gemma3-windows")
COUNT = 48


@pytest.fixture(scope="module", params=[case for case in CASES if case.name in NAMES], ids=lambda case: case.name)
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """A tiny model."""
    directory: Path = tmp_path_factory.mktemp(request.param.name)
    request.param.build().save_pretrained(directory)
    return load_model(directory, torch.float32)


@pytest.mark.parametrize("native_tokens", [0, ANY], ids=["torch", "native"])
@pytest.mark.parametrize("store", ["contiguous", "static"])
def test_tokens_do_not_depend_on_the_store(decoder: Decoder, store: str, native_tokens: int) -> None:
    """Chunking, batching, preemption, forks, rollbacks and samples change no token, contiguous or static."""
    if store == "static" and len({layer.window for layer in decoder.config.layers}) > 1:
        pytest.skip("a static reservation is divided among kinds of layers: their schedules are those of more memory")
    if native_tokens and backend_name() != "native":
        pytest.skip("the native module was not built")
    prompt = torch.randint(0, 199, (130,), generator=torch.Generator().manual_seed(5)).tolist()
    reference, found = reference_tokens(decoder, prompt, COUNT), Difference()
    subject = Subject(decoder, ComputePath(native_tokens), kv_store=store)
    for seed, schedule in enumerate(SCHEDULES.values()):
        for tokens in schedule(subject, prompt, COUNT, seed):
            found.add(tokens, reference)
    assert found.num_tokens >= 10 * COUNT
    assert (found.unexcused, found.excused) == (0, 0)
