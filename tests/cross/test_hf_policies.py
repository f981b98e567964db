"""Plans with policies as caches of transformers models, against the engine that knows where prompts end."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.families import Case
from tests.support.hf import assert_same, generate, left_padded
from tests.support.tiny_model import write_tiny_model
from torch import Tensor

from elbowroom.bench.random_model import random_calibration
from elbowroom.bench.schedules import EXCUSED_GAP, Stepper, Subject
from elbowroom.engine.types import SessionRef
from elbowroom.errors import ConfigError, IntegrityError, PlanError, RequestError
from elbowroom.kv import KVPlan
from elbowroom.kv.calibration import FILE, Calibration
from elbowroom.memory.meter import rss_bytes
from elbowroom.models.decoder import Decoder
from elbowroom.models.loader import load_model
from elbowroom.models.path import ComputePath

transformers = pytest.importorskip("transformers", minversion="5.23", reason="the library that is adapted to")
pytestmark = pytest.mark.filterwarnings("ignore")

PLANS = (
    "snapkv(128)",
    "streaming(128)",
    "think",
    "kvmerger(128)",
    "spatten(160,last=128)",
    "snapkv(128) | kivi(2,2,32)",
    "snapkv(128) | think | int8",
    "quest(192,skip=0)",
    "heads(0.5,skip=0)",
    "progressive | planes(g=16)",
    "compresskv(160)",
    "bfp(n=16,sort=on)",
)
NUM_NEW = 12
Opener = Callable[..., Any]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), context=2048)


@pytest.fixture(scope="module")
def decoder(directory: Path) -> Decoder:
    return load_model(directory, torch.float32)


@pytest.fixture(scope="module")
def calibration(decoder: Decoder) -> Calibration:
    return random_calibration(decoder.config.layers)


@pytest.fixture(scope="module")
def model(directory: Path) -> Any:
    made = transformers.AutoModelForCausalLM.from_pretrained(directory)
    made.generation_config.eos_token_id = None
    return made


@pytest.fixture
def open_cache(model: Any, calibration: Calibration) -> Iterator[Opener]:
    """Opens caches, and checks that they leave nothing behind."""
    caches = []

    def opener(plan: str) -> Any:
        caches.append(KVPlan.parse(plan).for_hf(model, memory="64MiB", calibration=calibration))
        return caches[-1]

    yield opener
    for cache in caches:
        cache._shared.store.check_integrity()
        cache.close()
        assert cache.ledger.total("host") == 0
    assert "generate" not in vars(model)


def texts(*lengths: int, seed: int = 0) -> list[Tensor]:
    """Return random printable tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(32, 120, (length,), generator=generator) for length in lengths]


def engine_tokens(subject: Subject, prompt: Tensor, count: int, sizes: Sequence[int] = ()) -> list[int]:
    """Return what the engine says behind ``prompt`` alone, which it reads in steps of ``sizes`` if there are any."""
    left = list(sizes)
    stepper = Stepper(subject, 2000, (lambda: left.pop(0) if left else 512) if sizes else None)
    stepper.add(1, prompt.tolist(), count)
    stepper.run()
    stepper.close()
    return stepper.tokens[1, 0]


def check_tokens(found: Tensor, logits: Tensor, expected: list[int]) -> None:
    """Tokens are equal, up to a first one whose two best logits lie closer than rounding."""
    differs = [place for place, token in enumerate(expected) if int(found[place]) != token]
    if differs:
        best = logits[differs[0]].topk(2).values
        assert best[0] - best[1] < EXCUSED_GAP, (found.tolist(), expected)


@pytest.mark.parametrize("plan", ["streaming(128)", "snapkv(128,w=8,every=64)"])
def test_long_generations_are_chosen_from_as_in_the_engine(
    plan: str, model: Any, decoder: Decoder, open_cache: Opener
) -> None:
    """Behind every 64 decoded tokens: a cache holds no more than its budget and those, however long it goes on."""
    rows, cache = texts(150, 96), open_cache(plan)
    together, logits = generate(model, left_padded(rows), 300, past_key_values=cache)
    report = cache.report()
    assert report.num_tokens - report.num_dropped <= len(rows) * (128 + 64)
    subject = Subject(decoder, ComputePath(0), plan)
    for row, tokens, scores in zip(rows, together, logits, strict=True):
        check_tokens(tokens[-300:], scores, engine_tokens(subject, row, 300))


