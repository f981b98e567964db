"""The rival's model file: what was written can be read back, and its rotated pairs are those of Hugging Face."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support.models import write_model
from tests.support.tiny_model import write_tiny_model

from elbowroom.bench.gguf_file import interleaved, write_gguf
from elbowroom.core import RopeSpec
from elbowroom.errors import ConfigError, ElbowroomError
from elbowroom.kernels.rope import RopeTable, rotate


def test_interleaved_rows_rotate_as_neighbours_like_halves_before():
    """Rotating neighbouring pairs of the moved rows gives the moved rows of the rotated halves."""
    heads, width, hidden = 3, 8, 5
    weight, x = torch.randn(heads * width, hidden), torch.randn(4, hidden)
    cos, sin = RopeTable(RopeSpec(), width).cos_sin(torch.arange(4) + 7, torch.float32)
    halves = rotate((x @ weight.t()).view(4, heads, width), cos, sin)
    moved = (x @ interleaved(weight, heads).t()).view(4, heads, width // 2, 2)
    even, odd = moved[..., 0], moved[..., 1]
    c, s = (table.reshape(4, 1, -1)[..., : width // 2] for table in (cos, sin))
    neighbours = torch.stack((even * c - odd * s, odd * c + even * s), -1)
    first, second = neighbours[..., 0], neighbours[..., 1]
    torch.testing.assert_close(torch.cat((first, second), -1), halves)


def test_a_file_read_back_has_the_model(tmp_path: Path):
    gguf = pytest.importorskip("gguf", reason="the package that writes the rival's files is not installed")
    weights = write_model(tmp_path / "model", torch.bfloat16)
    reader = gguf.GGUFReader(write_gguf(tmp_path / "model", tmp_path / "model.gguf"))
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert len(found) == len(weights)
    for ours, theirs in (("model.layers.1.mlp.down_proj", "blk.1.ffn_down"), ("lm_head", "output")):
        tensor = found[f"{theirs}.weight"]
        assert tensor.data.dtype == np.float16
        np.testing.assert_array_equal(tensor.data, weights[f"{ours}.weight"].half().numpy())
    assert found["blk.0.attn_norm.weight"].data.dtype == np.float32
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["llama.attention.head_count"] == 4
    assert fields["llama.attention.head_count_kv"] == 2
    assert fields["llama.block_count"] == 2
    assert fields["llama.vocab_size"] == 48
    assert fields["llama.rope.freq_base"] == 10_000.0
    assert fields["tokenizer.ggml.model"] == "none"


def test_another_family_is_refused(tmp_path: Path):
    pytest.importorskip("gguf", reason="the package that writes the rival's files is not installed")
    directory = write_tiny_model(tmp_path / "model", family="qwen2")
    with pytest.raises(ConfigError, match="plain Llama"):
        write_gguf(directory, tmp_path / "model.gguf")


def test_without_its_package_the_error_names_the_fix(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ElbowroomError, match="gguf is not installed") as caught:
        write_gguf(tmp_path, tmp_path / "model.gguf")
    assert caught.value.hint == "`make bench` installs it"
