"""The CUDA operators without a GPU: nvcc's PTX of csrc/cuda, executed on the CPU by tools/ptxrun.

:class:`PtxBackend` has the operators' own signatures. For each call it fills the params struct of
``csrc/include/tokendance/params.h``, asks the operator's plan (``csrc/cuda/<op>_plan.h``) what the
launcher would launch, and executes just that, with every access checked against its buffer and with
race checks on. The C++ compiler checks the structs' layouts against the mirrors in ``cuda_params``.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ptxrun
import torch
from cuda_params import (
    DTYPES,
    OPERATORS,
    CollectiveAttentionParams,
    DiffEncodeParams,
    DiffRestoreParams,
    Extents,
    KeyDeviationParams,
    LaunchPlan,
    LayerPointers,
    MergeStatesParams,
    RopeRotateParams,
    RopeTables,
    RoundView,
    RowLayout,
    static_asserts,
)
from ptxrun.nvcc import compile_ptx, find_nvcc
from torch import Tensor

from tokendance.host.round import RoundExtents

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "ptx"
CUDA_SOURCES = ROOT / "csrc" / "cuda"
INCLUDES = (f"-I{ROOT / 'csrc' / 'include'}", f"-I{ROOT / 'csrc'}", "-std=c++17")

# Compiling ----------------------------------------------------------------------------------------


def _digest(*parts: str) -> str:
    """Of ``parts`` and of everything that a source of csrc/cuda may include."""
    digest = hashlib.blake2b(digest_size=12)
    for part in parts:
        digest.update(part.encode() + b"\0")
    for directory in (CUDA_SOURCES, ROOT / "csrc" / "include" / "tokendance"):
        for path in sorted([*directory.glob("*.h"), *directory.glob("*.cuh")]):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _write_once(path: Path, content: bytes) -> None:
    """Several test processes may compile the same; the last one wins, with the same content."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)


def sources_of(operator: str, part: str = "*") -> list[Path]:
    """The sources of an operator's kernels: ``<operator>.cu``, or several of which a call needs the
    ``part`` of its kernel (``d64``) and the one that merges."""
    if operator != "collective_attention":
        return [CUDA_SOURCES / f"{operator}.cu"]
    parts = sorted(CUDA_SOURCES.glob(f"{operator}_{part}.cu"))
    merge = CUDA_SOURCES / f"{operator}_merge.cu"
    return [*(path for path in parts if path != merge), merge]


@functools.cache
def ptx_of(operator: str, arch: str = "80", part: str = "*") -> str:
    """nvcc's PTX of the sources of an operator, one after the other."""
    texts = [ptx_of_source(source, arch) for source in sources_of(operator, part)]
    # Every text numbers its files from 1.
    return texts[0] + "".join(
        _FILE_NUMBER.sub(lambda match, i=i: f"{match[1]}{1000 * i + int(match[2])}", text)
        for i, text in enumerate(texts[1:], 1)
    )


_FILE_NUMBER = re.compile(r"(^\s*\.(?:file|loc)\s+|inlined_at\s+)(\d+)", re.M)


@functools.cache
def ptx_of_source(source: Path, arch: str) -> str:
    """nvcc's PTX of a source."""
    return ptx_file(source, arch).read_text()


def ptx_file(source: Path, arch: str) -> Path:
    """nvcc's PTX of a source, kept in ``build/ptx`` until it or a header changes."""
    options = ("-lineinfo", *INCLUDES)  # so that tools can tell the line of an instruction
    digest = _digest(source.read_text(), arch, *options)
    kept = CACHE / f"{source.stem}-sm{arch}-{digest}.ptx"
    if not kept.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        _write_once(kept, compile_ptx(source, arch, options).encode())
    return kept


