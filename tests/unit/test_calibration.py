"""Calibration: the file, what is measured of the built-in model, and who asks for it."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.support.cli import COMMAND
from tests.support.kv_world import make_spec
from tests.support.tiny_model import write_tiny_model

from elbowroom.bench.random_model import random_calibration
from elbowroom.engine.resident import ResidentModel, load_resident, read_calibration
from elbowroom.errors import BudgetTooSmall, ConfigError, ModelError, PlanError, RequestError
from elbowroom.evals.calibration import measure
from elbowroom.evals.calibration.errors import LayerErrors
from elbowroom.evals.calibration.heads import HeadScores
from elbowroom.evals.calibration.measure import Effort, spread
from elbowroom.evals.calibration.needles import haystacks
from elbowroom.evals.calibration.reader import LayerSight, Reader
from elbowroom.evals.calibration.text import FILES, calibration_text
from elbowroom.evals.distractors import Distractors
from elbowroom.evals.engine_target import PlainTokenizer
from elbowroom.evals.heldout import heldout_names
from elbowroom.kv.calibration import FILE, Calibration
from elbowroom.models.dense import DenseContext
from elbowroom.models.directory import BUILTIN
from elbowroom.models.path import ComputePath

LAYERS = [make_spec(q_heads=4, kv_heads=2), make_spec(q_heads=4, kv_heads=2, window=50)]


def load(memory: str = "96MiB", model: str | None = None, tasks_bytes: int = 2**20) -> ResidentModel:
    return load_resident(
        model, memory, "plain", "float32", path=ComputePath(0), max_sequences=1, tasks_bytes=tasks_bytes
    )


@pytest.fixture(scope="module")
def builtin() -> Iterator[ResidentModel]:
    loaded = load()
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def distractors(builtin: ResidentModel) -> Distractors:
    return Distractors(PlainTokenizer(builtin.tokenizer), [calibration_text(None)[:60_000]])


# The file


def test_a_calibration_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    made = random_calibration(LAYERS)
    assert made.save(tmp_path) == tmp_path / FILE
    assert Calibration.load(tmp_path) == made
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert Calibration.load(tmp_path / "elsewhere") is None


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"version": 2}, "version 2"),
        ({"layer_errors": [0.5, 0.2]}, "sum to 0.7"),
        ({"layer_errors": [1.0]}, "disagree on the number of layers"),
        ({"head_scores": [[0.1] * 4, [0.1] * 3]}, "number of query heads"),
        ({"copy_scores": [[0.1] * 4, [0.1, 0.1, -1, 0.1]]}, "negative"),
        ({"key_rms": [[[1.0], [1.0, 2.0]], [[1.0], [1.0]]]}, "width of keys"),
        ({"measured": {"runs": 3}}, "missing"),
        ({"model": None, "head_scores": 3}, "not iterable"),
    ],
)
def test_a_file_that_is_none_is_refused_with_the_command(tmp_path: Path, change: dict[str, object], found: str) -> None:
    random_calibration(LAYERS).save(tmp_path)
    values = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps(values | change))
    with pytest.raises(ConfigError, match=found) as caught:
        Calibration.load(tmp_path)
    assert "elbowroom calibrate" in str(caught.value.hint)
    (tmp_path / FILE).write_text("{")
    with pytest.raises(ConfigError, match="is no calibration"):
        Calibration.load(tmp_path)


def test_a_calibration_of_another_shape_is_refused() -> None:
    made = random_calibration(LAYERS)
    made.check(LAYERS)
    with pytest.raises(PlanError, match="2 layers, the model 1"):
        made.check(LAYERS[:1])
    with pytest.raises(PlanError, match=r"layer 1 .*\(4, 2, 8\) in the calibration, \(4, 1, 8\)"):
        made.check([LAYERS[0], make_spec(q_heads=4, kv_heads=1)])


def test_a_calibration_of_other_weights_is_refused(tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path / "tiny")
    assert read_calibration(directory) is None
    dataclasses.replace(random_calibration(LAYERS), model="ab").save(directory)
    with pytest.raises(ConfigError, match="other weights") as caught:
        read_calibration(directory)
    assert f"elbowroom calibrate {directory}" in str(caught.value.hint)


# What is shipped


def test_the_built_in_model_is_calibrated(builtin: ResidentModel) -> None:
    shipped = read_calibration(BUILTIN)
    assert shipped is not None
    shipped.check(builtin.config.layers)
    assert shipped.measured.successes >= 0.9 * shipped.measured.runs >= 100


def test_the_text_is_none_that_evaluations_use() -> None:
    assert not set(FILES) & set(heldout_names())


# Measuring


def test_needles_are_where_they_are_said_to_be(builtin: ResidentModel, distractors: Distractors) -> None:
    tokenizer = builtin.tokenizer
    for haystack, length in zip(haystacks(tokenizer, distractors, (300, 700), seed=1), (300, 700), strict=True):
        assert length - 60 < len(haystack.token_ids) < length
        for needle in haystack.needles:
            text = tokenizer.decode(list(haystack.token_ids[needle.start : needle.stop]))
            question = tokenizer.decode(list(needle.prompt_ids))
            assert text.strip("\n") == f"{question.strip()} {needle.answer}."
            assert haystack.token_ids[needle.start : needle.stop] == needle.token_ids


def test_the_reader_shows_what_attention_reads(builtin: ResidentModel) -> None:
    """Keys and values of every layer, in chunks and behind forks, are those that a dense pass computes."""
    layers, tokens = builtin.config.layers, torch.randint(5, 2000, (150,), generator=torch.Generator().manual_seed(1))
    dense: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    class Noting(DenseContext):
        def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            dense[layer] = (q, k, v)
            return super().attend(layer, q, k, v)

    with torch.inference_mode():
        hidden = builtin.decoder(tokens, Noting(layers, 1, len(tokens)))
        expected = int(builtin.decoder.logits(hidden[-1:]).argmax())
    reader, seen = Reader(builtin), []

    def look(sight: LayerSight) -> None:
        q, k, v = dense[sight.layer]
        torch.testing.assert_close(sight.queries, q[-50:], atol=1e-4, rtol=1e-4)
        for head in range(2):
            torch.testing.assert_close(sight.keys(head), k[:, head], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(sight.values(head), v[:, head], atol=1e-4, rtol=1e-4)
        seen.append(sight.layer)

    context = reader.open()
    reader.read(context, tokens[:100].tolist())
    fork = reader.fork(context)
    assert reader.read(fork, tokens[100:].tolist(), look) == expected
    assert seen == list(range(6))
    reader.close(fork)
    reader.close(context)
    assert builtin.store.report().num_strips == 0


def test_heads_are_scored_by_hand_worked_numbers(builtin: ResidentModel, distractors: Distractors) -> None:
    """The score of a head is its attention to the fact in each step that writes a token of it; see the paper."""
    (haystack,) = haystacks(builtin.tokenizer, distractors, (400,), seed=3)
    needle = haystack.needles[1]
    tokens = [*haystack.token_ids, *needle.prompt_ids]
    semantic, copying = torch.zeros(6, 4), torch.zeros(6, 4)
    for _ in range(needle.max_new_tokens):
        weights: dict[int, torch.Tensor] = {}

        class Noting(DenseContext):
            noted = weights

            def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
                keys = k.repeat_interleave(2, dim=1)
                self.noted[layer] = torch.einsum("hd,nhd->hn", q[-1], keys).mul(0.125).softmax(1)
                return super().attend(layer, q, k, v)

        with torch.inference_mode():
            hidden = builtin.decoder(torch.tensor(tokens), Noting(builtin.config.layers, 1, len(tokens)))
            token = int(builtin.decoder.logits(hidden[-1:]).argmax())
        for place in range(needle.start, needle.stop):
            if tokens[place] == token:
                for layer in range(6):
                    semantic[layer] += weights[layer][:, needle.start : needle.stop].sum(1)
                    copying[layer] += (weights[layer].argmax(1) == place).float() / len(needle.token_ids)
        tokens.append(token)
    scores, reader = HeadScores(builtin.config.layers), Reader(builtin)
    context = reader.open()
    reader.read(context, haystack.token_ids)
    assert scores.ask(reader, context, needle)
    reader.close(context)
    torch.testing.assert_close(torch.tensor(scores.semantic()), semantic, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(torch.tensor(scores.copying()), copying)
    assert semantic[1].min() > 2, "the layer in which the built-in model copies"


def test_a_wrong_answer_counts_nowhere(builtin: ResidentModel, distractors: Distractors) -> None:
    (haystack,) = haystacks(builtin.tokenizer, distractors, (300,), seed=4)
    scores, reader = HeadScores(builtin.config.layers), Reader(builtin)
    context = reader.open()
    reader.read(context, haystack.token_ids)
    needle = haystack.needles[0]
    assert not scores.ask(reader, context, dataclasses.replace(needle, answer="000000"))
    assert scores.ask(reader, context, needle)
    once = scores.semantic()
    assert scores.ask(reader, context, needle)
    assert scores.semantic() == once
    assert (scores.num_runs, scores.num_successes) == (3, 2)
    reader.close(context)


def test_errors_of_layers_are_nothing_while_all_tokens_stay(builtin: ResidentModel, distractors: Distractors) -> None:
    reader, heads = Reader(builtin), [[1.0] * 4] * 6
    (haystack,) = haystacks(builtin.tokenizer, distractors, (256,), seed=5)
    for prompt, lossless in ((haystack.token_ids[:20], True), (haystack.token_ids, False)):
        errors = LayerErrors(reader, heads)
        handle = reader.open()
        errors.generate(handle, prompt, 6)
        reader.close(handle)
        assert all(each < 1e-5 for each in errors._sums) == lossless
    assert sum(errors.shares()) == pytest.approx(1)


def test_what_cannot_be_measured_is_refused(builtin: ResidentModel, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"the text has .* at least 512 are needed"):
        measure.calibrate(builtin, "a short text\n" * 10, Effort(1, 256), lambda done, total: None)
    small = load("48MiB")
    try:
        small.store.resize(2**20)
        with pytest.raises(BudgetTooSmall, match="contexts of 256 tokens need"):
            measure.calibrate(small, calibration_text(None)[:9000], Effort(1, 256), lambda done, total: None)
    finally:
        small.close()


def test_the_longest_context_is_what_the_memory_holds(builtin: ResidentModel, distractors: Distractors) -> None:
    assert measure._longest(builtin, distractors.num_tokens, 2048) == 2048
    assert measure._longest(builtin, 1000, 2048) == 500
    capacity = builtin.store.report().capacity_bytes
    builtin.store.resize(6 * 2**20)
    try:
        assert measure._longest(builtin, distractors.num_tokens, 4096) == 509
        for haystack in spread(builtin, distractors, 509, 1, 0):
            reader = Reader(builtin)
            handle = reader.open()
            reader.read(handle, haystack.token_ids)
            reader.close(handle)
    finally:
        builtin.store.resize(capacity)


# The command


def test_the_command_writes_beside_the_model_and_says_what_it_found(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(BUILTIN, directory)
    (directory / FILE).unlink()
    arguments = ["--contexts", "1", "--length", "300", "--memory", "96MiB", "--dtype", "float32", "--json"]
    done = subprocess.run(
        [*COMMAND, "calibrate", str(directory), *arguments], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["measured"]["successes"] == result["measured"]["runs"] == 4
    assert result["peak_over_baseline_bytes"] <= result["budget_bytes"]
    made = read_calibration(directory)
    assert made is not None
    assert json.loads(json.dumps(dataclasses.asdict(made)))["layer_errors"] == result["layer_errors"]
    assert max(made.head_scores[1]) > 2


def test_a_model_that_finds_nothing_is_refused(tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path / "tiny", context=1024)
    loaded = load(model=str(directory))
    try:
        with pytest.raises(ModelError, match="found none of 4 facts"):
            measure.calibrate(loaded, calibration_text(None)[:20_000], Effort(1, 256), lambda done, total: None)
    finally:
        loaded.close()
