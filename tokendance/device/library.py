"""The compiled operators as torch sees them: loaded, with fakes for tracing, and counted mutations.

`tokendance.device.operators` has what is called.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from tokendance.host.round import require_round_version
from tokendance.source_tree import missing

__all__ = ["LIBRARY", "OPERATORS", "registered"]

LIBRARY = Path(__file__).parent.with_name("_C.so")


def _round_version() -> int | None:
    """Of the rounds that the library's operators read; None if it does not say."""
    say = getattr(ctypes.CDLL(str(LIBRARY)), "tokendance_round_version", None)
    return None if say is None else int(say())


if not LIBRARY.exists():
    raise missing(LIBRARY)
torch.ops.load_library(str(LIBRARY))  # type: ignore[no-untyped-call]
require_round_version(f"tokendance/{LIBRARY.name}", _round_version())

_ops = torch.ops.tokendance

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
    "encode_pages",
    "decode_pages",
)


def registered(device: str) -> list[str]:
    """Operators that this build has a kernel of for ``device``: ``"CPU"`` or ``"CUDA"``."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return [name for name in OPERATORS if has_kernel(f"tokendance::{name}", device)]


# Fakes ------------------------------------------------------------------------------------------
# The shapes of results, for tracing. Operators that only mutate return nothing.


def _fake_rope_rotate(
    x: Tensor,
    row_in: Tensor | None,
    position_from: Tensor | None,
    position_to: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    attention_factor: float = 1.0,
) -> Tensor:
    # numel() of a part of a shape is an int: all rows of a compiled graph would be as many.
    rows = math.prod(x.shape[:-2]) if row_in is None else row_in.shape[0]
    return x.new_empty((rows, x.shape[-2], x.shape[-1]))


def _fake_key_deviation(
    fresh: Tensor,
    fresh_row: Tensor,
    fresh_position: Tensor | None,
    cached: Tensor,
    cached_row: Tensor,
    cached_position: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    attention_factor: float = 1.0,
) -> Tensor:
    return fresh.new_empty((cached_row.shape[0],), dtype=torch.float32)


def _fake_collective_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    round: Tensor,
    extents: Sequence[int],
    softmax_scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    attention_factor: float = 1.0,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    out = q.new_empty((q.shape[0], q.shape[1], q.shape[2]))
    return out, q.new_empty((q.shape[0], q.shape[1]), dtype=torch.float32)


def _fake_merge_states(
    partial_out: Tensor, partial_lse: Tensor, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    out = partial_out.new_empty(partial_out.shape[1:])
    return out, partial_lse.new_empty(partial_lse.shape[1:])


def _fake_mutation(*arguments: object, **options: object) -> None:
    return None


_FAKES: dict[str, Callable[..., object]] = {
    "rope_rotate": _fake_rope_rotate,
    "key_deviation": _fake_key_deviation,
    "collective_attention": _fake_collective_attention,
    "merge_states": _fake_merge_states,
}
for _name in OPERATORS:
    torch.library.register_fake(f"tokendance::{_name}", _FAKES.get(_name, _fake_mutation))


# Mutation ---------------------------------------------------------------------------------------
# Autograd finds what was overwritten by its version. The stable ABI can neither count it up nor ask
# for `requires_grad`, so that a kernel in front of the others does.

_library = torch.library.Library("tokendance", "IMPL")  # type: ignore[no-untyped-call]


def _register_mutation(name: str) -> None:
    operator = getattr(_ops, name).default
    written = [
        (index, argument.name)
        for index, argument in enumerate(operator._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    if not written:
        return
    below = torch._C._after_ADInplaceOrView_keyset

    def mutate(keyset: torch._C.DispatchKeySet, *arguments: object, **options: object) -> object:
        for index, argument in written:
            value = cast(Tensor | list[Tensor], arguments[index])
            if torch.is_grad_enabled():
                _refuse_grad(argument, value)
            torch.autograd.graph.increment_version(value)
        return operator.redispatch(keyset & below, *arguments, **options)

    _library.impl(  # type: ignore[no-untyped-call]
        name, mutate, "ADInplaceOrView", with_keyset=True
    )


def _refuse_grad(name: str, value: Tensor | list[Tensor]) -> None:
    if isinstance(value, list):
        for layer, tensor in enumerate(value):
            _refuse_grad(f"{name}[{layer}]", tensor)
    elif value.requires_grad:
        raise RuntimeError(
            f"{name}: expected a tensor that does not require grad, since it is overwritten, "
            "got one that does"
        )


for _name in OPERATORS:
    _register_mutation(_name)
