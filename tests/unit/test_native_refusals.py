"""What the native decoder refuses, and weights that it must not misread."""

from __future__ import annotations

import importlib
import importlib.util

import pytest
import torch
from tests.support.decoder_world import (
    BIASES,
    CONFIGS,
    VOCAB,
    GuardedScratch,
    close,
    config,
    dense_logits,
    dense_step,
    random_decoder,
    random_tokens,
    random_weights,
    upcast,
)

from elbowroom.models.config import ModelConfig
from elbowroom.models.decoder import Decoder
from elbowroom.models.path import ANY, ComputePath
from elbowroom.weights.base import LinearDescriptor
from elbowroom.weights.resident import DenseLinear, GatedFFN, ResidentWeights

if importlib.util.find_spec("elbowroom._native") is None:
    pytest.skip("elbowroom._native was not built (ELBOWROOM_NATIVE=0)", allow_module_level=True)

from elbowroom.models.native import NativeDecoder

_native = importlib.import_module("elbowroom._native")


def twins(made: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Decoder, NativeDecoder]:
    """The float32 oracle and the native decoder of the same weights."""
    decoder = random_decoder(made, dtype, seed)
    return upcast(decoder), NativeDecoder(made, decoder.weights)


def check_dense(oracle: Decoder, native: NativeDecoder, count: int) -> None:
    """Without strips: the halves of every layer around the context's attention."""
    tokens, scratch = random_tokens(count, oracle.config.vocab_size, seed=count), GuardedScratch()
    close(dense_step(native, tokens, range(count), scratch), dense_logits(oracle, tokens))
    scratch.check()


@pytest.mark.parametrize("token", [VOCAB, -1, 2**40])
@pytest.mark.parametrize("count", [1, 8, 9, 40])
def test_a_token_outside_the_vocabulary_is_named(token: int, count: int) -> None:
    native = twins(CONFIGS["llama"])[1]
    tokens = random_tokens(count)
    tokens[count // 2] = token

    with pytest.raises(ValueError, match=f"token {token} is not in a vocabulary of {VOCAB}"):
        dense_step(native, tokens, [0])
    assert dense_step(native, random_tokens(count), [0]).isfinite().all(), "and the next pass runs"


class Packed(DenseLinear):
    """A matrix that is nowhere dense."""

    def descriptor(self) -> LinearDescriptor | None:
        return None


class PartlyPacked(ResidentWeights):
    """Resident weights with one matrix that native code cannot read."""

    packed = ""

    def linear(self, name: str) -> DenseLinear:
        found = super().linear(name)
        return Packed(found.weight, found.bias) if name == self.packed else found


class OtherFFN(GatedFFN):
    """A block that is not the plain product of three matrices."""

    def descriptors(self) -> tuple[LinearDescriptor, ...]:
        return None  # type: ignore[return-value]


class OtherBlocks(ResidentWeights):
    """Weights with such a block in layer 1."""

    def ffn(self, layer: int) -> GatedFFN:
        found = super().ffn(layer)
        return OtherFFN(found.gate, found.up, found.down, self.activation) if layer == 1 else found


@pytest.mark.parametrize(
    "name",
    ["embed_tokens", "lm_head", "layers.0.self_attn.q_proj", "layers.1.self_attn.o_proj", "layers.1.mlp.down_proj"],
)
def test_one_matrix_that_is_not_plain_leaves_all_to_the_readable_decoder(name: str) -> None:
    made = config()
    weights = PartlyPacked(random_weights(made).named_tensors(), "silu")
    weights.packed = name
    decoder = Decoder(made, weights)

    assert NativeDecoder.of(decoder) is None
    for path in (ComputePath(ANY), ComputePath(8), ComputePath(0)):
        assert path.model(decoder) is decoder
    with pytest.raises(LookupError, match="not dense and resident"):
        NativeDecoder(made, weights)


def test_a_block_that_is_not_plain_leaves_all_to_the_readable_decoder() -> None:
    made = config()
    decoder = Decoder(made, OtherBlocks(random_weights(made).named_tensors(), "silu"))

    assert NativeDecoder.of(decoder) is None
    assert ComputePath(ANY).model(decoder) is decoder


def test_a_dtype_that_native_code_lacks_leaves_all_to_the_readable_decoder() -> None:
    assert NativeDecoder.of(random_decoder(config(**BIASES), torch.float64)) is None


def test_weights_whose_columns_lie_apart_are_not_read_as_if_they_did_not() -> None:
    """A transposed matrix has the right shape, and another stride."""
    made = config(hidden=32)
    tensors = {name: each.detach() for name, each in random_weights(made).named_tensors().items()}
    name = "layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].T.contiguous().T
    decoder = Decoder(made, ResidentWeights(tensors, "silu"))
    model = ComputePath(ANY).model(decoder)

    tokens = random_tokens(12)
    close(dense_step(model, tokens, range(12)), dense_logits(decoder, tokens))


def test_weights_may_be_views_of_a_wider_arena(isa: str) -> None:
    """Rows at a larger stride, biases at an odd offset."""
    made = config(**BIASES)
    plain = random_weights(made).named_tensors()
    tensors = {}
    for name, each in plain.items():
        wide = torch.full((each.shape[0], *(extent + 5 for extent in each.shape[1:])), float("nan"))
        place = wide[:, 3:-2] if each.dim() == 2 else torch.cat([each, each])[len(each) :]
        tensors[name] = place.copy_(each.detach())
    decoder = Decoder(made, ResidentWeights(tensors, "silu"))
    native = NativeDecoder(made, decoder.weights)
    for count in (3, 20):
        check_dense(decoder, native, count)


def test_the_default_dtype_of_torch_changes_nothing() -> None:
    _, native = twins(CONFIGS["llama"])
    tokens = random_tokens(30)
    expected = dense_step(native, tokens, [3, 29])
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = dense_step(native, tokens, [3, 29])
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, expected)
