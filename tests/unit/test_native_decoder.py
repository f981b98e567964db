"""The native decoder against the readable one: every switch of every family, every layout, every schedule."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.decoder_world import (
    CONFIGS,
    LINEAR,
    LLAMA3,
    ROPE,
    YARN,
    YARN_MSCALE,
    GuardedScratch,
    Paged,
    close,
    config,
    dense_logits,
    dense_step,
    random_decoder,
    random_tokens,
    spec,
    upcast,
)
from tests.support.native import instructions
from torch import Tensor

from elbowroom.kernels import LayerStrips
from elbowroom.models.base import AttentionContext, TorchScratch
from elbowroom.models.config import ModelConfig
from elbowroom.models.decoder import Decoder
from elbowroom.models.dense import DenseContext

if importlib.util.find_spec("elbowroom._native") is None:
    pytest.skip("elbowroom._native was not built (ELBOWROOM_NATIVE=0)", allow_module_level=True)

from elbowroom.models.native import NativeDecoder

_native = importlib.import_module("elbowroom._native")
COUNTS = (1, 7, 9, 16, 17, 32, 40, 50)
HALVES = (torch.bfloat16, torch.float16)


def twins(made: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Decoder, NativeDecoder]:
    """The float32 oracle and the native decoder of the same weights."""
    decoder = random_decoder(made, dtype, seed)
    return upcast(decoder), NativeDecoder(made, decoder.weights)


def check_dense(oracle: Decoder, native: NativeDecoder, count: int) -> None:
    """Without strips: the halves of every layer around the context's attention."""
    tokens, scratch = random_tokens(count, oracle.config.vocab_size, seed=count), GuardedScratch()
    close(dense_step(native, tokens, range(count), scratch), dense_logits(oracle, tokens))
    scratch.check()


def check_paged(oracle: Decoder, native: NativeDecoder, chunks: tuple[int, ...]) -> None:
    """Over plain strips, in one call."""
    tokens, paged = random_tokens(sum(chunks), oracle.config.vocab_size, seed=1), Paged(native)
    made = []
    for part in tokens.split(list(chunks)):
        scratch = GuardedScratch()
        made.append(paged.step([(0, part)], scratch=scratch))
        scratch.check()
    close(torch.cat(made), dense_logits(oracle, tokens))
    paged.close()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_switch_equals_the_readable_decoder(isa: str, name: str) -> None:
    """Also that scratch is written before it is read (it is full of NaN), and nothing beside it."""
    oracle, native = twins(CONFIGS[name])
    for count in COUNTS:
        check_dense(oracle, native, count)
    check_paged(oracle, native, COUNTS)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["biases", "layers of every width", "gemma", "wide"])
def test_half_precision_weights_are_computed_in_float32(isa: str, name: str, dtype: torch.dtype) -> None:
    """As the float32 decoder of the same values does; keys and values are kept in float32 here."""
    oracle, native = twins(CONFIGS[name], dtype)
    for count in (3, 21):
        check_dense(oracle, native, count)
    check_paged(oracle, native, (21, 8, 1))


def test_the_embedding_scale_is_rounded_to_the_dtype_of_the_weights() -> None:
    """Gemma's way: sqrt(hidden) in bfloat16."""
    made = config(embed_scale=27.7)
    rounded = dataclasses.replace(made, embed_scale=float(torch.tensor(27.7, dtype=torch.bfloat16)))
    assert rounded.embed_scale != made.embed_scale
    decoder = random_decoder(made, torch.bfloat16)
    oracle = Decoder(rounded, upcast(decoder).weights)

    check_dense(oracle, NativeDecoder(made, decoder.weights), 5)


