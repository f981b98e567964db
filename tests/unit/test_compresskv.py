"""Policy compresskv: budgets of layers, heads that vote, and that the engine answers with what stays."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.support.kv_world import make_spec

from elbowroom.bench.random_model import random_calibration
from elbowroom.engine.llm import LLM
from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.errors import PlanError
from elbowroom.evals import samples
from elbowroom.evals.base import score_reply
from elbowroom.evals.engine_target import PlainTokenizer
from elbowroom.evals.samples import TaskSpec
from elbowroom.kv import KVPlan
from elbowroom.kv.policies import LayerView
from elbowroom.kv.policies.budgets import layer_budgets
from elbowroom.kv.policies.compresskv import CompressKVPolicy
from elbowroom.kv.policies.parameters import READING

# Published error scores of Llama-3.1-8B-Instruct times 32 (Lin et al., arXiv 2508.02401), layer by layer.
LLAMA = (
    *(0.58908, 0.60937, 1.16052, 0.90048, 0.89616, 1.17768, 0.83396, 0.98202, 1.41497, 1.36387, 1.40371),
    *(1.26427, 0.58091, 1.37684, 1.19757, 1.20667, 0.96894, 1.13374, 1.10823, 1.15865, 1.34507, 0.80679),
    *(1.10862, 1.20164, 1.08773, 0.92560, 0.90741, 1.02127, 0.71108, 0.58361, 0.74766, 0.22587),
)
LAYERS = [make_spec(q_heads=6, kv_heads=2), make_spec(q_heads=6, kv_heads=2, window=50), make_spec(q_heads=6)]


def test_budgets_of_published_scores_are_the_published_ones() -> None:
    budgets = layer_budgets(LLAMA, 256)
    assert sum(budgets) == 8192
    assert (budgets[0], budgets[8], budgets[31]) == (164, 350, 83)
    assert (min(budgets), max(budgets)) == (83, 350)


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=40).filter(lambda errors: sum(errors) > 1e-6),
    st.integers(32, 600),
    st.integers(0, 200),
)
def test_budgets_are_exact_bounded_and_follow_the_errors(errors: list[float], mean: int, least: int) -> None:
    least = min(32 + least, mean)
    budgets = layer_budgets(errors, mean, least)
    assert sum(budgets) == mean * len(errors)
    assert all(least <= each <= 3 * mean for each in budgets)
    rising = np.argsort(errors, kind="stable")
    assert (np.diff(np.array(budgets)[rising]) >= -1).all()


def view(layer: int, num_held: int = 300) -> LayerView:
    spec, generator = LAYERS[layer], torch.Generator().manual_seed(layer)
    keys = torch.randn(spec.num_kv_heads, num_held, spec.head_dim, generator=generator)
    return LayerView(layer, spec, torch.randn(4, 6, spec.head_dim, generator=generator), keys.__getitem__, num_held)


@pytest.mark.parametrize(("pick", "heads"), [("srh", 1), ("srh", 3), ("classic", 2), ("all", 2), ("random", 2)])
@pytest.mark.parametrize("kernel", [1, 5])
def test_what_stays_agrees_with_a_loop(pick: str, heads: int, kernel: int) -> None:
    calibration = random_calibration(LAYERS)
    bound = CompressKVPolicy(tokens=100, w=4, kernel=kernel, heads=heads, pick=pick).calibrated(LAYERS, calibration)
    for layer in (0, 2):
        scores = {"srh": calibration.head_scores, "classic": calibration.copy_scores}.get(pick)
        voters = list(bound.voters[layer])
        if scores is not None:
            assert voters == sorted(np.argsort(scores[layer])[::-1][:heads].tolist())
        assert len(set(voters)) == (6 if pick == "all" else heads)
        seen, group = view(layer), LAYERS[layer].group_size
        attention = torch.cat([seen.window_attention(head) for head in range(LAYERS[layer].num_kv_heads)])
        assert torch.equal(attention[group - 1], seen.window_attention(0, [group - 1])[0])
        votes = [float(sum(attention[head, :, slot].sum() for head in voters)) for slot in range(296)]
        around = [range(max(slot - kernel // 2, 0), min(slot + kernel // 2 + 1, 296)) for slot in range(296)]
        smooth = [sum(votes[slot] for slot in near) for near in around]
        best = sorted(sorted(range(296), key=lambda slot: -smooth[slot])[:56])
        assert bound.select(seen, 60).tolist() == [[*best, *range(296, 300)]]


def test_keys_are_decoded_only_of_heads_that_vote() -> None:
    calibration = dataclasses.replace(
        random_calibration(LAYERS), head_scores=((0.1, 0.1, 0.1, 0.9, 0.1, 0.8), (0.1,) * 6, (0.1,) * 6)
    )
    bound = CompressKVPolicy(tokens=100, heads=2).calibrated(LAYERS, calibration)
    seen, decoded = view(0), list[int]()
    noting = dataclasses.replace(seen, keys=lambda head: (decoded.append(head), seen.keys(head))[1])
    bound.select(noting, 80)
    assert bound.voters[0] == (3, 5)
    assert decoded == [1]


def test_budgets_are_divided_among_the_layers_that_are_chosen_from() -> None:
    bound = KVPlan.parse("compresskv(tokens=100)").bind(LAYERS, "float32", random_calibration(LAYERS))
    assert bound.policy is not None
    limits = [bound.policy.limit(layer, True) for layer in (0, 2)]
    assert sum(limits) == 200
    assert min(limits) >= 72, "the newest eight and a block"
    assert bound.policy.limit(0, False) == READING * limits[0]


def test_what_a_plan_was_calibrated_with_is_in_its_fingerprint() -> None:
    plan = KVPlan.parse("compresskv(heads=2)")
    prints = {plan.bind(LAYERS, "float32", random_calibration(LAYERS, seed)).fingerprint() for seed in (0, 0, 1, 2)}
    assert len(prints) == 3
    assert KVPlan.parse(plan.text) == plan
    assert plan.text == "compresskv(tokens=256,w=8,kernel=5,heads=2,pick=srh,budgets=error,every=0) | plain(dtype=auto)"


@pytest.mark.parametrize(
    "arguments", ["", "budgets=uniform", "pick=all", "pick=random", "pick=classic,budgets=uniform"]
)
def test_without_a_calibration_the_command_is_named(arguments: str) -> None:
    plan = KVPlan.parse(f"compresskv({arguments})")
    assert plan.needs_calibration
    with pytest.raises(PlanError, match="needs a calibrated model") as caught:
        plan.bind(LAYERS, "float32")
    assert "elbowroom calibrate" in str(caught.value.hint)
    with pytest.raises(PlanError, match="the calibration has 2 layers"):
        plan.bind(LAYERS, "float32", random_calibration(LAYERS[:2]))


@pytest.mark.parametrize("pick", ["all", "random"])
def test_without_scores_no_calibration_is_needed(pick: str) -> None:
    plan = KVPlan.parse(f"compresskv(100,pick={pick},budgets=uniform)")
    assert not plan.needs_calibration
    bound = plan.bind(LAYERS, "float32")
    assert bound.policy is not None
    assert bound.policy.limit(0, True) == 100


@pytest.mark.parametrize(
    ("text", "found", "fix"),
    [
        ("compresskv(tokens=70)", "cannot keep 70 tokens", "tokens=72"),
        ("compresskv(pick=best)", "pick=best", "srh, classic, random, all"),
        ("compresskv(budgets=none)", "budgets=none", "error, uniform"),
        ("compresskv(kernel=2)", "kernel=2", "an odd kernel"),
        ("compresskv(heads=0)", "heads=0", "a number above 0"),
        ("compresskv(voters=3)", "does not take", "parts joined"),
    ],
)
def test_parameters_that_cannot_work_name_the_way_out(text: str, found: str, fix: str) -> None:
    with pytest.raises(PlanError) as caught:
        KVPlan.parse(text)
    assert found in caught.value.message
    assert fix in str(caught.value.hint)


def test_the_engine_answers_with_what_stays() -> None:
    """The built-in model finds facts among 500 tokens of which a layer keeps 96 or less on average, in real bytes."""
    found = 0
    with LLM(memory="128MiB", kv="compresskv(96,heads=1)") as llm:
        parts = llm.engine.parts
        plain = KVPlan.parse("plain").bind(parts.config.layers, "bfloat16")
        for sample in samples.retrieval(PlainTokenizer(llm.tokenizer), TaskSpec(context_tokens=500, num_queries=4)):
            (turn,) = sample.turns
            with llm.session(sample.context + turn.prompt) as session:
                held = parts.store.report().live_bytes
                assert held <= 0.3 * plain.curve(0, np.array([session.mark])).resident_bytes[0]
                reply = session.ask([], SamplingParams(max_tokens=turn.max_new_tokens, temperature=0.0))
            found += score_reply(reply.outputs[0].text, turn.target).value == 1.0
    assert found >= 3