def column_sizes(mask: Tensor, chunk: int) -> list[int]:
    """Return the tokens that each chunk of columns holds of a row, without those that hold none."""
    return [count for count in (int(part.sum()) for part in mask.split(chunk)) if count]


@pytest.mark.parametrize("plan", PLANS)
def test_rows_of_a_padded_batch_get_the_tokens_of_the_engine(
    plan: str, model: Any, decoder: Decoder, calibration: Calibration, open_cache: Opener
) -> None:
    """Each as if it were alone, one of a single token among them."""
    rows, cache = texts(330, 1, 215), open_cache(plan)
    together, logits = generate(model, left_padded(rows), NUM_NEW, past_key_values=cache)
    assert (cache.report().num_dropped > 0) == any(name in plan for name in ("(128", "(160"))
    subject = Subject(decoder, ComputePath(0), plan, calibration)
    for row, tokens, scores in zip(rows, together, logits, strict=True):
        check_tokens(tokens[-NUM_NEW:], scores, engine_tokens(subject, row, NUM_NEW))


@pytest.mark.parametrize(
    ("plan", "lengths"),
    [("snapkv(128)", (257, 150)), ("streaming(128) | int8", (330, 215)), ("snapkv(128) | kivi(2,2,32)", (257, 150))],
)
def test_a_prompt_that_generate_reads_in_chunks_ends_with_the_last_one(
    plan: str, lengths: tuple[int, ...], model: Any, decoder: Decoder, open_cache: Opener
) -> None:
    """The last one may be a single token; the engine with the same chunks is the reference."""
    rows = texts(*lengths)
    inputs, cache = left_padded(rows), open_cache(plan)
    together, logits = generate(model, inputs, NUM_NEW, past_key_values=cache, prefill_chunk_size=64)
    subject = Subject(decoder, ComputePath(0), plan)
    for number, row in enumerate(rows):
        sizes = column_sizes(inputs["attention_mask"][number], 64)
        check_tokens(together[number, -NUM_NEW:], logits[number], engine_tokens(subject, row, NUM_NEW, sizes))


@pytest.mark.parametrize("plan", ["snapkv(128)", "think | kivi(4,4,32)"])
def test_parts_of_a_prompt_are_announced(plan: str, model: Any, open_cache: Opener) -> None:
    """A loop of one's own reads what generate reads in chunks of the same sizes; nothing is chosen before the end."""
    inputs = left_padded(texts(257, 150))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    _, expected = generate(model, inputs, 2, past_key_values=(reference := open_cache(plan)), prefill_chunk_size=64)
    cache = open_cache(plan)

    def read(start: int, stop: int) -> Tensor:
        part = {"input_ids": ids[:, start:stop], "position_ids": positions[:, start:stop]}
        return model(**part, attention_mask=mask[:, :stop], past_key_values=cache).logits[:, -1]

    with torch.no_grad():
        with cache.reading():
            for start in range(0, 256, 64):
                read(start, start + 64)
        before = cache.report()
        logits = read(256, 257)
    assert_same(logits, expected[:, 0])
    after, wanted = cache.report(), reference.report()
    assert before.num_dropped == 0
    assert after.num_dropped == wanted.num_dropped
    assert after.live_bytes < before.live_bytes
    with pytest.raises(RequestError, match="cannot run inside"), cache.reading():
        generate(model, inputs, 2, past_key_values=cache)


