"""Outlier channels that change no function, and the codec that scales keys and values along either axis."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from elbowroom.bench.axis_codec import AXES, AxisCodec
from elbowroom.bench.families import FAMILIES, write_family
from elbowroom.bench.outliers import write_with_outliers
from elbowroom.bench.paged_logits import paged_logits
from elbowroom.bench.sorted_channels import channel_orders, sorting
from elbowroom.core import LayerSpec
from elbowroom.engine.executors.local import StoreContext
from elbowroom.errors import ModelError, PlanError
from elbowroom.kv.codecs.kivi import KiviCodec
from elbowroom.kv.plan import KVPlan
from elbowroom.models.directory import find_model
from elbowroom.models.loader import load_model
from elbowroom.models.path import ComputePath

TORCH = ComputePath(0)
LAYER = LayerSpec(num_q_heads=4, num_kv_heads=2, head_dim=64, v_head_dim=64, scale=0.125, rope=None)


def keys_of(decoder, tokens):
    """Return the keys of every layer as attention gets them."""
    found = []

    class Noting:
        positions = torch.arange(len(tokens))

        def attend(self, layer, q, k, v):
            found.append(k)
            return torch.zeros(len(tokens), q.shape[1], v.shape[2], dtype=q.dtype)

        def strips(self, layer):
            return None

        def end_layer(self, layer):
            pass

    decoder(torch.tensor(tokens), Noting())
    return found


def same_function(source: Path, target: Path, tokens: list[int]) -> None:
    plain, large = (load_model(path, torch.float32) for path in (source, target))
    logits = [paged_logits(each, tokens, 64, TORCH) for each in (plain, large)]
    assert torch.equal(*logits)
    grown = [torch.stack(keys_of(each, tokens)).abs() for each in (large, plain)]
    assert sorted((grown[0] / grown[1]).nan_to_num(1.0).unique().tolist()) == [1.0, 16.0]


@torch.inference_mode()
def test_the_built_in_model_stays_what_it_is_and_its_keys_grow(tmp_path: Path):
    source = find_model(None)
    target = write_with_outliers(source, tmp_path / "large")
    assert (target / "tokenizer.json").is_file()
    same_function(source, target, list(range(5, 105)))


@torch.inference_mode()
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_families_stay_what_they_are_or_are_refused(tmp_path: Path, family: str):
    write_family(family, tmp_path / "model", 0)
    if family == "gemma3":
        with pytest.raises(ModelError, match="norms"):
            write_with_outliers(tmp_path / "model", tmp_path / "large", num_pairs=2)
        return
    write_with_outliers(tmp_path / "model", tmp_path / "large", num_pairs=2)
    same_function(tmp_path / "model", tmp_path / "large", list(range(40)))


@pytest.mark.parametrize("bits", [2, 4])
def test_keys_by_channel_and_values_by_token_are_the_codec_of_plans(bits: int):
    k, v = torch.randn(2, 2, 64, 64, generator=torch.Generator().manual_seed(bits)).unbind()
    slots = torch.arange(64)
    found = []
    for codec in (AxisCodec("channel", "token", bits, 32), KiviCodec(bits, bits, 32)):
        fmt = codec.page_format(LAYER, "float32")
        strip = torch.zeros(fmt.strip_bytes, dtype=torch.uint8)
        codec.store(strip, fmt, slots, k, v)
        found.append((fmt.strip_bytes, codec.open(strip, fmt)))
    (ours, (keys, values)), (theirs, (kivi_keys, kivi_values)) = found
    assert ours == theirs
    torch.testing.assert_close(keys, kivi_keys, rtol=0, atol=1e-6)
    torch.testing.assert_close(values, kivi_values, rtol=0, atol=1e-6)


@torch.inference_mode()
def test_a_store_reads_it_as_it_reads_the_codec_of_plans():
    decoder = load_model(find_model(None), torch.float32)
    codecs = AxisCodec("channel", "token", 4, 32), KiviCodec(4, 4, 32)
    plans = [KVPlan.parse("plain"), *(KVPlan(codec) for codec in codecs)]
    plain, ours, theirs = (paged_logits(decoder, list(range(5, 205)), 64, TORCH, plan) for plan in plans)
    # Kernels multiply by the inverse of a scale: a code that lies on the edge may be its neighbour.
    assert (ours - theirs).abs().mean() < 0.25 * (ours - plain).abs().mean()


@pytest.mark.parametrize(("k", "v"), list(itertools.product(AXES, AXES)))
def test_an_outlier_spoils_what_shares_its_scale_only(k, v):
    """Channel 3 is large in all tokens: a scale of a token then rounds its neighbours to the same code."""
    x = torch.rand(2, 64, 64, generator=torch.Generator().manual_seed(0))
    x[:, :, 3] += 100
    codec = AxisCodec(k, v, 4, 32)
    fmt = codec.page_format(LAYER, "float32")
    strip = torch.zeros(fmt.strip_bytes, dtype=torch.uint8)
    codec.store(strip, fmt, torch.arange(64), x, x)
    for axis, back in zip((k, v), codec.open(strip, fmt), strict=True):
        error = (back - x).abs()
        assert error[:, :, 32:].max() < 0.05
        near = error[:, :, 4:32].max()
        assert (near > 0.5) if axis == "token" else (near < 0.05)


def test_groups_that_do_not_divide_a_head_are_refused():
    with pytest.raises(PlanError, match="groups of 24"):
        KVPlan(AxisCodec("token", "token", 4, 24)).bind((LAYER,), "float32")


@torch.inference_mode()
@pytest.mark.parametrize("by", ["magnitude", "ratio"])
def test_sorted_channels_give_the_same_logits_and_put_outliers_last(tmp_path: Path, by):
    decoder = load_model(write_with_outliers(find_model(None), tmp_path / "large", factor=1024.0), torch.float32)
    tokens = list(range(5, 105))
    order = channel_orders(decoder, tokens)[by]
    keys = keys_of(decoder, tokens)
    for layer, heads in zip(keys, order, strict=True):
        size = layer.square().mean(0).sqrt()
        assert heads.sort(dim=-1).values.equal(torch.arange(64).expand(2, 64))
        last = size.gather(1, heads[:, -6:])
        assert (last > 8 * size.median(dim=-1, keepdim=True).values).all()
    plain, reordered = (
        paged_logits(decoder, tokens, 64, TORCH, "plain", contexts) for contexts in (StoreContext, sorting(order))
    )
    torch.testing.assert_close(plain, reordered, rtol=1e-4, atol=1e-4)
