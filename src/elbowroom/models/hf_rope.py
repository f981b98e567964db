"""Rotary embeddings as config.json describes them, in the keys of transformers 4 and of transformers 5.

Version 4 wrote ``rope_theta`` and ``rope_scaling``; version 5 writes ``rope_parameters``, for Gemma 3 one section a
layer type. Both may say ``type`` for ``rope_type``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from elbowroom.core import RopeKind, RopeSpec
from elbowroom.models.fields import Fields

_DEFAULTS: Mapping[str, object] = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}


def read_rope(fields: Fields, layer_type: str, max_positions: int, *, local_rope: bool) -> RopeSpec:
    """Return the RoPE of the layers of ``layer_type``.

    Args:
        fields: config.json.
        layer_type: ``full_attention`` or ``sliding_attention``.
        max_positions: context length in tokens, the default of ``original_max_position_embeddings``.
        local_rope: whether sliding layers have a RoPE of their own (Gemma 3).

    Raises:
        ConfigError: an unsupported kind, or a missing or malformed parameter.
    """
    section = (_local_section if local_rope else _shared_section)(fields, layer_type)
    kind = _kind(section)
    theta_key = "rope_local_base_freq" if local_rope and layer_type == "sliding_attention" else "rope_theta"
    theta = section.number("rope_theta", low=1.0) if "rope_theta" in section else fields.number(theta_key, low=1.0)
    if kind == "linear":
        return RopeSpec(theta=theta, kind=kind, factor=section.number("factor"))
    if kind == "llama3":
        return _llama3(section, theta, _original(fields, section, max_positions))
    if kind == "yarn":
        return _yarn(section, theta, _original(fields, section, max_positions), max_positions)
    return RopeSpec(theta=theta)


def extended_positions(spec: RopeSpec, max_positions: int) -> int:
    """Return the context in tokens: yarn is often added by hand to a config whose length is still the trained one."""
    if spec.kind != "yarn":
        return max_positions
    return max(max_positions, int(spec.original_max_positions * spec.factor))


def _shared_section(fields: Fields, layer_type: str) -> Fields:
    scaling = fields.section("rope_scaling")
    section = scaling if scaling.values else fields.section("rope_parameters")
    return _filled(section.section(layer_type) if layer_type in section else section)


def _local_section(fields: Fields, layer_type: str) -> Fields:
    parameters = fields.section("rope_parameters")
    if parameters.values and not ({"full_attention", "sliding_attention"} & set(parameters.values)):
        raise fields.wrong("rope_parameters", "one section a layer type (full_attention, sliding_attention)")
    section = parameters.section(layer_type)
    if layer_type == "sliding_attention":
        return _filled(section)
    merged = {**section.values, **fields.section("rope_scaling").values}
    return _filled(Fields(merged, section.where, error=section.error))


def _filled(section: Fields) -> Fields:
    """Return the section with yarn's defaults; a null or 0 means the default there, as in transformers."""
    values = {key: value for key, value in section.values.items() if value or key not in ("beta_fast", "beta_slow")}
    return Fields(values, section.where, _DEFAULTS, section.error)


def _kind(section: Fields) -> RopeKind:
    key = "rope_type" if "rope_type" in section else "type"
    name = section.text(key) if key in section else "default"
    for kind in get_args(RopeKind):
        if kind == name:
            if section.get("partial_rotary_factor") not in (None, 1, 1.0):
                raise section.wrong("partial_rotary_factor", "1: partly rotated heads are not supported")
            return kind  # type: ignore[no-any-return]
    supported = ", ".join(get_args(RopeKind))
    raise section.wrong(key, f"one of: {supported}", "choose a model with a supported context extension")


def _original(fields: Fields, section: Fields, max_positions: int) -> int:
    key = "original_max_position_embeddings"
    if key in fields:
        return fields.integer(key)
    return section.integer(key) if key in section else max_positions


def _llama3(section: Fields, theta: float, original: int) -> RopeSpec:
    low = section.number("low_freq_factor")
    return RopeSpec(
        theta=theta,
        kind="llama3",
        factor=section.number("factor"),
        original_max_positions=original,
        low_freq_factor=low,
        high_freq_factor=section.number("high_freq_factor", low=low),
    )


def _yarn(section: Fields, theta: float, original: int, max_positions: int) -> RopeSpec:
    factor = section.number("factor") if "factor" in section else max_positions / original
    return RopeSpec(
        theta=theta,
        kind="yarn",
        factor=factor,
        original_max_positions=original,
        beta_fast=section.number("beta_fast"),
        beta_slow=section.number("beta_slow"),
        attention_factor=section.optional_number("attention_factor"),
        mscale=section.optional_number("mscale") or 0.0,
        mscale_all_dim=section.optional_number("mscale_all_dim") or 0.0,
        truncate=section.flag("truncate"),
    )
