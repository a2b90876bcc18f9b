"""The rotations that a transformers config describes, for whom there is no model at hand."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tokendance.device.rotation import Rotation, default_frequencies, even, required


@dataclass(frozen=True)
class _Style:
    """How a model type applies its rotation: the pairing, and whether it may rotate only a part.

    ``fields`` are further ones of its config that the parser reads.
    """

    interleaved: bool = False
    partial: bool = False
    fields: tuple[str, ...] = ()


_HALF_SPLIT = _Style()
_HALF_SPLIT_PARTIAL = _Style(partial=True)
_INTERLEAVED = _Style(interleaved=True)
_INTERLEAVED_PARTIAL = _Style(interleaved=True, partial=True)
_GPTJ = _Style(interleaved=True, partial=True, fields=("rotary_dim",))

_STYLES: dict[str, _Style] = {
    "codegen": _GPTJ,
    "cohere": _INTERLEAVED,
    "ernie4_5": _INTERLEAVED,
    "gemma": _HALF_SPLIT,
    "gemma2": _HALF_SPLIT,
    "gemma3_text": _Style(fields=("rope_local_base_freq",)),
    "glm": _INTERLEAVED_PARTIAL,
    "glm4": _INTERLEAVED_PARTIAL,
    "gpt_neox": _HALF_SPLIT_PARTIAL,
    "gptj": _GPTJ,
    "granite": _HALF_SPLIT,
    "helium": _INTERLEAVED,
    "llama": _HALF_SPLIT,
    "ministral": _HALF_SPLIT,
    "mistral": _HALF_SPLIT,
    "mixtral": _HALF_SPLIT,
    "olmo": _HALF_SPLIT,
    "olmo2": _HALF_SPLIT,
    "phi": _HALF_SPLIT_PARTIAL,
    "phi3": _HALF_SPLIT_PARTIAL,
    "qwen2": _HALF_SPLIT,
    "qwen2_moe": _HALF_SPLIT,
    "qwen3": _HALF_SPLIT,
    "qwen3_moe": _HALF_SPLIT,
    "smollm3": _Style(fields=("no_rope_layers", "no_rope_layer_interval")),
    "stablelm": _HALF_SPLIT_PARTIAL,
    "starcoder2": _HALF_SPLIT,
}

_COMMON_KEYS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_SCALING_KEYS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    ),
    "yarn": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        }
    ),
}


def rotations_of_config(config: Any) -> Rotation | list[Rotation | None]:
    """One, or one per layer; see `Rope.from_config`."""
    model_type = required(config, "model_type")
    style = _STYLES.get(model_type)
    if style is None:
        raise ValueError(
            f"model_type: expected one of {', '.join(sorted(_STYLES))}, got {model_type!r}; "
            "take the model's own (Rope.from_model), or give its frequencies to "
            "Rope(inv_freq, max_position)"
        )
    _check_fields(config, style)
    parameters = _rope_parameters(config)
    layer_types = _layer_types(config)
    per_type = {key: parameters[key] for key in dict.fromkeys(layer_types) if key in parameters}
    uses_rope = _uses_rope(config, style)
    if per_type:
        missing = [key for key in dict.fromkeys(layer_types) if key not in per_type]
        if missing:
            raise ValueError(
                f"rope_parameters: expected an entry per layer type, got none for {missing}"
            )
        rotations = {
            key: None if value is None else _build(config, style, value, key)
            for key, value in per_type.items()
        }
        layers = [rotations[key] for key in layer_types]
    else:
        rotation = _build(config, style, parameters, None)
        if not uses_rope:
            return rotation
        layers = [rotation] * int(required(config, "num_hidden_layers"))
    if uses_rope:
        if len(uses_rope) != len(layers):
            raise ValueError(
                f"no_rope_layers: expected {len(layers)} entries, got {len(uses_rope)}"
            )
        # The field's name says the opposite of what it holds: 1 stands for a layer with RoPE.
        layers = [one if use else None for one, use in zip(layers, uses_rope, strict=True)]
    return layers


# Fields with which configs change angles: what matches, and is not read, is refused.
_ANGLE_FIELDS = re.compile(
    "rope|rotary|alibi|theta|position_embedding_type|position_scal|llama_4_scaling|long_factor|"
    "short_factor|attn_temperature"
)
_COMMON_FIELDS = (
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "ignore_keys_at_rope_validation",  # says which keys transformers is not to check
)


def _check_fields(config: Any, style: _Style) -> None:
    """Refuses fields that may change angles and that nothing here reads."""
    known = {*_COMMON_FIELDS, *style.fields, *(("partial_rotary_factor",) if style.partial else ())}
    for name, value in vars(config).items():
        if name in known or value is None or value is False or not _ANGLE_FIELDS.search(name):
            continue
        if name == "partial_rotary_factor" and value == 1.0:
            continue
        raise ValueError(
            f"{name}: expected none in the config of model_type {config.model_type!r}, since it "
            f"may change angles in a way that is not known here, got {value!r}; take the model's "
            "own (Rope.from_model)"
        )


def _layer_types(config: Any) -> list[str]:
    """The kind of every layer; Gemma 3's older configs give a period instead."""
    types = list(getattr(config, "layer_types", None) or [])
    if not types and getattr(config, "rope_local_base_freq", None) is not None:
        period = int(required(config, "sliding_window_pattern"))
        types = [
            "full_attention" if layer % period == 0 else "sliding_attention"
            for layer in range(1, int(required(config, "num_hidden_layers")) + 1)
        ]
    return types


