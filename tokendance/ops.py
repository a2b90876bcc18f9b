"""The operators ``torch.ops.tokendance.*``."""

from __future__ import annotations

from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_C.so")

if not LIBRARY.exists():
    raise ImportError(
        f"{LIBRARY.name}: expected beside {Path(__file__).name}, got nothing; "
        "build it with `pip install .` or `python setup.py build_ext --inplace`"
    )
torch.ops.load_library(str(LIBRARY))  # type: ignore[no-untyped-call]

OPERATORS = (
    "rope_rotate",
    "rope_rotate_out",
    "rope_rotate_",
    "key_deviation",
    "key_deviation_out",
    "diff_encode",
    "diff_restore",
    "collective_attention",
    "collective_attention_out",
    "merge_states",
    "merge_states_out",
)


def registered(device: str) -> list[str]:
    """Operators that this build has a kernel of for ``device``: ``"CPU"`` or ``"CUDA"``."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return [name for name in OPERATORS if has_kernel(f"tokendance::{name}", device)]
