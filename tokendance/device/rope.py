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
import re
import struct
import sys
from collections.abc import Mapping, Sequence
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
        cos = torch.empty(max_position, frequencies.numel(), dtype=torch.float32, device="cpu")
        sin = torch.empty_like(cos)
        for start in range(0, max_position, _TABLE_CHUNK):
            stop = min(start + _TABLE_CHUNK, max_position)
            positions = torch.arange(start, stop, dtype=torch.float64, device="cpu")
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
    def from_model(cls, model: Any, max_position: int | None = None) -> Rope | list[Rope | None]:
        """The embedding of a transformers model itself: its frequencies, bit for bit.

        Takes the ``inv_freq`` and ``attention_scaling`` of the model's rotary module, for each
        layer type where it has several, and tries which dimensions the model's own rotation pairs.

        Args:
            model: a transformers causal language model, or its body without the head.
            max_position: rows of the tables; ``max_position_embeddings`` of the config by default.
                Where frequencies change with the length of the prompt (dynamic, longrope), at most
                as many as they are the same for.

        Returns:
            One `Rope`; or one per layer where the layers differ, None for a layer without
            positions.

        Raises:
            ValueError: rotary modules that are not understood, or weights that are not loaded.
        """
        body = getattr(model, "base_model", model)
        config = model.config
        if max_position is None:
            max_position = int(_required(config, "max_position_embeddings"))
        rotary = _rotary_module(body)
        types = list(getattr(config, "layer_types", None) or [])
        names = [name for name in dict.fromkeys(types) if hasattr(rotary, f"{name}_inv_freq")]
        count = int(_required(config, "num_hidden_layers"))
        made: dict[str | None, Rope] = {}
        for name in names or [None]:
            rope = _rope_of_module(cls, body, rotary, name, max_position)
            same = [one for one in made.values() if one.fingerprint == rope.fingerprint]
            made[name] = same[0] if same else rope
        # A layer type without frequencies of its own, beside others that have some, has no RoPE.
        layers = [made.get(name) for name in types[:count]] if names else [made[None]] * count
        if len(layers) != count:
            raise ValueError(f"layer_types: expected {count} entries, got {len(types)}")
        layers = [
            None if _has_no_rope(config, layer) else rope
            for layer, rope in zip(_layers_of(body, count), layers, strict=True)
        ]
        return _one_or_per_layer(layers)

    @classmethod
    def from_config(
        cls, hf_config: Any, max_position: int | None = None
    ) -> Rope | list[Rope | None]:
        """The embedding that a transformers model uses, frequencies bit for bit.

        For whom there is no model at hand: `from_model` takes the model's own. Reads
        ``rope_parameters`` (transformers >= 5) or ``rope_theta`` and ``rope_scaling`` (before; of
        Gemma 3 ``rope_local_base_freq`` too), with the scalings default, linear, llama3 and yarn
        and with partial rotary dimensions, for the model types whose rotation has been compared
        with transformers' own (see ``tests``).

        Args:
            hf_config: a transformers text-model config.
            max_position: rows of the tables; ``max_position_embeddings`` of the config by default.

        Returns:
            One `Rope`; or one per layer where the layers differ, None for a layer without
            positions.

        Raises:
            ValueError: a model type, scaling or parameter that is not supported, by name; or
                another field of the config that looks as if it changed angles.
        """
        model_type = _required(hf_config, "model_type")
        style = _STYLES.get(model_type)
        if style is None:
            raise ValueError(
                f"model_type: expected one of {', '.join(sorted(_STYLES))}, got {model_type!r}; "
                "take the model's own (Rope.from_model), or give its frequencies to "
                "Rope(inv_freq, max_position)"
            )
        _check_fields(hf_config, style)
        if max_position is None:
            max_position = int(_required(hf_config, "max_position_embeddings"))
        parameters = _rope_parameters(hf_config)
        layer_types = _layer_types(hf_config)
        per_type = {key: parameters[key] for key in dict.fromkeys(layer_types) if key in parameters}
        uses_rope = _uses_rope(hf_config, style)
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
        return _one_or_per_layer(layers)

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
    exponent = _even(rotary_dim) / rotary_dim
    frequencies: torch.Tensor = 1.0 / (theta**exponent)
    return frequencies


def _even(rotary_dim: int) -> torch.Tensor:
    return torch.arange(0, rotary_dim, 2, dtype=torch.float32, device="cpu")


def _required(config: Any, field: str) -> Any:
    value = getattr(config, field, None)
    if value is None:
        raise ValueError(f"{field}: expected in the config, got none ({type(config).__name__})")
    return value


def _one_or_per_layer(layers: list[Rope | None]) -> Rope | list[Rope | None]:
    first = layers[0] if layers else None
    if first is not None and all(layer is first for layer in layers):
        return first
    return layers


def _rotary_module(body: Any) -> Any:
    """The one module of a transformers body that holds rotary frequencies."""
    found = {
        name: module
        for name, module in body.named_modules()
        if any(key == "inv_freq" or key.endswith("_inv_freq") for key in module._buffers)
    }
    if len(found) != 1:
        raise ValueError(
            "model: expected one rotary module (a buffer inv_freq, or one per layer type), "
            f"got {list(found) or 'none'} in {type(body).__name__}; give its frequencies to "
            "Rope(inv_freq, max_position)"
        )
    return next(iter(found.values()))