@functools.cache
def plans() -> ctypes.CDLL:
    """The plan functions, compiled for the host: ``plan_<op>(const Params*, LaunchPlan*)``.

    Compiling fails where a mirror's layout differs from the C++ struct's.
    """
    planned = [op for op in OPERATORS if (CUDA_SOURCES / f"{op}_plan.h").exists()]
    lines = [
        "#include <stddef.h>",
        '#include "cuda/launch_plan.h"',
        '#include "tokendance/params.h"',
    ]
    lines += [f'#include "cuda/{op}_plan.h"' for op in planned]
    lines += static_asserts()
    for op in planned:
        lines.append(
            f'extern "C" void plan_{op}(const tokendance::{OPERATORS[op].__name__}* params, '
            f"tokendance::LaunchPlan* plan) {{ *plan = tokendance::plan_{op}(*params); }}"
        )
    source = "\n".join(lines)
    library = CACHE / f"plans-{_digest(source)}.so"
    if not library.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        text, built = library.with_suffix(f".{os.getpid()}.cpp"), f"{library}.{os.getpid()}"
        text.write_text(source)
        compiler = os.environ.get("CXX", "g++")
        command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", *INCLUDES]
        try:
            subprocess.run([*command, str(text), "-o", built], check=True)
        finally:
            text.unlink()
        Path(built).replace(library)
    return ctypes.CDLL(str(library))


def plan(operator: str, params: ctypes.Structure) -> LaunchPlan:
    """What the launcher of an operator would launch for these params."""
    result = LaunchPlan()
    getattr(plans(), f"plan_{operator}")(ctypes.byref(params), ctypes.byref(result))
    return result


# Executing ----------------------------------------------------------------------------------------


@dataclass
class Traffic:
    """Bytes that kernels read and wrote, 32-byte sectors that warps touched, and the fewest that
    such accesses could touch."""

    load_bytes: int = 0
    store_bytes: int = 0
    sectors: int = 0
    ideal: int = 0


ROUND_CATEGORIES = {
    "use_masks": "masks",
    **dict.fromkeys(("work", "work_rows", "work_chunks", "work_uses"), "work"),
    **dict.fromkeys(("row_partial_indptr", "row_partials"), "work"),
}


class Buffers:
    """Device addresses of tensors: each storage is a buffer whose bounds the interpreter checks.

    ``categories`` tells what a buffer was called when its address was asked for.
    """

    def __init__(self, module: ptxrun.Module) -> None:
        self._module = module
        self.categories: dict[int, str] = {}

    def __call__(self, tensor: Tensor | None, category: str) -> int:
        if tensor is None or tensor.numel() == 0:
            return 0
        storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()
        base = self._module.ptr(storage)
        self.categories[base] = category
        return base + tensor.storage_offset() * tensor.element_size()

    def part(self, tensor: Tensor, category: str) -> int:
        """Of a contiguous part of a storage, as a buffer with bounds of its own."""
        if tensor.numel() == 0:
            return 0
        base = self._module.ptr(tensor.numpy())
        self.categories[base] = category
        return base


def _row_layout(x: Tensor) -> RowLayout:
    """Of ``[rows, heads, D]`` or ``[pages, block_size, heads, D]``."""
    if x.dim() == 4:
        pages, block_size = x.shape[:2]
        return RowLayout(pages * block_size, x.stride(0), x.stride(1), x.stride(2), block_size)
    return RowLayout(x.shape[0], x.stride(0), 0, x.stride(1), 1)


@dataclass
class Reached:
    """Positions of the instructions of a kernel that calls have executed, and of its conditional
    jumps with whether a thread jumped or went on."""

    instructions: set[int] = field(default_factory=set)
    branches: set[tuple[int, bool]] = field(default_factory=set)


