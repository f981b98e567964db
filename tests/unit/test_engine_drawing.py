"""Native drawing gives the tokens of the readable one, on every instruction set and whatever the batch."""

from __future__ import annotations

import importlib.util
import math
import random
from collections import Counter

import pytest
import torch

from elbowroom.engine.drawing import BROKEN, Draw, choose, draw_in_torch, draw_natively, uniform
from elbowroom.engine.sampling_params import SamplingParams

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("elbowroom._native") is None, reason="nothing native was built"
)

SIZES = (1, 2, 7, 63, 64, 65, 200, 1000, 5000)
ROUNDING = 1e-5
"""Share by which weights, and sums of them, may differ between two ways to compute them in float32."""
CHI_SQUARE_999 = {3: 16.3, 4: 18.5, 5: 20.5, 6: 22.5, 7: 24.3, 8: 26.1, 9: 27.9, 10: 29.6, 11: 31.3}
"""Quantile 0.999 by degrees of freedom."""


def random_draw(rng: random.Random) -> Draw:
    params = SamplingParams(
        temperature=rng.choice([0.0, 0.1, 0.7, 1.0, 1.0, 3.0, 100.0]),
        top_k=rng.choice([0, 0, 1, 2, 5, 50, 3000, 10**6]),
        top_p=rng.choice([1.0, 1.0, 0.999, 0.9, 0.5, 0.01]),
        min_p=rng.choice([0.0, 0.0, 0.01, 0.3, 1.0]),
    )
    return Draw.of(params, rng.randint(-(2**63), 2**64 - 1), rng.randint(0, 127))


def random_logits(rng: random.Random, size: int) -> torch.Tensor:
    """Return flat, peaked, coarse (many ties), masked or constant logits."""
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    logits = torch.randn(size, generator=generator) * rng.choice([0.01, 1.0, 4.0, 30.0]) + rng.choice([0.0, 500.0])
    kind = rng.randint(0, 5)
    if kind == 0:
        logits = (logits * 2).round() / 2
    elif kind == 1:
        logits = logits.bfloat16().float()
    elif kind == 2:
        logits[torch.rand(size, generator=generator) < 0.5] = -math.inf
        logits[rng.randrange(size)] = 0.0
    elif kind == 3:
        logits = torch.full((size,), -0.0)
        logits[:: rng.randint(1, 9)] = 0.0
    return logits


def neighbours(logits: torch.Tensor, draw: Draw, point: float) -> set[int]:
    """Return the tokens that the oracle draws when points and limits move by rounding."""
    tokens = set()
    for moved in (0.0, ROUNDING, -ROUNDING):
        for p in (0.0, ROUNDING, -ROUNDING):
            for m in (0.0, ROUNDING, -ROUNDING):
                top_p = draw.top_p if draw.top_p == 1 else draw.top_p + p
                min_p = draw.min_p * (1 + m)
                near = Draw(draw.temperature, draw.top_k, top_p, min_p, draw.seed, draw.sample)
                tokens.add(choose(logits, near, min(max(point + moved, 0.0), 1 - 2**-53)))
    return tokens


def test_native_tokens_are_those_of_the_oracle(isa: str) -> None:
    """Over thousands of rows and mixes; a difference is excused only within rounding of a boundary, and is rare."""
    rng, excused, drawn = random.Random(7), 0, 0
    for _ in range(700):
        size = rng.choice(SIZES)
        draws = [random_draw(rng) for _ in range(rng.randint(1, 6))]
        logits = torch.stack([random_logits(rng, size) for _ in draws])
        positions = [rng.randint(0, 2**31) for _ in draws]
        expected = draw_in_torch(logits, draws, positions)
        for row, token in enumerate(draw_natively(logits, draws, positions)):
            drawn += draws[row].temperature > 0
            if token != expected[row]:
                draw = draws[row]
                assert draw.temperature > 0, "greedy tokens are exact"
                point = uniform(draw.seed, draw.sample, positions[row])
                assert token in neighbours(logits[row], draw, point), (isa, draw, token, expected[row])
                excused += 1
    assert drawn > 1800
    assert excused <= drawn / 500


