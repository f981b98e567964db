"""Plans with policies cost what they are priced at: bytes that a store holds, and memory while a policy chooses."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from tests.support.decoder_world import config as random_config

from elbowroom.core import LayerSpec
from elbowroom.engine.accounting import KVPricing
from elbowroom.engine.sizing import RUNTIME_BASE_BYTES, plan_memory
from elbowroom.kv import KVHandle, KVPlan, KVStep, PagedStore, Want
from elbowroom.kv.base import PromptPart
from elbowroom.memory import Arena, Budget, HostTier, Ledger
from elbowroom.memory.meter import reset_peak
from elbowroom.models.path import ComputePath

# One head of 16 + 16 float32 makes a strip of 8 KiB: two whole pages, so that bytes can be compared exactly.
SPEC = LayerSpec(num_q_heads=1, num_kv_heads=1, head_dim=16, v_head_dim=16, scale=0.25, rope=None)
STRIP = 64 * 32 * 4


def append(store: PagedStore, handle: KVHandle, count: int, part: PromptPart) -> None:
    start = store.num_tokens(handle)
    parts = np.array([part], dtype=np.int8)
    step = KVStep((handle,), np.array([0, count], dtype=np.int32), np.arange(start, start + count), parts)
    assert store.reserve(step) is None
    x = torch.randn(count, 1, 16, generator=torch.Generator().manual_seed(start))
    for layer in range(len(store.plan.layers)):
        store.attend(layer, x, x, x, step, Want())
        store.end_layer(layer, step)
    store.end_step(step)


@pytest.mark.parametrize("text", ["snapkv(96)", "streaming(96)", "spatten(140,last=110)", "snapkv(150,every=128)"])
@pytest.mark.parametrize("chunks", [[1000], [300, 150, 550]])
@pytest.mark.parametrize("window", [70, 500])
def test_a_window_beside_a_policy_is_priced_by_what_was_read(text: str, chunks: list[int], window: int) -> None:
    """It reads the newest tokens of all, and holds more of them than the policy leaves to the other layers."""
    layers = [SPEC, SPEC, dataclasses.replace(SPEC, window=window)]
    plan = KVPlan.parse(text).bind(layers, "float32")
    ledger = Ledger(Budget({}))
    store = PagedStore(plan, Arena(HostTier(), ledger), 2**22)
    handle, prompt, held = store.open(), sum(chunks), []
    for number, count in enumerate(chunks):
        append(store, handle, count, PromptPart.END if number == len(chunks) - 1 else PromptPart.PART)
    generated = np.arange(1, 141)
    choices = generated % (plan.interval or 1000) == 0
    for chooses in choices:
        append(store, handle, 1, PromptPart.CHOICE if chooses else PromptPart.NONE)
        held.append(ledger.held("kv", "host"))
    priced = plan.curve(prompt, prompt + generated, step_tokens=max(chunks)).resident_bytes

    assert held[0] >= (2 + 1 + window // 64) * STRIP
    assert (np.array(held) <= priced).all()
    # At a choice what goes and what is written anew are both there, until it is over.
    exact = (np.array(held) >= priced - 2 * STRIP)[~choices]
    assert exact.all(), "more than a window's two blocks that may be gone"


@pytest.mark.parametrize("text", ["snapkv(150,every=128)", "streaming(200)", "snapkv(150,every=64) | kivi(2,2,32)"])
def test_bytes_of_a_long_generation_are_bounded(text: str) -> None:
    """While each choice is made and behind it, for 1,000 tokens, without more than pages that strips share."""
    plan = KVPlan.parse(text).bind([SPEC, SPEC], "float32")
    pricing = KVPricing.of(plan, 4096, 512, 4096)
    never = KVPlan.parse(re.sub(r"every=\d+", "every=0", str(KVPlan.parse(text)))).bind([SPEC, SPEC], "float32")
    assert pricing.by_blocks == KVPricing.of(never, 4096, 512, 4096).by_blocks
    ledger, most = Ledger(Budget({})), 0
    store = PagedStore(plan, Arena(HostTier(), ledger), 2**22)
    handle = store.open()
    append(store, handle, 100, PromptPart.END)
    for number in range(1, 1001):
        append(store, handle, 1, PromptPart.NONE if number % plan.interval else PromptPart.CHOICE)
        most = max(most, ledger.held("kv", "host"))
        assert ledger.held("kv", "host") <= pricing.generation_bytes(100, 100 + number)
    assert pricing.generation_bytes(100, 4000) < pricing.price(20)
    assert pricing.generation_bytes(100, 1100) <= pricing.generation_bytes(100, 4000)
    blocks = pricing.largest(2**22, 100) // 64
    assert blocks == 64, "the whole context fits"
    assert most >= 2 * plan.chosen_bytes


def test_memory_for_choices_is_that_of_the_tokens_that_fit() -> None:
    """Without choices in between a prompt may follow as many tokens as the budget holds."""
    config = dataclasses.replace(random_config(), max_positions=2**20)
    for text, every in (("snapkv(256)", 0), ("snapkv(256)", 64), ("snapkv(256) | int8", 0)):
        plan = KVPlan.parse(text.replace(")", f",every={every})", 1)).bind(config.layers, "float32")
        last = 0
        for budget in (2**26, 2**26 + 1000, 2**27):
            made = plan_memory(config, torch.float32, ComputePath(0), [plan], budget, 8)
            tokens = made.kv_bytes // plan.chosen_bytes * 64
            temporary = plan.choice_bytes(made.max_step_tokens, min(tokens, config.max_positions))
            assert made.runtime_bytes - RUNTIME_BASE_BYTES >= temporary
            assert made.kv_bytes >= last, "a larger budget holds no less"
            last = made.kv_bytes
        assert (temporary < 2**23) == (every > 0)


CHOICE = """
import json, os, sys
import numpy as np, torch
from elbowroom.core import LayerSpec
from elbowroom.kv import KVPlan, KVStep, PagedStore, Want
from elbowroom.kv.base import PromptPart
from elbowroom.memory import Arena, Budget, HostTier, Ledger
from elbowroom.memory.meter import peak_rss_bytes, reset_peak, rss_bytes