SPECS = st.builds(
    lambda kv, group, dim, v_dim, window, softcap, rope: spec(
        kv * group, kv, 2 * dim, v_dim, window=window, softcap=softcap, rope=rope
    ),
    kv=st.integers(1, 3),
    group=st.integers(1, 4),
    dim=st.integers(1, 20),
    v_dim=st.integers(1, 40),
    window=st.none() | st.integers(1, 30),
    softcap=st.none() | st.floats(1.0, 20.0),
    rope=st.sampled_from([None, ROPE, LINEAR, LLAMA3, YARN, YARN_MSCALE]),
)
CONFIG_STRATEGY = st.builds(
    lambda layers, **changes: config(*layers, **changes),
    layers=st.lists(SPECS, min_size=1, max_size=3),
    hidden=st.integers(1, 100),
    ffn=st.integers(1, 120),
    vocab_size=st.integers(2, 120),
    activation=st.sampled_from(["silu", "gelu_tanh"]),
    norm_offset=st.sampled_from([0.0, 1.0]),
    qkv_bias=st.booleans(),
    o_bias=st.booleans(),
    mlp_bias=st.booleans(),
    qk_norm=st.booleans(),
    post_norms=st.booleans(),
    embed_scale=st.sampled_from([1.0, 3.5]),
    tie_embeddings=st.booleans(),
    final_softcap=st.none() | st.floats(1.0, 30.0),
)


@settings(max_examples=40, deadline=None, database=None)
@given(made=CONFIG_STRATEGY, dtype=st.sampled_from([torch.float32, *HALVES]), data=st.data())
def test_any_configuration_equals_the_readable_decoder(made: ModelConfig, dtype: torch.dtype, data: Any) -> None:
    with instructions(data.draw(st.sampled_from(_native.supported_isas()))):
        oracle, native = twins(made, dtype)
        check_dense(oracle, native, data.draw(st.integers(1, 40)))
        check_paged(oracle, native, tuple(data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))))


# --- rows, batches, schedules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 5, 8, 9, 40])
@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_logits_come_for_any_rows_in_any_order(isa: str, count: int, name: str) -> None:
    """None, one, some, all, and more rows than the pass has tokens: an n-fold sample asks for one row n times."""
    oracle, native = twins(CONFIGS[name])
    tokens = random_tokens(count)
    expected = dense_logits(oracle, tokens)
    last = count - 1
    for rows in (
        [],
        [last],
        [0] * 3,
        list(range(count))[::-1],
        [last, 0, last, 0],
        [last] * 40,
        [*range(count), 0, last] * 9,
    ):
        scratch = GuardedScratch()
        close(dense_step(native, tokens, rows, scratch), expected[rows])
        scratch.check()


def test_rows_and_tokens_may_be_views_with_gaps(isa: str) -> None:
    """Torch indexes with any strides; so must native code."""
    oracle, native = twins(CONFIGS["llama"])
    tokens, rows = random_tokens(24), torch.arange(12)
    context = DenseContext(oracle.config.layers, 1, 12)
    with torch.inference_mode():
        got = native.step(tokens[::2], context, rows[1::3], TorchScratch())
    close(got, dense_logits(oracle, tokens[::2])[1::3])


@pytest.mark.parametrize("row", [-1, 3, 2**40])
def test_a_row_outside_the_pass_is_refused(row: int) -> None:
    native = twins(CONFIGS["llama"])[1]
    with pytest.raises(ValueError, match=f"row {row} is not in a pass of 3 tokens"):
        dense_step(native, random_tokens(3), [0, row])


@pytest.mark.parametrize("name", ["llama", "windows", "layers of every width", "gemma"])
def test_sequences_of_a_batch_do_not_disturb_each_other(isa: str, name: str) -> None:
    """Prompts, chunks and decode rows of five sequences side by side, in another order in every step."""
    oracle, native = twins(CONFIGS[name])
    lengths = (150, 70, 65, 12, 3)
    texts = [random_tokens(length, seed=length) for length in lengths]
    expected = [dense_logits(oracle, text) for text in texts]
    paged, done = Paged(native, len(texts)), [0] * len(texts)
    for takes in ((3, 0, 1, 0, 1), (40, 64, 1, 1, 1), (1, 1, 1, 1, 1), (100, 5, 62, 0, 0), (6, 0, 0, 10, 0)):
        order = [sequence for sequence in (2, 0, 4, 1, 3) if takes[sequence]]
        runs = [(s, texts[s][done[s] : done[s] + takes[s]]) for s in order]
        wanted = torch.cat([expected[s][done[s] : done[s] + takes[s]] for s in order])
        scratch = GuardedScratch()
        close(paged.step(runs, scratch=scratch), wanted)
        scratch.check()
        done = [start + taken for start, taken in zip(done, takes, strict=True)]
    assert tuple(done) == (150, 70, 65, 12, 3)
    paged.close()


