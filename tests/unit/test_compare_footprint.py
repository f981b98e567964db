"""What a comparison measures of a real, tiny model: bytes as the store holds them, and perplexity behind a context."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support.compare import use_little_text
from tests.support.decoder_world import spec
from tests.support.tiny_model import write_tiny_model

from elbowroom.bench.footprint import measure_footprint, strips_read_bytes
from elbowroom.engine.llm import LLM
from elbowroom.errors import RequestError
from elbowroom.evals.comparison.perplexity import FILE, read_windows, score_windows, windows
from elbowroom.evals.engine_target import PlainTokenizer
from elbowroom.kernels.base import LayerStrips, Selection, StripStep, Tail
from elbowroom.kv.codecs.plain import PlainCodec
from elbowroom.kv.plan import KVPlan
from elbowroom.memory.tiers import HostTier
from elbowroom.models.dense import DenseContext
from elbowroom.models.loader import load_model

LENGTH = 256


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("tiny"), context=4096))


@pytest.fixture(autouse=True)
def little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    use_little_text(monkeypatch)


def load(model: str, kv: str, memory: str = "64MiB") -> LLM:
    return LLM(model, memory, kv, prefix_cache=False)


def nothing(done: int, total: int) -> None:
    """Advance silently."""


@pytest.mark.parametrize(
    ("kv", "sealed", "open_blocks"), [("plain", 0, 4), ("int8", 0, 4), ("kivi(2,2,32)", 3, 1), ("fp8", 0, 4)]
)
def test_bytes_are_those_of_full_and_open_blocks(model: str, kv: str, sealed: int, open_blocks: int):
    moves: list[tuple[int, int]] = []
    with load(model, kv) as llm:
        found = measure_footprint(llm, LENGTH, 3, lambda *move: moves.append(move))
        plan = llm.engine.parts.plan
        llm.engine.check_integrity()
        assert llm.engine.kv_report().num_sequences == 0
    each_block = plan.tail_bytes or plan.block_bytes
    expected = sealed * plan.block_bytes + open_blocks * each_block
    assert found.read_bytes_per_token == expected
    # Whole pages are charged: a few for each context.
    assert 3 * expected <= found.kv_bytes <= 3 * (expected + 6 * HostTier.page_bytes)
    assert found.kv_peak_bytes >= found.kv_bytes
    assert found.context_bytes == found.kv_bytes / 3
    for middle, (low, high) in (
        (found.prefill_tokens_per_s, found.prefill_range),
        (found.decode_tokens_per_s, found.decode_range),
    ):
        assert 0 < low <= middle <= high
    assert found.peak_over_baseline_bytes > 0
    assert moves == [(1, 3), (2, 3), (3, 3)]


def test_a_model_with_sliding_windows_holds_and_reads_the_window(tmp_path: Path):
    directory = write_tiny_model(tmp_path, family="llama", context=1024)
    changes = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 64}
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))
    with load(str(directory), "plain") as llm:
        found = measure_footprint(llm, 512, 2, nothing)
        block_bytes = llm.engine.parts.plan.block_bytes
        tokenizer = PlainTokenizer(llm.tokenizer)
        scored = score_windows(llm, tokenizer, windows(tokenizer, 200, 1), tmp_path / FILE, nothing)
    assert found.read_bytes_per_token == 2 * block_bytes
    assert 2 * 2 * block_bytes <= found.kv_bytes < 2 * 8 * block_bytes
    assert scored[0].num_tokens == 100


def test_contexts_that_do_not_fit_together_are_refused(model: str):
    few = r"holds \d+ of 40 contexts"
    with load(model, "plain", "24MiB") as llm, pytest.raises(RequestError, match=few) as refused:
        measure_footprint(llm, 1024, 40, nothing)
    assert "--contexts" in (refused.value.hint or "")


@pytest.mark.parametrize(("window", "blocks"), [(None, 5), (64, 1), (65, 2), (128, 2), (129, 3), (1, 1), (1000, 5)])
def test_a_window_reads_only_what_it_sees(window: int | None, blocks: int):
    layer = spec(window=window)
    fmt = PlainCodec().page_format(layer, "float32")
    step = StripStep.of_runs([(256 + 63, 1)])
    strips = LayerStrips(step, np.zeros((1, 5), dtype=np.uint32), torch.zeros(64, dtype=torch.uint8), fmt)
    assert strips_read_bytes(strips, layer) == blocks * fmt.strip_bytes


@pytest.mark.parametrize(("codec", "bounds"), [("int8", 4 * 2 * 2 * 2 * 16), ("kivi(2,2,64)", 2 * 2 * 2 * 16)])
@pytest.mark.parametrize(("blocks", "read"), [(5, 5), (6, 5), (30, 5)])
def test_a_token_that_selects_reads_some_strips_and_bounds_of_all(codec: str, bounds: int, blocks: int, read: int):
    layer = spec(num_q_heads=4, num_kv_heads=2, head_dim=16, v_head_dim=16)
    plan = KVPlan.parse(f"quest(320,skip=0) | {codec}").bind([layer], "float32")
    fmt, last = plan.formats[0], (plan.tails or plan.formats)[0]
    step, none = StripStep.of_runs([(blocks * 64 - 1, 1)]), np.zeros(0, dtype=np.uint32)
    table, base = np.zeros((1, blocks), dtype=np.uint32), torch.zeros(64, dtype=torch.uint8)
    first = np.zeros(1, dtype=np.int64)
    tail = Tail(table=table, first_blocks=first, base=base, fmt=last, full=none, sealed=none) if plan.tails else None
    for rows, expected in ((1, read), (0, blocks)):
        selection = Selection(5, np.array([rows], dtype=np.uint8))
        strips = LayerStrips(step, table, base, fmt, plan.plan.codec, tail, selection)
        others = (blocks - 2) * bounds if expected < blocks else 0
        size = fmt.strip_bytes - fmt.digest_bytes
        assert strips_read_bytes(strips, layer) == (expected - 1) * size + last.strip_bytes - last.digest_bytes + others


def dense_nats(model: str, tokens: list[int], count: int) -> float:
    decoder = load_model(Path(model), torch.float32)
    with torch.inference_mode():
        hidden = decoder(torch.tensor(tokens), DenseContext(decoder.config.layers, 1, len(tokens)))
        logs = torch.log_softmax(decoder.logits(hidden), -1)
    positions = range(len(tokens) - count, len(tokens))
    return -sum(float(logs[position - 1, tokens[position]]) for position in positions)


def test_perplexity_is_that_of_a_model_without_a_cache(model: str, tmp_path: Path):
    with load(model, "plain") as llm:
        tokenizer = PlainTokenizer(llm.tokenizer)
        every = windows(tokenizer, 200, 3)
        found = score_windows(llm, tokenizer, every, tmp_path / FILE, nothing)
    assert [each.num_tokens for each in found] == [100] * 3
    assert [each.num_bytes for each in found] == [100] * 3  # a token is a byte
    for each, tokens in zip(found, every, strict=True):
        expected = dense_nats(model, tokens, 100)
        assert each.nats == pytest.approx(expected, rel=1e-4)
        assert each.bits_per_byte == pytest.approx(expected / 100 / np.log(2), rel=1e-4)


def test_a_cache_of_two_bits_costs_bits(model: str, tmp_path: Path):
    found = {}
    for kv in ("plain", "kivi(2,2,32)"):
        with load(model, kv) as llm:
            tokenizer = PlainTokenizer(llm.tokenizer)
            every = windows(tokenizer, 300, 2)
            found[kv] = score_windows(llm, tokenizer, every, tmp_path / f"{len(kv)}.jsonl", nothing)
    assert all(one.nats != two.nats for one, two in zip(*found.values(), strict=True))


def test_windows_that_were_scored_are_not_scored_again(model: str, tmp_path: Path):
    path, moves = tmp_path / FILE, []
    with load(model, "plain") as llm:
        tokenizer = PlainTokenizer(llm.tokenizer)
        every = windows(tokenizer, 160, 4)
        whole = score_windows(llm, tokenizer, every, path, nothing)
        text = path.read_text()
        path.write_text(text[: text.index('"window": 2') + 20])  # what kill -9 leaves
        assert len(read_windows(path)) == 2
        again = score_windows(llm, tokenizer, every, path, lambda *move: moves.append(move))
    assert again == whole
    assert path.read_text() == text
    assert moves == [(2, 4), (3, 4), (4, 4)]
    assert [json.loads(line)["window"] for line in text.splitlines()] == [0, 1, 2, 3]


def test_windows_longer_than_the_text_are_refused(model: str):
    with load(model, "plain") as llm, pytest.raises(RequestError, match="less than 100000000 tokens"):
        windows(PlainTokenizer(llm.tokenizer), 100_000_000, 2)
