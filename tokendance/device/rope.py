"""Rotary position embedding: one pair of tables, computed once, from which every rotation is made.

RoFormer (Su et al., 2021): ``R(p)`` turns each pair of dimensions ``i`` of a query or key by the
angle ``p * inv_freq[i]``. Only differences of positions reach a score, so a key computed at
position ``s`` is moved to ``s + shift`` by the one rotation ``R(shift)``, and ``R(p) R(-shift)`` on
a query sees the unmoved key as if it had been moved.

The angle is formed in fp64 and its cosine and sine are rounded once to fp32. An angle formed in
fp32 is off by up to half a unit in the last place of ``p * inv_freq`` (about 2.4e-4 rad at position
8192), and not by the same amount in ``R(p)``, ``R(s)`` and ``R(p - s)``, so that a rotated query
and a moved key would disagree about one and the same score.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["Rope"]

# Rows of the table computed at a time: bounds the fp64 temporaries for tables of a million
# positions.
_TABLE_CHUNK = 1 << 14


@dataclass(frozen=True, init=False, eq=False, repr=False, slots=True)
class Rope:
    """Cosine and sine tables of one rotary embedding. Immutable.

    Attributes:
        cos: ``[max_position, rotary_dim / 2]`` fp32, ``cos(position * inv_freq)``.
        sin: ``[max_position, rotary_dim / 2]`` fp32, ``sin(position * inv_freq)``.
        rotary_dim: leading dimensions of a head that are rotated; the others pass unchanged.
        interleaved: False pairs dimension ``i`` with ``i + rotary_dim / 2`` (half-split, "neox"),
            True pairs ``2 i`` with ``2 i + 1`` ("gptj").
        attention_factor: multiplies the rotary dimensions of fresh queries and keys (YaRN), so that
            cached keys hold it once, as engines' caches do. It is not in the tables: a move from
            one position to another is of unit norm.
        max_position: rows of the tables; positions are ``0 .. max_position - 1``.
        fingerprint: 16 bytes that differ whenever rotated keys would: a digest of the frequencies,
            the style and the attention factor (not of ``max_position`` or the device).
    """

    cos: torch.Tensor
    sin: torch.Tensor
    rotary_dim: int
    interleaved: bool
    attention_factor: float
    max_position: int
    fingerprint: bytes

    def __init__(
        self,
        inv_freq: torch.Tensor | npt.NDArray[np.floating[Any]],
        max_position: int,
        interleaved: bool = False,
        attention_factor: float = 1.0,
    ) -> None:
        """Builds the tables on the CPU.

        Args:
            inv_freq: ``[rotary_dim / 2]`` radians per position, fp64. Values that a model holds in
                fp32 are to be widened as they are, not recomputed: at position 8192 the rounding of
                a frequency to fp32 is worth up to 4.9e-4 rad.
            max_position: rows of the tables, at least 1.
            interleaved: the pairing of dimensions, see the class.
            attention_factor: see the class; finite and positive.

        Raises:
            TypeError: ``inv_freq`` is no floating-point tensor or array.
            ValueError: a shape or a value is out of range.
        """
        frequencies = _as_frequencies(inv_freq)
        if isinstance(max_position, bool) or not isinstance(max_position, int) or max_position < 1:
            raise ValueError(f"max_position: expected an int >= 1, got {max_position!r}")
        factor = float(attention_factor)
        if not (math.isfinite(factor) and factor > 0):
            raise ValueError(
                f"attention_factor: expected a finite value > 0, got {attention_factor}"
            )
        cos = torch.empty(max_position, frequencies.numel(), dtype=torch.float32)
        sin = torch.empty_like(cos)
        for start in range(0, max_position, _TABLE_CHUNK):
            stop = min(start + _TABLE_CHUNK, max_position)
            positions = torch.arange(start, stop, dtype=torch.float64)
            angle = positions[:, None] * frequencies[None, :]
            cos[start:stop] = angle.cos()
            sin[start:stop] = angle.sin()
        digest = hashlib.blake2b(digest_size=16, person=b"tokendance-rope")
        digest.update(struct.pack("<?d", bool(interleaved), factor))
        digest.update(frequencies.numpy().astype("<f8").tobytes())
        self._set(cos, sin, bool(interleaved), factor, digest.digest())

    def _set(
        self,
        cos: torch.Tensor,
        sin: torch.Tensor,
        interleaved: bool,
        attention_factor: float,
        fingerprint: bytes,
    ) -> None:
        for name, value in (
            ("cos", cos),
            ("sin", sin),
            ("rotary_dim", 2 * cos.shape[1]),
            ("interleaved", interleaved),
            ("attention_factor", attention_factor),
            ("max_position", cos.shape[0]),
            ("fingerprint", fingerprint),
        ):
            object.__setattr__(self, name, value)

    @classmethod
    def default(
        cls,
        head_dim: int,
        theta: float,
        max_position: int,
        rotary_dim: int | None = None,
        interleaved: bool = False,
    ) -> Rope:
        """The unscaled embedding, ``inv_freq[i] = theta ** (-2 i / rotary_dim)``.

        Args:
            head_dim: dimensions of a head.
            theta: base of the frequencies ("rope_theta").
            max_position: rows of the tables.
            rotary_dim: rotated leading dimensions, even, at most ``head_dim``; all by default.
            interleaved: the pairing of dimensions, see the class.

        Raises:
            ValueError: ``rotary_dim`` is odd or outside ``2 .. head_dim``, or ``theta`` is not
                positive.
        """
        rotary_dim = head_dim if rotary_dim is None else rotary_dim
        if rotary_dim > head_dim:
            raise ValueError(
                f"rotary_dim: expected at most head_dim = {head_dim}, got {rotary_dim}"
            )
        return cls(_default_frequencies(float(theta), rotary_dim), max_position, interleaved)

    @classmethod
    def from_config(
        cls, hf_config: Any, max_position: int | None = None
    ) -> Rope | list[Rope | None]:
        """The embedding that a transformers model uses, frequencies bit for bit.

        Reads ``rope_parameters`` (transformers >= 5) or ``rope_theta`` and ``rope_scaling``
        (before), with the scalings default, linear, llama3 and yarn and with partial rotary
        dimensions, for the model types whose rotation has been compared with transformers' own (see
        ``tests``).

        Args:
            hf_config: a transformers text-model config.
            max_position: rows of the tables; ``max_position_embeddings`` of the config by default.

        Returns:
            One `Rope`; or one per layer where the layers differ, None for a layer without
            positions.

        Raises:
            ValueError: a model type, scaling or parameter that is not supported, by name.
        """
        model_type = _required(hf_config, "model_type")
        style = _STYLES.get(model_type)
        if style is None:
            raise ValueError(
                f"model_type: expected one of {', '.join(sorted(_STYLES))}, got {model_type!r}; "
                "for another model give its frequencies to Rope(inv_freq, max_position)"
            )
        if max_position is None:
            max_position = int(_required(hf_config, "max_position_embeddings"))
        parameters = _rope_parameters(hf_config)
        layer_types = list(getattr(hf_config, "layer_types", None) or [])
        per_type = {key: parameters[key] for key in dict.fromkeys(layer_types) if key in parameters}
        uses_rope = getattr(hf_config, "no_rope_layers", None)
        if per_type:
            missing = [key for key in dict.fromkeys(layer_types) if key not in per_type]
            if missing:
                raise ValueError(
                    f"rope_parameters: expected an entry per layer type, got none for {missing}"
                )
            ropes = {
                key: None
                if value is None
                else _build(cls, hf_config, style, value, key, max_position)
                for key, value in per_type.items()
            }
            layers = [ropes[key] for key in layer_types]
        else:
            rope = _build(cls, hf_config, style, parameters, None, max_position)
            if not uses_rope:
                return rope
            layers = [rope] * int(_required(hf_config, "num_hidden_layers"))
        if uses_rope:
            if len(uses_rope) != len(layers):
                raise ValueError(
                    f"no_rope_layers: expected {len(layers)} entries, got {len(uses_rope)}"
                )
            # The field's name says the opposite of what it holds: 1 stands for a layer with RoPE.
            layers = [rope if use else None for rope, use in zip(layers, uses_rope, strict=True)]
        first = layers[0] if layers else None
        if first is not None and all(layer is first for layer in layers):
            return first
        return layers

    @property
    def device(self) -> torch.device:
        """Where the tables are."""
        return self.cos.device

    def to(self, device: torch.device | str) -> Rope:
        """The same embedding with its tables on ``device`` (itself if they are there already)."""
        cos, sin = self.cos.to(device), self.sin.to(device)
        if cos is self.cos:
            return self
        moved = object.__new__(Rope)
        moved._set(cos, sin, self.interleaved, self.attention_factor, self.fingerprint)
        return moved

    def __repr__(self) -> str:
        style = "interleaved" if self.interleaved else "half-split"
        return (
            f"Rope(rotary_dim={self.rotary_dim}, {style}, max_position={self.max_position}, "
            f"attention_factor={self.attention_factor:g}, device={self.device})"
        )


@dataclass(frozen=True)
class _Style:
    """How a model type applies its rotation: the pairing, and whether it may rotate only a part."""

    interleaved: bool = False
    partial: bool = False


_HALF_SPLIT = _Style()
_HALF_SPLIT_PARTIAL = _Style(partial=True)
_INTERLEAVED = _Style(interleaved=True)
_INTERLEAVED_PARTIAL = _Style(interleaved=True, partial=True)

_STYLES: dict[str, _Style] = {
    "codegen": _INTERLEAVED_PARTIAL,
    "cohere": _INTERLEAVED,
    "ernie4_5": _INTERLEAVED,
    "gemma": _HALF_SPLIT,
    "gemma2": _HALF_SPLIT,
    "gemma3_text": _HALF_SPLIT,
    "glm": _INTERLEAVED_PARTIAL,
    "glm4": _INTERLEAVED_PARTIAL,
    "gpt_neox": _HALF_SPLIT_PARTIAL,
    "gptj": _INTERLEAVED_PARTIAL,
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
    "smollm3": _HALF_SPLIT,
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


def _as_frequencies(inv_freq: torch.Tensor | npt.NDArray[np.floating[Any]]) -> torch.Tensor:
    if isinstance(inv_freq, np.ndarray):
        inv_freq = torch.from_numpy(np.array(inv_freq))
    if not isinstance(inv_freq, torch.Tensor):
        raise TypeError(
            f"inv_freq: expected a torch.Tensor or numpy.ndarray, got {type(inv_freq).__name__}"
        )
    if not inv_freq.is_floating_point():
        raise TypeError(f"inv_freq: expected a floating-point dtype, got {inv_freq.dtype}")
    if inv_freq.ndim != 1 or inv_freq.numel() == 0:
        raise ValueError(
            f"inv_freq: expected shape [rotary_dim / 2] with at least one entry, "
            f"got {list(inv_freq.shape)}"
        )
    frequencies = inv_freq.detach().to(device="cpu", dtype=torch.float64)
    if not bool(torch.isfinite(frequencies).all()) or bool((frequencies < 0).any()):
        raise ValueError(f"inv_freq: expected finite values >= 0, got {frequencies.tolist()}")
    return frequencies


def _default_frequencies(theta: float, rotary_dim: int) -> torch.Tensor:
    """``[rotary_dim / 2]`` fp32, by the very operations with which models make theirs."""
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"rotary_dim: expected an even number >= 2, got {rotary_dim}")
    if not (math.isfinite(theta) and theta > 0):
        raise ValueError(f"rope_theta: expected a finite value > 0, got {theta}")
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    return torch.as_tensor(1.0 / (theta**exponent))


def _required(config: Any, field: str) -> Any:
    value = getattr(config, field, None)
    if value is None:
        raise ValueError(f"{field}: expected in the config, got none ({type(config).__name__})")
    return value


def _rope_parameters(config: Any) -> dict[str, Any]:
    """The config's parameters in the naming of transformers 5, flat or one dict per layer type."""
    parameters = dict(getattr(config, "rope_parameters", None) or {})
    parameters = parameters or dict(getattr(config, "rope_scaling", None) or {})
    if not any(isinstance(value, Mapping) for value in parameters.values()):
        theta = getattr(config, "rope_theta", None)
        if theta is None and getattr(config, "rotary_dim", None) is not None:
            theta = 10000.0  # GPT-J and CodeGen have no such field: their code holds the constant.
        parameters.setdefault("rope_theta", theta)
        parameters.setdefault(
            "partial_rotary_factor", getattr(config, "partial_rotary_factor", None)
        )
    return parameters


