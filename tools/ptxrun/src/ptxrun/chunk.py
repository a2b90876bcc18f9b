"""The machine that a chunk of blocks runs on: its threads and its memory."""

import numpy as np

from .dtypes import i64, u32
from .races import RaceDetector
from .storage import align_up, poisoned

_MULTIPROCESSORS = 132
_TICKS_PER_READ = 32


class Chunk:
    """Blocks that run together. Threads are numbered through all of them: a thread's slot.

    `blocks` are the blocks' numbers in the grid and `params` the packed kernel parameters (u8).
    `race` watches accesses to shared memory once `watch_races` has been called.
    """

    def __init__(self, arena, code, grid, block, blocks, params, shared_bytes, stats):
        self.arena, self.code, self.stats = arena, code, stats
        self.name = code.kernel.name
        self.grid, self.block, self.blocks = grid, block, np.asarray(blocks)
        self.params = params
        self.count_traffic, self.race = True, None
        size, blocks_here = block[0] * block[1] * block[2], len(blocks)
        self.thread_count = blocks_here * size
        self.warps_per_block = (size + 31) // 32
        self.warp_count = blocks_here * self.warps_per_block
        self.thread_in_block = np.tile(np.arange(size), blocks_here)
        self.block_in_chunk = np.repeat(np.arange(blocks_here), size)
        lane = self.thread_in_block & 31
        self.warp = self.block_in_chunk * self.warps_per_block + (self.thread_in_block >> 5)
        self.warp_lane = self.warp * 32 + lane
        self.lane = lane.astype(u32)
        self.live = np.zeros(self.warp_count, u32)  # lanes that have not exited
        np.bitwise_or.at(self.live, self.warp, u32(1) << self.lane)
        self.live_in_block = np.full(blocks_here, size, i64)
        self.shared_bytes = shared_bytes
        self.shared_stride = max(128, align_up(shared_bytes, 128))
        self.shared = poisoned(blocks_here * self.shared_stride)
        self.local_bytes = code.kernel.local_bytes
        self.local_stride = align_up(self.local_bytes, 32)
        self.local = poisoned(max(32, self.thread_count * self.local_stride))
        self.pending_copies = []
        self.copy_group = np.zeros(self.thread_count, i64)  # the group that is open
        self._ticks = 0

    def watch_races(self, lanes):
        """Detect races among warps, and among the lanes of a warp too."""
        blocks = len(self.blocks)
        self.race = RaceDetector(blocks, self.warps_per_block, self.shared_stride, lanes)

    def tick(self):
        """The clock, which goes on with every look at it."""
        self._ticks += _TICKS_PER_READ
        return self._ticks

    def thread_name(self, slot):
        """Block and thread coordinates, for messages."""
        thread = _coordinates(int(self.thread_in_block[slot]), self.block)
        block = _coordinates(int(self.blocks[self.block_in_chunk[slot]]), self.grid)
        block, thread = (",".join(map(str, place)) for place in (block, thread))
        return f"block ({block}) thread ({thread})"

    def special(self, lanes, name):
        """Value of a special register for some threads (u32)."""
        kind, _, axis = name.partition(".")
        number = "xyz".index(axis) if axis else 0
        block = self.blocks[self.block_in_chunk[lanes.slots]]
        per_lane = {
            "tid": lambda: _coordinates(self.thread_in_block[lanes.slots], self.block)[number],
            "ctaid": lambda: _coordinates(block, self.grid)[number],
            "clusterid": lambda: _coordinates(block, self.grid)[number],
            "laneid": lambda: lanes.lane,
            "warpid": lambda: self.thread_in_block[lanes.slots] >> 5,
            "smid": lambda: block % _MULTIPROCESSORS,
        }
        if kind in per_lane:
            return per_lane[kind]().astype(u32)
        if kind.startswith("lanemask_"):
            return _lane_mask(lanes.lane, kind.removeprefix("lanemask_"))
        static_bytes = self.code.kernel.shared_dynamic_offset
        everywhere = {
            "ntid": self.block[number],
            "nctaid": self.grid[number],
            "nclusterid": self.grid[number],
            "cluster_ctaid": 0,
            "cluster_nctaid": 1,
            "cluster_ctarank": 0,
            "cluster_nctarank": 1,
            "is_explicit_cluster": 0,
            "nwarpid": 64,
            "nsmid": _MULTIPROCESSORS,
            "gridid": 1,
            "dynamic_smem_size": max(self.shared_bytes - static_bytes, 0),
            "total_smem_size": self.shared_bytes,
        }
        return np.full(lanes.count, u32(everywhere[kind]))


def _coordinates(number, extents):
    x, y, _ = extents
    return number % x, number // x % y, number // (x * y)


def _lane_mask(lane, relation):
    own = u32(1) << lane
    below = own - u32(1)
    return {
        "eq": own,
        "lt": below,
        "le": below | own,
        "ge": ~below,
        "gt": ~(below | own),
    }[relation]
