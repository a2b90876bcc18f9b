"""Block-wide barriers: who waits where, and when a barrier is complete."""

from dataclasses import dataclass

import numpy as np

from .dtypes import i64, u32
from .errors import PtxError
from .races import BARRIERS_PER_BLOCK


@dataclass(slots=True)
class Release:
    """Threads (slots) that leave a code block's barrier, and what `bar.red` gives each of them."""

    block: int
    slots: np.ndarray
    reduced: np.ndarray | None


class BlockBarriers:
    """Barriers of a chunk's blocks; number `16 * block + id` everywhere below."""

    def __init__(self, chunk, code_blocks):
        self._chunk, self._code_blocks = chunk, code_blocks
        threads = chunk.thread_count
        barriers = len(chunk.blocks) * BARRIERS_PER_BLOCK
        self.waiting = 0
        self._barrier = np.full(threads, -1, i64)  # that a thread waits at
        self._code_block = np.zeros(threads, i64)  # where it does
        self._predicate = np.zeros(threads, bool)
        self._expected = np.zeros(barriers, i64)  # threads, 0 for all of the block
        self._arrived = np.zeros(barriers, i64)  # threads that came by and did not wait

    def arrive(self, lanes, block, request, everyone):
        """Threads come to a code block's barrier -> whether they go on at once.

        `request` is (kind, id, thread count or None, predicate or None); `everyone` tells that
        these are all the threads that live. Others may have to go on then too: see `released`.
        """
        kind, ident, threads, predicate = request
        chunk, position = self._chunk, block.last.position
        chunk.stats.barriers += lanes.warp_count()
        ident = np.broadcast_to(np.asarray(ident).astype(i64), (lanes.count,))
        if (ident >= BARRIERS_PER_BLOCK).any():
            lanes.fail(position, "barrier number above 15", int(np.argmax(ident)))
        barrier = chunk.block_in_chunk[lanes.slots] * BARRIERS_PER_BLOCK + ident
        if chunk.race:
            chunk.race.arrive(lanes.warp, barrier)
        nobody_else = everyone and not self.waiting and not self._arrived.any()
        if kind == "sync" and threads is None and nobody_else and (ident == ident[0]).all():
            if chunk.race:
                chunk.race.release(lanes.warp, barrier)
                chunk.race.forget(np.unique(barrier))
            return True
        if threads is not None:
            threads = np.broadcast_to(np.asarray(threads).astype(i64), (lanes.count,))
            if (threads & 31).any():
                message = "barrier thread count is not a multiple of the warp size"
                lanes.fail(position, message, int(np.argmax(threads & 31)))
            self._expected[barrier] = threads
        elif kind != "arrive":
            self._expected[barrier] = 0
        if kind == "arrive":
            _, first = np.unique(lanes.warp, return_index=True)
            np.add.at(self._arrived, barrier[first], 32)
            return True
        self._barrier[lanes.slots] = barrier
        self._code_block[lanes.slots] = block.index
        if predicate is not None:
            self._predicate[lanes.slots] = predicate
        self.waiting += lanes.count
        return False

    def released(self):
        """Threads of the barriers that are complete now; they no longer wait."""
        if not self.waiting:
            return []
        chunk = self._chunk
        slots = np.flatnonzero(self._barrier >= 0)
        complete = self._complete(slots)
        slots = slots[complete[self._barrier[slots]]]
        if not slots.size:
            return []
        barrier, code_block = self._barrier[slots], self._code_block[slots]
        self._check_aligned(slots, code_block)
        if chunk.race:
            chunk.race.release(chunk.warp[slots], barrier)
            chunk.race.forget(np.flatnonzero(complete))
        self._arrived[complete] = 0
        self._barrier[slots] = -1
        self.waiting -= slots.size
        releases = []
        for index in np.unique(code_block):
            here = code_block == index
            result = self._code_blocks[index].barrier_result
            reduced = None
            if result is not None:
                reduced = _reduce(result[0], barrier, self._predicate[slots])[here]
            releases.append(Release(int(index), slots[here], reduced))
        return releases

    def _complete(self, slots):
        chunk = self._chunk
        waiting = np.bincount(self._barrier[slots], minlength=self._expected.size)
        present = waiting + self._arrived
        live = np.repeat(chunk.live_in_block, BARRIERS_PER_BLOCK)
        complete = (waiting > 0) & (self._expected == 0) & (present >= live)
        counted = (waiting > 0) & (self._expected > 0)
        if counted.any():
            # Counts are of whole warps: lanes of a waiting warp that have exited count as there.
            warp, first = np.unique(chunk.warp[slots], return_index=True)
            exited = 32 - np.bitwise_count(chunk.live[warp]).astype(i64)
            np.add.at(present, self._barrier[slots][first], exited)
            if (counted & (present > self._expected)).any():
                raise PtxError(
                    f"{chunk.name}: more threads than the declared count arrived at a barrier"
                )
            complete |= counted & (present >= self._expected)
        return complete

    def _check_aligned(self, slots, code_block):
        """All threads of a warp must come to an aligned barrier at the same place."""
        chunk = self._chunk
        warp = chunk.warp[slots]
        first_place = np.full(chunk.warp_count, -1)
        first_place[warp[::-1]] = code_block[::-1]
        elsewhere = first_place[warp] != code_block
        if not elsewhere.any():
            return
        stray = int(np.argmax(elsewhere))
        here = self._code_blocks[code_block[stray]].last
        there = self._code_blocks[first_place[warp[stray]]].last
        if here.opcode == "bar" or "aligned" in here.modifiers:
            raise PtxError(
                f"{chunk.name}: threads of one warp arrived at an aligned barrier from different"
                f' places; PTX line {here.line} "{here.text}" and line {there.line}; thread'
                f" {chunk.thread_name(int(slots[stray]))}"
            )

    def describe_waiting(self):
        """Who waits at which barrier, for the message about a deadlock."""
        chunk, lines = self._chunk, []
        slots = np.flatnonzero(self._barrier >= 0)
        for index in np.unique(self._code_block[slots]):
            instruction = self._code_blocks[index].last
            here = slots[self._code_block[slots] == index]
            block = int(chunk.block_in_chunk[here[0]])
            in_block = int((chunk.block_in_chunk[here] == block).sum())
            lines.append(
                f"{here.size} threads wait at barrier PTX line {instruction.line}"
                f' "{instruction.text}" (e.g. {chunk.thread_name(int(here[0]))}; {in_block} of'
                f" {int(chunk.live_in_block[block])} live threads of that block are there)"
            )
        return lines


def _reduce(operation, barrier, predicate):
    """`bar.red`'s result for every thread, over the threads of its barrier."""
    true = np.bincount(barrier, weights=predicate).astype(i64)[barrier]
    if operation == "popc":
        return true.astype(u32)
    return true > 0 if operation == "or" else true == np.bincount(barrier)[barrier]
