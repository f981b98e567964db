"""config.json: defaults, spellings of version 4 and 5, and every way to be wrong."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.support.models import write_config

from elbowroom.core import RopeSpec
from elbowroom.errors import ConfigError, UnknownArchitecture
from elbowroom.models.hf_config import read_config, read_dtype
from elbowroom.models.hf_families import FAMILIES


def family(name: str, **changes: Any) -> dict[str, Any]:
    return {"architectures": [FAMILIES[name].architecture], "model_type": name, **changes}


def test_version_4_and_5_spell_the_same_rope(tmp_path: Path) -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    spellings: list[dict[str, Any]] = [
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **scaling}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **scaling}},
        {"rope_theta": ..., "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **scaling}},
    ]
    specs = {read_config(write_config(tmp_path, **keys)).layers[0].rope for keys in spellings}
    expected = RopeSpec(theta=5e5, kind="llama3", factor=8.0, original_max_positions=32, high_freq_factor=4.0)
    assert specs == {expected}


def test_gemma_scales_only_global_layers(tmp_path: Path) -> None:
    old = {"rope_theta": 1e6, "rope_local_base_freq": 5e3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    new = {
        "rope_theta": ...,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
        },
    }
    for spelling in (old, new):
        keys = family("gemma3_text", sliding_window=16, sliding_window_pattern=2, head_dim=16, **spelling)
        local, full = read_config(write_config(tmp_path, **keys)).layers
        assert (local.window, local.rope) == (16, RopeSpec(theta=5e3))
        assert (full.window, full.rope) == (None, RopeSpec(theta=1e6, kind="linear", factor=8.0))


def test_gemma_switches(tmp_path: Path) -> None:
    keys = family("gemma3_text", query_pre_attn_scalar=64, attn_logit_softcapping=50.0, final_logit_softcapping=30.0)
    config = read_config(write_config(tmp_path, **keys, head_dim=16))
    assert (config.norm_offset, config.post_norms, config.qk_norm, config.activation) == (1.0, True, True, "gelu_tanh")
    assert config.embed_scale == math.sqrt(32)
    assert config.layers[0].scale == 0.125
    assert (config.layers[0].softcap, config.final_softcap) == (50.0, 30.0)
    assert config.tie_embeddings


def test_keys_that_a_family_does_not_read_change_nothing(tmp_path: Path) -> None:
    plain = read_config(write_config(tmp_path))
    extra = {"sliding_window": 8, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 1, "unknown": {"a": 1}}
    assert read_config(write_config(tmp_path, **extra)) == plain


def test_windows_of_qwen_need_their_switch(tmp_path: Path) -> None:
    keys = family("qwen2", sliding_window=16, max_window_layers=1)
    assert [layer.window for layer in read_config(write_config(tmp_path, **keys)).layers] == [None, None]
    layers = read_config(write_config(tmp_path, **keys, use_sliding_window=True)).layers
    assert [layer.window for layer in layers] == [None, 16]


def test_yarn_added_by_hand_extends_the_context(tmp_path: Path) -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert read_config(write_config(tmp_path, rope_scaling=scaling)).max_positions == 256
    rope = read_config(write_config(tmp_path, rope_scaling={**scaling, "beta_fast": None})).layers[0].rope
    assert rope is not None
    assert rope.beta_fast == 32.0


def test_stop_tokens_come_from_generation_config(tmp_path: Path) -> None:
    write_config(tmp_path, eos_token_id=[7, 8])
    assert read_config(tmp_path).eos_token_ids == (7, 8)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert read_config(tmp_path).eos_token_ids == (9,)
    (tmp_path / "generation_config.json").write_text('{"temperature": 1}')
    assert read_config(tmp_path / "config.json").eos_token_ids == (7, 8)


def test_dtype(tmp_path: Path) -> None:
    assert read_dtype(write_config(tmp_path)) is None
    assert read_dtype(write_config(tmp_path, torch_dtype="bfloat16")) == "bfloat16"
    assert read_dtype(write_config(tmp_path, dtype="float16")) == "float16"
    with pytest.raises(ConfigError, match="torch_dtype is 'int4'"):
        read_dtype(write_config(tmp_path, torch_dtype="int4"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "multiple of num_attention_heads"),
        ({"num_key_value_heads": 3}, "divisor of num_attention_heads"),
        ({"num_attention_heads": 8, "num_key_value_heads": 8}, "heads are 4 wide"),
        ({"head_dim": 12}, "heads are 12 wide"),
        ({"hidden_size": -32}, "hidden_size is -32, expected a whole number from 1"),
        ({"vocab_size": "48"}, "vocab_size is '48'"),
        ({"vocab_size": 48.0}, "vocab_size is 48.0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_hidden_layers": 10**12}, "from 1 to 10000"),
        ({"rms_norm_eps": 0}, "finite number above 0"),
        ({"rms_norm_eps": math.inf}, "rms_norm_eps is inf"),
        ({"tie_word_embeddings": 1}, "expected true or false"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu', expected one of: silu"),
        ({"architectures": "LlamaForCausalLM"}, "expected a list of strings"),
        ({"architectures": None, "model_type": None}, "names neither architectures nor model_type"),
        ({"model_type": "mistral"}, "contradicts model_type 'mistral'"),
        ({"quantization_config": {"bits": 4}}, "quantised checkpoints are not read"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', expected an object"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "type is 'dynamic', expected one of: default, linear"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type is 'longrope'"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partly rotated"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
            "high_freq_factor is 4, expected a finite number above 4",
        ),
        (family("gemma3_text", head_dim=16, layer_types=["full_attention"]), "2 times full_attention"),
        (family("gemma3_text", head_dim=16, layer_types=["full_attention", "mamba"]), "layer_types is"),
        (family("gemma3_text", head_dim=16, sliding_window=None), "sliding_window is None"),
        (family("gemma3_text", head_dim=16, use_bidirectional_attention=True), "only causal"),
        (family("gemma3_text", head_dim=16, rope_parameters={"rope_theta": 1e4}), "one section a layer type"),
    ],
)
def test_bad_values_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=r"config\.json") as error:
        read_config(write_config(tmp_path, **changes))
    assert message in str(error.value)
    assert error.value.hint


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "LlamaForSequenceClassification", "GPT2LMHeadModel"])
def test_unknown_architectures_are_refused_with_the_known_ones(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnknownArchitecture, match=name) as error:
        read_config(write_config(tmp_path, architectures=[name]))
    assert "Qwen3ForCausalLM" in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"model_type": "lla', "not valid JSON"),
        (b"[1]", "holds a JSON list"),
        (b"\xff\xfe", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"vocab_size": 1, "vocab_size": 2}', "a key occurs twice"),
        (b" " * (16 * 2**20 + 1), "larger than"),
    ],
)
def test_files_that_are_no_json_object(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_config(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        read_config(tmp_path)


def test_reading_a_config_imports_nothing_heavy() -> None:
    code = "import sys, elbowroom.models.hf_config; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
