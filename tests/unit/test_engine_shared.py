"""Requests that continue one cached prefix give the tokens that each gives alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.support.tiny_model import write_tiny_model

from elbowroom.bench.patching import replaced
from elbowroom.engine.llm import LLM
from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.kernels import LayerStrips
from elbowroom.kv.base import KVStep

PREFIX, MEMBERS = 320, 10
SAMPLING = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)


def prompts() -> list[dict[str, list[int]]]:
    random = torch.Generator().manual_seed(3)
    prefix = torch.randint(32, 120, (PREFIX,), generator=random).tolist()
    return [{"prompt_token_ids": [*prefix, *range(40, 44 + i)]} for i in range(MEMBERS)]


@pytest.mark.parametrize("kv", ["plain", "int8"])
def test_members_of_a_prefix_give_the_tokens_that_each_gives_alone(tmp_path: Path, kv: str) -> None:
    directory = str(write_tiny_model(tmp_path / "tiny", context=512))
    with LLM(directory, "256MiB", kv=kv, dtype="float32", prefix_cache=False) as llm:
        alone = [llm.generate(prompt, SAMPLING)[0].outputs[0].token_ids for prompt in prompts()]
    most = [0]

    with LLM(directory, "256MiB", kv=kv, dtype="float32", max_sequences=MEMBERS) as llm:
        llm.generate(prompts()[0], SAMPLING)
        strips = llm.engine.parts.store.strips

        def watch(layer: int, step: KVStep) -> LayerStrips | None:
            found = strips(layer, step)
            if found is not None and len(found.table) == MEMBERS:
                most[0] = max(most[0], int((found.table == found.table[0]).all(0).sum()))
            return found

        with replaced(llm.engine.parts.store, "strips", watch):
            together = [each.outputs[0].token_ids for each in llm.generate(prompts(), SAMPLING)]

    assert together == alone
    assert most[0] >= PREFIX // 64, "no step had all members with their shared strips"
