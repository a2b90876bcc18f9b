"""The pages that hold keys and values."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from tokendance.device import operators as ops
from tokendance.device.arrays import Array, as_output
from tokendance.device.geometry import BLOCK_SIZES, KVGeometry
from tokendance.device.quantization import LARGEST, Quantization
from tokendance.host.round import IntArray
from tokendance.host.uncopied import Uncopied


def bits_of(pages: Tensor) -> Tensor:
    """The same as bytes, where an element has no more: torch selects e4m3 by index so only."""
    return pages.view(torch.uint8) if pages.element_size() == 1 else pages


class PagePool(Uncopied, instead="make another PagePool over tensors of its own"):
    """Pages of keys and values, one strided tensor of each per layer, the same page ids in all.

    The pool may be the engine's own KV cache: pass its tensors or other arrays (views of any
    strides whose innermost stride is 1) and the functions by which pages are taken from and given
    back to the engine's allocator. The pool itself never calls them: the store's books do.

    Args:
        k_pools, v_pools: per layer ``[num_pages, block_size, Hk, D]``.
        allocate: ``allocate(n)`` returns n page ids that nobody else uses. None, or an exception,
            means that there are fewer.
        free: ``free(pages)`` gives page ids back. Without both, all pages are the store's.
        quantization: what the elements of e4m3 or int8 pools stand for; scales of 1 by default.
        num_free: how many pages ``allocate`` could give now. Without it the store can only try.

    Raises:
        ValueError: for wrong shapes, dtypes or strides, naming the argument.
    """

    def __init__(
        self,
        k_pools: Sequence[Array],
        v_pools: Sequence[Array],
        allocate: Callable[[int], Sequence[int] | None] | None = None,
        free: Callable[[Sequence[int]], None] | None = None,
        quantization: Quantization | None = None,
        num_free: Callable[[], int] | None = None,
    ) -> None:
        if (allocate is None) != (free is None):
            raise ValueError("free: expected both allocate and free, or neither, got one")
        if not k_pools or len(k_pools) != len(v_pools):
            raise ValueError(f"v_pools: expected {max(len(k_pools), 1)} layers, got {len(v_pools)}")
        self.k_pools = [as_output(pool) for pool in k_pools]
        self.v_pools = [as_output(pool) for pool in v_pools]
        first = self.k_pools[0]
        if first.dim() != 4 or first.shape[1] not in BLOCK_SIZES:
            raise ValueError(
                f"k_pools[0]: expected [num_pages, block_size in {BLOCK_SIZES}, Hk, D], "
                f"got {list(first.shape)}"
            )
        for name, pools in (("k_pools", self.k_pools), ("v_pools", self.v_pools)):
            for layer, pool in enumerate(pools):
                if (pool.shape, pool.dtype, pool.device) != (
                    first.shape,
                    first.dtype,
                    first.device,
                ):
                    raise ValueError(
                        f"{name}[{layer}]: expected {list(first.shape)} {first.dtype} on "
                        f"{first.device}, got {list(pool.shape)} {pool.dtype} on {pool.device}"
                    )
                if pool.stride(3) != 1:
                    raise ValueError(
                        f"{name}[{layer}]: expected innermost stride 1, got {pool.stride(3)}"
                    )
                if pool.stride() != pools[0].stride():
                    raise ValueError(
                        f"{name}[{layer}]: expected strides {pools[0].stride()} of layer 0, "
                        f"got {pool.stride()}"
                    )
        self._check_memory()
        # Tables of no dims.
        self._unrotated = torch.empty(1, 0, dtype=torch.float32, device=first.device)
        self.quantization = self._checked(quantization)
        self.allocate = allocate
        self.free = free
        self.num_free = num_free

    def _check_memory(self) -> None:
        """Every element of every pool is written for itself."""
        owners: dict[int, str] = {}
        for name, pools in (("k_pools", self.k_pools), ("v_pools", self.v_pools)):
            for layer, pool in enumerate(pools):
                if any(n > 1 and s == 0 for n, s in zip(pool.shape, pool.stride(), strict=True)):
                    raise ValueError(
                        f"{name}[{layer}]: expected no stride of 0, got {list(pool.stride())}"
                    )
                # Views of one engine tensor are welcome, unless they begin at the same element.
                owner = owners.setdefault(pool.data_ptr(), f"{name}[{layer}]")
                if owner != f"{name}[{layer}]" and pool.numel():
                    raise ValueError(
                        f"{name}[{layer}]: expected memory of its own, got that of {owner}"
                    )

    def _checked(self, quantization: Quantization | None) -> Quantization | None:
        shape, dtype = [self.num_layers, self.k_pools[0].shape[2]], self.dtype
        if quantization is None:
            if dtype not in LARGEST:
                return None
            ones = torch.ones(shape, dtype=torch.float32, device="cpu")
            quantization = Quantization(dtype, ones, ones.clone())
        if quantization.dtype != dtype or list(quantization.k_scale.shape) != shape:
            raise ValueError(
                f"quantization: expected {dtype} with scales {shape}, got {quantization.dtype} "
                f"with scales {list(quantization.k_scale.shape)}"
            )
        return quantization.to(self.device)

    @classmethod
    def own(
        cls,
        geometry: KVGeometry,
        num_pages: int,
        block_size: int,
        device: torch.device | str,
        quantization: Quantization | None = None,
    ) -> PagePool:
        """A pool that allocates its tensors, ``num_pages`` pages of ``block_size`` rows, itself.

        Its dtype is that of the geometry, or of the quantization.
        """
        if block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size: expected one of {BLOCK_SIZES}, got {block_size}")
        shape = (num_pages, block_size, geometry.num_kv_heads, geometry.head_dim)
        dtype = geometry.dtype if quantization is None else quantization.dtype
        pools = [
            torch.empty(shape, dtype=dtype, device=device) for _ in range(2 * geometry.num_layers)
        ]
        return cls(pools[0::2], pools[1::2], quantization=quantization)

    @property
    def num_layers(self) -> int:
        return len(self.k_pools)

    @property
    def num_pages(self) -> int:
        return self.k_pools[0].shape[0]

    @property
    def block_size(self) -> int:
        return self.k_pools[0].shape[1]

    @property
    def device(self) -> torch.device:
        return self.k_pools[0].device

    @property
    def dtype(self) -> torch.dtype:
        return self.k_pools[0].dtype

    def scales(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """The scales ``[Hk]`` of a layer's keys and values; None where nothing is quantized."""
        if self.quantization is None:
            return None, None
        return self.quantization.k_scale[layer], self.quantization.v_scale[layer]

    def scales_of(self, layers: Sequence[int]) -> tuple[Tensor | None, Tensor | None]:
        """The same ``[len(layers), Hk]`` of several."""
        if self.quantization is None:
            return None, None
        both = (self.quantization.k_scale, self.quantization.v_scale)
        first, last = layers[0], layers[-1] + 1
        if list(layers) == list(range(first, last)):
            k, v = (scale[first:last] for scale in both)
        else:
            k, v = (torch.stack([scale[layer] for layer in layers]) for scale in both)
        return k, v

    @property
    def page_bytes(self) -> int:
        """Bytes of one page: keys and values in all layers."""
        return self.block_size * self.row_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of one row: keys and values in all layers."""
        row = self.k_pools[0].shape[2:].numel() * self.k_pools[0].element_size()
        return 2 * self.num_layers * row

    def part(self, part: int) -> Tensor:
        """Pages of the keys of a layer, ``part = 2 * layer``, or of its values, one more."""
        return (self.k_pools, self.v_pools)[part % 2][part // 2]

    def pages_of(self, part: int, pages: IntArray) -> tuple[Tensor, Tensor]:
        """Pages of keys or values, see `part`, where the CPU can read them.

        Returns:
            ``[*, block_size, Hk, D]``, and int64 where in it each of the pages is.
        """
        at = torch.from_numpy(np.ascontiguousarray(pages, np.int64))
        found = self.part(part)
        if self.device.type == "cpu":
            return found, at
        there = bits_of(found).index_select(0, at.to(self.device)).cpu().view(self.dtype)
        return there, torch.arange(len(at), dtype=torch.int64, device="cpu")

    def write_rows(
        self, layer: int, k: Tensor, v: Tensor, slots: Tensor, rows: Tensor | None = None
    ) -> None:
        """Copies ``rows`` (default: all) of ``k`` and ``v`` to ``slots``, as they are.

        Args:
            k, v: ``[n, Hk, D]`` or pages, of the pool's dtype.
            slots: int64, page * block_size + row of the page.
            rows: int64, as many.
        """
        none = self._unrotated
        for x, pool in ((k, self.k_pools[layer]), (v, self.v_pools[layer])):
            ops.rope_rotate_out(x, rows, slots, None, None, none, none, False, 1.0, pool)
