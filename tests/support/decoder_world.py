"""Small random decoders of every switch, scratch full of NaN between guards, and the way to run them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elbowroom.core import LayerSpec, RopeSpec
from elbowroom.engine.executors.local import StoreContext
from elbowroom.kv import KVHandle, KVPlan, KVStep, PagedStore
from elbowroom.memory import Arena, Budget, HostTier, Ledger
from elbowroom.models.base import Scratch, StepModel, TorchScratch
from elbowroom.models.config import ModelConfig
from elbowroom.models.decoder import Decoder
from elbowroom.models.dense import DenseContext
from elbowroom.weights.resident import ResidentWeights

TOLERANCE = 1e-4
"""Of logits, times max(1, max|reference|)."""
ROPE = RopeSpec()
LINEAR = RopeSpec(kind="linear", factor=4.0)
LLAMA3 = RopeSpec(kind="llama3", theta=500_000.0, factor=8.0, original_max_positions=64)
YARN = RopeSpec(kind="yarn", factor=4.0, original_max_positions=64)
YARN_MSCALE = dataclasses.replace(YARN, mscale=1.0, mscale_all_dim=0.5, beta_fast=16.0, truncate=False)
VOCAB = 199


def spec(q: int = 4, kv: int = 2, dim: int = 8, v: int | None = None, **changes: Any) -> LayerSpec:
    base = LayerSpec(
        num_q_heads=q,
        num_kv_heads=kv,
        head_dim=dim,
        v_head_dim=v or dim,
        scale=dim**-0.5,
        rope=changes.pop("rope", ROPE),
    )
    return dataclasses.replace(base, **changes)


def config(*layers: LayerSpec, hidden: int = 40, ffn: int = 50, **changes: Any) -> ModelConfig:
    base = ModelConfig(
        family="test",
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=ffn,
        layers=layers or (spec(), spec()),
        max_positions=4096,
        norm_eps=1e-6,
    )
    return dataclasses.replace(base, **changes)


GEMMA: dict[str, Any] = {
    "activation": "gelu_tanh",
    "norm_offset": 1.0,
    "qk_norm": True,
    "post_norms": True,
    "embed_scale": 6.5,
    "tie_embeddings": True,
}
BIASES: dict[str, Any] = {"qkv_bias": True, "o_bias": True, "mlp_bias": True}
CONFIGS: dict[str, ModelConfig] = {
    "llama": config(),
    "one head, one of everything": config(spec(1, 1, 2), hidden=1, ffn=1, vocab_size=1),
    "biases": config(hidden=72, ffn=31, **BIASES),
    "qk norm": config(spec(6, 3, 24), spec(6, 3, 24), hidden=33, ffn=17, qk_norm=True),
    "gelu": config(hidden=64, ffn=96, activation="gelu_tanh"),
    "post norms": config(spec(3, 1, 20), hidden=41, post_norms=True, norm_offset=1.0),
    "softcaps": config(spec(softcap=2.0), spec(softcap=1.0, window=5), final_softcap=3.0, embed_scale=4.0),
    "windows": config(spec(window=1), spec(window=9), spec(), spec(window=40)),
    "narrow values": config(spec(4, 2, 20, 12), spec(4, 2, 20, 12), hidden=48),
    "wide values": config(spec(3, 3, 6, 22), hidden=24, ffn=12),
    "layers of every width": config(
        spec(2, 1, 4), spec(8, 2, 16, window=12), spec(1, 1, 64, 3), hidden=24, ffn=100, qk_norm=True, **BIASES
    ),
    "ropes": config(
        spec(rope=None), spec(rope=LINEAR), spec(rope=LLAMA3), spec(rope=YARN), spec(rope=YARN_MSCALE), spec()
    ),
    "ropes of two widths": config(spec(dim=8), spec(dim=12), spec(dim=8, rope=YARN), spec(dim=12, rope=None)),
    "no rope": config(spec(rope=None)),
    "gemma": config(spec(4, 1, 16, window=10, rope=LINEAR), spec(4, 1, 16, softcap=5.0), final_softcap=9.0, **GEMMA),
    "wide": config(spec(4, 2, 64, rope=LLAMA3), hidden=264, ffn=700, vocab_size=1003, **BIASES),
}


def random_weights(made: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> ResidentWeights:
    """Return weights that exercise every switch: no bias is 0, no norm is neutral, logits spread."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in made.tensor_shapes().items():
        tensor = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            tensor = 1.0 - made.norm_offset + 0.2 * tensor
        elif name.endswith(".bias"):
            tensor = 0.3 * tensor
        elif not name.startswith("embed"):
            tensor = 1.5 * tensor / shape[-1] ** 0.5
        tensors[name] = tensor.to(dtype)
    return ResidentWeights(tensors, made.activation)


