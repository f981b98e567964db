"""Counting what attention fetches: a small trace by hand, dense ones, pruned heads, SpAtten's public traces."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from elbowroom.bench.shared_data import DATA
from elbowroom.errors import IntegrityError, RequestError
from elbowroom.kv.read_count import HeadRead, count_reads
from elbowroom.kv.read_trace import read_trace

TRACES = DATA / "spatten"
HEADER = (
    "iteration_id,layer_id,head_id,embedding_length_D,sentence_length_L,key_fetch_num,quant_key_bit,quant_query_bit,"
    "auto_requant_thres,if_requant,auto_requant_incre,value_fetch_num,quant_value_bit,if_accumulate_importance,"
    "if_rescale_previous_importance,if_topk,topk\n"
)


def line(step: int, layer: int, head: int, tokens: int, keys: int, values: int, bits: int, again: bool) -> str:
    low = 4 if bits > 0 else -1
    return (
        f"{step},{layer},{head},8.0,{tokens},{keys},{bits},16,0.05,{again},{low},{values},{bits},True,False,False,-1\n"
    )


def written(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(HEADER + "".join(lines) + "some/run.yml" + "," * 16 + "\n")
    return path


def test_a_small_trace_counts_as_by_hand(tmp_path: Path):
    """Two layers of two heads: all keys of the prompt; then half of the keys, a quarter of the values, a head less."""
    prompt = [line(0, layer, head, 10, 10, 5, 6, False) for layer in (0, 1) for head in (0, 1)]
    decode = [line(1, 0, 0, 12, 6, 3, 6, True), line(1, 0, 1, 12, 6, 3, 6, False), line(1, 1, 0, 12, 6, 3, 6, False)]
    trace = read_trace(written(tmp_path, *prompt, *decode))
    assert (trace.run, trace.num_layers, trace.num_heads) == ("some/run.yml", 2, 2)
    count = trace.count(16)
    assert count.dense_elements == 2 * 2 * 2 * 8 * (10 + 12)
    assert count.key_elements == 8 * (4 * 10 + 3 * 6)
    assert count.value_elements == 8 * (4 * 5 + 3 * 3)
    assert count.key_bytes == count.key_elements * 6 / 8
    assert count.value_bytes == count.value_elements * 6 / 8
    assert count.refetch_bytes == 8 * 6 * 4 / 8
    assert (count.num_reads, count.num_refetches, count.refetch_rate) == (7, 1, 1 / 7)
    assert count.element_ratio == pytest.approx(1408 / 696)
    assert count.byte_ratio == pytest.approx(1408 * 16 / (696 * 6 + 8 * 6 * 4))
    assert trace.count(32).byte_ratio == pytest.approx(2 * count.byte_ratio)
    later = trace.count(16, decode_only=True)
    assert later.dense_elements == 2 * 2 * 2 * 8 * 12
    assert later.key_elements == 8 * 18


@pytest.mark.parametrize("dense_bits", [16, 32])
def test_what_prunes_nothing_is_read_exactly_as_dense(tmp_path: Path, dense_bits: int):
    lines = [line(step, 0, head, 5 + step, 5 + step, 5 + step, -1, False) for step in range(3) for head in range(4)]
    count = read_trace(written(tmp_path, *lines)).count(dense_bits)
    assert (count.element_ratio, count.byte_ratio, count.num_refetches) == (1.0, 1.0, 0)


READ = HeadRead(step=0, layer=0, head=0, num_tokens=4, width=8, num_keys=4, num_values=4)


@pytest.mark.parametrize(
    "wrong",
    [{"num_keys": 5}, {"num_values": -1}, {"width": 0}, {"key_bits": 0}, {"refetch_bits": 4}, {"value_bits": -1}],
)
def test_what_no_head_can_fetch_is_refused(wrong: dict[str, int]):
    with pytest.raises(IntegrityError):
        dataclasses.replace(READ, **wrong)


@pytest.mark.parametrize(
    "reads",
    [
        [],
        [READ, READ],
        [dataclasses.replace(READ, head=1)],
        [dataclasses.replace(READ, layer=1)],
        [READ, dataclasses.replace(READ, step=1), dataclasses.replace(READ, step=1, layer=0, head=0, num_tokens=5)],
    ],
)
def test_reads_that_do_not_fit_together_are_refused(reads: list[HeadRead]):
    with pytest.raises(IntegrityError):
        count_reads(reads, 1, 1, 16)


def test_a_step_has_one_length():
    other = dataclasses.replace(READ, head=1, num_tokens=5)
    with pytest.raises(IntegrityError, match="two lengths"):
        count_reads([READ, other], 1, 2, 16)


@pytest.mark.parametrize("damage", ["not a number", "9"])
def test_a_damaged_line_is_named(tmp_path: Path, damage: str):
    good = line(0, 0, 0, 5, 5, 5, -1, False)
    path = written(tmp_path, good, good.replace("5,5,-1", f"5,{damage},-1", 1))
    with pytest.raises(RequestError, match="line 3"):
        read_trace(path)


def test_a_file_of_something_else_is_refused(tmp_path: Path):
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(RequestError, match="no line"):
        read_trace(path)


@pytest.mark.skipif(not TRACES.is_dir(), reason=f"no traces at {TRACES} (set ELBOWROOM_DATA)")
def test_the_public_traces_give_the_published_reductions():
    small = read_trace(TRACES / "summary-gpt2-small-wikitext2-per8.csv")
    assert f"{small.count(16).element_ratio:.2f}" == "6.04"
    assert f"{small.count(16, decode_only=True).element_ratio:.2f}" == "6.59"
    assert (f"{small.count(32).byte_ratio:.1f}", f"{small.count(16).byte_ratio:.1f}") == ("28.9", "14.4")
    assert (small.count(16).num_refetches, small.count(16).num_reads) == (323, 4608)
    dense = read_trace(TRACES / "summary-gpt2-medium-ptb-per0.csv").count(16)
    assert (dense.element_ratio, dense.byte_ratio) == (1.0, 1.0)
