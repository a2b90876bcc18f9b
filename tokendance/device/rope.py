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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tokendance.device.rope_config import rotations_of_config
from tokendance.device.rope_model import rotations_of_model
from tokendance.device.rotation import Rotation, default_frequencies, required

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
        return cls(default_frequencies(float(theta), rotary_dim), max_position, interleaved)

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
        if max_position is None:
            max_position = int(required(model.config, "max_position_embeddings"))
        return cls._of(rotations_of_model(model, max_position), max_position)

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
        rotations = rotations_of_config(hf_config)
        if max_position is None:
            max_position = int(required(hf_config, "max_position_embeddings"))
        return cls._of(rotations, max_position)

    @classmethod
    def _of(
        cls, rotations: Rotation | Sequence[Rotation | None], max_position: int
    ) -> Rope | list[Rope | None]:
        """One for all layers, or one per layer where the layers differ."""
        per_layer = [rotations] if isinstance(rotations, Rotation) else rotations
        different = {id(one): one for one in per_layer if one is not None}
        made = {
            key: cls(one.inv_freq.double(), max_position, one.interleaved, one.attention_factor)
            for key, one in different.items()
        }
        layers = [made.get(id(one)) for one in per_layer]
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
