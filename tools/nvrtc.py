"""Compiles the CUDA kernels with the NVRTC of CUDA 12: does it take them?

    pip install nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12 nvidia-cuda-cccl-cu12
    python -m tools.nvrtc [--archs 80,90] [SOURCE ...]

There is no nvcc of CUDA 12 on PyPI, but its compiler as a library is. Launchers, which run on the
host, are cut off; kernels are compiled to machine code as they stand. No GPU is needed.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from tools.kernel_ptx import operators

import ptx_backend  # isort: skip

ROOT = Path(__file__).resolve().parent.parent
_INTEGERS = (
    "int8_t",
    "uint8_t",
    "int16_t",
    "uint16_t",
    "int32_t",
    "uint32_t",
    "int64_t",
    "uint64_t",
)
# NVRTC has no headers of the host; CUDA's own say the same in cuda::std.
HEADERS = {
    "stdint.h": "#include <cuda/std/cstdint>\n"
    + "".join(f"using cuda::std::{name};\n" for name in (*_INTEGERS, "uintptr_t")),
    "type_traits": "#include <cuda/std/type_traits>\n"
    "namespace std { using namespace cuda::std; }\n",
    "math.h": "#define INFINITY __int_as_float(0x7f800000)\n",
}
_HOST_INCLUDES = re.compile(r'^#include "(?:cuda/launch\.cuh|tokendance/launch\.h)"\n', re.M)
_LAUNCHERS = re.compile(r"^(?:#define TOKENDANCE_KERNEL\(|int cuda_|namespace \{$)", re.M)


def toolkit() -> Path:
    """Where NVIDIA's packages are installed."""
    found = importlib.util.find_spec("nvidia")
    for place in found.submodule_search_locations or () if found else ():
        if (Path(place) / "cuda_nvrtc").is_dir():
            return Path(place)
    raise ModuleNotFoundError("nvidia: expected the packages that the help names, got none")


def kernels_of(source: Path) -> str:
    """The source without what runs on the host."""
    text = _HOST_INCLUDES.sub("", source.read_text())
    launchers = _LAUNCHERS.search(text)
    if launchers is None:
        return text
    return text[: launchers.start()] + "}  // namespace tokendance\n"


class Compiler:
    def __init__(self, packages: Path) -> None:
        library = next((packages / "cuda_nvrtc" / "lib").glob("libnvrtc.so.*"))
        self._nvrtc = ctypes.CDLL(str(library))
        self._includes = [ROOT / "csrc", ROOT / "csrc" / "include"]
        self._includes += [packages / name / "include" for name in ("cuda_runtime", "cuda_cccl")]

    def version(self) -> str:
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        return f"{major.value}.{minor.value}"

    def size(self, source: Path, arch: str) -> int:
        """Bytes of machine code; RuntimeError with the compiler's words if it refuses."""
        program, size = ctypes.c_void_p(), ctypes.c_size_t()
        self._nvrtc.nvrtcCreateProgram(
            *(ctypes.byref(program), kernels_of(source).encode(), source.name.encode()),
            *(len(HEADERS), _strings(HEADERS.values()), _strings(HEADERS)),
        )
        options = [f"--gpu-architecture=sm_{arch}", "-std=c++17", "-default-device"]
        options += ["-include=math.h", *(f"-I{path}" for path in self._includes)]
        refused = self._nvrtc.nvrtcCompileProgram(program, len(options), _strings(options))
        if refused:
            self._nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            self._nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(log.value.decode())
        self._nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        self._nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
        return size.value


def _strings(texts: Iterable[str]) -> ctypes.Array[ctypes.c_char_p]:
    encoded = [text.encode() for text in texts]
    return (ctypes.c_char_p * len(encoded))(*encoded)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.nvrtc", description=__doc__.split("\n")[0]
    )
    parser.add_argument("sources", nargs="*", type=Path, help="of csrc/cuda; default: all")
    parser.add_argument("--archs", default="80,90", help="comma-separated")
    options = parser.parse_args(arguments)
    every = [source for name in operators() for source in ptx_backend.sources_of(name)]
    sources = options.sources or every
    try:
        compiler = Compiler(toolkit())
        for source in sources:
            for arch in options.archs.split(","):
                size = compiler.size(source, arch)
                print(f"NVRTC {compiler.version()}: {source.name} for sm_{arch}, {size} bytes")
    except (ModuleNotFoundError, RuntimeError) as error:
        print(f"tools.nvrtc: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
