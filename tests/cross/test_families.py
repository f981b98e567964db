"""Every family and RoPE kind against transformers, from the files that transformers writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.families import CASES, Case, as_version_4

from elbowroom.models.decoder import Decoder
from elbowroom.models.dense import DenseContext
from elbowroom.models.hf_config import read_config, read_dtype
from elbowroom.models.loader import load_model

transformers = pytest.importorskip("transformers", reason="the reference implementation is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

LENGTHS = (1, 7, 200)


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    """Tiny matrices are faster without a pool, above all where other tests run beside."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def our_logits(decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits ``[B, T, V]`` of int64 ``tokens [B, T]``."""
    context = DenseContext(decoder.config.layers, *tokens.shape)
    with torch.no_grad():
        return decoder.logits(decoder(tokens.flatten(), context)).view(*tokens.shape, -1)


def reference_logits(case: Case, model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits of transformers, which reads Gemma's attn_logit_softcapping but needs it passed along."""
    softcap = {} if case.attention_softcap is None else {"softcap": case.attention_softcap}
    with torch.no_grad():
        return model(tokens, use_cache=False, **softcap).logits


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logits_are_those_of_transformers(case: Case, tmp_path: Path, record_property: Any) -> None:
    model = case.build()
    model.save_pretrained(tmp_path)
    decoders = {"v5": load_model(tmp_path, torch.float32)}
    for type_key in ("type", "rope_type"):
        model.save_pretrained(tmp_path)
        as_version_4(tmp_path / "config.json", type_key=type_key)
        decoders[type_key] = load_model(tmp_path, torch.float32)
    assert read_dtype(tmp_path) == "float32"
    assert decoders["v5"].config == decoders["type"].config == decoders["rope_type"].config
    for length in LENGTHS:
        tokens = torch.randint(0, 199, (2, length), generator=torch.Generator().manual_seed(length))
        reference = reference_logits(case, model, tokens)
        error = (our_logits(decoders["v5"], tokens) - reference).abs().max().item()
        record_property(f"max_error_{length}", error)
        assert error <= 1e-4 * max(1.0, reference.abs().max().item())
        assert torch.equal(our_logits(decoders["v5"], tokens), our_logits(decoders["type"], tokens))


@pytest.mark.parametrize("name", ["llama", "gemma3-windows"])
@pytest.mark.parametrize("saved", [torch.bfloat16, torch.float16])
def test_half_precision_files_load_exactly(name: str, saved: torch.dtype, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == name)
    case.build().to(saved).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    tokens = torch.arange(40)[None]
    upcast = our_logits(load_model(tmp_path, torch.float32), tokens)
    reference = reference_logits(case, model, tokens)
    assert (upcast - reference).abs().max() <= 1e-4 * max(1.0, reference.abs().max())
    assert read_dtype(tmp_path) == str(saved).removeprefix("torch.")


def test_gemma_scales_embeddings_in_the_dtype_of_the_weights(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "gemma3-windows")
    model = Case(case.name, case.config_class, {**case.keys, "hidden_size": 72}).build().bfloat16()
    model.save_pretrained(tmp_path)
    decoder = load_model(tmp_path, torch.bfloat16)
    tokens = torch.arange(50)
    ours = decoder.weights.embed(tokens) * torch.tensor(decoder.config.embed_scale, dtype=torch.bfloat16)
    assert torch.equal(ours, model.get_input_embeddings()(tokens))


def test_a_sharded_checkpoint_loads_like_a_single_file(tmp_path: Path) -> None:
    model = CASES[0].build()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="100KB")
    assert (tmp_path / "many/model.safetensors.index.json").exists()
    tokens = torch.arange(20)[None]
    one, many = (load_model(tmp_path / name, torch.float32) for name in ("one", "many"))
    assert torch.equal(our_logits(one, tokens), our_logits(many, tokens))


def test_omitted_keys_have_the_defaults_of_transformers(tmp_path: Path) -> None:
    classes = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma3_text": "Gemma3Text"}
    for name, prefix in classes.items():
        reference = getattr(transformers, f"{prefix}Config")()
        (tmp_path / "config.json").write_text(json.dumps({"model_type": name}))
        config = read_config(tmp_path)
        layer = config.layers[0]
        assert config.vocab_size == reference.vocab_size
        assert config.hidden_size == reference.hidden_size
        assert config.intermediate_size == reference.intermediate_size
        assert config.num_layers == reference.num_hidden_layers
        assert config.max_positions == reference.max_position_embeddings
        assert config.norm_eps == reference.rms_norm_eps
        assert config.tie_embeddings == reference.tie_word_embeddings
        assert config.eos_token_ids == (() if reference.eos_token_id is None else (reference.eos_token_id,))
        assert config.bos_token_id == reference.bos_token_id
        assert layer.num_q_heads == reference.num_attention_heads
        assert layer.num_kv_heads == reference.num_key_value_heads
        assert layer.head_dim == getattr(reference, "head_dim", 128)
        types = (
            getattr(reference, "layer_types", None)
            or ["sliding_attention" if name == "mistral" else "full_attention"] * config.num_layers
        )
        assert [each.window is not None for each in config.layers] == [kind.startswith("sliding") for kind in types]
