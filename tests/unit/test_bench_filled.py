"""A context that nobody read: an engine decodes behind random keys and values as behind real ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.tiny_model import write_tiny_model

from elbowroom.bench.filled_cache import fill_prefix
from elbowroom.bench.patching import replaced
from elbowroom.engine.llm import LLM
from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.errors import RequestError

GREEDY = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)


@pytest.fixture
def llm(tmp_path: Path):
    with LLM(str(write_tiny_model(tmp_path, context=4096)), "64MiB") as made:
        yield made


def test_a_filled_prefix_is_used_and_paid_for(llm):
    tokens = [token % 256 for token in range(1280)]
    fill_prefix(llm.engine, tokens)
    llm.engine.check_integrity()
    held = llm.engine.kv_report()
    assert held.num_tokens == 1280
    outputs = [llm.generate({"prompt_token_ids": [*tokens, 1]}, GREEDY)[0] for _ in range(2)]
    assert [output.cached_tokens for output in outputs] == [1280, 1280]
    assert outputs[0].outputs[0].token_ids == outputs[1].outputs[0].token_ids
    assert llm.engine.kv_report().live_bytes == held.live_bytes
    llm.clear_cache()
    llm.engine.check_integrity()
    assert llm.engine.kv_report().num_tokens == 0


def test_the_keys_depend_on_the_seed(llm):
    tokens = [token % 256 for token in range(640)]
    made = set()
    for seed in range(3):
        fill_prefix(llm.engine, tokens, seed)
        made.add(tuple(llm.generate({"prompt_token_ids": [*tokens, 1]}, GREEDY)[0].outputs[0].token_ids))
        llm.clear_cache()
    assert len(made) > 1


def test_a_part_of_a_block_is_refused(llm):
    with pytest.raises(RequestError, match="multiple of 64"):
        fill_prefix(llm.engine, [1] * 100)


class Clock:
    def tick(self) -> int:
        return 1


def test_a_replaced_method_comes_back():
    clock = Clock()
    with replaced(clock, "tick", lambda: 2), replaced(Clock, "tick", lambda _: 3):
        assert (clock.tick(), Clock().tick()) == (2, 3)
    assert (clock.tick(), vars(clock)) == (1, {})


def test_what_does_not_exist_cannot_be_replaced():
    with pytest.raises(AttributeError), replaced(Clock, "tock", lambda _: 3):
        pass
    assert not hasattr(Clock, "tock")
