"""Arrays of other libraries, taken as tensors over the same memory.

Whatever this library takes as a tensor may as well be an array that exports itself by DLPack: of
NumPy, CuPy, JAX. It is used where it is, never copied. An array on a GPU is exported for torch's
current stream, on which the operators work: the exporter makes that stream wait for whatever the
array still waits for. Results are tensors, which export themselves in the same way
(``numpy.from_dlpack(out)``, ``cupy.from_dlpack(out)``).

What is written into an array is there for work that follows on torch's current stream, and for
other streams that wait for it. With CuPy it is easiest to let both libraries work on one stream:
``torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr))``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias, cast, overload

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack
from typing_extensions import TypeIs

__all__ = ["Array", "ExportsDLPack", "as_output", "as_tensor", "as_tensors", "is_array"]


class ExportsDLPack(Protocol):
    """An array that exports itself by DLPack."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...

    def __dlpack_device__(self) -> tuple[Any, Any]: ...


Array: TypeAlias = Tensor | ExportsDLPack
"""A tensor, or an array that exports itself by DLPack."""


def is_array(x: object) -> TypeIs[Array]:
    """Whether ``x`` is one array, and not a sequence of arrays."""
    return isinstance(x, Tensor) or hasattr(x, "__dlpack__")


@overload
def as_tensor(x: Array) -> Tensor: ...
@overload
def as_tensor(x: Array | None) -> Tensor | None: ...
def as_tensor(x: Array | None) -> Tensor | None:
    """``x`` as a tensor over the same memory; a tensor, or None, as it is.

    NumPy does not export the ``bfloat16`` of ml_dtypes; it is taken by its bits.

    Raises:
        TypeError: ``x`` is no array.
        ValueError: it has negative strides.
        BufferError: it has a dtype that torch lacks.
    """
    if x is None or isinstance(x, Tensor):
        return x
    if not is_array(x):
        raise TypeError(
            f"array: expected a tensor or an array with __dlpack__, got {type(x).__name__}"
        )
    strides = getattr(x, "strides", None)
    if strides and min(strides) < 0:
        # torch would end the process.
        raise ValueError(f"array: expected strides of at least 0, got {list(strides)} bytes")
    if getattr(getattr(x, "dtype", None), "name", "") == "bfloat16":
        return from_dlpack(cast(Any, x).view("uint16")).view(torch.bfloat16)
    return from_dlpack(x)


def as_tensors(xs: Sequence[Array]) -> list[Tensor]:
    """`as_tensor` of each."""
    return [as_tensor(x) for x in xs]


def as_output(x: Array) -> Tensor:
    """`as_tensor` of an array that is to be written.

    Raises:
        ValueError: it is read-only, or as `as_tensor`.
    """
    if not isinstance(x, Tensor) and not getattr(getattr(x, "flags", None), "writeable", True):
        raise ValueError("array: expected one that may be written, got a read-only one")
    return as_tensor(x)
