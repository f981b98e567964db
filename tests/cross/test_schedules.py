"""Every family under every schedule: always the greedy tokens of a plain loop and of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.families import CASES, Case

from elbowroom.bench.schedules import SCHEDULES, Difference, Reference, Subject, reference_tokens
from elbowroom.kernels import backend_name
from elbowroom.models.decoder import Decoder
from elbowroom.models.loader import load_model
from elbowroom.models.path import ANY, ComputePath

pytest.importorskip("transformers", reason="the reference implementation is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

NAMES = ("llama", "mistral-window", "qwen2", "qwen3", "gemma3-windows")
COUNT = 64
LENGTHS = (1, 100, 170)


@pytest.fixture(scope="module", params=[case for case in CASES if case.name in NAMES], ids=lambda case: case.name)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Any, Decoder]:
    """A tiny model as transformers has it, and as we load it."""
    model = request.param.build()
    directory: Path = tmp_path_factory.mktemp(request.param.name)
    model.save_pretrained(directory)
    return request.param, model, load_model(directory, torch.float32)


@pytest.fixture(scope="module")
def references(family: tuple[Case, Any, Decoder]) -> list[tuple[list[int], Reference]]:
    """Prompts, and what a plain loop makes of them."""
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(0, 199, (length,), generator=generator).tolist() for length in LENGTHS]
    return [(prompt, reference_tokens(family[2], prompt, COUNT)) for prompt in prompts]


def test_the_plain_loop_is_that_of_transformers(
    family: tuple[Case, Any, Decoder], references: list[tuple[list[int], Reference]]
) -> None:
    """Our reference is generate(do_sample=False) of transformers."""
    model = family[1]
    model.generation_config.eos_token_id = None
    found = Difference()
    for prompt, reference in references:
        with torch.no_grad():
            tokens = torch.tensor([prompt])
            made = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=COUNT, do_sample=False)
        found.add(made[0, len(prompt) :].tolist(), reference)
    assert (found.unexcused, found.excused) == (0, 0)


@pytest.mark.parametrize("native_tokens", [0, 8, ANY], ids=["torch", "native-decode", "native"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_tokens_do_not_depend_on_the_schedule(
    family: tuple[Case, Any, Decoder], references: list[tuple[list[int], Reference]], name: str, native_tokens: int
) -> None:
    """Chunking, batching, preemption, cache hits, forks, rollbacks, samples and the compute path change no token."""
    if native_tokens and backend_name() != "native":
        pytest.skip("the native module was not built")
    found = Difference()
    # In torch, which is slow, every other schedule reads the longest prompt, and the others the one before.
    left_out = len(LENGTHS) - 1 - list(SCHEDULES).index(name) % 2 if native_tokens == 0 else None
    for seed, (prompt, reference) in enumerate(references):
        if seed == left_out:
            continue
        if len(prompt) > 1 or name not in ("preempted", "forked", "rolled_back", "prefix_hit"):
            for tokens in SCHEDULES[name](Subject(family[2], ComputePath(native_tokens)), prompt, COUNT, seed):
                found.add(tokens, reference)
    assert found.num_tokens >= COUNT
    assert (found.unexcused, found.excused) == (0, 0)
