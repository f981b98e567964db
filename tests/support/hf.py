"""Padded batches for transformers models, and what they generate."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from tests.support.families import CASES, Case
from torch import Tensor

_SOFTCAPS = Case(
    "gemma2-softcaps",
    "Gemma2Config",
    {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 32, "attn_logit_softcapping": 3.0},
)
_WIDE = Case("llama-wide", "LlamaConfig", {"head_dim": 32})
CASE_OF = {case.name: case for case in (*CASES, _SOFTCAPS, _WIDE)}


@functools.cache
def model_of(name: str) -> Any:
    """Return the random model of a case, in float32, made once; it never stops by itself."""
    model = CASE_OF[name].build()
    model.generation_config.eos_token_id = None
    return model


def prompts(lengths: Sequence[int], seed: int = 0) -> list[Tensor]:
    """Return random tokens, int64 ``[length]`` each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 199, (length,), generator=generator) for length in lengths]


def left_padded(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return ``input_ids`` and ``attention_mask``, ``[B, longest]``, with padding before the shorter rows."""
    longest = max(row.numel() for row in rows)
    pads = [longest - row.numel() for row in rows]
    ids = [torch.nn.functional.pad(row, (pad, 0)) for row, pad in zip(rows, pads, strict=True)]
    masks = [(torch.arange(longest) >= pad).long() for pad in pads]
    return {"input_ids": torch.stack(ids), "attention_mask": torch.stack(masks)}


def generate(model: Any, inputs: dict[str, Tensor], num_tokens: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Return the sequences ``[B, T]`` and the logits ``[B, num_tokens, V]`` of greedy generation."""
    keys = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0, **options}
    made = model.generate(**inputs, max_new_tokens=num_tokens, min_new_tokens=num_tokens, **keys)
    return made.sequences, torch.stack(made.logits, dim=1)


def assert_same(found: Tensor, reference: Tensor) -> None:
    """Logits agree as the house demands: within 1e-4 of the largest, or of 1."""
    assert (found - reference).abs().max() <= 1e-4 * max(1.0, reference.abs().max().item())


def assert_alike(found: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor], tolerance: float) -> None:
    """Greedy tokens ``[n]`` and their logits ``[n, V]`` agree up to rounding that flips codes of a codec.

    Behind a token that differs nothing is compared; it may differ only where the two best are closer than rounding.
    """
    (tokens, logits), (expected, wanted) = found, reference
    bound = tolerance * max(1.0, wanted.abs().max().item())
    differs = (tokens != expected).nonzero().flatten().tolist()
    compared = differs[0] + 1 if differs else tokens.numel()
    assert (logits[:compared] - wanted[:compared]).abs().max() <= bound
    if differs:
        best = wanted[compared - 1].topk(2).values
        assert best[0] - best[1] <= 2 * bound