class PtxBackend:
    """The operators by executing their PTX; tensors are on the CPU and mutated in place.

    ``arch`` is the architecture that nvcc compiles for. ``modules`` replace the PTX of operators
    (mutated kernels). ``options`` are those of ``ptxrun.Module.launch``. After a call, ``stats``
    holds the interpreter's counters of each launch and ``launched`` the plan; ``reached`` is what
    all calls reached of each kernel.
    """

    name = "ptx"
    device = torch.device("cpu")

    def __init__(
        self, arch: str = "80", modules: dict[str, ptxrun.Module] | None = None, **options: Any
    ) -> None:
        self.arch = arch
        self.stats: list[ptxrun.Stats] = []
        self.launched: LaunchPlan | None = None
        self.reached: dict[str, Reached] = {}
        self._replacing = modules or {}
        self.options = {"race": "warp", **options}
        self._modules: dict[tuple[str, str], ptxrun.Module] = {}
        self._module: ptxrun.Module | None = None
        self._categories: dict[int, str] = {}

    @staticmethod
    def missing() -> str | None:
        """Why this backend cannot run here, or None."""
        return (
            None if find_nvcc() else "nvcc is not on PATH, and neither NVCC nor CUDA_HOME names one"
        )

    def module(self, operator: str, part: str = "*") -> ptxrun.Module:
        """The operator's PTX, loaded; ``part``: see :func:`sources_of`."""
        if operator in self._replacing:
            return self._replacing[operator]
        key = operator, part
        if key not in self._modules:
            self._modules[key] = ptxrun.Module(ptx_of(operator, self.arch, part))
        return self._modules[key]

    def _buffers(self, operator: str, part: str = "*") -> Buffers:
        self._module = self.module(operator, part)
        buffers = Buffers(self._module)
        self._categories = buffers.categories
        return buffers

    def _run(self, operator: str, params: ctypes.Structure) -> None:
        module = self._module
        assert module is not None, "the params hold addresses of buffers"
        self.launched = plan(operator, params)
        self.stats = []
        try:
            for launch in self.launched.launches[: self.launched.num_launches]:
                name = launch.name.decode()
                stats = module.launch(
                    name,
                    tuple(launch.grid),
                    tuple(launch.block),
                    [bytes(params), bytes(launch.tile)],
                    shared_bytes=launch.shared_bytes,
                    smem_limit=99 * 1024,
                    **self.options,
                )
                self.stats.append(stats)
                reached = self.reached.setdefault(name, Reached())
                reached.instructions |= stats.executed
                reached.branches |= stats.branches
        finally:
            module.reset()

    def traffic(self) -> dict[str, Traffic]:
        """What the last call read and wrote, by category of buffer ("params": kernel params)."""
        traffic: dict[str, Traffic] = {}
        for stats in self.stats:
            for base, counters in stats.buffers.items():
                category = self._categories.get(base, "params")
                total = traffic.setdefault(category, Traffic())
                total.load_bytes += counters["load_bytes"]
                total.store_bytes += counters["store_bytes"]
                total.sectors += counters["sectors"]
                total.ideal += counters["ideal"]
        return traffic

    # rope_rotate --------------------------------------------------------------

    def rope_rotate_out(
        self,
        x: Tensor,
        row_in: Tensor | None,
        row_out: Tensor | None,
        position_from: Tensor | None,
        position_to: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        interleaved: bool,
        attention_factor: float,
        out: Tensor,
        x_scale: Tensor | None = None,
        out_scale: Tensor | None = None,
    ) -> None:
        address = self._buffers("rope_rotate")
        x_layout = _row_layout(x)
        rows = x_layout.num_rows if row_in is None else row_in.numel()
        self._run(
            "rope_rotate",
            RopeRotateParams(
                x=address(x, "rows"),
                out=address(out, "rows"),
                x_layout=x_layout,
                out_layout=_row_layout(out),
                row_in=address(row_in, "indices"),
                row_out=address(row_out, "indices"),
                position_from=address(position_from, "indices"),
                position_to=address(position_to, "indices"),
                num_rows=rows,
                destinations=1 if row_out is None or row_out.dim() == 1 else row_out.shape[1],
                num_heads=x.shape[-2],
                head_dim=x.shape[-1],
                attention_factor=attention_factor,
                rope=_tables(address, cos, sin, interleaved),
                x_scale=address(x_scale, "scales"),
                out_scale=address(out_scale, "scales"),
                dtype=DTYPES[x.dtype],
                out_dtype=DTYPES[out.dtype],
            ),
        )

    def rope_rotate_(
        self,
        x: Tensor,
        rows: Tensor | None,
        position_from: Tensor | None,
        position_to: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        interleaved: bool = False,
        attention_factor: float = 1.0,
    ) -> None:
        self.rope_rotate_out(
            x, rows, rows, position_from, position_to, cos, sin, interleaved, attention_factor, x
        )

    # key_deviation ------------------------------------------------------------

    def key_deviation_out(
        self,
        fresh: Tensor,
        fresh_row: Tensor,
        fresh_position: Tensor | None,
        cached: Tensor,
        cached_row: Tensor,
        cached_position: Tensor,
        cos: Tensor,
        sin: Tensor,
        interleaved: bool,
        attention_factor: float,
        out: Tensor,
    ) -> None:
        address = self._buffers("key_deviation")
        self._run(
            "key_deviation",
            KeyDeviationParams(
                fresh=address(fresh, "rows"),
                cached=address(cached, "rows"),
                fresh_layout=_row_layout(fresh),
                cached_layout=_row_layout(cached),
                fresh_row=address(fresh_row, "indices"),
                fresh_position=address(fresh_position, "indices"),
                cached_row=address(cached_row, "indices"),
                cached_position=address(cached_position, "indices"),
                deviation=address(out, "deviation"),
                num_tokens=cached_row.numel(),
                num_agents=fresh_row.shape[0],
                num_heads=fresh.shape[-2],
                head_dim=fresh.shape[-1],
                attention_factor=attention_factor,
                rope=_tables(address, cos, sin, interleaved),
                dtype=DTYPES[fresh.dtype],
            ),
        )

    # Mirrors ------------------------------------------------------------------

    def diff_encode(
        self,
        k_in: Sequence[Tensor],
        v_in: Sequence[Tensor],
        slot_mapping: Tensor,
        length: Tensor,
        k_pool: Sequence[Tensor],
        v_pool: Sequence[Tensor],
        cos: Tensor,
        sin: Tensor,
        interleaved: bool,
        round: Tensor,
        extents: Sequence[int],
        atol: float = 0.0,
        rtol: float = 0.0,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> None:
        address = self._buffers("diff_encode")
        params = DiffEncodeParams(
            pool=_layers(address, k_pool, v_pool, "pool"),
            in_k_layout=_row_layout(k_in[0]),
            in_v_layout=_row_layout(v_in[0]),
            pool_k_layout=_row_layout(k_pool[0]),
            pool_v_layout=_row_layout(v_pool[0]),
            slot_mapping=address(slot_mapping, "indices"),
            slot_stride=slot_mapping.stride(0),
            length=address(length, "indices"),
            round=_round_view(address, round, extents),
            atol=atol,
            rtol=rtol,
            num_layers=len(k_in),
            num_heads=k_in[0].shape[-2],
            head_dim=k_in[0].shape[-1],
            max_length=slot_mapping.shape[1],
            rope=_tables(address, cos, sin, interleaved),
            k_scale=address(k_scale, "scales"),
            v_scale=address(v_scale, "scales"),
            dtype=DTYPES[k_in[0].dtype],
        )
        setattr(params, "in", _layers(address, k_in, v_in, "rows"))
        self._run("diff_encode", params)

    def diff_restore(
        self,
        k_pool: Sequence[Tensor],
        v_pool: Sequence[Tensor],
        cos: Tensor,
        sin: Tensor,
        interleaved: bool,
        round: Tensor,
        extents: Sequence[int],
        slot_mapping: Tensor,
        k_out: Sequence[Tensor],
        v_out: Sequence[Tensor],
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> None:
        address = self._buffers("diff_restore")
        self._run(
            "diff_restore",
            DiffRestoreParams(
                pool=_layers(address, k_pool, v_pool, "pool"),
                out=_layers(address, k_out, v_out, "rows"),
                pool_k_layout=_row_layout(k_pool[0]),
                pool_v_layout=_row_layout(v_pool[0]),
                out_k_layout=_row_layout(k_out[0]),
                out_v_layout=_row_layout(v_out[0]),
                slot_mapping=address(slot_mapping, "indices"),
                slot_stride=slot_mapping.stride(0),
                round=_round_view(address, round, extents),
                num_layers=len(k_pool),
                num_heads=k_pool[0].shape[-2],
                head_dim=k_pool[0].shape[-1],
                max_length=slot_mapping.shape[1],
                rope=_tables(address, cos, sin, interleaved),
                k_scale=address(k_scale, "scales"),
                v_scale=address(v_scale, "scales"),
                dtype=DTYPES[k_pool[0].dtype],
                out_dtype=DTYPES[k_out[0].dtype],
            ),
        )

    # Attention ----------------------------------------------------------------

    def collective_attention_out(
        self,
        q: Tensor,
        k_pool: Tensor,
        v_pool: Tensor,
        cos: Tensor,
        sin: Tensor,
        interleaved: bool,
        round: Tensor,
        extents: Sequence[int],
        softmax_scale: float,
        window: int,
        soft_cap: float,
        sinks: Tensor | None,
        attention_factor: float,
        workspace: Tensor,
        out: Tensor,
        lse: Tensor,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> None:
        address = self._buffers("collective_attention", f"d{q.shape[-1]}")
        self._run(
            "collective_attention",
            CollectiveAttentionParams(
                q=address(q, "q"),
                out=address(out, "rows"),
                lse=address(lse, "lse"),
                k_pool=address(k_pool, "pool"),
                v_pool=address(v_pool, "pool"),
                sinks=address(sinks, "sinks"),
                workspace=address(workspace, "partials"),
                q_row_stride=q.stride(0),
                q_head_stride=q.stride(1),
                out_row_stride=out.stride(0),
                out_head_stride=out.stride(1),
                k_layout=_row_layout(k_pool),
                v_layout=_row_layout(v_pool),
                round=_round_view(address, round, extents),
                num_q_heads=q.shape[1],
                num_kv_heads=k_pool.shape[-2],
                head_dim=q.shape[-1],
                window=window,
                softmax_scale=softmax_scale,
                soft_cap=soft_cap,
                attention_factor=attention_factor,
                rope=_tables(address, cos, sin, interleaved),
                k_scale=address(k_scale, "scales"),
                v_scale=address(v_scale, "scales"),
                dtype=DTYPES[q.dtype],
                pool_dtype=DTYPES[k_pool.dtype],
            ),
        )

    def merge_states_out(
        self,
        partial_out: Tensor,
        partial_lse: Tensor,
        sinks: Tensor | None,
        out: Tensor,
        lse: Tensor,
    ) -> None:
        address = self._buffers("merge_states")
        partials, rows, heads, head_dim = partial_out.shape
        self._run(
            "merge_states",
            MergeStatesParams(
                partial_out=address(partial_out, "partials"),
                partial_lse=address(partial_lse, "lse"),
                sinks=address(sinks, "sinks"),
                out=address(out, "rows"),
                lse=address(lse, "lse"),
                num_partials=partials,
                num_rows=rows,
                num_heads=heads,
                head_dim=head_dim,
                dtype=DTYPES[partial_out.dtype],
            ),
        )


def _tables(address: Buffers, cos: Tensor, sin: Tensor, interleaved: bool) -> RopeTables:
    return RopeTables(
        address(cos, "tables"), address(sin, "tables"), cos.shape[0], 2 * cos.shape[1], interleaved
    )


def _layers(
    address: Buffers, k: Sequence[Tensor], v: Sequence[Tensor], category: str
) -> LayerPointers:
    pointers = LayerPointers()
    for layer in range(len(k)):
        pointers.k[layer] = address(k[layer], category)
        pointers.v[layer] = address(v[layer], category)
    return pointers


def _round_view(address: Buffers, buffer: Tensor, extents: Sequence[int]) -> RoundView:
    """Pointers into the packed round, as make_round_view of round.h makes them; but each field is a
    buffer of its own, so that no kernel reads beyond one, and what it reads is counted apart."""
    capacity = RoundExtents(*extents)
    view = RoundView(extents=Extents(*extents))
    for name, (offset, length) in capacity.offsets()[0].items():
        part = buffer[offset : offset + length]
        setattr(view, name, address.part(part, ROUND_CATEGORIES.get(name, "round")))
    return view