def _layers_of(body: Any, count: int) -> list[Any]:
    layers = getattr(body, "layers", None)
    if layers is None or len(layers) != count:
        got = "none" if layers is None else len(layers)
        raise ValueError(f"model: expected {count} decoder layers in its body, got {got}")
    return list(layers)


def _has_no_rope(config: Any, layer: Any) -> bool:
    """Whether a layer leaves queries and keys as they are (NoPE)."""
    attention = getattr(layer, "self_attn", layer)
    if not getattr(attention, "use_rope", True):  # SmolLM3, Llama 4
        return True
    if config.model_type in ("cohere2", "cohere2_moe"):
        return getattr(attention, "sliding_window", None) is None
    if config.model_type.startswith("exaone"):
        window = getattr(attention, "sliding_window", None)
        return window is not None and not getattr(attention, "is_sliding", True)
    return False


def _rope_of_module(
    cls: type[Rope], body: Any, rotary: Any, layer_type: str | None, max_position: int
) -> Rope:
    """The embedding of a rotary module, or of one layer type in it."""
    prefix = "" if layer_type is None else f"{layer_type}_"
    kinds = getattr(rotary, "rope_type", "default")
    kind = kinds.get(layer_type, "default") if isinstance(kinds, Mapping) else kinds
    inv_freq = getattr(rotary, f"{prefix}inv_freq")
    if inv_freq.is_meta:
        raise ValueError("model: expected loaded weights, got frequencies on the meta device")
    if kind in ("dynamic", "longrope"):
        limit = _positions_of_one_kind(rotary, layer_type, kind)
        if max_position > limit:
            raise ValueError(
                f"max_position: expected at most {limit}, since the model's frequencies "
                f"({kind}) are others in longer prompts, got {max_position}"
            )
        inv_freq = getattr(rotary, f"{prefix}original_inv_freq")
    scaling = float(getattr(rotary, f"{prefix}attention_scaling", 1.0))
    pairing = _is_interleaved(body, rotary, inv_freq, scaling, layer_type)
    return cls(inv_freq.double(), max_position, pairing, scaling)


def _positions_of_one_kind(rotary: Any, layer_type: str | None, kind: str) -> int:
    """Longest prompt whose angles are of ``original_inv_freq``."""
    if kind == "dynamic":
        return int(rotary.original_max_seq_len)
    parameters = rotary.config.rope_parameters
    parameters = parameters if layer_type is None else parameters[layer_type]
    return int(parameters["original_max_position_embeddings"])


def _is_interleaved(
    body: Any, rotary: Any, inv_freq: torch.Tensor, scaling: float, layer_type: str | None
) -> bool:
    """Tries which dimensions the model's own function turns together."""
    rotate = getattr(sys.modules[type(rotary).__module__], "apply_rotary_pos_emb", None)
    if rotate is None:
        rotate = getattr(sys.modules[type(body).__module__], "apply_rotary_pos_emb", None)
    if rotate is None:
        raise ValueError(
            f"model: expected a function apply_rotary_pos_emb beside {type(rotary).__name__}, "
            "got none; give the frequencies to Rope(inv_freq, max_position, interleaved)"
        )
    count, device = inv_freq.numel(), inv_freq.device
    x = torch.linspace(1, 2, 2 * count, dtype=torch.float32, device=device)[None, None, None]
    one = torch.ones(1, 1, dtype=torch.int64, device=device)
    with torch.no_grad():
        cos, sin = rotary(x, one) if layer_type is None else rotary(x, one, layer_type)
        turned = rotate(x, x, cos, sin)[0].flatten().cpu()
    angle, x = inv_freq.detach().float().cpu(), x.flatten().cpu()
    cos, sin = angle.cos() * scaling, angle.sin() * scaling
    for interleaved, a, b in ((False, x[:count], x[count:]), (True, x[0::2], x[1::2])):
        parts = (a * cos - b * sin, a * sin + b * cos)
        own = torch.stack(parts, dim=-1).flatten() if interleaved else torch.cat(parts)
        if turned.shape == own.shape and bool(((turned - own).abs() < 1e-3).all()):
            return interleaved
    raise ValueError(
        f"model: expected a rotation of halves or of neighbouring dimensions, got another "
        f"({rotate.__module__}.{rotate.__name__})"
    )


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
        period = int(_required(config, "sliding_window_pattern"))
        types = [
            "full_attention" if layer % period == 0 else "sliding_attention"
            for layer in range(1, int(_required(config, "num_hidden_layers")) + 1)
        ]
    return types


def _uses_rope(config: Any, style: _Style) -> Sequence[int] | None:
    """Per layer whether it has RoPE (1 or 0); None: all of them."""
    layers: Sequence[int] | None = getattr(config, "no_rope_layers", None)
    if layers is None and "no_rope_layers" in style.fields:
        interval = int(_required(config, "no_rope_layer_interval"))
        count = int(_required(config, "num_hidden_layers"))
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
    ramp = torch.clamp((_even(rotary_dim) / 2 - low) / width, 0, 1)
    frequency = theta ** (_even(rotary_dim) / rotary_dim)
    kept = 1 - ramp
    inv_freq = 1.0 / (factor * frequency) * (1 - kept) + 1.0 / frequency * kept
    return inv_freq, float(attention_factor)
