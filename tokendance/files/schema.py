"""What a file of `DiffStore.save` must hold, checked before any page is taken for it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokendance.host.mirror import pages_for


@dataclass(frozen=True)
class _Digest:
    """A string of hexadecimal digits: 16 bytes, or none where ``optional``."""

    optional: bool = False


# A type; a dtype (a one-dimensional tensor); a list of one schema; schemas by key.
_SCHEMA: dict[str, Any] = {
    "model": str,
    "geometry": dict.fromkeys(("num_layers", "num_q_heads", "num_kv_heads", "head_dim"), int),
    "dtype": torch.dtype,
    "block_size": int,
    "positions": int,
    "ropes": [str],
    "k_pools": [Tensor],
    "v_pools": [Tensor],
    "masters": [
        {
            "digest": _Digest(optional=True),  # an output that nobody can find has none
            "length": int,
            "origin": int,
            "context": _Digest(optional=True),
            "exact": bool,
            "seen": [_Digest()],
            "stored": bool,
            "pages": torch.int32,
        }
    ],
    "mirrors": [
        {
            "agent": str,
            "length": int,
            "exact_length": int,
            "own_pages": torch.int32,
            "own_position": torch.int32,
            "segments": [
                {
                    "token_ids": torch.int32,
                    "is_shared": bool,
                    "digest": _Digest(),
                    "stem": _Digest(),
                    "space": _Digest(),
                }
            ],
            "uses": [{"master": int, "delta": int, "length": int, "masks": torch.int32}],
        }
    ],
}
_QUANTIZATION = {"dtype": torch.dtype, "k_scale": Tensor, "v_scale": Tensor}


def check_state(state: Mapping[str, Any], path: object) -> None:
    """Raises ``ValueError``, naming the file and the field, for anything that `save` never
    writes."""
    try:
        _check_types(state, _SCHEMA, "")
        _expect("quantization" in state, "quantization", "a value", "none")
        if state["quantization"] is not None:
            _check_types(state["quantization"], _QUANTIZATION, "quantization")
        _check_pools(state)
        _check_masters(state)
        _check_mirrors(state)
        _check_owners(state)
    except _FieldError as error:
        raise ValueError(f"path: {error} in {path}") from None


class _FieldError(Exception):
    """A field is not as expected."""


def _expect(holds: bool, field: str, wanted: object, got: object) -> None:
    if not holds:
        raise _FieldError(f"expected {wanted} at {field}, got {got}")


def _check_types(value: Any, schema: Any, field: str) -> None:
    kind = type(value).__name__
    if isinstance(schema, dict):
        _expect(isinstance(value, Mapping), field, "dict", kind)
        for key, inner in schema.items():
            name = f"{field}.{key}" if field else key
            _expect(key in value, name, "a value", "none")
            _check_types(value[key], inner, name)
    elif isinstance(schema, list):
        _expect(isinstance(value, list), field, "list", kind)
        for i, item in enumerate(value):
            _check_types(item, schema[0], f"{field}[{i}]")
    elif isinstance(schema, _Digest):
        digits = 0 if schema.optional and value == "" else 32
        good = isinstance(value, str) and bool(re.fullmatch(f"[0-9a-f]{{{digits}}}", value))
        _expect(good, field, "16 bytes in hexadecimal digits", repr(value))
    elif isinstance(schema, torch.dtype):
        good = isinstance(value, Tensor) and value.dtype == schema and value.dim() == 1
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else kind
        _expect(good, field, f"{schema} of one dimension", got)
    else:
        good = isinstance(value, schema) and (schema is bool or not isinstance(value, bool))
        _expect(good, field, schema.__name__, kind)


def _check_pools(state: Mapping[str, Any]) -> None:
    geometry, layers = state["geometry"], state["geometry"]["num_layers"]
    kept = state["dtype"] if state["quantization"] is None else state["quantization"]["dtype"]
    _expect(state["positions"] >= 0, "positions", "at least 0", state["positions"])
    for name in ("ropes", "k_pools", "v_pools"):
        _expect(len(state[name]) == layers > 0, name, f"{layers} layers", len(state[name]))
    pages = len(state["k_pools"][0]) if state["k_pools"][0].dim() else 0
    shape = [pages, state["block_size"], geometry["num_kv_heads"], geometry["head_dim"]]
    for name in ("k_pools", "v_pools"):
        for layer, pool in enumerate(state[name]):
            good = list(pool.shape) == shape and pool.dtype == kept
            got = f"{pool.dtype} {list(pool.shape)}"
            _expect(good, f"{name}[{layer}]", f"{kept} {shape}", got)


def _check_masters(state: Mapping[str, Any]) -> None:
    found: set[str] = set()
    for i, master in enumerate(state["masters"]):
        field = f"masters[{i}]"
        for name in ("length", "origin"):
            _expect(master[name] >= 0, f"{field}.{name}", "at least 0", master[name])
        wanted, got = pages_for(master["length"], state["block_size"]), len(master["pages"])
        _expect(got == wanted, f"{field}.pages", f"{wanted} pages", got)
        if master["stored"]:
            fresh = master["digest"] not in {"", *found}
            _expect(fresh, f"{field}.digest", "one of its own", repr(master["digest"]))
            found.add(master["digest"])


def _check_mirrors(state: Mapping[str, Any]) -> None:
    agents: set[str] = set()
    for i, mirror in enumerate(state["mirrors"]):
        field, length = f"mirrors[{i}]", mirror["length"]
        agent, exact = mirror["agent"], mirror["exact_length"]
        _expect(agent not in agents, f"{field}.agent", "a name of its own", repr(agent))
        agents.add(agent)
        rows = sum(len(segment["token_ids"]) for segment in mirror["segments"])
        _expect(length == rows, f"{field}.length", f"{rows} tokens of its segments", length)
        _expect(0 <= exact <= length, f"{field}.exact_length", f"0..{length}", exact)
        own = mirror["own_position"].numpy()
        bounded = np.concatenate([[-1], own, [length]])
        falls = np.flatnonzero(np.diff(bounded) <= 0)[:1]
        got = [bounded[i : i + 2].tolist() for i in falls.tolist()]
        wanted = f"ascending positions below {length}"
        _expect(not len(falls), f"{field}.own_position", wanted, got)
        needed, pages = pages_for(len(own), state["block_size"]), len(mirror["own_pages"])
        _expect(pages >= needed, f"{field}.own_pages", f"at least {needed} pages", pages)
        _check_uses(state, mirror, field)


def _check_uses(state: Mapping[str, Any], mirror: Mapping[str, Any], field: str) -> None:
    masters, end = state["masters"], 0
    for i, use in enumerate(mirror["uses"]):
        name = f"{field}.uses[{i}]"
        index, delta, length = use["master"], use["delta"], use["length"]
        _expect(0 <= index < len(masters), f"{name}.master", f"one of {len(masters)}", index)
        _expect(delta >= end, f"{name}.delta", f"at least {end}", delta)
        most = min(masters[index]["length"], mirror["length"] - delta)
        _expect(0 <= length <= most, f"{name}.length", f"0..{most}", length)
        wanted, got = pages_for(length, state["block_size"]), len(use["masks"])
        _expect(got == wanted, f"{name}.masks", f"{wanted} pages", got)
        end = delta + length


def _check_owners(state: Mapping[str, Any]) -> None:
    """Every page of the file has one owner."""
    owned = np.zeros(len(state["k_pools"][0]), dtype=np.int64)
    fields = [(f"masters[{i}].pages", x["pages"]) for i, x in enumerate(state["masters"])]
    fields += [(f"mirrors[{i}].own_pages", x["own_pages"]) for i, x in enumerate(state["mirrors"])]
    for field, tensor in fields:
        pages = tensor.numpy()
        inside = bool(((pages >= 0) & (pages < len(owned))).all())
        _expect(inside, field, f"pages 0..{len(owned) - 1}", pages.tolist())
        np.add.at(owned, pages, 1)
        _expect(bool((owned <= 1).all()), field, "pages that nothing else has", pages.tolist())
