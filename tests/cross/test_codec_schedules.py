"""Every query-agnostic codec under every schedule: what a query reads depends on positions only."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch
from tests.support.families import CASES

from elbowroom.bench.paged_logits import paged_logits
from elbowroom.bench.schedules import SCHEDULES, Difference, Reference, Subject
from elbowroom.kernels import backend_name
from elbowroom.models.decoder import Decoder
from elbowroom.models.loader import load_model
from elbowroom.models.path import ANY, ComputePath

pytest.importorskip("transformers", reason="the reference implementation is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

PLANS = ("int8", "fp8", "bfp(k=8,v=4,n=16)", "kivi(k=2,v=2,g=32)", "kivi(k=4,v=4,g=64)", "planes(g=16)")
COUNT = 48
LENGTHS = (100, 170)
GAP = 0.005
"""Passes of other shapes round keys differently in the last bit, and a code on the edge may fall to the other side."""


@pytest.fixture(scope="module", params=["llama", "gemma3-windows"])
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """A tiny model with random weights."""
    directory: Path = tmp_path_factory.mktemp(request.param)
    next(case for case in CASES if case.name == request.param).build().save_pretrained(directory)
    return load_model(directory, torch.float32)


def reference(decoder: Decoder, prompt: list[int], kv: str) -> Reference:
    """The greedy tokens of one request alone, chosen from the logits of one pass over all of them.

    Tokens are guessed until that pass chooses the same ones; then each was chosen from what stands before it.
    """
    guess = [0] * COUNT
    if backend_name() == "native":
        guess = SCHEDULES["one_shot"](Subject(decoder, ComputePath(ANY), kv), prompt, COUNT, 0)[0]
    while True:
        tokens = [*prompt, *guess[:-1]]
        best = paged_logits(decoder, tokens, len(tokens), ComputePath(0), kv)[len(prompt) - 1 :].topk(2)
        chosen = best.indices[:, 0].tolist()
        if chosen == guess:
            return Reference(guess, (best.values[:, 0] - best.values[:, 1]).tolist())
        guess = chosen


@pytest.mark.parametrize("kv", PLANS)
def test_tokens_do_not_depend_on_the_schedule(decoder: Decoder, kv: str) -> None:
    """Chunking, batching, preemption, cache hits, forks, rollbacks, samples and the compute path change no token.

    Every two of schedule, path and length meet; each schedule reads one length in torch and the other natively.
    """
    generator = torch.Generator().manual_seed(5)
    found = Difference()
    prompts = [torch.randint(0, 199, (length,), generator=generator).tolist() for length in LENGTHS]
    expected = [reference(decoder, prompt, kv) for prompt in prompts]
    for each in expected:
        assert statistics.median(each.gaps) > 5 * GAP, "most choices are too close to prove anything"
    paths = [ComputePath(0), ComputePath(ANY)] if backend_name() == "native" else [ComputePath(0)]
    for first, path in enumerate(paths):
        for seed, schedule in enumerate(SCHEDULES.values()):
            which = (first + seed) % len(LENGTHS)
            for tokens in schedule(Subject(decoder, path, kv), prompts[which], COUNT, seed):
                found.add(tokens, expected[which], GAP)
    assert found.num_tokens > 400 * len(paths)
    assert found.unexcused == 0
    assert found.excused <= found.num_tokens // 100