def _build(
    cls: type[Rope],
    config: Any,
    style: _Style,
    parameters: Mapping[str, Any],
    layer_type: str | None,
    max_position: int,
) -> Rope:
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
    inv_freq = _default_frequencies(theta, rotary_dim)
    attention_factor = 1.0
    if kind == "linear":
        inv_freq = inv_freq / _factor(given, where)
    elif kind == "llama3":
        inv_freq = _llama3_frequencies(inv_freq, config, given, layer_type, where)
    elif kind == "yarn":
        inv_freq, attention_factor = _yarn(theta, rotary_dim, config, given, layer_type, where)
    return cls(inv_freq.double(), max_position, style.interleaved, attention_factor)


def _rotary_dim(config: Any, style: _Style, given: Mapping[str, Any], where: str) -> int:
    head_dim = getattr(config, "head_dim", None)
    if head_dim is None:
        hidden_size = int(_required(config, "hidden_size"))
        head_dim = hidden_size // int(_required(config, "num_attention_heads"))
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
    return float(_required(config, "max_position_embeddings"))


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
        factor = float(_required(config, "max_position_embeddings")) / length

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
    ramp = torch.clamp((torch.arange(rotary_dim // 2, dtype=torch.float32) - low) / width, 0, 1)
    frequency = theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)
    kept = 1 - ramp
    inv_freq = 1.0 / (factor * frequency) * (1 - kept) + 1.0 / frequency * kept
    return inv_freq, float(attention_factor)
