"""Errors of layers: what the output of attention loses when only a few tokens of the prompt stay.

CompressKV (arXiv 2508.02401), offline: the prompt is reduced to 32 tokens in one layer at a time, by the rule that is
used later; the model itself goes on with everything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from elbowroom.evals.calibration.reader import LayerSight, Reader
from elbowroom.kv.base import KVHandle
from elbowroom.kv.policies.voting import vote

KEPT_TOKENS = 32
WINDOW = 8
KERNEL = 5
NUM_HEADS = 4
_TINY = 1e-5


class LayerErrors:
    """Sums over the tokens that are generated behind prompts.

    Args:
        reader: runs the model.
        head_scores: ``[layers][Hq]``; the best heads vote on what stays.
    """

    def __init__(self, reader: Reader, head_scores: Sequence[Sequence[float]]) -> None:
        self._reader = reader
        self._heads = [sorted(range(len(row)), key=lambda head: -row[head])[:NUM_HEADS] for row in head_scores]
        self._sums = [0.0] * len(head_scores)
        self._newest: dict[int, Tensor] = {}
        self._kept: dict[int, Tensor] = {}
        self._prompt_tokens = 0

    def generate(self, handle: KVHandle, prompt_ids: Sequence[int], num_tokens: int) -> None:
        """Read the end of a prompt, at least ``WINDOW`` tokens, and generate behind it, counting the errors."""
        self._newest.clear()
        self._kept.clear()
        token = self._reader.read(handle, prompt_ids, self._remember)
        self._prompt_tokens = self._reader.model.store.num_tokens(handle)
        for _ in range(num_tokens):
            if token in self._reader.eos_token_ids:
                break
            token = self._reader.read(handle, [token], self._compare)

    def shares(self) -> list[float]:
        """Return the errors of the layers so far, summing to 1; all 0 while there are none."""
        total = math.fsum(self._sums)
        return [each / total if total else 0.0 for each in self._sums]

    def _remember(self, sight: LayerSight) -> None:
        """Keep the newest queries of the prompt, and choose among all that is held behind each pass."""
        if sight.spec.window is not None:
            return
        before = self._newest.get(sight.layer, sight.queries[:0])
        self._newest[sight.layer] = newest = torch.cat([before, sight.queries[-WINDOW:]])[-WINDOW:].clone()
        count = min(KEPT_TOKENS, sight.num_tokens)
        view = sight.view(newest)
        self._kept[sight.layer] = vote(view, self._heads[sight.layer], count, WINDOW, KERNEL)[0]

    def _compare(self, sight: LayerSight) -> None:
        """Add the relative error of the layer's output behind its last projection."""
        if sight.spec.window is not None:
            return
        view = sight.view(sight.queries)
        generated = torch.arange(self._prompt_tokens, sight.num_tokens)
        kept = torch.cat([self._kept[sight.layer], generated])
        full, reduced = list[Tensor](), list[Tensor]()
        for head in range(sight.spec.num_kv_heads):
            weights, values = view.window_attention(head)[:, -1], sight.values(head)
            part = weights[:, kept]
            full.append(weights @ values)
            reduced.append(part @ values[kept] / part.sum(1, keepdim=True))
        outputs = torch.stack([torch.cat(full).flatten(), torch.cat(reduced).flatten()]).to(sight.queries.dtype)
        exact, lossy = self._reader.model.decoder.layers[sight.layer].attention.o(outputs).float()
        self._sums[sight.layer] += float((lossy - exact).norm() / (exact.norm() + _TINY))