@pytest.mark.parametrize("plan", ["snapkv(384)", "snapkv(384) | kivi(2,2,64)"])
def test_bytes_are_given_back_when_the_prompt_ends(plan: str) -> None:
    """By the books of the store and by the process."""
    heavy = Case("heavy", "LlamaConfig", {"head_dim": 64, "num_key_value_heads": 4}).build()
    with KVPlan.parse(plan).for_hf(heavy, memory="64MiB") as cache, torch.no_grad():
        shares = []
        for length in (600, 1500, 1500, 1500):  # the first one loads code; others may take memory meanwhile
            cache.reset()
            prompt = texts(length)[0][None]
            with cache.reading():
                for part in prompt[:, :-1].split(500, dim=1):
                    heavy(part, past_key_values=cache)
            before, resident = cache.report(), rss_bytes()
            heavy(prompt[:, -1:], past_key_values=cache)
            after, fallen = cache.report(), resident - rss_bytes()
            shares.append(fallen / (before.live_bytes - after.live_bytes))
        planned = int(cache._shared.store.plan.curve(1500, np.array([1501])).resident_bytes[0])
        assert after.live_bytes <= planned * 1.02 + 2 * 4096 * after.num_strips // 4
        assert before.live_bytes > 1500 * 8192
        assert after.num_dropped >= 1500 - 384
        assert cache.ledger.total("host") == after.live_bytes
        assert max(shares[1:]) > 0.8


@pytest.mark.parametrize("plan", ["snapkv(128)", "spatten(160,last=128)", "snapkv(128) | kivi(2,2,32)"])
def test_later_prompts_are_those_of_a_session(plan: str, model: Any, decoder: Decoder, open_cache: Opener) -> None:
    """What the first prompt left is chosen from again; a copy of the cache goes the same way."""
    said, cache = texts(300)[0], open_cache(plan)
    stepper = Stepper(Subject(decoder, ComputePath(0), plan), 4000)
    for turn, question in enumerate(texts(40, 150, seed=1)):
        said = torch.cat([said, question])
        twin = copy.deepcopy(cache)
        found, logits = generate(model, left_padded([said]), NUM_NEW, past_key_values=cache)
        again, _ = generate(model, left_padded([said]), NUM_NEW, past_key_values=twin)
        twin.close()
        stepper.add(turn, said.tolist(), NUM_NEW, session=SessionRef(1))
        stepper.run()
        assert torch.equal(again, found)
        check_tokens(found[0, -NUM_NEW:], logits[0], stepper.tokens[turn, 0])
        said = found[0]
    stepper.close()


def test_beams_score_what_their_tokens_score_one_by_one(model: Any, open_cache: Opener) -> None:
    inputs, cache = left_padded(texts(300, 200)), open_cache("snapkv(128)")
    options = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "pad_token_id": 0, "length_penalty": 0.0}
    made = model.generate(**inputs, **options, past_key_values=cache, output_scores=True, return_dict_in_generate=True)
    mask, total = inputs["attention_mask"], torch.zeros(2)
    cache.reset()
    with torch.no_grad():
        ids, positions = inputs["input_ids"], (mask.cumsum(1) - 1).clamp(min=0)
        for place in range(8):
            out = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
            ids, positions = made.sequences[:, 300 + place, None], positions[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            total += out.logits[:, -1].log_softmax(-1).gather(1, ids)[:, 0]
    assert torch.allclose(total, made.sequences_scores, atol=1e-3)


def test_rows_are_chosen_and_repeated_behind_a_choice(model: Any, open_cache: Opener) -> None:
    inputs, cache = left_padded(texts(300, 200)), open_cache("snapkv(128) | kivi(2,2,32)")
    generate(model, inputs, 1, past_key_values=cache)
    ids, wide = torch.full((4, 1), 70), torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)
    positions = wide.sum(1, keepdim=True) - 1
    with torch.no_grad(), copy.deepcopy(cache) as twin:
        one = model(ids[:2], attention_mask=wide, position_ids=positions, past_key_values=twin).logits
        held = cache.report().num_strips
        cache.batch_select_indices(torch.tensor([1, 0]))
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([0, 2, 2, 1]))
        assert cache.report().num_strips == held
        rows = torch.tensor([1, 0, 0, 1])
        many = model(ids, attention_mask=wide[rows], position_ids=positions[rows], past_key_values=cache).logits
    assert_same(many, one[rows])