def test_a_large_flat_vocabulary_is_cut_where_the_oracle_cuts(isa: str) -> None:
    """152,000 tokens: top-p, min-p and a top-k beyond any shortcut, on flat, peaked and equal logits."""
    size = 152_000
    generator = torch.Generator().manual_seed(5)
    flat = torch.randn(size, generator=generator)
    outlier = flat * 0.05
    outlier[77] = 25.0
    rows = [flat * 0.05, flat, flat * 4, outlier, torch.zeros(size)]
    settings = [{"top_p": 0.9}, {"min_p": 0.2}, {"top_k": 20_000, "top_p": 0.99}, {"top_k": 50, "min_p": 0.1}]
    different = 0
    for row in rows:
        draws = [Draw.of(SamplingParams(**each), seed, 0) for seed, each in enumerate(settings * 2)]
        tokens = draw_natively(row.expand(len(draws), size).contiguous(), draws, [3] * len(draws))
        for draw, token in zip(draws, tokens, strict=True):
            point = uniform(draw.seed, 0, 3)
            if token != choose(row, draw, point):
                different += 1
                # A token weighs some 1e-5 here, so that a shift by rounding crosses one boundary at most.
                assert token in {choose(row, draw, min(max(point + shift, 0), 0.9999999)) for shift in (-1e-6, 1e-6)}
    assert different <= 2


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 0.6}, {"top_k": 6}, {"top_p": 0.8}, {"min_p": 0.15}, {"top_k": 9, "top_p": 0.9}]
)
def test_native_frequencies_follow_the_distribution(params: dict[str, float]) -> None:
    """Chi-square at 0.001 against the exact probabilities of a small vocabulary; nothing cut off is ever drawn."""
    num_draws, size = 20_000, 12
    logits = torch.linspace(2.0, -2.0, size)[torch.randperm(size, generator=torch.Generator().manual_seed(1))]
    draw = [Draw.of(SamplingParams(**params), seed, 1) for seed in range(num_draws)]
    counts = Counter(draw_natively(logits.expand(num_draws, size).contiguous(), draw, [5] * num_draws))
    # The oracle, asked at the middle of each of many equal parts, gives the probabilities to 1 / parts.
    parts = 4000
    exact = Counter(choose(logits, draw[0], (part + 0.5) / parts) for part in range(parts))
    assert set(counts) == set(exact)
    statistic = sum((counts[t] - num_draws * n / parts) ** 2 / (num_draws * n / parts) for t, n in exact.items())
    assert statistic < CHI_SQUARE_999[len(exact) - 1]


def test_a_row_does_not_depend_on_its_batch() -> None:
    """Alone, or among others in any order, or as a row of a wider tensor, a row has one token."""
    rng = random.Random(3)
    draws = [random_draw(rng) for _ in range(64)]
    logits = torch.stack([random_logits(rng, 700) for _ in draws])
    positions = list(range(64))
    together = draw_natively(logits, draws, positions)
    order = rng.sample(range(64), 64)
    shuffled = draw_natively(logits[order], [draws[i] for i in order], order)
    assert shuffled == [together[i] for i in order]
    wide = torch.full((64, 900), 1e9)
    wide[:, 100:800] = logits
    assert draw_natively(wide[:, 100:800], draws, positions) == together
    assert [draw_natively(logits[i : i + 1], [draws[i]], [i])[0] for i in range(64)] == together


def test_broken_rows_are_marked_wherever_the_value_stands(isa: str) -> None:
    """NaN or infinity at any place of a block, and rows of minus infinity; others keep their tokens."""
    for size in (1, 9, 64, 130):
        for bad in (math.nan, math.inf):
            logits = torch.zeros(size, size)
            logits.fill_diagonal_(bad)
            assert draw_natively(logits, [Draw.of(SamplingParams(), 0, 0)] * size, [0] * size) == [BROKEN] * size
        rows = torch.zeros(2, size)
        rows[1] = -math.inf
        assert draw_natively(rows, [Draw.of(SamplingParams(temperature=0), 0, 0)] * 2, [0, 0]) == [0, BROKEN]


def test_random_numbers_are_the_same_in_both_languages() -> None:
    """Any 64-bit seed, sample and position."""
    from elbowroom import _native

    rng = random.Random(0)
    for _ in range(2000):
        seed, sample, position = rng.randint(-(2**63), 2**64 - 1), rng.randint(0, 127), rng.randint(0, 2**31)
        assert uniform(seed, sample, position) == _native.uniform(seed % 2**64, sample, position)


def test_what_native_code_cannot_read_is_refused() -> None:
    """Other dtypes, strides and counts are errors, not wrong reads."""
    draw = [Draw.of(SamplingParams(), 0, 0)]
    for logits in (torch.zeros(1, 4).double(), torch.zeros(4), torch.zeros(4, 2).T[:1], torch.zeros(2, 4)):
        with pytest.raises(ValueError, match="logits"):
            draw_natively(logits, draw, [0])
    with pytest.raises(ValueError, match="one draw"):
        draw_natively(torch.zeros(2, 4), draw, [0, 0])
