"""Stores under every schedule: the greedy tokens of a plain loop, wherever keys and values lie."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.support.families import CASES

from elbowroom.bench.schedules import SCHEDULES, Difference, Subject, reference_tokens
from elbowroom.errors import PlanError
from elbowroom.kernels import backend_name
from elbowroom.models.decoder import Decoder
from elbowroom.models.loader import load_model
from elbowroom.models.path import ANY, ComputePath

pytest.importorskip("transformers", reason="the reference implementation is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

NAMES = ("llama", "gemma3-windows")
COUNT = 48


@pytest.fixture(scope="module", params=[case for case in CASES if case.name in NAMES], ids=lambda case: case.name)
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """A tiny model."""
    directory: Path = tmp_path_factory.mktemp(request.param.name)
    request.param.build().save_pretrained(directory)
    return load_model(directory, torch.float32)


@pytest.mark.parametrize(
    ("store", "native_tokens"),
    [("contiguous", 0), ("contiguous", ANY), ("static", ANY)],
    ids=["contiguous-torch", "contiguous-native", "static-native"],
)
def test_tokens_do_not_depend_on_the_store(decoder: Decoder, store: str, native_tokens: int) -> None:
    """Chunking, batching, preemption, forks, rollbacks and samples change no token, contiguous or static."""
    if store == "static" and len({layer.window for layer in decoder.config.layers}) > 1:
        pytest.skip("a static reservation is divided among kinds of layers: their schedules are those of more memory")
    if native_tokens and backend_name() != "native":
        pytest.skip("the native module was not built")
    prompt = torch.randint(0, 199, (150,), generator=torch.Generator().manual_seed(5)).tolist()
    reference, found = reference_tokens(decoder, prompt, COUNT), Difference()
    subject = Subject(decoder, ComputePath(native_tokens), kv_store=store)
    for seed, schedule in enumerate(SCHEDULES.values()):
        for tokens in schedule(subject, prompt, COUNT, seed):
            found.add(tokens, reference)
    assert found.num_tokens >= 10 * COUNT
    assert (found.unexcused, found.excused) == (0, 0)


@pytest.mark.parametrize("store", ["contiguous", "static"])
def test_engine_answers_the_same_from_every_store(store: str) -> None:
    """Generation, batches and branched sessions of the built-in model; bytes stay inside what is charged."""
    from elbowroom import LLM, SamplingParams

    sampling = SamplingParams(max_tokens=24, temperature=0.0)
    prompts = ["def fib(n):", "import os\n" * 40, "class Stack:\n"]
    answers = []
    for name in ("paged", store):
        with LLM(memory="256MiB", kv_store=name) as llm:
            texts = [output.outputs[0].text for output in llm.generate(prompts, sampling)]
            with llm.session(prompts[1]) as session:
                texts += [session.fork().ask(end, sampling).outputs[0].text for end in ("import ", "from ")]
            llm.engine.check_integrity()
            answers.append(texts)
    assert answers[0] == answers[1]


def test_sequences_of_a_contiguous_store_are_saved_and_loaded(tmp_path: Path) -> None:
    """Requests that do not fit beside each other give way to each other's turns: the answers of a roomy engine."""
    from elbowroom import LLM, SamplingParams, Scheduling

    sampling = SamplingParams(max_tokens=500, temperature=0.0, ignore_eos=True)
    prompts = [f"def step_{number}(value):\n" * 8 for number in range(6)]
    with LLM(memory="256MiB") as llm:
        roomy = [output.outputs[0].token_ids for output in llm.generate(prompts, sampling)]
    scheduling = Scheduling(preemption="swap", swap_directory=tmp_path)
    with LLM(memory="33MiB", kv_store="contiguous", scheduling=scheduling) as llm:
        tight = [output.outputs[0].token_ids for output in llm.generate(prompts, sampling)]
        stats = llm.engine.stats()
        llm.engine.check_integrity()
    assert tight == roomy
    assert stats.swaps_in > 0


def test_engine_refuses_what_a_store_cannot_keep() -> None:
    """The contiguous store takes one plain plan; the error comes before the model is read."""
    from elbowroom import LLM

    with pytest.raises(PlanError, match="--kv-store paged"):
        LLM(memory="256MiB", kv="int8", kv_store="contiguous")
    with pytest.raises(PlanError, match="one plan"):
        LLM(memory="256MiB", kv_relief="int8", kv_store="contiguous")