def test_assisted_generation_is_refused_and_crops_stop_at_the_prompt(model: Any, open_cache: Opener) -> None:
    inputs, cache = left_padded([texts(60)[0].repeat(4)]), open_cache("snapkv(128)")
    with pytest.raises(RequestError, match="assisted generation"):
        generate(model, inputs, 20, past_key_values=cache, prompt_lookup_num_tokens=4, max_matching_ngram_size=1)
    cache.reset()
    told, _ = generate(model, inputs, 20, past_key_values=cache)
    cache.crop(-19)
    with pytest.raises(IntegrityError, match="chose among all tokens before 240"):
        cache.crop(-1)
    mask = torch.ones(1, 241, dtype=torch.long)
    with torch.no_grad():
        out = model(told[:, 240:241], attention_mask=mask, past_key_values=cache).logits
    assert int(out[0, -1].argmax()) == int(told[0, 241])


@pytest.mark.parametrize("turns", [1, 2])
def test_a_pass_that_dies_while_something_is_chosen(turns: int, model: Any, open_cache: Opener) -> None:
    """A first prompt leaves no trace; a later one loses what it chose from, and says so."""
    inputs, cache = left_padded(texts(300)), open_cache("snapkv(128)")
    told, _ = generate(model, inputs, 4, past_key_values=open_cache("snapkv(128)"))
    if turns == 2:
        generate(model, left_padded(texts(250)), 1, past_key_values=cache)
    hook = model.model.layers[0].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(model, inputs, 4, past_key_values=cache)
    hook.remove()
    if turns == 2:
        with pytest.raises(RequestError, match=r"(?s)are lost.*cache.reset"):
            generate(model, inputs, 4, past_key_values=cache)
        cache.reset()
    assert torch.equal(generate(model, inputs, 4, past_key_values=cache)[0], told)


def test_rows_whose_prompt_ended_in_an_earlier_part_are_refused(model: Any, open_cache: Opener) -> None:
    ids, mask, cache = torch.full((2, 90), 70), torch.ones(2, 90, dtype=torch.long), open_cache("snapkv(128)")
    mask[1, 50:] = 0
    with torch.no_grad():
        with cache.reading():
            model(ids[:, :60], attention_mask=mask[:, :60], past_key_values=cache)
        with pytest.raises(RequestError, match="row 1 has only padding"):
            model(ids[:, 60:], attention_mask=mask, past_key_values=cache)
    cache.reset()
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    assert cache.report().num_tokens == 140


def test_a_calibration_comes_from_a_directory(directory: Path, tmp_path: Path, calibration: Calibration) -> None:
    fresh = transformers.AutoModelForCausalLM.from_pretrained(directory)
    plan = KVPlan.parse("compresskv(160)")
    with pytest.raises(PlanError, match=r"(?s)no kv_calibration.json.*calibration=DIR"):
        plan.for_hf(fresh)
    (tmp_path / FILE).write_text("{}")
    with pytest.raises(ConfigError, match="no calibration"):
        plan.for_hf(fresh, calibration=tmp_path)
    calibration.save(tmp_path)
    other = write_tiny_model(tmp_path / "same")
    beside = transformers.AutoModelForCausalLM.from_pretrained(other)
    calibration.save(other)
    made = []
    for each, given in ((fresh, calibration), (fresh, str(tmp_path)), (beside, None)):
        with plan.for_hf(each, memory="64MiB", calibration=given) as cache:
            made.append(cache._shared.store.plan.policy)
    assert made[0] == made[1] == made[2]
    assert made[0] is not plan.policy


def test_copies_of_a_model_generate_by_themselves(model: Any, open_cache: Opener) -> None:
    open_cache("snapkv(128)")
    twin = copy.deepcopy(model)
    assert twin.generate.__self__ is twin
    read = pickle.loads(pickle.dumps(model))
    torch.nn.init.zeros_(read.lm_head.weight)
    inputs = left_padded(texts(20))
    assert (generate(read, inputs, 3)[0][:, -3:] == 0).all()
    assert torch.equal(generate(twin, inputs, 3)[0], generate(model, inputs, 3)[0])