def _uses_rope(config: Any, style: _Style) -> Sequence[int] | None:
    """Per layer whether it has RoPE (1 or 0); None: all of them."""
    layers: Sequence[int] | None = getattr(config, "no_rope_layers", None)
    if layers is None and "no_rope_layers" in style.fields:
        interval = int(required(config, "no_rope_layer_interval"))
        count = int(required(config, "num_hidden_layers"))
        return [int(layer % interval != 0) for layer in range(1, count + 1)]
    return layers


def _rope_parameters(config: Any) -> dict[str, Any]:
    """The config's parameters in the naming of transformers 5, flat or one dict per layer type."""
    parameters = dict(getattr(config, "rope_parameters", None) or {})
    scaling = dict(getattr(config, "rope_scaling", None) or {})
    if parameters and scaling and parameters != scaling:
        raise ValueError(
            f"rope_scaling: expected none beside rope_parameters {parameters}, got {scaling}"
        )
    parameters = parameters or scaling
    theta = getattr(config, "rope_theta", None)
    local = getattr(config, "rope_local_base_freq", None)
    if any(isinstance(value, Mapping) for value in parameters.values()):
        for name, value in (("rope_theta", theta), ("rope_local_base_freq", local)):
            if value is not None:
                raise ValueError(
                    f"{name}: expected none beside rope_parameters per layer type, got {value}"
                )
        return parameters
    if theta is None and getattr(config, "rotary_dim", None) is not None:
        theta = 10000.0  # GPT-J and CodeGen have no such field: their code holds the constant.
    parameters.setdefault("rope_theta", theta)
    parameters.setdefault("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
    if config.model_type == "gemma3_text":
        # Before transformers 5: scaled and of the longer period on full layers alone.
        if local is None:
            raise ValueError("rope_local_base_freq: expected a number beside rope_theta, got none")
        return {
            "full_attention": parameters,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }
    return parameters


def _build(
    config: Any, style: _Style, parameters: Mapping[str, Any], layer_type: str | None
) -> Rotation:
    where = "rope_parameters" if layer_type is None else f"rope_parameters[{layer_type!r}]"
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in _SCALING_KEYS:
        raise ValueError(
            f"{where}['rope_type']: expected one of {', '.join(_SCALING_KEYS)}, got {kind!r}"
        )
    given = {key: value for key, value in parameters.items() if value is not None}
    unknown = sorted(set(given) - _COMMON_KEYS - _SCALING_KEYS[kind])
    if unknown:
        raise ValueError(
            f"{where}: expected only {sorted(_COMMON_KEYS | _SCALING_KEYS[kind])} "
            f"for rope_type {kind!r}, got also {unknown}"
        )
    if "rope_theta" not in given:
        raise ValueError(f"{where}['rope_theta']: expected a number, got none")
    theta = float(given["rope_theta"])
    rotary_dim = _rotary_dim(config, style, given, where)
    inv_freq = default_frequencies(theta, rotary_dim)
    attention_factor = 1.0
    if kind == "linear":
        inv_freq = inv_freq / _factor(given, where)
    elif kind == "llama3":
        inv_freq = _llama3_frequencies(inv_freq, config, given, layer_type, where)
    elif kind == "yarn":
        inv_freq, attention_factor = _yarn(theta, rotary_dim, config, given, layer_type, where)
    return Rotation(inv_freq, style.interleaved, attention_factor)


def _rotary_dim(config: Any, style: _Style, given: Mapping[str, Any], where: str) -> int:
    head_dim = getattr(config, "head_dim", None)
    if head_dim is None:
        hidden_size = int(required(config, "hidden_size"))
        head_dim = hidden_size // int(required(config, "num_attention_heads"))
    fraction = float(given.get("partial_rotary_factor", 1.0))
    if not style.partial:
        if fraction != 1.0:
            raise ValueError(
                f"{where}['partial_rotary_factor']: expected 1.0 for model_type "
                f"{config.model_type!r}, which rotates whole heads, got {fraction}"
            )
        return int(head_dim)
    rotary_dim = getattr(config, "rotary_dim", None)
    return int(head_dim * fraction) if rotary_dim is None else int(rotary_dim)


def _number(given: Mapping[str, Any], key: str, where: str) -> float:
    value = given.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(f"{where}[{key!r}]: expected a number > 0, got {value!r}")
    return value


def _factor(given: Mapping[str, Any], where: str) -> float:
    return _number(given, "factor", where)


def _original_length(
    config: Any, given: Mapping[str, Any], layer_type: str | None, where: str
) -> float:
    """Positions of the pretraining; a field of the config itself wins over a flat parameter."""
    key = "original_max_position_embeddings"
    own = getattr(config, key, None) if layer_type is None else None
    if own is not None:
        return float(own)
    if key in given:
        return _number(given, key, where)
    return float(required(config, "max_position_embeddings"))


def _llama3_frequencies(
    inv_freq: torch.Tensor,
    config: Any,
    given: Mapping[str, Any],
    layer_type: str | None,
    where: str,
) -> torch.Tensor:
    """Llama 3.1: long wavelengths divided by the factor, short ones kept, a ramp between."""
    factor = _factor(given, where)
    low = _number(given, "low_freq_factor", where)
    high = _number(given, "high_freq_factor", where)
    if not high > low:
        raise ValueError(
            f"{where}['high_freq_factor']: expected more than low_freq_factor = {low}, got {high}"
        )
    length = _original_length(config, given, layer_type, where)
    wavelength = 2 * math.pi / inv_freq
    scaled = torch.where(wavelength > length / low, inv_freq / factor, inv_freq)
    ramp = (length / wavelength - low) / (high - low)
    between = (1 - ramp) * scaled / factor + ramp * scaled
    in_ramp = (wavelength >= length / high) & (wavelength <= length / low)
    return torch.where(in_ramp, between, scaled)


def _yarn(
    theta: float,
    rotary_dim: int,
    config: Any,
    given: Mapping[str, Any],
    layer_type: str | None,
    where: str,
) -> tuple[torch.Tensor, float]:
    """YaRN (Peng et al., 2309.00071) as transformers has it: frequencies, attention factor."""
    length = _original_length(config, given, layer_type, where)
    if "factor" in given:
        factor = _factor(given, where)
    else:
        factor = float(required(config, "max_position_embeddings")) / length

    def mscale(weight: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    attention_factor = given.get("attention_factor")
    if attention_factor is None:
        numerator, denominator = given.get("mscale"), given.get("mscale_all_dim")
        if numerator and denominator:
            attention_factor = mscale(numerator) / mscale(denominator)
        else:
            attention_factor = mscale()

    def dimension_of(rotations: float) -> float:
        """The (fractional) dimension that turns so many times within the pretraining length."""
        return rotary_dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension_of(given.get("beta_fast") or 32)
    high = dimension_of(given.get("beta_slow") or 1)
    if given.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    width = high - low if high != low else 0.001
    ramp = torch.clamp((even(rotary_dim) / 2 - low) / width, 0, 1)
    frequency = theta ** (even(rotary_dim) / rotary_dim)
    kept = 1 - ramp
    inv_freq = 1.0 / (factor * frequency) * (1 - kept) + 1.0 / frequency * kept
    return inv_freq, float(attention_factor)
