"""Sampling: the right distribution, penalties as published, and randomness that belongs to the request alone."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elbowroom.engine.drawing import uniform
from elbowroom.engine.sampler import SlotSampler, _penalise, sample
from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.engine.types import SampledToken, SampleSpec
from elbowroom.errors import ModelError, RequestError

LOGITS = torch.tensor([2.0, 1.5, 1.0, 0.0, -1.0, 0.5, -3.0])
CHI_SQUARE_999 = {1: 10.8, 2: 13.8, 3: 16.3, 4: 18.5, 5: 20.5, 6: 22.5}
"""Quantile 0.999 by degrees of freedom."""
DRAWS = 2500


def slot(history: list[int] | None = None, prompt: int = 0, sample_number: int = 0, **params: object) -> SlotSampler:
    given_seed = params.pop("seed", 0)
    spec = SampleSpec(SamplingParams(**params), given_seed, sample_number, prompt, tuple(history or []))
    return SlotSampler.start(spec)


def one(logits: torch.Tensor, state: SlotSampler) -> SampledToken:
    return sample(logits.clone()[None], [state])[0]


def reference(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> list[float]:
    """Return the probabilities by the definitions, token by token, in double precision."""
    weights = [math.exp(x / temperature) for x in logits.double().tolist()]
    probs = [w / sum(weights) for w in weights]
    order = sorted(range(len(probs)), key=lambda i: -probs[i])
    order = order[:top_k] if top_k > 0 else order
    total, mass, kept = sum(probs[i] for i in order), 0.0, []
    for i in order:
        if mass < top_p:
            kept.append(i)
        mass += probs[i] / total
    kept = [i for i in kept if probs[i] >= min_p * probs[kept[0]]]
    total = sum(probs[i] for i in kept)
    return [probs[i] / total if i in kept else 0.0 for i in range(len(probs))]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0),
        (0.5, 0, 1.0, 0.0),
        (2.5, 0, 1.0, 0.0),
        (1.0, 3, 1.0, 0.0),
        (1.0, 100, 1.0, 0.0),
        (1.0, 0, 0.7, 0.0),
        (1.0, 0, 0.01, 0.0),
        (1.0, 0, 1.0, 0.3),
        (1.3, 5, 0.9, 0.2),
    ],
)
def test_tokens_follow_the_distribution(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    """Frequencies pass a chi-square test at 0.001, and what is cut off is never drawn."""
    params = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    states = [slot(seed=seed, **params) for seed in range(DRAWS)]
    counts = Counter(token.token_id for token in sample(LOGITS.repeat(DRAWS, 1), states))
    expected = reference(LOGITS, temperature, top_k, top_p, min_p)
    support = [i for i, p in enumerate(expected) if p > 0]
    assert set(counts) <= set(support)
    if len(support) > 1:
        statistic = sum((counts[i] - DRAWS * expected[i]) ** 2 / (DRAWS * expected[i]) for i in support)
        assert statistic < CHI_SQUARE_999[len(support) - 1]


def test_positions_of_one_request_are_independent_draws() -> None:
    """Tokens of one seed at successive positions follow the distribution too."""
    state = slot(seed=3)
    counts = Counter(one(LOGITS, state).token_id for _ in range(DRAWS))
    expected = reference(LOGITS, 1.0, 0, 1.0, 0.0)
    assert sum((counts[i] - DRAWS * p) ** 2 / (DRAWS * p) for i, p in enumerate(expected)) < CHI_SQUARE_999[6]


def test_uniform_numbers_are_uniform_in_each_key() -> None:
    """Seed, sample and position each drive the generator: no key is ignored, no neighbours repeat."""
    for key in range(3):
        values = [uniform(*(number if place == key else 7 for place in range(3))) for number in range(2000)]
        assert all(0 <= value < 1 for value in values)
        assert len(set(values)) == 2000
        counts = Counter(int(value * 5) for value in values)
        assert sum((counts[i] - 400) ** 2 / 400 for i in range(5)) < CHI_SQUARE_999[4]
    assert 0 <= uniform(-(2**63), 0, 0) < 1
    assert 0 <= uniform(2**64 - 1, 127, 2**31) < 1


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 5), st.integers(0, 99)), min_size=1, max_size=8),
    st.randoms(use_true_random=False),
)
def test_a_token_depends_on_its_own_request_only(keys: list[tuple[int, int, int]], order: object) -> None:
    """Alone or in any batch and order, (seed, sample, position) and the logits give the same token."""
    kinds = [{"temperature": 1.1, "top_p": 0.9}, {}, {"top_k": 3}, {"top_k": 5, "min_p": 0.1}, {"temperature": 0.0}]
    rows = [torch.randn(20, generator=torch.Generator().manual_seed(place)) for place in range(len(keys))]

    def state(key: tuple[int, int, int]) -> SlotSampler:
        return slot([1] * key[2], key[2], key[1], seed=key[0], **kinds[key[2] % len(kinds)])

    alone = [one(row, state(key)).token_id for row, key in zip(rows, keys, strict=True)]
    places = list(range(len(keys)))
    order.shuffle(places)
    together = sample(torch.stack([rows[i] for i in places]), [state(keys[i]) for i in places])
    assert [token.token_id for token in together] == [alone[i] for i in places]


def test_a_restarted_slot_goes_on_where_it_was() -> None:
    """After a preemption the state is rebuilt from the tokens, penalties and position included."""
    params = {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2, "seed": 11}
    state, tokens = slot([1, 2], 2, **params), [1, 2]
    for _ in range(40):
        rebuilt = slot(tokens, 2, **params)
        token = one(LOGITS, state).token_id
        assert token == one(LOGITS, rebuilt).token_id
        tokens.append(token)


def test_penalties_are_the_published_formulas() -> None:
    """Repetition counts prompt and output; presence and frequency count the output; bias is added last."""
    logits = torch.tensor([1.0, -1.0, 0.5, 0.25])
    state = slot(
        [0, 1, 2, 2, 2],
        2,
        temperature=0.0,
        repetition_penalty=2.0,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        logit_bias={3: 0.125, 99: 5.0},
        logprobs=0,
    )
    changed = logits.clone()
    _penalise(changed, state)
    assert changed.tolist() == [0.5, -2.0, 0.25 - 0.5 - 0.75, 0.375]
    chosen = one(logits, state)
    assert chosen.token_id == 0
    assert chosen.logprob == pytest.approx(float(torch.log_softmax(logits, -1)[0]))


def test_greedy_takes_the_first_of_equal_logits() -> None:
    """Ties go to the lowest token id, with and without penalties."""
    tied = torch.tensor([0.0, 3.0, 1.0, 3.0])
    assert one(tied, slot(temperature=0.0)).token_id == 1
    assert one(tied, slot(temperature=0.0, logit_bias={2: 2.0})).token_id == 1
    assert one(tied.bfloat16(), slot(temperature=0.0)).token_id == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_k": 2}, {"frequency_penalty": 1.0}])
def test_broken_logits_are_an_error_that_says_so(bad: float, params: dict[str, float]) -> None:
    """One NaN or infinity anywhere in a row stops the step instead of choosing something."""
    logits = LOGITS.repeat(2, 1)
    logits[1, 3] = bad
    with pytest.raises(ModelError, match=f"the model gave the logit {bad}"):
        sample(logits, [slot(**params), slot(**params)])


def test_a_cut_behind_the_first_look_is_found() -> None:
    """With a flat distribution over 6,000 tokens, top-p and min-p still cut where they say."""
    flat = torch.linspace(0.1, 0.0, 6000)
    expected = reference(flat, 1.0, 0, 0.8, 0.0)
    states = [slot(seed=seed, top_p=0.8) for seed in range(400)]
    drawn = {token.token_id for token in sample(flat.repeat(400, 1), states)}
    last = max(i for i, p in enumerate(expected) if p > 0)
    assert 4400 < max(drawn) <= last
    assert max(one(flat, slot(seed=seed, min_p=0.93)).token_id for seed in range(100)) > 3000


def test_masked_logits_are_allowed_and_never_drawn() -> None:
    """Minus infinity forbids a token; a row of nothing else is an error."""
    logits = torch.full((7,), -math.inf)
    logits[4] = 0.0
    assert {one(logits, slot(seed=seed)).token_id for seed in range(50)} == {4}
    with pytest.raises(ModelError, match="-inf"):
        one(torch.full((7,), -math.inf), slot())


def test_logprobs_are_of_the_unchanged_distribution() -> None:
    """Temperature and penalties do not change what is reported; the top ones come in order."""
    token = one(LOGITS, slot([0], 0, temperature=0.1, frequency_penalty=2.0, logprobs=3))
    expected = torch.log_softmax(LOGITS, -1)
    assert token.logprob == pytest.approx(float(expected[token.token_id]))
    assert [pair[0] for pair in token.top_logprobs] == [0, 1, 2]
    assert [pair[1] for pair in token.top_logprobs] == pytest.approx(expected[:3].tolist())
    assert one(LOGITS, slot()).logprob is None
    assert len(one(LOGITS, slot(logprobs=20)).top_logprobs) == 7


@pytest.mark.parametrize(
    "params",
    [
        {"n": 0},
        {"n": True},
        {"temperature": math.nan},
        {"temperature": -0.1},
        {"top_p": 0.0},
        {"top_p": math.nan},
        {"top_k": -2},
        {"min_p": 1.5},
        {"max_tokens": -1},
        {"max_tokens": 1.0},
        {"repetition_penalty": 0.0},
        {"presence_penalty": 3},
        {"logit_bias": {1: math.nan}},
        {"stop": ("",)},
        {"stop": tuple("abcdefghijklmnopq")},
        {"logprobs": 21},
        {"seed": 2**64},
    ],
)
def test_parameters_out_of_range_are_refused(params: dict[str, object]) -> None:
    """What cannot be sampled with never reaches the engine."""
    with pytest.raises(RequestError):
        SamplingParams(**params)


def test_forced_tokens_come_first_whatever_their_logits():
    """Their log-probabilities are the model's; a sequence that is computed again goes on where it was."""
    logits = torch.tensor([0.0, 5.0, 1.0, 2.0])
    state = slot([7, 7], prompt=2, temperature=0.0, logprobs=0, forced=(2, 0))
    made = [one(logits, state) for _ in range(3)]
    assert [each.token_id for each in made] == [2, 0, 1]
    expected = torch.log_softmax(logits, -1)
    assert [each.logprob for each in made] == pytest.approx([float(expected[token]) for token in (2, 0, 1)])
    again = slot([7, 7, 2], prompt=2, temperature=0.0, forced=(2, 0))
    assert [one(logits, again).token_id for _ in range(2)] == [0, 1]
