"""Which calls of a transformers model read and end prompts, without the library."""

from __future__ import annotations

import pytest

from elbowroom.errors import RequestError
from elbowroom.kv.adapters.hf_generate import unwatch_generate, watch_generate
from elbowroom.kv.adapters.hf_prompts import Prompts
from elbowroom.kv.base import PromptPart

NONE, PART, END = PromptPart.NONE, PromptPart.PART, PromptPart.END


class Columns:
    """A cache that only counts."""

    def __init__(self, chosen_layers: tuple[int, ...] = (0,), interval: int = 0) -> None:
        self.prompts, self.count = Prompts(chosen_layers, interval), 0

    def get_seq_length(self) -> int:
        return self.count

    def generating(self, until: int):
        return self.prompts.generating(until)

    def call(self, *sizes: int) -> list[PromptPart]:
        parts = []
        for size in sizes:
            parts.append(self.prompts.part(self.count, size))
            self.prompts.end(parts[-1], self.count, size)
            self.count += size
        return parts


def test_a_call_of_several_tokens_ends_a_prompt_and_single_tokens_decode() -> None:
    cache = Columns()
    assert cache.call(30, 1, 1, 5, 1) == [END, NONE, NONE, END, NONE]
    assert Columns().call(1, 1) == [END, NONE]


def test_choices_come_behind_so_many_decoded_tokens() -> None:
    cache = Columns(interval=3)
    assert cache.call(30, 1, 1, 1, 1, 1, 1) == [END, NONE, NONE, PromptPart.CHOICE, NONE, NONE, PromptPart.CHOICE]
    assert cache.call(5, 1, 1, 1) == [END, NONE, NONE, PromptPart.CHOICE]
    assert cache.prompts.fork().part(cache.count + 2, 1) is PromptPart.CHOICE


@pytest.mark.parametrize("last", [1, 9])
def test_the_call_behind_parts_ends_the_prompt_however_short(last: int) -> None:
    cache = Columns()
    with cache.prompts.reading():
        assert cache.call(30, 1, 20) == [PART, PART, PART]
        with pytest.raises(RequestError, match="already"), cache.prompts.reading():
            pass
    assert cache.call(last, 1) == [END, NONE]
    with cache.prompts.reading():
        pass
    assert cache.call(1) == [NONE]


def test_a_copy_has_the_open_prompt_and_not_the_block() -> None:
    cache = Columns()
    with cache.prompts.reading():
        cache.call(30)
        twin = Columns()
        twin.prompts, twin.count = cache.prompts.fork(), 30
    assert twin.call(1, 1) == [END, NONE]
    cache.prompts.cut(20)
    assert cache.prompts.begun == 0
    cache.prompts.cut(0)
    assert cache.prompts.begun is None


@pytest.mark.parametrize(
    ("sizes", "parts"), [((100, 1), [END, NONE]), ((33, 33, 33, 1, 1), [PART, PART, PART, END, NONE])]
)
def test_generate_ends_a_prompt_where_it_ends(sizes: tuple[int, ...], parts: list[PromptPart]) -> None:
    cache = Columns()
    with cache.prompts.generating(100):
        assert cache.call(*sizes) == parts
        for size in (2, 5):
            with pytest.raises(RequestError, match="assisted"):
                cache.call(size)
        with pytest.raises(RequestError, match="already"), cache.prompts.reading():
            pass


def test_drafts_are_refused_only_where_something_is_chosen() -> None:
    cache = Columns()
    with cache.prompts.generating(100), pytest.raises(RequestError, match="beyond the prompt of 100 columns"):
        cache.call(103)
    with (free := Columns(())).prompts.generating(100):
        assert free.call(103, 4) == [NONE, NONE]


class Model:
    """Reads its input in calls of ``sizes``."""

    def generate(self, inputs: object = None, sizes: tuple[int, ...] = (), **kwargs: Columns) -> list[PromptPart]:
        return kwargs["past_key_values"].call(*sizes)


class Shaped:
    def __init__(self, columns: int) -> None:
        self.shape = (2, columns)


@pytest.mark.parametrize("cached", [0, 40])
def test_prompts_are_as_long_as_the_mask_where_input_is_not_only_what_is_new(cached: int) -> None:
    for given in (
        {"inputs": Shaped(100)},
        {"input_ids": Shaped(100), "attention_mask": Shaped(100)},
        {"input_ids": Shaped(100 - cached), "attention_mask": Shaped(100)},
        {"inputs_embeds": Shaped(100)},
    ):
        model, cache = Model(), Columns()
        cache.count = cached
        assert watch_generate(model) is None
        assert model.generate(sizes=(59 - cached, 41, 1), past_key_values=cache, **given) == [PART, END, NONE]
        unwatch_generate(model, None)
        assert "generate" not in vars(model)
        assert model.generate(sizes=(3,), past_key_values=cache) == [END]


def test_a_generate_of_the_model_itself_is_kept() -> None:
    model = Model()
    model.generate = own = lambda **given: given["past_key_values"].call(4, 1)  # type: ignore[method-assign]
    assert watch_generate(model) is own
    cache = Columns()
    assert model.generate(input_ids=Shaped(5), past_key_values=cache) == [PART, END]
    unwatch_generate(model, own)
    assert model.generate is own