def random_decoder(made: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> Decoder:
    return Decoder(made, random_weights(made, dtype, seed))


def upcast(decoder: Decoder) -> Decoder:
    """Return the float32 decoder of the same values."""
    assert isinstance(decoder.weights, ResidentWeights)
    tensors = {name: each.detach().float() for name, each in decoder.weights.named_tensors().items()}
    return Decoder(decoder.config, ResidentWeights(tensors, decoder.config.activation))


def random_tokens(count: int, vocab: int = VOCAB, seed: int = 0) -> Tensor:
    return torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(seed))


class GuardedScratch:
    """Gives buffers of exactly the size asked for, full of NaN, between guards that nobody may write."""

    GUARD = 1024
    VALUE = 123.25

    def __init__(self) -> None:
        self.taken: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = int(np.prod(shape, dtype=np.int64))
        whole = self.taken[name] = torch.full((size + 2 * self.GUARD,), self.VALUE, dtype=dtype)
        place = whole[self.GUARD : self.GUARD + size]
        return place.fill_(float("nan")).view(shape)

    def check(self) -> None:
        for name, whole in self.taken.items():
            guards = torch.cat([whole[: self.GUARD], whole[-self.GUARD :]])
            assert (guards == self.VALUE).all(), f"somebody wrote outside {name}"


def close(got: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """Assert that logits agree."""
    assert got.shape == expected.shape
    if got.numel():
        error = (got.double() - expected.double()).abs().max().item()
        allowed = tolerance * max(1.0, expected.abs().max().item())
        assert error <= allowed, f"off by {error:.2e}, allowed are {allowed:.2e}"


@torch.inference_mode()
def dense_step(model: StepModel, tokens: Tensor, rows: Sequence[int], scratch: Scratch | None = None) -> Tensor:
    """Return the logits of some rows of one sequence, read at once without a store."""
    context = DenseContext(model.config.layers, 1, len(tokens))
    return model.step(tokens, context, torch.tensor(rows, dtype=torch.int64), scratch or TorchScratch())


def dense_logits(decoder: Decoder, tokens: Tensor) -> Tensor:
    """Return the logits of every token of one sequence: the oracle."""
    return dense_step(decoder, tokens, range(len(tokens)))


class Paged:
    """Sequences in a store with plain float32 strips, read in steps by ``model``."""

    def __init__(self, model: StepModel, num_sequences: int = 1, plan: str = "plain") -> None:
        bound = KVPlan.parse(plan).bind(model.config.layers, "float32")
        self.model = model
        self.store = PagedStore(bound, Arena(HostTier(), Ledger(Budget({}))), 2**26)
        self.handles: list[KVHandle] = [self.store.open() for _ in range(num_sequences)]

    @torch.inference_mode()
    def step(
        self,
        runs: Sequence[tuple[int, Tensor]],
        rows: Sequence[int] | None = None,
        scratch: Scratch | None = None,
    ) -> Tensor:
        """Append ``(sequence, tokens)`` runs in one pass and return the logits of ``rows`` (None: all)."""
        starts = [self.store.num_tokens(self.handles[sequence]) for sequence, _ in runs]
        positions = [np.arange(start, start + len(run)) for start, (_, run) in zip(starts, runs, strict=True)]
        step = KVStep(
            tuple(self.handles[sequence] for sequence, _ in runs),
            np.cumsum([0, *(len(run) for _, run in runs)]).astype(np.int32),
            np.concatenate(positions).astype(np.int64),
        )
        assert self.store.reserve(step) is None
        tokens = torch.cat([run for _, run in runs])
        picked = torch.tensor(range(len(tokens)) if rows is None else rows, dtype=torch.int64)
        logits = self.model.step(tokens, StoreContext(self.store, step), picked, scratch or TorchScratch())
        self.store.end_step(step)
        return logits.clone()

    def close(self) -> None:
        self.store.check_integrity()
        self.store.close_all()
