"""Policies that choose while tokens are generated: long generations stay within a bound, and say what they should."""

from __future__ import annotations

import pytest
import torch
from tests.support.policies import TaperingPolicy
from tests.support.tiny_model import write_tiny_model
from torch import Tensor

from elbowroom.bench.random_model import random_calibration
from elbowroom.bench.schedules import EXCUSED_GAP, Stepper, Subject
from elbowroom.core import STRIP_TOKENS, LayerSpec
from elbowroom.engine.accounting import KVPricing
from elbowroom.engine.room import preempt
from elbowroom.engine.sampling_params import SamplingParams
from elbowroom.engine.scheduler import Scheduler, SchedulerConfig
from elbowroom.engine.types import Request, SampledToken, SessionRef, StepResult
from elbowroom.errors import PlanError, RequestTooLarge
from elbowroom.kernels import LayerStrips, backend_name
from elbowroom.kv import KVPlan
from elbowroom.kv.base import KVStep, PromptPart, Shortfall
from elbowroom.kv.codecs.kivi import KiviCodec
from elbowroom.kv.codecs.plain import PlainCodec
from elbowroom.kv.policies import LayerView, TokenPolicy
from elbowroom.models.decoder import Decoder
from elbowroom.models.loader import load_model
from elbowroom.models.path import ANY, ComputePath

PLANS = (
    "streaming(128)",
    "snapkv(128,every=64)",
    "snapkv(128,every=128) | kivi(2,2,32)",
    "spatten(150,w=16,every=64) | fp8",
    "compresskv(160,every=128) | int8",
    KVPlan(PlainCodec(), TaperingPolicy(interval=64)),
    KVPlan(KiviCodec(2, 4, 32), TaperingPolicy(interval=128)),
)
NATIVE = ANY if backend_name() == "native" else 0


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return load_model(write_tiny_model(tmp_path_factory.mktemp("tiny"), context=4096), torch.float32)


