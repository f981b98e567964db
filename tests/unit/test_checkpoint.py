"""Weight files: checked before anything is allocated, read in small pieces."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.support.models import random_tensors, write_config, write_model

from elbowroom.errors import CheckpointError
from elbowroom.models import reading
from elbowroom.models.checkpoint import Checkpoint
from elbowroom.models.hf_config import read_config
from elbowroom.models.safetensors_file import read_header

NORM = "norm.weight"
EMBED = "embed_tokens.weight"


def opened(directory: Path) -> Checkpoint:
    return Checkpoint(directory, read_config(directory))


def write_raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(begin: int, end: int, **changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end]} | changes


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_is_converted_as_torch_does(tmp_path: Path, source: torch.dtype, target: torch.dtype) -> None:
    tensors = write_model(tmp_path, source)
    with opened(tmp_path) as weights:
        for name, shape in read_config(tmp_path).tensor_shapes().items():
            found = torch.empty(shape, dtype=target)
            weights.read({name: found})
            expected = tensors.get(f"model.{name}", tensors.get(name))
            assert expected is not None
            assert torch.equal(found, expected.to(target))


@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16])
def test_chunks_join_without_seams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: torch.dtype) -> None:
    monkeypatch.setattr(reading, "PIECE_BYTES", 52)
    tensors = write_model(tmp_path)
    done: list[int] = []
    with opened(tmp_path) as weights:
        found = torch.empty(48, 32, dtype=target)
        weights.read({EMBED: found}, done.append)
    assert torch.equal(found, tensors[f"model.{EMBED}"].to(target))
    assert done[-1] == 48 * 32 * 4
    assert done == sorted(set(done))


def test_destinations_may_have_strides(tmp_path: Path) -> None:
    tensors = write_model(tmp_path)
    found = torch.zeros(48, 64)
    with opened(tmp_path) as weights:
        weights.read({EMBED: found[:, 16:48]})
        with pytest.raises(CheckpointError, match="destination has the shape"):
            weights.read({EMBED: torch.empty(32, 48)})
    assert torch.equal(found[:, 16:48], tensors[f"model.{EMBED}"])
    assert not found[:, :16].any()
    assert not found[:, 48:].any()


def test_names_of_other_wrappings_and_known_extras_are_understood(tmp_path: Path) -> None:
    tensors = random_tensors(write_config(tmp_path, tie_word_embeddings=True))
    renamed = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    renamed["language_model.lm_head.weight"] = torch.zeros(48, 32)
    renamed["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    renamed["vision_tower.x"] = torch.zeros(3, dtype=torch.int64)
    save_file(renamed, tmp_path / "model.safetensors")
    found = torch.empty(32)
    with opened(tmp_path) as weights:
        weights.read({NORM: found})
        assert "lm_head.weight" not in weights.entries
    assert torch.equal(found, tensors[f"model.{NORM}"])


def changed(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = random_tensors(write_config(directory))
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "lacks 1 of 21 tensors: norm.weight"),
        (lambda t: t.pop("lm_head.weight"), "tie_word_embeddings"),
        (lambda t: [t.pop(name) for name in list(t) if "layers.1" in name], r"lacks 9 of 21 .* and 5 more"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(33)}), r"norm.weight \(33,\) for \(32,\)"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(32).double()}), r"not read: norm.weight \(F64\)"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}), "does not account for"),
        (lambda t: t.update({"norm.weight": torch.zeros(32)}), "twice under different prefixes"),
    ],
)
def test_tensors_that_do_not_fit_the_config(tmp_path: Path, change: Any, message: str) -> None:
    changed(tmp_path, change)
    with pytest.raises(CheckpointError, match=message) as error:
        opened(tmp_path)
    assert error.value.hint


def test_shards(tmp_path: Path) -> None:
    tensors = random_tensors(write_config(tmp_path))
    names = sorted(tensors)
    parts = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    shard_of = {name: file for file, part in parts.items() for name in part}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    found = torch.empty(32)
    with opened(tmp_path) as weights:
        assert weights.total_bytes == 4 * read_config(tmp_path).num_parameters()
        weights.read({NORM: found})
    assert torch.equal(found, tensors[f"model.{NORM}"])

    index.write_text(json.dumps({"weight_map": shard_of | {"model.extra": "a.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"their shards lack: model\.extra"):
        opened(tmp_path)
    index.write_text(json.dumps({"weight_map": shard_of | {"model.extra": "../a.safetensors"}}))
    with pytest.raises(CheckpointError, match="names of files in the same directory"):
        opened(tmp_path)
    index.write_text(json.dumps({"weight_map": shard_of}))
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of 2 shards: b\.safetensors"):
        opened(tmp_path)
    index.write_text('{"weight_map": {"a"')
    with pytest.raises(CheckpointError, match="not valid JSON"):
        opened(tmp_path)


def test_a_directory_without_weights_says_what_it_found(tmp_path: Path) -> None:
    write_config(tmp_path)
    with pytest.raises(CheckpointError, match="found no weight file"):
        opened(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"found pytorch_model\.bin"):
        opened(tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 8, 20, 1500, -1])
def test_a_truncated_file_is_found_when_it_is_opened(tmp_path: Path, keep: int) -> None:
    write_model(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        opened(tmp_path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    write_model(tmp_path)
    with opened(tmp_path) as weights:
        (tmp_path / "model.safetensors").write_bytes(b"")
        with pytest.raises(CheckpointError, match="became shorter"):
            weights.read({EMBED: torch.empty(48, 32)})


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"{", b"", "header is not valid JSON"),
        (b"[]", b"", "expected an object"),
        ({"a": 1}, b"", "'a' has no dtype"),
        ({"a": entry(0, 8, dtype="F31")}, bytes(8), "unknown dtype 'F31'"),
        ({"a": entry(0, 8, dtype=["F32"])}, bytes(8), "unknown dtype"),
        ({"a": entry(0, 8, shape=[-2])}, bytes(8), r"shape \[-2\]"),
        ({"a": entry(0, 8, shape=[2.0])}, bytes(8), "shape"),
        ({"a": entry(0, 8, shape=[1] * 17)}, bytes(8), "shape"),
        ({"a": entry(0, 8, shape=[3])}, bytes(8), "needs 12 bytes, data_offsets give 8"),
        ({"a": entry(0, 8, shape=[2**62, 2**62])}, bytes(8), "data_offsets give 8"),
        ({"a": entry(0, 8, data_offsets=[8, 0])}, bytes(8), "data_offsets give -8"),
        ({"a": entry(0, 8, data_offsets=[0])}, bytes(8), "data_offsets"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12), "overlaps"),
        ({"a": entry(0, 8), "b": entry(12, 16)}, bytes(16), "leaves a gap"),
        ({"a": entry(0, 2**50)}, bytes(8), "is truncated"),
        ({"a": entry(0, 8)}, bytes(9), "bytes behind its last tensor"),
    ],
)
def test_headers_that_contradict_themselves(tmp_path: Path, header: object, data: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    write_raw(path, header, data)
    with pytest.raises(CheckpointError, match=message) as error:
        read_header(path)
    assert str(path) in str(error.value)


def test_header_lengths_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_raw(path, {}, length=2**63)
    with pytest.raises(CheckpointError, match="its header alone needs"):
        read_header(path)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 2**26))
        file.truncate(2**27)  # sparse
    with pytest.raises(CheckpointError, match="exceeds"):
        read_header(path)
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_header(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path / "absent")


def test_metadata_and_scalars_are_no_trouble(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.tensor(1.5), "b": torch.zeros(0, 3)}, path, metadata={"format": "pt"})
    found = read_header(path)
    assert {name: each.shape for name, each in found.items()} == {"a": (), "b": (0, 3)}
