"""An attention backend for vLLM's CPU engines that has its cache as those for GPUs have it.

vLLM's own for a CPU packs keys, so that rows have no views there. This one takes every layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_layout import KVCacheLayout


class PlainBuilder(AttentionMetadataBuilder):  # type: ignore[misc,type-arg]
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, **more: Any
    ) -> CommonAttentionMetadata:
        return common_attn_metadata


class PlainImpl(AttentionImpl):  # type: ignore[misc,type-arg]
    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        *args: Any,
        **more: Any,
    ) -> None:
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_size, self.scale = head_size, scale
        self.kv_cache_dtype = "auto"

    def _caches(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        return keys, values

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        rows = (slot_mapping >= 0).nonzero().flatten()
        slots = slot_mapping[rows]
        for cache, new in zip(self._caches(kv_cache), (key, value), strict=True):
            cache[slots // cache.shape[1], slots % cache.shape[1]] = new[rows]

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CommonAttentionMetadata | None,
        output: Tensor,
        *args: Any,
        **more: Any,
    ) -> Tensor:
        if attn_metadata is None:
            return output.fill_(0)
        starts = attn_metadata.query_start_loc_cpu.tolist()
        caches = self._caches(kv_cache)
        block, group = caches[0].shape[1], self.num_heads // self.num_kv_heads
        for i, length in enumerate(attn_metadata.seq_lens.tolist()):
            begin, end = starts[i], starts[i + 1]
            if begin == end:
                continue
            blocks = attn_metadata.block_table_tensor[i, : -(-length // block)].long()
            k, v = (
                one[blocks].flatten(0, 1)[:length].repeat_interleave(group, dim=1).transpose(0, 1)
                for one in caches
            )
            scores = query[begin:end].transpose(0, 1) @ k.mT * self.scale
            at = torch.arange(length - (end - begin), length)[:, None]
            scores.masked_fill_(torch.arange(length) > at, -torch.inf)
            output[begin:end] = (scores.softmax(-1) @ v).transpose(0, 1)
        return output


class PlainBackend(AttentionBackend):  # type: ignore[misc]
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(16)]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[PlainImpl]:
        return PlainImpl

    @staticmethod
    def get_builder_cls() -> type[PlainBuilder]:
        return PlainBuilder


@contextmanager
def laid_out(layout: KVCacheLayout) -> Iterator[None]:
    """Has engines be made with this backend and a layout."""
    from vllm.platforms.cpu import CpuPlatform

    path = f"{PlainBackend.__module__}.{PlainBackend.__qualname__}"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(CpuPlatform, "get_attn_backend_cls", classmethod(lambda *_, **__: path))
        patched.setattr(
            PlainBackend, "supported_kv_cache_layouts", classmethod(lambda _: (layout,))
        )
        yield
