"""From a directory to a decoder: where models are found, what is allocated, and how much memory it takes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tests.support.models import write_config, write_model

from elbowroom.errors import CheckpointError, ConfigError, ElbowroomError, ModelError
from elbowroom.models import directory
from elbowroom.models.dense import DenseContext
from elbowroom.models.directory import find_model, read_ahead
from elbowroom.models.hf_config import read_config
from elbowroom.models.loader import dummy_weights, load_model, read_weights, weights_bytes
from elbowroom.weights.resident import ResidentWeights


def test_weights_live_where_the_caller_allocates_them(tmp_path: Path) -> None:
    write_model(tmp_path)
    given: dict[str, torch.Tensor] = {}

    def allocate(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        given[name] = torch.empty(shape, dtype=dtype)
        return given[name]

    decoder = load_model(tmp_path, torch.bfloat16, allocate)
    config = decoder.config
    assert list(given) == list(config.tensor_shapes())
    assert isinstance(decoder.weights, ResidentWeights)
    for name, parameter in decoder.weights.named_tensors().items():
        assert parameter.data_ptr() == given[name].data_ptr()
        assert not parameter.requires_grad
    assert weights_bytes(config, torch.bfloat16) == sum(tensor.nbytes for tensor in given.values())


def test_progress_grows_to_the_total(tmp_path: Path) -> None:
    write_model(tmp_path)
    seen: list[tuple[int, int]] = []
    load_model(tmp_path, torch.float32, progress=lambda done, total: seen.append((done, total)))
    total = weights_bytes(read_config(tmp_path), torch.float32)
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_the_report_says_how_the_seconds_split(tmp_path: Path) -> None:
    write_model(tmp_path, torch.bfloat16)
    config = read_config(tmp_path)
    tensors, report = read_weights(tmp_path, config, torch.float32)
    assert report.file_bytes == weights_bytes(config, torch.bfloat16)
    assert report.memory_bytes == weights_bytes(config, torch.float32) == sum(each.nbytes for each in tensors.values())
    assert min(report.open_s, report.read_s, report.convert_s) > 0
    assert report.open_s + report.read_s + report.convert_s <= report.total_s


@pytest.mark.parametrize("damage", ["truncated", "config", "missing", "dtype"])
def test_nothing_is_allocated_for_a_model_that_cannot_be_loaded(tmp_path: Path, damage: str) -> None:
    write_model(tmp_path)
    path = tmp_path / "model.safetensors"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "config":
        write_config(tmp_path, intermediate_size=48)
    elif damage == "missing":
        path.unlink()

    def allocate(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        pytest.fail(f"{name} {shape} {dtype} was allocated")

    error = ConfigError if damage == "dtype" else CheckpointError
    with pytest.raises(error):
        load_model(tmp_path, torch.float64 if damage == "dtype" else torch.float32, allocate)


def test_models_are_directories_with_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_model(str(write_config(tmp_path / "good"))) == tmp_path / "good"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_model("~/good") == tmp_path / "good"
    with pytest.raises(ModelError, match="'/no/such': expected a directory, found nothing"):
        find_model("/no/such")
    with pytest.raises(ModelError, match="found a file"):
        find_model(str(tmp_path / "good/config.json"))
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        find_model(str(tmp_path))


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="Linux tells whether a file is cached")
def test_reading_ahead_fills_the_page_cache(tmp_path: Path) -> None:
    file = write_model(tmp_path, vocab_size=40_000) and (tmp_path / "model.safetensors")
    with file.open("r+b", buffering=0) as opened:
        number = opened.fileno()

        def cached(offset: int) -> bool:
            try:
                return os.preadv(number, [bytearray(4096)], offset, os.RWF_NOWAIT) == 4096
            except BlockingIOError:
                return False

        os.fsync(number)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        places = range(0, file.stat().st_size - 4096, 2**18)
        if any(map(cached, places)):
            pytest.skip("this file system does not drop cached pages")
        thread = read_ahead(tmp_path)
        assert thread is not None
        thread.join()
        deadline = time.monotonic() + 20
        while not all(map(cached, places)):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_reading_ahead_is_only_advice(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").symlink_to(tmp_path / "absent")
    (tmp_path / "b.safetensors").mkdir()
    for place in (tmp_path, tmp_path / "absent"):
        thread = read_ahead(place)
        assert thread is None or thread.join(5) or not thread.is_alive()


def test_none_is_the_built_in_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "BUILTIN", tmp_path / "builtin")
    with pytest.raises(ModelError, match="built-in model is not installed"):
        find_model(None)
    write_config(tmp_path / "builtin")
    assert find_model(None) == tmp_path / "builtin"


@pytest.mark.parametrize("model", ["gemma3_text", "llama"])
def test_dummy_weights_are_neutral_and_reproducible(tmp_path: Path, model: str) -> None:
    changes = {"architectures": ["Gemma3ForCausalLM"], "model_type": model, "head_dim": 16}
    config = read_config(write_config(tmp_path, **(changes if model != "llama" else {"attention_bias": True})))
    first, second, other = (dummy_weights(config, torch.bfloat16, seed=seed).named_tensors() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    name = "layers.0.mlp.up_proj.weight"
    assert not torch.equal(first[name], other[name])
    assert first[name].float().std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.all(first["layers.1.input_layernorm.weight"] == 1.0 - config.norm_offset)
    assert all(not tensor.any() for name, tensor in first.items() if name.endswith("bias"))


def test_the_loaded_decoder_runs(tmp_path: Path) -> None:
    write_model(tmp_path, torch.float16)
    decoder = load_model(tmp_path, torch.float32)
    with torch.no_grad():
        hidden = decoder(torch.arange(5), DenseContext(decoder.config.layers, 1, 5))
        assert decoder.logits(hidden).isfinite().all()


MEASURE = """
import sys, torch
from pathlib import Path
from elbowroom.models.loader import load_model
def kib(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])
directory, small, dtype = Path(sys.argv[1]), Path(sys.argv[2]), getattr(torch, sys.argv[3])
load_model(small, dtype)  # each kernel once
before = kib("VmRSS")
decoder = load_model(directory, dtype)
print(decoder.weights.resident_bytes(), (kib("VmHWM") - before) * 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_loading_needs_little_beside_the_weights(tmp_path: Path) -> None:
    large = {"vocab_size": 40_000, "hidden_size": 256, "intermediate_size": 2048, "head_dim": 8}
    write_model(tmp_path / "large", torch.bfloat16, **large, num_hidden_layers=6, tie_word_embeddings=False)
    write_model(tmp_path / "small", torch.bfloat16)
    assert (tmp_path / "large/model.safetensors").stat().st_size > 56 * 2**20
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "large"), str(tmp_path / "small"), "float32"],
        capture_output=True,
        text=True,
        check=True,
    )
    resident, peak = (int(word) for word in done.stdout.split())
    assert peak <= resident + 8 * 2**20


def test_errors_are_one_tree() -> None:
    assert issubclass(CheckpointError, ModelError)
    assert issubclass(ModelError, ElbowroomError)
