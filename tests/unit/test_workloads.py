"""Workloads: made, kept, read from traces; the metrics of runs; simulated replays against slow oracles."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.engine_world import bound, layer

from elbowroom.bench.load_real import engine
from elbowroom.bench.load_setup import Policies
from elbowroom.bench.shared_data import DATA
from elbowroom.engine.accounting import KVPricing
from elbowroom.engine.executors.base import ServingCostModel, StepShape
from elbowroom.engine.executors.measuring import BUSY_S, MeasuringExecutor
from elbowroom.engine.scheduler import Scheduler, SchedulerConfig
from elbowroom.engine.types import Row, StepPlan, StepResult
from elbowroom.errors import RequestError
from elbowroom.workloads.arrivals import GammaArrivals, PoissonArrivals, WeibullArrivals
from elbowroom.workloads.base import TimedRequest, Workload
from elbowroom.workloads.fit import fit_costs
from elbowroom.workloads.generate import Generator
from elbowroom.workloads.lengths import FixedLengths, HistogramLengths, LognormalLengths, ZipfLengths
from elbowroom.workloads.metrics import RequestTimes, RunRecord, Targets
from elbowroom.workloads.prompts import PromptMaker
from elbowroom.workloads.replay import Replay
from elbowroom.workloads.simulate import Simulation
from elbowroom.workloads.traces import read_trace
from elbowroom.workloads.traces.base import TraceOptions

PRICING = KVPricing.of(bound(layer()), 8192, 128, 4096)
COST = ServingCostModel(0.01, 0.001, 0.0005, 1e-6)
LENGTHS = {
    "zipf": ZipfLengths(1.3, 50),
    "lognormal": LognormalLengths(100, 1.0, 1000),
    "histogram": HistogramLengths.of({5: 1.0, 9: 3.0}),
}


@pytest.mark.parametrize("arrivals", [PoissonArrivals(4.0), GammaArrivals(4.0, 2.0), WeibullArrivals(4.0, 0.7)])
def test_arrivals_have_their_rate_and_burstiness(arrivals):
    times = arrivals.times(20_000, np.random.default_rng(0))
    gaps = np.diff(times)
    assert len(times) / times[-1] == pytest.approx(4.0, rel=0.05)
    wanted = {PoissonArrivals: 1.0, GammaArrivals: 2.0, WeibullArrivals: 1.46}[type(arrivals)]
    assert gaps.std() / gaps.mean() == pytest.approx(wanted, rel=0.06)


def test_lengths_follow_their_distributions():
    generator = np.random.default_rng(0)
    drawn = {name: lengths.draw(20_000, generator) for name, lengths in LENGTHS.items()}
    assert drawn["zipf"].max() <= 50
    assert (drawn["zipf"] == 1).mean() > 0.25
    assert drawn["lognormal"].mean() == pytest.approx(100, rel=0.05)
    assert (drawn["histogram"] == 9).mean() == pytest.approx(0.75, abs=0.02)


def test_generated_workloads_repeat_and_survive_a_file(tmp_path: Path):
    make = Generator(
        arrivals=GammaArrivals(2.0, 1.5),
        prompts=LENGTHS["lognormal"],
        outputs=FixedLengths(20),
        reasoning_share=0.5,
        shared_tokens=128,
        num_prefixes=2,
        tenants=("a", "b"),
    ).make
    workload = make(50, 3)
    assert workload == make(50, 3) != make(50, 4)
    assert {each.tenant for each in workload.requests} == {"a", "b"}
    assert len({each.block_keys[:2] for each in workload.requests if each.block_keys}) == 2
    workload.save(tmp_path / "w.jsonl")
    assert Workload.load(tmp_path / "w.jsonl") == read_trace(tmp_path / "w.jsonl") == workload
    assert workload.at_rate(8.0).rate == pytest.approx(8.0)
    assert max(each.num_output_tokens for each in workload.with_at_most(7).requests) == 7


def test_a_bad_line_is_named(tmp_path: Path):
    path = tmp_path / "w.jsonl"
    path.write_text('{"arrival_s": 0, "num_prompt_tokens": 3, "num_output_tokens": 1}\n{"arrival_s": 1}\n')
    with pytest.raises(RequestError, match="line 2"):
        read_trace(path)
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,12,x\n")
    with pytest.raises(RequestError, match="line 2"):
        read_trace(path)
    path.write_text("time,a,b\n1,2,3\n")
    with pytest.raises(RequestError, match="no known trace layout") as refusal:
        read_trace(path)
    for name in ("azure", "mooncake", "burstgpt", "sharegpt", "servegen", "workload"):
        assert f"{name}:" in str(refusal.value)
    with pytest.raises(RequestError, match="no trace at"):
        read_trace(tmp_path / "none")


AZURE_HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
MOONCAKE = '{"timestamp": 0, "input_length": 9, "output_length": 6, "hash_ids": []}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "begins with nothing"),
        (b"\x1f\x8b\x08\x00\xff", "is no text"),
        (AZURE_HEAD.encode(), "holds no requests"),
        (AZURE_HEAD.encode() + b"2023-11-16 18:15:46,9,2\n\xff\xfe\n", "is no text|line 3"),
        (AZURE_HEAD.encode() + b"2023-11-16 18:15:46,-9,2\n", "line 2: num_prompt_tokens"),
        (AZURE_HEAD.encode() + b"2023-11-16 18:15:46," + b"9" * 140_000 + b",2\n", "line 2"),
        (MOONCAKE.replace("9", "Infinity").encode(), "line 1"),
        (MOONCAKE.replace("0", "NaN", 1).encode(), "line 1: arrival_s"),
        (b'{"workload": "w"}\n', "trace w holds no requests"),
        (b'{"conversations": []}\n{"conversations": \n', "behind conversation 1"),
        (b'[{"conversations": []}, {', "behind conversation 0"),
    ],
)
def test_a_broken_file_is_refused_with_its_place(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "trace").write_bytes(content)
    with pytest.raises(RequestError, match=message):
        read_trace(tmp_path / "trace", TraceOptions(count_tokens=len))


def test_a_mark_of_its_encoding_is_no_part_of_a_name(tmp_path: Path):
    (tmp_path / "trace").write_bytes(b"\xef\xbb\xbf" + AZURE_HEAD.encode() + b"2023-11-16 18:15:46,9,2\n")
    assert read_trace(tmp_path / "trace").requests == (TimedRequest(0.0, 9, 2),)


def test_requests_that_come_at_once_have_no_rate():
    at_once = Workload("w", (TimedRequest(0.0, 9, 2),))
    assert at_once.at_rate(3.0) == at_once
    for rate in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(RequestError, match="requests a second"):
            at_once.at_rate(rate)


def test_layouts_are_recognised_by_their_columns(tmp_path: Path):
    path = tmp_path / "trace"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.5,374,44\n2023-11-16 18:15:48,9,2\n")
    assert read_trace(path).requests == (TimedRequest(0.0, 374, 44), TimedRequest(1.5, 9, 2))
    rows = [{"timestamp": 500 * i, "input_length": 1100, "output_length": 6, "hash_ids": [1, 2, 7 + i]} for i in (0, 1)]
    path.write_text("\n".join(map(json.dumps, rows)))
    first, second = read_trace(path).requests
    assert (second.arrival_s, len(second.block_keys or ())) == (0.5, 17)
    assert [a == b for a, b in zip(first.block_keys or (), second.block_keys or (), strict=True)] == [True] * 16 + [
        False
    ]
    head = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    path.write_text(head + "5,7,1,GPT-4,100,20,120,Conversation log\n6,7,1,GPT-4,100,0,100,Conversation log\n")
    assert read_trace(path).requests == (TimedRequest(0.0, 100, 20, "GPT-4", "7"),)
    turns = [{"from": who, "value": "x " * n} for who, n in (("human", 3), ("gpt", 4), ("human", 2), ("gpt", 5))]
    path.write_text(json.dumps([{"id": "c", "conversations": turns}]))
    with pytest.raises(RequestError, match="tokens must be counted"):
        read_trace(path)
    made = read_trace(path, TraceOptions(count_tokens=lambda text: len(text.split()))).requests
    assert [(each.num_prompt_tokens, each.num_output_tokens, each.session) for each in made] == [
        (3, 4, "c"),
        (9, 5, "c"),
    ]


def test_servegen_draws_from_its_histograms(tmp_path: Path):
    fields = {"input_tokens": "{10: 1.0}", "output_tokens": "{8: 0.5, 16: 0.5}", "reason_ratio": "{0.5: 1.0}"}
    (tmp_path / "chunk-0-dataset.json").write_text(json.dumps({"0": fields}))
    (tmp_path / "chunk-0-trace.csv").write_text("0,0,0,,0,0\n600,0.5,2.0,Gamma,0.25,8\n")
    made = read_trace(tmp_path, TraceOptions(num_requests=100, seed=1))
    assert len(made.requests) == 100
    assert {each.num_output_tokens for each in made.requests} == {8, 16}
    assert all(each.num_reasoning_tokens * 2 == each.num_output_tokens for each in made.requests)
    assert made == read_trace(tmp_path, TraceOptions(num_requests=100, seed=1))
    (tmp_path / "chunk-0-trace.csv").write_text("0,0,0,,0,0\n600,x,2.0,Gamma,0.25,8\n")
    with pytest.raises(RequestError, match="line 2"):
        read_trace(tmp_path)


@pytest.mark.skipif(not (DATA / "traces").is_dir(), reason="the shared traces are not there")
def test_real_traces_are_as_published():
    azure = read_trace(DATA / "traces" / "azure_llm_2023_conv.csv")
    assert len(azure.requests) == 19_366
    assert np.mean([each.num_prompt_tokens for each in azure.requests]) == pytest.approx(1155, abs=1)
    assert azure.rate == pytest.approx(5.5, rel=0.01)
    mooncake = read_trace(DATA / "traces" / "mooncake_synthetic.jsonl", TraceOptions(num_requests=200))
    assert mooncake.has_block_keys


times_of = st.lists(st.floats(0.001, 3.0), min_size=1, max_size=12)


@given(times_of, st.integers(0, 12), st.integers(1, 4))
def test_request_times_are_as_defined(gaps: list[float], hidden: int, batch: int) -> None:
    times = np.cumsum(gaps).tolist()
    request = TimedRequest(0.0, 3, len(times), num_reasoning_tokens=min(hidden, len(times)))
    noted = RequestTimes(request)
    for start in range(0, len(times), batch):
        noted.add(times[start : start + batch])
    assert noted.ttft_s == times[0]
    assert noted.ttfvt_s == times[min(hidden, len(times) - 1)]
    assert noted.e2e_s == times[-1]
    assert noted.largest_gap_s == pytest.approx(max(np.diff(times), default=0.0))
    if len(times) > 1:
        assert noted.tpot_s == pytest.approx((times[-1] - times[0]) / (len(times) - 1))


def test_failures_count_and_memory_is_weighted_by_time():
    good, late, lost = (RequestTimes(TimedRequest(0.0, 1, 2)) for _ in range(3))
    good.add([1.0, 2.0])
    late.add([1.0, 4.0])
    good.has_ended = late.has_ended = lost.has_ended = True
    lost.error = "refused"
    record = RunRecord(requests=[good, late, lost])
    record.timeline.add(0.0, 2, 0, {"a": 0})
    record.timeline.add(1.0, 0, 2, {"a": 10, "b": 30})
    record.timeline.add(4.0, 0, 0, {})
    made = record.summary(Targets())
    assert (made.num_good, made.num_failed, made.makespan_s, made.goodput) == (1, 1, 4.0, 0.25)
    assert made.output_tokens_per_s == 1.0
    assert (made.mean_kv_bytes, made.peak_kv_bytes, made.mean_waiting) == (30.0, 40, 0.5)
    assert made.std_kv_bytes == pytest.approx(np.sqrt(300))
    assert made.ttft.p50 == 1.0


requests = st.lists(st.tuples(st.floats(0, 3), st.integers(1, 300), st.integers(1, 90)), min_size=1, max_size=8)


def simulate(workload: Workload, blocks: int, repeats: bool = True) -> RunRecord:
    config = SchedulerConfig(
        max_positions=8192, max_step_tokens=128, eos_token_ids=(1,), prefix_cache=True, repeats_steps=repeats
    )
    scheduler = Scheduler(config, [PRICING], blocks * PRICING.block_bytes)
    return Simulation(scheduler, COST, 256).run(workload)


@settings(max_examples=25, deadline=None)
@given(requests, st.integers(10, 60))
def test_skipping_to_events_changes_no_time(made: list[tuple[float, int, int]], blocks: int) -> None:
    """Once from event to event, once step by step."""
    workload = Workload("w", tuple(TimedRequest(*each) for each in sorted(made)))
    runs = [simulate(workload, blocks, repeats) for repeats in (True, False)]
    for fast, slow in zip(runs[0].requests, runs[1].requests, strict=True):
        assert fast.num_tokens == slow.num_tokens == fast.request.num_output_tokens
        for name in ("first_s", "last_s", "largest_gap_s"):
            assert getattr(fast, name) == pytest.approx(getattr(slow, name), abs=1e-6)
    assert runs[0].evictions == runs[1].evictions
    assert runs[0].recomputed_tokens == runs[1].recomputed_tokens
    assert (runs[0].recomputed_tokens > 0) == (runs[0].evictions > 0)


def test_one_request_takes_what_the_costs_say():
    record = simulate(Workload("w", (TimedRequest(2.0, 200, 3),)), 100)
    first = 0.01 + 128 * 0.001 + 128e-6
    second = first + 0.01 + 72 * 0.001 + 200e-6
    third = second + 0.01 + 0.0005 + 201e-6
    (noted,) = record.requests
    assert noted.ttft_s == pytest.approx(second)
    assert noted.e2e_s == pytest.approx(third + 0.01 + 0.0005 + 202e-6)
    assert record.summary(Targets()).peak_kv_bytes == 4 * PRICING.block_bytes


def test_sessions_and_block_keys_share_what_is_stored():
    keys = tuple(bytes([i]) for i in range(4))
    alike = [TimedRequest(float(i), 260, 4, block_keys=keys) for i in range(2)]
    assert simulate(Workload("keys", tuple(alike)), 100).cached_prompt_tokens == 256
    turns = [TimedRequest(0.0, 100, 30, session="s"), TimedRequest(9.0, 150, 5, session="s")]
    assert simulate(Workload("session", tuple(turns)), 100).cached_prompt_tokens == 129
    strangers = [TimedRequest(float(i), 260, 4) for i in range(2)]
    assert simulate(Workload("strangers", tuple(strangers)), 100).cached_prompt_tokens == 0


def talk(busy_s: float) -> Workload:
    """A session whose second and third turns come while the first is answered, and a stranger behind them."""
    turns = [TimedRequest(at_s, 100 + 60 * number, 60, session="s") for number, at_s in enumerate((0.0, 0.01, 0.02))]
    return Workload("talk", (*turns, TimedRequest(busy_s, 50, 3)))


def check_turns(record: RunRecord) -> None:
    first, second, third, stranger = record.requests
    assert all(each.is_answered for each in record.requests)
    assert second.start_s >= first.last_s > second.request.arrival_s
    assert third.start_s >= second.last_s
    assert stranger.start_s == stranger.request.arrival_s
    assert stranger.last_s < third.first_s, "a turn that waits held up a stranger"
    assert second.ttft_s == second.first_s - second.start_s


def test_turns_wait_for_the_turn_before_and_hold_up_nobody():
    check_turns(simulate(talk(0.05), 100))


def test_a_turn_behind_one_that_was_refused_is_sent():
    turns = (TimedRequest(0.0, 60, 40, session="s"), TimedRequest(0.01, 5000, 3, session="s"))
    record = simulate(Workload("w", (*turns, TimedRequest(0.02, 120, 3, session="s"))), 10)
    assert [each.is_answered for each in record.requests] == [True, False, True]


def test_a_real_replay_keeps_turns_and_tenants():
    """On the built-in model; the engine is told who asks."""
    heard = []
    with engine(Policies(order="fair")) as made:
        enqueue = made.enqueue
        made.enqueue = lambda *args, **named: (heard.append(named["tenant"]), enqueue(*args, **named))[1]
        load = talk(0.03)
        check_turns(
            Replay(made).run(replace(load, requests=(*load.requests[:3], replace(load.requests[3], tenant="t"))))
        )
    assert sorted(heard) == ["", "", "", "t"]


def test_requests_that_never_fit_fail_and_nothing_else():
    record = simulate(Workload("w", (TimedRequest(0.0, 5000, 3), TimedRequest(0.0, 50, 3))), 10)
    assert [each.is_answered for each in record.requests] == [False, True]
    assert "KV cache" in record.requests[0].error


def test_prompts_begin_alike_where_the_workload_says_so():
    maker = PromptMaker(1000)
    keys = (b"a", b"b")
    one = maker.tokens(1, TimedRequest(0.0, 150, 1, block_keys=keys))
    two = maker.tokens(2, TimedRequest(0.0, 150, 1, block_keys=keys))
    three = maker.tokens(3, TimedRequest(0.0, 150, 1))
    assert len(one) == 150
    assert one[:128] == two[:128]
    assert one[128:] != two[128:]
    assert three[:16] != one[:16]
    assert min(one) >= 2


def test_costs_are_found_again_from_steps():
    generator = np.random.default_rng(0)
    steps = []
    for _ in range(300):
        decodes, prefill, held = (int(each) for each in generator.integers(0, (30, 500, 9000)))
        shape = StepShape(decodes + prefill, decodes, 0, decodes, held)
        steps.append((shape, COST.step_seconds(shape) * float(generator.normal(1.0, 0.01))))
    found = fit_costs(steps)
    for name in ("step_s", "prefill_token_s", "decode_row_s", "kv_token_s"):
        assert getattr(found, name) == pytest.approx(getattr(COST, name), rel=0.1)
    with pytest.raises(RequestError, match="too few"):
        fit_costs(steps[:3])


def test_measured_steps_take_until_the_next_one_begins_unless_the_engine_rested():
    class Instant:
        """An executor whose steps take a millisecond, twice each."""

        def submit(self, plan: StepPlan) -> int:
            return 1

        def collect(self, ticket: int) -> StepResult:
            return StepResult({}, duration_s=0.002, num_steps=2)

    measured = MeasuringExecutor(Instant())
    plan = StepPlan((), (Row(0, "decode", 5, 1, None, None),))
    for pause_s in (0.002, 4 * BUSY_S, 0.0):
        measured.collect(measured.submit(plan))
        time.sleep(pause_s)
    seconds = [each for _, each in measured.steps]
    assert 0.002 <= seconds[0] < 0.001 + BUSY_S / 2
    assert seconds[1:] == [0.001, 0.001]
