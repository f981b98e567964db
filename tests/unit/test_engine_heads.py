"""KV heads that go, in the engine: logits are those of a model that computes the rest without them."""

from __future__ import annotations

import pytest
import torch
from tests.support.decoder_world import VOCAB, config, random_decoder, spec
from torch import Tensor

from elbowroom.bench.schedules import Stepper, Subject
from elbowroom.engine.llm import LLM
from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.kernels import backend_name
from elbowroom.kv.heads import Places
from elbowroom.models.dense import DenseContext
from elbowroom.models.path import ANY, ComputePath

LAYERS = [spec(8, 4, 16), spec(8, 4, 16, window=40), spec(8, 4, 16), spec(8, 4, 16)]
PROMPT = 150


class Pruned(DenseContext):
    """Dense attention in which tokens behind a prompt get nothing from heads that are gone."""

    def __init__(self, length: int, places: Places) -> None:
        super().__init__(LAYERS, 1, length)
        self._places = places

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = super().attend(layer, q, k, v)
        gone = torch.from_numpy(self._places[layer] < 0).repeat_interleave(LAYERS[layer].group_size)
        out[PROMPT:, gone] = 0.0
        return out


@pytest.mark.parametrize("native_tokens", [0, ANY] if backend_name() == "native" else [0])
@pytest.mark.parametrize("kv", ["heads(0.5,skip=1)", "heads(0.75,last=0.25,skip=0)"])
def test_tokens_behind_a_prompt_are_those_of_a_model_without_these_heads(native_tokens: int, kv: str) -> None:
    decoder = random_decoder(config(*LAYERS))
    stepper = Stepper(Subject(decoder, ComputePath(native_tokens), kv), 1024, chunk=lambda: 64)
    prompt = torch.randint(0, VOCAB, (PROMPT,), generator=torch.Generator().manual_seed(5)).tolist()
    stepper.add(0, prompt, 80)
    places: Places = ()
    while stepper.scheduler.has_work():
        stepper.step()
        places = next((each.places for each in stepper.store._sequences.values() if each.places), places)
    made = stepper.tokens[0, 0]
    stepper.close()

    tokens = torch.tensor([*prompt, *made[:-1]])
    with torch.inference_mode():
        whole, pruned = (
            decoder.logits(decoder(tokens, context)[PROMPT - 1 :])
            for context in (DenseContext(LAYERS, 1, len(tokens)), Pruned(len(tokens), places))
        )
    assert pruned.argmax(1).tolist() == made
    assert float((whole - pruned)[1:].abs().max()) > 0.1, "or nothing shows that heads are gone"


def test_the_built_in_model_holds_half_of_half_its_layers_for_a_whole_session() -> None:
    """Later prompts choose nothing anew."""
    with LLM(None, "64MiB", "heads(0.5,skip=3)") as llm:
        tokens = llm.tokenizer.encode("def add(a, b):\n    return a + b\n" * 40)
        with llm.session(tokens) as session:
            for question in ("x = add(1, ", "y = add(2, "):
                made = session.ask(question, SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True))
                assert len(made.outputs[0].token_ids) == 40
            report = llm.engine.kv_report()
    tail = 64 * report.bf16_bytes // report.num_tokens
    assert 0.7 < (report.live_bytes - tail) / report.bf16_bytes < 0.8, "three layers of six hold half"