@settings(max_examples=12, deadline=None, database=None)
@given(data=st.data())
def test_any_schedule_gives_the_same_logits(data: st.DataObject) -> None:
    """Random chunks of random sequences, random rows of each step."""
    lengths = data.draw(st.lists(st.integers(1, 90), min_size=1, max_size=4))
    oracle, native = twins(CONFIGS[data.draw(st.sampled_from(["biases", "windows", "ropes"]))])
    texts = [random_tokens(length, seed=index) for index, length in enumerate(lengths)]
    expected = [dense_logits(oracle, text) for text in texts]
    paged, done = Paged(native, len(texts)), [0] * len(texts)
    while done != lengths:
        left = [s for s in range(len(texts)) if done[s] < lengths[s]]
        order = data.draw(st.permutations(left))[: data.draw(st.integers(1, len(left)))]
        takes = {s: data.draw(st.integers(1, lengths[s] - done[s])) for s in order}
        runs = [(s, texts[s][done[s] : done[s] + takes[s]]) for s in order]
        wanted = torch.cat([expected[s][done[s] : done[s] + takes[s]] for s in order])
        rows = data.draw(st.lists(st.integers(0, len(wanted) - 1), max_size=12))
        close(paged.step(runs, rows, GuardedScratch()), wanted[rows])
        for s in order:
            done[s] += takes[s]


def test_layers_may_read_the_keys_and_values_of_another(isa: str) -> None:
    """Cross-layer sharing: the readable decoder over a store of its own is the oracle."""
    made = config(spec(), spec(8, 2, kv_source=0), spec(window=9), spec(kv_source=2, window=5), spec(kv_source=0))
    oracle, native = twins(made)
    tokens = random_tokens(120)
    readable, ours = Paged(oracle), Paged(native)
    for part in tokens.split([30, 1, 8, 9, 72]):
        close(ours.step([(0, part)]), readable.step([(0, part)]))


class SomePlain:
    """A context that hands out strips for some layers only, each time as new objects."""

    def __init__(self, inner: AttentionContext, plain: set[int]) -> None:
        self._inner, self._plain = inner, plain
        self.attended: list[int] = []
        self.ended: list[int] = []

    @property
    def positions(self) -> Tensor:
        return self._inner.positions

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.attended.append(layer)
        return self._inner.attend(layer, q, k, v)

    def strips(self, layer: int) -> LayerStrips | None:
        found = self._inner.strips(layer)
        if found is None or layer not in self._plain:
            return None
        return dataclasses.replace(found, table=found.table.copy())

    def end_layer(self, layer: int) -> None:
        self.ended.append(layer)
        self._inner.end_layer(layer)


