"""Drawing tokens from logits: temperature, top-k, top-p and min-p for many rows at once.

Rows are grouped by how they are cut, never by who else is there, and each group runs the same operations row by row:
a row's token does not depend on its batch. Groups run in pieces, so that temporaries stay small at any vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from elbowroom.engine.sampling_params import SamplingParams

PIECE_ELEMENTS = 2**17
"""Logits worked on at once (at least one row); a piece needs about 30 bytes for each."""
_FIRST_LOOK = 512
"""Most likely tokens that top-p and min-p look at before they sort a vocabulary of more than ``_SMALL``."""
_SMALL = 4096


def draw(logits: Tensor, rows: Sequence[int], params: Sequence[SamplingParams], points: Sequence[float]) -> list[int]:
    """Return one token for each of ``rows``.

    Args:
        logits: float32 ``[R, V]``, finite or minus infinity.
        rows: n rows to draw for; none is greedy.
        params: of each of them.
        points: for each of them a number in [0, 1) that decides.
    """
    groups: dict[int, list[int]] = {}
    for place, each in enumerate(params):
        groups.setdefault(_num_candidates(each, logits.shape[1]), []).append(place)
    tokens = [0] * len(rows)
    size = max(PIECE_ELEMENTS // logits.shape[1], 1)
    for count, places in groups.items():
        for begin in range(0, len(places), size):
            piece = places[begin : begin + size]
            picked = logits[[rows[i] for i in piece]]
            chosen = _draw_piece(picked, [params[i] for i in piece], [points[i] for i in piece], count)
            for place, token in zip(piece, chosen, strict=True):
                tokens[place] = token
    return tokens


def _num_candidates(params: SamplingParams, vocab_size: int) -> int:
    """Return how many of the most likely tokens to sort; 0 when nothing is cut off."""
    if params.top_k > 0:
        return min(params.top_k, vocab_size)
    if params.top_p < 1.0 or params.min_p > 0.0:
        return vocab_size if vocab_size <= _SMALL else _FIRST_LOOK
    return 0


def _draw_piece(logits: Tensor, params: Sequence[SamplingParams], points: Sequence[float], count: int) -> list[int]:
    probs = torch.softmax(logits / _column([each.temperature for each in params]), dim=-1)
    if count == 0:
        plain: list[int] = _pick(probs, points).tolist()
        return plain
    values, ids = _most_likely(probs, count)
    kept = _kept(values, params)
    chosen: list[int] = ids.gather(1, _pick(values * kept, points)[:, None])[:, 0].tolist()
    if count < probs.shape[1]:
        for row, each in enumerate(params):
            if each.top_k <= 0 and bool(kept[row, -1]):  # the cut lies behind the first look
                values, ids = _most_likely(probs[row : row + 1], probs.shape[1])
                place = int(_pick(values * _kept(values, [each]), [points[row]]))
                chosen[row] = int(ids[0, place])
    return chosen


def _most_likely(probs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the ``count`` largest probabilities of each row, descending, and their token ids."""
    if count < probs.shape[1]:
        return probs.topk(count)
    return probs.sort(dim=-1, descending=True, stable=True)


def _kept(values: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Return which of the descending probabilities ``[R, K]`` top-p and then min-p leave: a prefix of each row."""
    totals = torch.stack([v.sum() if p.top_k > 0 else v.new_tensor(1.0) for v, p in zip(values, params, strict=True)])
    mass_before = (values.cumsum(dim=-1) - values) / totals[:, None]
    top_p = _column([each.top_p for each in params])
    kept = (mass_before < top_p) | (top_p >= 1.0)
    return kept & (values >= _column([each.min_p for each in params]) * values[:, :1])


def _pick(weights: Tensor, points: Sequence[float]) -> Tensor:
    """Return for each row of ``weights [R, K]`` the index at which the cumulated weight passes its point."""
    cumulative = weights.double().cumsum(dim=-1)
    marks = torch.tensor(points, dtype=torch.float64)[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, marks, right=True)[:, 0]
    return index.clamp(max=weights.shape[1] - 1)


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None]