torch.set_num_threads(1)

def measure(case):
    text, dtype, (count, group, num_kv, dim, generated) = case
    num_q = group * num_kv
    spec = LayerSpec(num_q_heads=num_q, num_kv_heads=num_kv, head_dim=dim, v_head_dim=dim, scale=0.1, rope=None)
    plan = KVPlan.parse(text).bind([spec], dtype)
    store = PagedStore(plan, Arena(HostTier(), Ledger(Budget({}))), 2**28)
    q, k, v = (torch.randn(count, heads, dim, dtype=getattr(torch, dtype)) for heads in (num_q, num_kv, num_kv))
    growth = 0
    for _ in range(2):  # the first one makes strips and code resident
        handle = store.open()
        first = PromptPart.END if generated else PromptPart.PART
        steps = [(0, first), *((start, PromptPart.NONE) for start in range(count, generated, count))]
        for start, part in [*steps, (steps[-1][0] + count, PromptPart.END)]:
            parts = np.array([part], dtype=np.int8)
            step = KVStep((handle,), np.array([0, count], dtype=np.int32), np.arange(start, start + count), parts)
            assert store.reserve(step) is None
            reset_peak()
            before = rss_bytes()
            out = store.attend(0, q, k, v, step, Want())
            store.end_layer(0, step)
            growth = peak_rss_bytes() - before
            del out
            store.end_step(step)
        held = store.num_tokens(handle)
        store.close(handle)
    return growth, plan.choice_bytes(count, held)

for case in json.loads(sys.argv[1]):
    if os.fork() == 0:  # each in a process of its own, which need not import anything
        print(json.dumps(measure(case)), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


CASES = (
    ("snapkv(tokens=512,w=64)", "bfloat16", (1024, 8, 2, 64, 0)),  # scores weigh most
    ("spatten(tokens=512,w=64)", "bfloat16", (1024, 8, 2, 64, 0)),  # and the books of tokens
    ("heads(0.5,skip=0,w=64)", "bfloat16", (1024, 8, 2, 64, 0)),  # scores of a whole prompt, and values
    ("streaming(512)", "float32", (1024, 1, 8, 128, 0)),  # keys, strips and the output of attention
    ("snapkv(tokens=128,w=64)", "bfloat16", (64, 8, 2, 64, 6000)),  # what was generated before a later prompt
    ("snapkv(tokens=128,w=64) | kivi(2,2,64)", "bfloat16", (64, 8, 2, 64, 6000)),
)
"""Plans, types and shapes: tokens of a step, queries of a KV head, KV heads, channels, tokens between two prompts."""


@pytest.fixture(scope="module")
def choices() -> list[tuple[int, int]]:
    """Of each case how far the process grew, and the bytes that the engine sets aside."""
    if not reset_peak():
        pytest.skip("this system does not let a process reset VmHWM")
    # Every large buffer is mapped by itself: what was given back before cannot hide what is taken now.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", CHOICE, json.dumps(CASES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{text}-{dtype}" for text, dtype, _ in CASES])
def test_a_choice_takes_no_more_memory_than_the_engine_sets_aside(choices: list[tuple[int, int]], number: int) -> None:
    """The peak of a process while one layer attends and a policy chooses from it, strips being resident already."""
    growth, priced = choices[number]
    assert growth <= priced
    assert growth > 0.3 * priced, "or the measurement missed the choice"


@pytest.mark.parametrize("text", ["snapkv(256,every=64) | kivi(4,4,32)", "streaming(512) | kivi(4,4,32)"])
def test_nothing_is_set_aside_for_layers_that_are_not_chosen_from(text: str) -> None:
    full = LayerSpec(num_q_heads=8, num_kv_heads=2, head_dim=64, v_head_dim=64, scale=0.1, rope=None)
    windowed = dataclasses.replace(full, window=512)
    prices = [
        KVPlan.parse(text).bind(layers, "float32").choice_bytes(512, 2**17)
        for layers in ([full] * 4, [full, windowed] * 2)
    ]
    assert prices[0] == prices[1] < 2**25
