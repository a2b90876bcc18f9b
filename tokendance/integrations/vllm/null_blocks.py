"""vLLM's books of blocks, in which members of rounds hold none: their rows are in the store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry


class Members(Protocol):
    """What the books have to know of members."""

    def is_member(self, request_id: str) -> bool:
        """Whether a request's rows are in the store alone."""
        ...

    def has_room(self, request_id: str, length: int) -> bool:
        """Whether a member can grow to so many rows in the step that is being scheduled."""
        ...

    def stop(self, request_id: str) -> None:
        """A member was preempted."""
        ...


@dataclass(frozen=True, kw_only=True)
class MembersSpec(FullAttentionSpec):  # type: ignore[misc]
    """A cache of vLLM's whose books are `MembersBlocks`."""


class MembersBlocks(FullAttentionManager):  # type: ignore[misc]
    """Blocks of requests: of members the null block, as often as their length wants.

    Attributes:
        members: None: nobody is one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.members: Members | None = None

    def _is_member(self, request_id: str) -> bool:
        return self.members is not None and self.members.is_member(request_id)

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> int:
        """None for a member, if it has room.

        More than there are of what can only be preempted: a member without room, and one whose rows
        were lost, which is no member any more and has no rows here either.
        """
        too_many: int = self.block_pool.num_gpu_blocks + 1
        if self._is_member(request_id):
            assert self.members is not None
            return 0 if self.members.has_room(request_id, num_tokens) else too_many
        blocks = self.req_to_blocks.get(request_id)
        if blocks and blocks[0].is_null:
            return too_many
        count: int = super().get_num_blocks_to_allocate(request_id, num_tokens, *args, **kwargs)
        return count

    def allocate_external_computed_blocks(
        self, request_id: str, local: int, external: int, *args: Any, **kwargs: Any
    ) -> None:
        if self._is_member(request_id):
            self._grow(request_id, local + external)
        else:
            super().allocate_external_computed_blocks(request_id, local, external, *args, **kwargs)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> list[KVCacheBlock]:
        if self._is_member(request_id):
            return self._grow(request_id, num_tokens)
        blocks: list[KVCacheBlock] = super().allocate_new_blocks(
            request_id, num_tokens, *args, **kwargs
        )
        return blocks

    def _grow(self, request_id: str, length: int) -> list[KVCacheBlock]:
        blocks = self.req_to_blocks[request_id]
        new = [self._null_block] * (-(-length // self.block_size) - len(blocks))
        blocks.extend(new)
        return new

    def cache_blocks(self, request: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing of a member: there is nothing in its blocks to be found."""
        if not self._is_member(request.request_id):
            super().cache_blocks(request, *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        blocks: list[KVCacheBlock] = super().pop_blocks_for_free(request_id)
        if self._is_member(request_id):
            assert self.members is not None
            self.members.stop(request_id)
        return [block for block in blocks if not block.is_null]


def install(kv_cache_groups: Sequence[Any]) -> None:
    """Has vLLM make `MembersBlocks` of the one group of these, before it makes its books."""
    (group,) = kv_cache_groups
    spec = group.kv_cache_spec
    KVCacheSpecRegistry.get_manager_class(spec)  # which registers vLLM's own, if nobody has yet
    KVCacheSpecRegistry.register(MembersSpec, MembersBlocks, FullAttentionSpec)
    group.kv_cache_spec = MembersSpec(**{one.name: getattr(spec, one.name) for one in fields(spec)})
