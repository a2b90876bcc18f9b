"""What `DiffStore.save` writes: one file of pages, Masters and Mirrors.

A dictionary of plain values and tensors, written by ``torch.save`` and read with
``weights_only=True``, so that a file can hold data only and never code. Page ids are those of the
file, 0 .. pages - 1.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokendance.device.geometry import KVGeometry
from tokendance.device.layer_ropes import LayerRope
from tokendance.device.pool import PagePool
from tokendance.device.quantization import Quantization
from tokendance.files.schema import check_state
from tokendance.host.books import Books
from tokendance.host.mirror import Master, Mirror, Pages, Use, Uses
from tokendance.host.segments import Segment

VERSION = 4
_FORMAT = "tokendance.DiffStore"
_GEOMETRY = ("num_layers", "num_q_heads", "num_kv_heads", "head_dim")


def write_state(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Writes the file in one step: whoever opens ``path`` finds the old file or the new one."""
    target = Path(path)
    handle, scratch = tempfile.mkstemp(prefix=f"{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save({**state, "checksum": checksum(state)}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, target)
    except BaseException:
        os.unlink(scratch)
        raise


def read_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Raises ``ValueError`` for something that is no store, or one of another version."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception as error:  # whatever bytes that are no pickle, or no longer one, lead to
        raise ValueError(f"path: expected a saved DiffStore, got {path} ({error})") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise ValueError(f"path: expected a saved DiffStore, got {path}")
    if state["version"] != VERSION:
        raise ValueError(f"path: expected version {VERSION}, got {state.get('version')} in {path}")
    found = state.pop("checksum", None)
    if found != checksum(state):
        raise ValueError(f"path: expected the checksum of what was saved, got another in {path}")
    check_state(state, path)
    return state


def checksum(state: Mapping[str, Any]) -> str:
    """Of all that a file holds, but for itself."""
    hasher = hashlib.blake2b(digest_size=16)
    _hash(state, hasher.update)
    return hasher.hexdigest()


def _hash(value: Any, update: Callable[[Any], None]) -> None:
    """Depth first; every value begins with its kind and size, so that no two files run together."""
    if isinstance(value, Tensor):
        update(f"{value.dtype}{list(value.shape)}".encode())
        rows = value.contiguous().as_strided((value.numel(),), (1,))
        update(rows.view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        update(f"dict{len(value)}".encode())
        for key in value:
            _hash(key, update)
            _hash(value[key], update)
    elif isinstance(value, list):
        update(f"list{len(value)}".encode())
        for item in value:
            _hash(item, update)
    else:
        text = repr(value).encode()
        update(f"{type(value).__name__}{len(text)}".encode() + text)


def pack(
    model: str,
    geometry: KVGeometry,
    pool: PagePool,
    ropes: Sequence[LayerRope],
    masters: Iterable[Master],
    mirrors: Mapping[str, Mirror],
) -> dict[str, Any]:
    """The contents of a file.

    Args:
        masters: those that the store finds by their digests. Others that Mirrors use come along.
    """
    kept = {id(master): master for master in masters}
    for mirror in mirrors.values():
        kept |= {id(master): master for master in mirror.uses.masters}
    ordered = sorted(kept.values(), key=lambda master: master.last_used)
    index = {id(master): i for i, master in enumerate(ordered)}
    lists = [master.pages for master in ordered] + [m.own_pages for m in mirrors.values()]
    pages = np.unique(np.concatenate([np.empty(0, np.int32), *lists]))
    at = torch.from_numpy(pages.astype(np.int64)).to(pool.device)
    positions = max(
        [master.origin + master.length for master in ordered]
        + [mirror.length for mirror in mirrors.values()],
        default=0,
    )
    return {
        "format": _FORMAT,
        "version": VERSION,
        "model": model,
        "geometry": {name: getattr(geometry, name) for name in _GEOMETRY},
        "dtype": geometry.dtype,
        "quantization": None
        if pool.quantization is None
        else {
            "dtype": pool.quantization.dtype,
            "k_scale": pool.quantization.k_scale.cpu(),
            "v_scale": pool.quantization.v_scale.cpu(),
        },
        "block_size": pool.block_size,
        "positions": positions,
        "ropes": rope_digests(ropes, positions),
        "k_pools": [layer.index_select(0, at).cpu() for layer in pool.k_pools],
        "v_pools": [layer.index_select(0, at).cpu() for layer in pool.v_pools],
        "masters": [
            {
                "digest": master.digest.hex(),
                "length": master.length,
                "origin": master.origin,
                "context": master.context.hex(),
                "exact": master.exact,
                "seen": sorted(digest.hex() for digest in master.seen),
                "stored": master.stored,
                "pages": _tensor(np.searchsorted(pages, master.pages)),
            }
            for master in ordered
        ],
        "mirrors": [
            {
                "agent": agent,
                "length": mirror.length,
                "exact_length": mirror.exact_length,
                "own_pages": _tensor(np.searchsorted(pages, mirror.own_pages)),
                "own_position": _tensor(mirror.own_position),
                "segments": [
                    {
                        "token_ids": _tensor(segment.token_ids),
                        "is_shared": segment.is_shared,
                        "digest": segment.digest.hex(),
                        "stem": segment.stem.hex(),
                        "space": segment.space.hex(),
                    }
                    for segment in mirror.segments
                ],
                "uses": [
                    {
                        "master": index[id(use.master)],
                        "delta": use.delta,
                        "length": use.length,
                        "masks": _tensor(use.masks.view(np.int32)),
                    }
                    for use in mirror.uses
                ],
            }
            for agent, mirror in mirrors.items()
        ],
    }


def geometry_in(state: Mapping[str, Any]) -> KVGeometry:
    return KVGeometry(**state["geometry"], dtype=state["dtype"])


def quantization_in(state: Mapping[str, Any]) -> Quantization | None:
    saved = state["quantization"]
    return None if saved is None else Quantization(**saved)


def unpack(
    state: Mapping[str, Any],
    pool: PagePool,
    books: Books,
) -> tuple[list[Master], dict[str, Mirror]]:
    """Fills pages of a pool and makes the Masters, the longest unused first, and the Mirrors.

    If that fails, the pages are given back.
    """
    count = len(state["k_pools"][0])
    pages = books.take_pages(count)
    try:
        return _unpack(state, pool, pages)
    except BaseException:
        books.drop_pages(pages)
        raise


def _unpack(
    state: Mapping[str, Any], pool: PagePool, pages: Pages
) -> tuple[list[Master], dict[str, Mirror]]:
    at = torch.from_numpy(pages.astype(np.int64)).to(pool.device)
    for name, pools in (("k_pools", pool.k_pools), ("v_pools", pool.v_pools)):
        for to, kept in zip(pools, state[name], strict=True):
            _bits(to).index_copy_(0, at, _bits(kept.to(pool.device)))
    masters = [
        Master(
            digest=bytes.fromhex(saved["digest"]),
            length=saved["length"],
            computed=saved["length"],
            origin=saved["origin"],
            context=bytes.fromhex(saved["context"]),
            exact=saved["exact"],
            seen=frozenset(bytes.fromhex(digest) for digest in saved["seen"]),
            pages=pages[saved["pages"].numpy()],
            stored=saved["stored"],
        )
        for saved in state["masters"]
    ]
    mirrors = {
        saved["agent"]: Mirror(
            segments=tuple(_segment(segment) for segment in saved["segments"]),
            length=saved["length"],
            uses=Uses.of(
                [
                    Use(
                        masters[use["master"]],
                        use["delta"],
                        use["length"],
                        use["masks"].numpy().view(np.uint32),
                    )
                    for use in saved["uses"]
                ],
                pool.block_size,
            ),
            own_pages=pages[saved["own_pages"].numpy()],
            own_position=saved["own_position"].numpy().copy(),
            exact_length=saved["exact_length"],
        )
        for saved in state["mirrors"]
    }
    return masters, mirrors


def _bits(pages: Tensor) -> Tensor:
    """torch copies e4m3 by index as bytes only."""
    return pages.view(torch.uint8) if pages.element_size() == 1 else pages


def rope_digests(ropes: Sequence[LayerRope], positions: int) -> list[str]:
    """Of each layer's tables, as far as rows have been rotated with them."""
    made: dict[int, str] = {}
    for rope in ropes:
        if id(rope) not in made:
            hasher = hashlib.blake2b(digest_size=16)
            for table in (rope.cos, rope.sin):
                hasher.update(repr(tuple(table.shape[1:])).encode())
                hasher.update(table[:positions].cpu().numpy().tobytes())
            hasher.update(repr((rope.interleaved, rope.attention_factor)).encode())
            made[id(rope)] = hasher.hexdigest()
    return [made[id(rope)] for rope in ropes]


def _tensor(values: np.ndarray[Any, np.dtype[np.integer[Any]]]) -> Tensor:
    return torch.from_numpy(values.astype(np.int32))


def _segment(saved: Mapping[str, Any]) -> Segment:
    token_ids = saved["token_ids"].numpy().copy()
    token_ids.flags.writeable = False
    return Segment(
        token_ids,
        saved["is_shared"],
        bytes.fromhex(saved["digest"]),
        bytes.fromhex(saved["stem"]),
        bytes.fromhex(saved["space"]),
    )
