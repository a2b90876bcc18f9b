"""Races in shared memory: vector clocks per warp, joined at barriers.

Every byte remembers its last writer and its last two readers with the clocks they had then; an
access races with a remembered one whose clock the accessing warp has not seen through a barrier.
"""

from dataclasses import dataclass

import numpy as np

BARRIERS_PER_BLOCK = 16
MAX_RACES = 20


@dataclass(slots=True)
class Race:
    """The first of the conflicts between two instructions, and how many bytes they touch."""

    kind: str
    position: int
    warp: int
    block: int
    other_kind: str
    other_position: int
    other_warp: int
    byte: int
    byte_count: int


class RaceDetector:
    """Watches the shared memory of blocks that run together.

    Warps are numbered through all blocks, and `stride` bytes apart lie the blocks' shared memories.
    With `lanes`, conflicts among the lanes of one warp between its barriers count too.
    """

    def __init__(self, blocks, warps_per_block, stride, lanes=False):
        warps, size = blocks * warps_per_block, blocks * stride
        self.found = {}
        self.warps_per_block, self.stride = warps_per_block, stride
        own = np.arange(warps)
        self.clocks = np.zeros((warps, warps_per_block), np.int32)
        self.clocks[own, own % warps_per_block] = 1
        self.barrier_clocks = np.zeros((blocks * BARRIERS_PER_BLOCK, warps_per_block), np.int32)
        self.writer = np.full(size, -1, np.int16)
        self.write_clock = np.zeros(size, np.int32)
        self.write_position = np.zeros(size, np.int32)
        self.write_atomic = np.zeros(size, bool)
        self.readers = [np.full(size, -1, np.int16) for _ in range(2)]
        self.read_clocks = [np.zeros(size, np.int32) for _ in range(2)]
        self.read_position = np.zeros(size, np.int32)
        self.lanes = lanes
        if lanes:
            self.epoch = np.ones(warps, np.int32)  # counts the warp's barriers
            self.write_lane, self.write_epoch = np.full(size, -1, np.int8), np.zeros(size, np.int32)
            self.read_lane, self.read_epoch = np.full(size, -1, np.int8), np.zeros(size, np.int32)
            self.read_by_many = np.zeros(size, bool)

    # ---- order ----
    def arrive(self, warp, barrier):
        """Warps (one entry a lane) come to barriers: what they did is before who leaves them."""
        self.warp_barrier(warp)
        warps, first = np.unique(warp, return_index=True)
        np.maximum.at(self.barrier_clocks, barrier[first], self.clocks[warps])
        self.clocks[warps, warps % self.warps_per_block] += 1

    def release(self, warp, barrier):
        """Warps leave barriers."""
        warps, first = np.unique(warp, return_index=True)
        self.clocks[warps] = np.maximum(self.clocks[warps], self.barrier_clocks[barrier[first]])

    def forget(self, barriers):
        """Barriers that are complete start afresh."""
        self.barrier_clocks[barriers] = 0

    def warp_barrier(self, warp):
        """Lanes of the warps are in order with one another."""
        if self.lanes:
            self.epoch[np.unique(warp)] += 1

    # ---- accesses ----
    def access(self, position, warp, offset, size, write, atomic=False, lane=None):
        """Lanes of the instruction at `position` touch `size` bytes each at their offsets."""
        byte = (offset[:, None] + np.arange(size)).ravel()
        warp = np.repeat(warp, size)
        own = (warp % self.warps_per_block).astype(np.int16)
        if self.lanes and lane is not None:
            lane = np.repeat(lane.astype(np.int8), size)
            self._check_lanes(position, byte, warp, own, lane, write, atomic)

        def conflict(other, clock):
            return (other >= 0) & (other != own) & (clock > self.clocks[warp, np.maximum(other, 0)])

        kind = "write" if write else "read"
        racy = conflict(self.writer[byte], self.write_clock[byte])
        if atomic:
            racy &= ~self.write_atomic[byte]
        self._report(kind, position, byte, warp, racy, "write", self.write_position, self.writer)
        if not write:
            self._remember_read(position, byte, own, self.clocks[warp, own])
            return
        for reader, clock in zip(self.readers, self.read_clocks, strict=True):
            racy = conflict(reader[byte], clock[byte])
            self._report("write", position, byte, warp, racy, "read", self.read_position, reader)
        self.writer[byte] = own
        self.write_clock[byte] = self.clocks[warp, own]
        self.write_position[byte] = position
        self.write_atomic[byte] = atomic
        if not atomic:  # two warps may write a byte in this very step
            racy = self.writer[byte] != own
            self._report(
                "write", position, byte, warp, racy, "write", self.write_position, self.writer
            )

    def _remember_read(self, position, byte, own, clock):
        changed = byte[self.readers[0][byte] != own]
        self.readers[1][changed] = self.readers[0][changed]
        self.read_clocks[1][changed] = self.read_clocks[0][changed]
        self.readers[0][byte] = own
        self.read_clocks[0][byte] = clock
        self.read_position[byte] = position
        # Of several warps that read a byte in this very step, the last stays and another is kept.
        lost = self.readers[0][byte] != own
        self.readers[1][byte[lost]] = own[lost]
        self.read_clocks[1][byte[lost]] = clock[lost]

    def _check_lanes(self, position, byte, warp, own, lane, write, atomic):
        epoch = self.epoch[warp]
        racy = (self.writer[byte] == own) & (self.write_epoch[byte] == epoch)
        racy &= self.write_lane[byte] != lane
        if atomic:
            racy &= ~self.write_atomic[byte]
        kind, other = "write" if write else "read", "write (other lane)"
        self._report(kind, position, byte, warp, racy, other, self.write_position, self.writer)
        recent = (self.readers[0][byte] == own) & (self.read_epoch[byte] == epoch)
        racy = recent & ((self.read_lane[byte] != lane) | self.read_by_many[byte])
        if write:
            reader, other = self.readers[0], "read (other lane)"
            self._report("write", position, byte, warp, racy, other, self.read_position, reader)
            self.write_lane[byte], self.write_epoch[byte] = lane, epoch
        else:
            self.read_lane[byte], self.read_epoch[byte] = lane, epoch
            self.read_by_many[byte] = racy
            self.read_by_many[byte[self.read_lane[byte] != lane]] = True

    def _report(self, kind, position, byte, warp, racy, other_kind, other_position, other_warp):
        if not racy.any():
            return
        first, count = int(np.argmax(racy)), int(np.count_nonzero(racy))
        at = byte[first]
        key = (int(position), int(other_position[at]), kind, other_kind)
        if key in self.found:
            self.found[key].byte_count += count
        elif len(self.found) < MAX_RACES:
            block, own = divmod(int(warp[first]), self.warps_per_block)
            self.found[key] = Race(
                kind,
                int(position),
                own,
                block,
                other_kind,
                int(other_position[at]),
                int(other_warp[at]),
                int(at) % self.stride,
                count,
            )