def prompt(count: int, seed: int = 0) -> list[int]:
    return torch.randint(32, 120, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


class Watched(Stepper):
    """A stepper whose books are compared with its store behind every step."""

    def __init__(self, decoder: Decoder, kv: str | KVPlan, capacity_tokens: int, native_tokens: int = 0) -> None:
        subject = Subject(decoder, ComputePath(native_tokens), kv, random_calibration(decoder.config.layers))
        super().__init__(subject, capacity_tokens)
        self.shortfalls: list[Shortfall] = []
        self.most_bytes = 0
        reserve = self.store.reserve

        def watch(step: KVStep) -> Shortfall | None:
            shortfall = reserve(step)
            self.shortfalls.extend([] if shortfall is None else [shortfall])
            held = self.store.report().live_bytes
            self.most_bytes = max(self.most_bytes, held)
            assert held <= self.scheduler.account.used_bytes + self.pricing.transient_bytes
            return shortfall

        self.store.reserve = watch  # type: ignore[method-assign]

    def step(self) -> None:
        super().step()
        self.scheduler.check()
        account = self.scheduler.account
        if not account.ops:
            assert self.store.report().live_bytes <= account.used_bytes + self.pricing.transient_bytes
        chosen = self.store.plan.chosen_layers
        for seq in self.scheduler._state.running:
            stored = self.store._sequences[self._executor._handles[seq.slot].id]
            gone = tuple(stored.expired_blocks[chosen].tolist())
            assert seq.dropped == (gone if any(gone) else ())


class DroppingContext:
    """Attention in plain torch over all that the policy has left; it chooses where it is told to."""

    def __init__(self, layers: tuple[LayerSpec, ...], policy: TokenPolicy) -> None:
        self._layers, self._policy = layers, policy
        self._held: list[tuple[Tensor, Tensor]] = [
            (torch.empty(0, spec.num_kv_heads, spec.head_dim), torch.empty(0, spec.num_kv_heads, spec.v_head_dim))
            for spec in layers
        ]
        self.positions = torch.arange(0)
        self.window = 0
        """Newest queries of this pass that choose; 0: nobody does."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        spec = self._layers[layer]
        keys, values = (torch.cat(pair) for pair in zip(self._held[layer], (k, v), strict=True))
        count = keys.shape[0]
        mask = torch.ones(len(q), count, dtype=torch.bool).tril(count - len(q))
        wide = [x.repeat_interleave(spec.group_size, 1).transpose(0, 1) for x in (keys, values)]
        scores = (q.transpose(0, 1) @ wide[0].transpose(1, 2)) * spec.scale
        out = (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ wide[1]).transpose(0, 1)
        above = count - self._policy.limit(layer, True)
        if self.window and above > 0:
            stay = count - -(-above // STRIP_TOKENS) * STRIP_TOKENS
            newest = q[-min(self.window, self._policy.window) :] if self._policy.window else q[:0]
            view = LayerView(layer, spec, newest, lambda head: keys[:, head], count)
            index = self._policy.select(view, stay).expand(spec.num_kv_heads, -1).t()[..., None]
            keys, values = (x.gather(0, index.expand(-1, -1, x.shape[2])) for x in (keys, values))
        self._held[layer] = keys, values
        return out

    def strips(self, layer: int) -> LayerStrips | None:
        return None

    def end_layer(self, layer: int) -> None:
        pass


@torch.inference_mode()
def oracle_logits(decoder: Decoder, policy: TokenPolicy, tokens: list[int], num_prompt: int) -> Tensor:
    """Return the logits behind the prompt and each later token; the last token before a choice is read alone."""
    context, made = DroppingContext(decoder.config.layers, policy), []
    starts = [0, num_prompt]
    for choice in range(num_prompt + policy.interval, len(tokens), policy.interval):
        starts += [choice - 1, choice]
    for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        context.positions = torch.arange(start, end)
        context.window = num_prompt if start == 0 else int(end - start == 1)
        logits = decoder.logits(decoder(torch.tensor(tokens[start:end]), context))
        made.append(logits[-1:] if start == 0 else logits)
    return torch.cat(made)


@pytest.mark.parametrize("kv", ["streaming(256)", "snapkv(256,every=128)"])
def test_a_long_generation_stays_within_a_bound_and_is_that_of_an_oracle(decoder: Decoder, kv: str) -> None:
    """2,100 tokens in room for a third of them, interrupted once; the same ones follow from what the policy leaves."""
    stepper, read = Watched(decoder, kv, 700, NATIVE), prompt(300)
    stepper.add(1, read, 2100)
    while stepper.scheduler.has_work():
        stepper.step()
        if len(stepper.tokens[1, 0]) == 1000 and not stepper.scheduler.stats().preemptions:
            preempt(stepper.scheduler._state.running[0], stepper.scheduler._state)
    made = stepper.tokens[1, 0]
    bound = stepper.pricing.generation_bytes(300, 2400)
    assert len(made) == 2100
    assert len(set(made)) > 40, "text that varies, or there is nothing to see"
    assert not stepper.shortfalls
    assert stepper.most_bytes <= max(bound, stepper.pricing.peak_bytes(300, ())) + stepper.pricing.transient_bytes
    assert bound < 0.5 * stepper.pricing.price(len(stepper.pricing.by_blocks) * 2400 // 4160)

    policy = stepper.store.plan.policy
    assert policy is not None
    best = oracle_logits(decoder, policy, [*read, *made], 300)[:-1].topk(2)
    clear = best.values[:, 0] - best.values[:, 1] >= EXCUSED_GAP
    assert clear.float().mean() > 0.99
    assert (best.indices[:, 0] == torch.tensor(made))[clear].all()
    stepper.close()


@pytest.mark.parametrize("kv", [*PLANS, "snapkv(256,every=64) | quest(192,skip=0) | int8"], ids=str)
def test_many_that_generate_share_what_one_would_fill_without_choices(decoder: Decoder, kv: str | KVPlan) -> None:
    """No shortfall, no preemption; sessions go on behind what stayed."""
    stepper = Watched(decoder, kv, 4000 if "kivi" in str(kv) else 2400, NATIVE)
    for number in range(3):
        stepper.add(number, prompt(100 + 50 * number, number), 300, session=SessionRef(number))
    stepper.run()
    assert all(len(stepper.tokens[number, 0]) == 300 for number in range(3))
    for number in range(3):
        before = prompt(100 + 50 * number, number) + stepper.tokens[number, 0]
        stepper.add(number + 3, [*before, 65, 66], 70, session=SessionRef(number))
    while stepper.scheduler._state.waiting:
        stepper.step()
    starts = [seq.num_cached_tokens for seq in stepper.scheduler._state.running]
    stepper.run()
    assert starts == [399, 449, 499]
    assert not stepper.shortfalls
    assert stepper.scheduler.stats().preemptions == 0
    stepper.close()


@pytest.mark.parametrize("kv", PLANS, ids=str)
def test_preemption_chooses_the_same_again(decoder: Decoder, kv: str | KVPlan) -> None:
    texts = []
    for interrupted in (False, True):
        stepper = Watched(decoder, kv, 4000, NATIVE)
        stepper.add(1, prompt(200), 210)
        while stepper.scheduler.has_work():
            stepper.step()
            made = len(stepper.tokens.get((1, 0), ()))
            if interrupted and made == 180 and not stepper.scheduler.stats().preemptions:
                preempt(stepper.scheduler._state.running[0], stepper.scheduler._state)
        texts.append(stepper.tokens[1, 0])
        assert stepper.scheduler.stats().preemptions == interrupted
        assert not stepper.shortfalls
        stepper.close()
    assert texts[0] == texts[1]


def test_what_is_generated_is_admitted_by_its_bound(decoder: Decoder) -> None:
    """Without choices the same request is too large, and one without a limit gets the whole context."""
    bounded, unbounded = (Watched(decoder, f"snapkv(128,every={every})", 1000) for every in (64, 0))
    bounded.add(1, prompt(100), 3000)
    with pytest.raises(RequestTooLarge, match="100 prompt tokens and 3000 new ones"):
        unbounded.add(1, prompt(100), 3000)
    limits = []
    for each in (bounded, unbounded):
        sampling = SamplingParams(max_tokens=None, ignore_eos=True)
        each.scheduler.add(Request(id=2, prompt_token_ids=tuple(prompt(100)), sampling=sampling))
        limits.append(each.scheduler._state.waiting[-1].max_new_tokens)
        each.close()
    assert limits[0] == 4096 - 100
    assert limits[1] < 1200


@pytest.mark.parametrize("repeats", [1, 7, 1000])
def test_repeated_steps_stop_before_a_choice(decoder: Decoder, repeats: int) -> None:
    """Choices come behind every 64th generated token, each in a step of its own."""
    bound = KVPlan.parse("streaming(128)").bind(decoder.config.layers, "float32")
    pricing = KVPricing.of(bound, 4096, 512, 4096)
    scheduler = Scheduler(SchedulerConfig(max_positions=4096), [pricing], 2**24)
    sampling = SamplingParams(max_tokens=300, ignore_eos=True)
    for number, count in ((1, 100), (2, 133)):
        scheduler.add(Request(id=number, prompt_token_ids=tuple(prompt(count)), sampling=sampling))
    chosen: dict[int, list[int]] = {}
    while scheduler.has_work():
        plan = scheduler.schedule(0.0)
        steps = min(repeats, plan.valid_for_steps)
        for row in plan.rows:
            if row.prompt is PromptPart.CHOICE:
                chosen.setdefault(row.slot, []).append(row.start + 1)
                assert plan.valid_for_steps == 1
        tokens = {row.slot: [SampledToken(65)] * steps for row in plan.rows if row.sample is not None}
        scheduler.update(StepResult(tokens, steps if plan.rows else 1))
        scheduler.check()
    assert sorted(chosen.values()) == [[164, 228, 292, 356], [197, 261, 325, 389]]


@pytest.mark.parametrize("text", ["snapkv(256,every=100)", "streaming(every=32)", "kvmerger(256,every=64)"])
def test_intervals_are_whole_blocks(text: str) -> None:
    with pytest.raises(PlanError):
        KVPlan.parse(text)