@pytest.mark.parametrize("plain", [{0, 1, 2, 3}, {0, 1}, {2, 3}, {1, 3}, {0, 3}, {2}, set()])
def test_layers_with_and_without_strips_may_alternate(plain: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The context attends and ends exactly the layers for which it gives no strips; what it gives is kept alive."""
    oracle, native = twins(config(spec(), spec(), spec(window=9), spec()))
    tokens = random_tokens(120)
    seen: list[SomePlain] = []
    step = native.step

    def watched(tokens: Tensor, context: AttentionContext, rows: Tensor, scratch: Any) -> Tensor:
        seen.append(SomePlain(context, plain))
        return step(tokens, seen[-1], rows, scratch)

    monkeypatch.setattr(native, "step", watched)
    paged = Paged(native)
    made = [paged.step([(0, part)], scratch=GuardedScratch()) for part in tokens.split([70, 1, 8, 41])]
    close(torch.cat(made), dense_logits(oracle, tokens))
    for context in seen:
        assert context.attended == context.ended == sorted({0, 1, 2, 3} - plain)


def test_a_row_has_the_logits_that_it_has_alone() -> None:
    """Whatever stands beside it."""
    _, native = twins(CONFIGS["gemma"])
    texts = [random_tokens(20, seed=seed) for seed in range(12)]
    alone = []
    for text in texts:
        paged = Paged(native)
        paged.step([(0, text[:-1])])
        alone.append(paged.step([(0, text[-1:])])[0])
    paged = Paged(native, len(texts))
    for sequence, text in enumerate(texts):
        paged.step([(sequence, text[:-1])])
    few = paged.step([(sequence, texts[sequence][-1:]) for sequence in range(7)])
    many = paged.step([(sequence, texts[sequence][-1:]) for sequence in range(7, 12)] + [(0, random_tokens(9))])

    close(few, torch.stack(alone[:7]), 1e-5)
    close(many[:5], torch.stack(alone[7:]), 1e-5)


def test_passes_do_not_depend_on_the_passes_before(isa: str) -> None:
    """The same bits from buffers that hold a longer pass, with torch's scratch reused under them."""
    _, native = twins(CONFIGS["biases"])
    tokens = random_tokens(33)

    class Kept(GuardedScratch):
        """Gives the same memory every time, uncleared."""

        def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            if name not in self.taken:
                self.taken[name] = torch.full((200_000,), float("nan"))
            return self.taken[name][: int(torch.tensor(shape).prod())].view(shape)

    fresh = {
        count: dense_step(native, tokens[:count], range(count), GuardedScratch()) for count in COUNTS if count < 33
    }
    kept = Kept()
    for count in (32, 1, 17, 9, 16, 7, 32):
        assert torch.equal(dense_step(native, tokens[:count], range(count), kept), fresh[count])


# --- other processes -------------------------------------------------------------------------------------------------


def run_here(code: str, **environment: str) -> str:
    """Run Python in a process of its own and return what it printed."""
    path = {"PYTHONPATH": ":".join([str(Path(__file__).parents[2]), *sys.path])}
    shown = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | path | environment, capture_output=True, check=False
    )
    assert shown.returncode == 0, shown.stderr.decode()
    return shown.stdout.decode().strip()


def digest_of_long_passes() -> str:
    """Fingerprint logits of few and many tokens; the last steps read more than one piece of attention (1024 tokens)."""
    import hashlib

    _, native = twins(CONFIGS["softcaps"])
    tokens, found = random_tokens(1050), hashlib.sha256()
    paged = Paged(native)
    for part in tokens.split([800, 1, 8, 9, 132, *[4] * 25]):
        found.update(paged.step([(0, part)], range(max(0, len(part) - 20), len(part))).numpy().tobytes())
    found.update(dense_step(native, tokens[:100], range(100)).numpy().tobytes())
    return found.hexdigest()


def test_logits_have_the_same_bits_on_any_number_of_threads() -> None:
    name = f"{Path(__file__).stem}"
    code = (
        "import importlib.util, sys; from elbowroom import _native\n"
        f"spec = importlib.util.spec_from_file_location({name!r}, {str(Path(__file__))!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "print(_native.num_threads(), module.digest_of_long_passes())"
    )
    threads, digest = run_here(code, ELBOWROOM_THREADS="1").split()

    assert threads == "1"
    if _native.num_threads() == 1:
        pytest.skip("this machine has one processor only")
    assert digest == digest_of_long_passes()


GENERATE = """
from elbowroom import LLM, SamplingParams, _native
from elbowroom.models import path
path._native_tokens = lambda dtype, width: path.ANY
prompts = ["def fib(n):", "The key is 4711. " * 20, "x"]
with LLM(memory="512MiB") as llm:
    made = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24, ignore_eos=True))
tokens = [output.outputs[0].token_ids for output in made]
isa = _native.isa()
"""


def test_a_whole_generation_is_the_same_on_portable_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy tokens of the built-in model without any vector instruction beyond the baseline."""
    from elbowroom.models import path

    monkeypatch.setattr(path, "_native_tokens", path._native_tokens)  # what GENERATE sets is undone
    here: dict[str, Any] = {}
    exec(GENERATE, here)
    portable = run_here(GENERATE + "print(isa, tokens)", ELBOWROOM_ISA="baseline")

    assert [len(tokens) for tokens in here["tokens"]] == [24] * 3
    assert portable == f"baseline {here['tokens']}"
