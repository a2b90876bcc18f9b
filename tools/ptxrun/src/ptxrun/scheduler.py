"""Runs the blocks of compiled code until every thread has exited.

Threads that are at the same block of code run together, lowest block first, so that threads which
diverged join again. One that waits for others (a spin loop) would keep those that are further on
from running; such loops and long waits let the oldest group have a turn.
"""

import functools

import numpy as np

from .barriers import BlockBarriers
from .codegen.classes import WARP_WIDE
from .dtypes import BY_NAME, i64, u32
from .errors import PtxError
from .lane_set import FULL_WARP
from .program import Integer
from .storage import POISON
from .threads import Lanes

PATIENCE = 3000  # steps that a group waits while others are at lower blocks
SPINS = 16  # executions of blocks that look like spin loops before the oldest group has a turn
TURN = 100  # steps of such a turn


@functools.lru_cache(maxsize=256)
def _poisoned_registers(dtype, count):
    """Shared by registers: results replace arrays, never write into them."""
    if dtype == "pred":
        return np.zeros(count, bool)
    scalar = np.dtype(BY_NAME[dtype])
    return np.resize(POISON, count * scalar.itemsize).view(scalar)


class Scheduler:
    """Threads of a chunk, their registers and where they are.

    `groups` maps a block of code to the sets of threads that are about to execute it, `waiting`
    to those that wait there for other lanes of their warps.
    """

    def __init__(self, chunk, max_steps):
        self.chunk, self.code, self.max_steps = chunk, chunk.code, max_steps
        self.barriers = BlockBarriers(chunk, chunk.code.blocks)
        self.groups, self.waiting = {}, {}
        self.warp_executions = np.zeros(len(chunk.code.blocks), i64)
        self.thread_executions = np.zeros(len(chunk.code.blocks), i64)
        self.followed, self.path = None, []  # a thread's slot, and the blocks it has executed
        self._stamps = {}  # step at which a group came to its block
        self._step = self._spins = 0
        self._live = chunk.thread_count
        self._row_of = np.arange(chunk.thread_count)
        self._root = Lanes(chunk, np.arange(chunk.thread_count), None)
        self._allocate_registers(chunk.thread_count)

    def run(self):
        """Execute everything; raises PtxError for what the hardware would not allow."""
        self._push(0, self._root)
        while self.groups:
            index, turn = self._choose()
            sets = self.groups.pop(index) + self.waiting.pop(index, [])
            del self._stamps[index]
            self._run_from(index, self._merge(sets), turn)
        if self.barriers.waiting or self.waiting:
            self._deadlock()
        warning = "cp.async copies still outstanding at kernel end"
        if self.chunk.pending_copies and warning not in self.chunk.stats.warnings:
            self.chunk.stats.warnings.append(warning)

    # ---- groups ----
    def _choose(self):
        """The next block to run, and for how many steps it may go on undisturbed."""
        if len(self.groups) > 1 and (self._step & 63 == 0 or self._spins > SPINS):
            oldest = min(self._stamps, key=self._stamps.get)
            if self._step - self._stamps[oldest] > PATIENCE or self._spins > SPINS:
                self._spins = 0
                return oldest, TURN
        return min(self.groups), 0

    def _push(self, index, lanes):
        if index not in self.groups:
            self.groups[index] = []
            self._stamps[index] = self._step
        self.groups[index].append(lanes)

    def _wait(self, index, lanes):
        self.waiting.setdefault(index, []).append(lanes)

    def _merge(self, sets):
        if len(sets) == 1:
            return sets[0]
        if sum(lanes.count for lanes in sets) == self._root.count:
            return self._root
        rows = np.sort(np.concatenate([lanes.rows for lanes in sets]))
        return Lanes(self.chunk, self._root.slots[rows], rows)

    def _run_from(self, index, lanes, turn):
        """Run threads from a block on, while no others could join them there."""
        blocks = self.code.blocks
        while True:
            self._count_step(index, lanes)
            if index >= len(blocks):
                self._exit(lanes)
                return
            everyone = lanes.count == self._live and not self.barriers.waiting and not self.waiting
            if everyone and lanes.rows is not None:
                lanes = self._compact(lanes, index)
            block = blocks[index]
            if block.spins and self.groups:
                self._spins += 1
            if block.collective is not None and not lanes.known_complete:
                lanes = self._meet(lanes, block)
                if lanes is None:
                    return
            self._count_executions(index, lanes)
            following = self._continue(block, lanes, self._execute(block, lanes))
            if following is None:
                return
            disturbed = bool(self.groups) and (turn <= 0 or following in self.groups)
            if disturbed or following in self.waiting:
                self._push(following, lanes)
                return
            turn -= 1
            index = following

    @property
    def steps(self):
        """Blocks of code that sets of threads have executed."""
        return self._step

    def _count_step(self, index, lanes):
        self._step += 1
        if self._step > self.max_steps:
            block = self.code.blocks[min(index, len(self.code.blocks) - 1)]
            raise PtxError(
                f"{self.chunk.name}: more than {self.max_steps} block steps; endless loop? last at"
                f" PTX line {block.instructions[0].line} thread"
                f" {self.chunk.thread_name(int(lanes.slots[0]))}"
            )

    def _count_executions(self, index, lanes):
        self.warp_executions[index] += lanes.warp_count()
        self.thread_executions[index] += lanes.count
        if self.followed is not None and self.followed in lanes.slots:
            self.path.append(index)

    # ---- registers ----
    def _allocate_registers(self, count):
        self.registers = [_poisoned_registers(dtype, count) for dtype in self.code.register_dtypes]

    def _compact(self, lanes, index):
        """All threads that live are in one set: keep registers for those only."""
        old = self.registers
        self._allocate_registers(lanes.count)
        for register in self.code.live_in[index]:
            self.registers[register] = old[register].take(lanes.rows)
        self._root = Lanes(self.chunk, lanes.slots, None)
        self._row_of[lanes.slots] = np.arange(lanes.count)
        return self._root

    def _read(self, register, lanes):
        values = self.registers[register.index]
        return values if lanes.rows is None else values[lanes.rows]

    def _write(self, register, rows, values):
        """Set a register of some rows (None for all)."""
        changed = self.registers[register].copy()
        changed[slice(None) if rows is None else rows] = values
        self.registers[register] = changed

    # ---- execution ----
    def _execute(self, block, lanes):
        try:
            if lanes.rows is None:
                return block.run(lanes, self.registers)
            values = {
                register: self.registers[register].take(lanes.rows) for register in block.reads
            }
            returned = block.run(lanes, values)
        except PtxError:
            raise
        except Exception as error:
            first, last = block.instructions[0].line, block.last.line
            raise PtxError(
                f"{self.chunk.name}: internal error in the block at PTX lines {first}-{last}"
                f" ({type(error).__name__}: {error})"
            ) from error
        for register in block.writes:
            if register in values:
                self._write(register, lanes.rows, values[register])
        return returned

    def _continue(self, block, lanes, returned):
        """The block that these threads go to, or None when they have been split or stopped."""
        following, ending = block.index + 1, block.ending
        if ending == "fall":
            return following
        if ending == "branch":
            return block.target
        if ending == "conditional":
            taken = int(np.count_nonzero(returned))
            if taken:
                self.chunk.stats.branches.add((block.last.position, True))
            if taken < lanes.count:
                self.chunk.stats.branches.add((block.last.position, False))
            if taken == lanes.count or block.target == following:
                return block.target
            if taken == 0:
                return following
            self._push(block.target, lanes.subset(np.flatnonzero(returned)))
            self._push(following, lanes.subset(np.flatnonzero(~returned)))
            return None
        if ending == "barrier":
            goes_on = self.barriers.arrive(lanes, block, returned, lanes.count == self._live)
            self._release_barriers()
            return following if goes_on else None
        if ending == "table":
            return self._jump(block, lanes, returned)
        if ending == "trap":
            lanes.fail(block.last.position, "trap / assertion reached", 0)
        self._exit(lanes)
        return None

    def _jump(self, block, lanes, index):
        outside = index >= block.table.size
        if outside.any():
            message = "brx.idx index out of range"
            lanes.fail(block.last.position, message, int(np.argmax(outside)))
        targets = block.table[index]
        different = np.unique(targets)
        if different.size == 1:
            return int(different[0])
        for target in different:
            self._push(int(target), lanes.subset(np.flatnonzero(targets == target)))
        return None

    def _exit(self, lanes):
        chunk = self.chunk
        chunk.live[lanes.warp] &= ~lanes.present()
        np.subtract.at(chunk.live_in_block, chunk.block_in_chunk[lanes.slots], 1)
        self._live -= lanes.count
        for index, sets in self.waiting.items():  # who waited for these lanes looks again
            for waiting in sets:
                self._push(index, waiting)
        self.waiting.clear()
        self._release_barriers()

    def _release_barriers(self):
        for release in self.barriers.released():
            rows = self._row_of[release.slots]
            if release.reduced is not None:
                register = self.code.blocks[release.block].barrier_result[1]
                self._write(register.index, rows, release.reduced)
            everyone = rows.size == self._root.count
            lanes = self._root if everyone else Lanes(self.chunk, release.slots, rows)
            self._push(release.block + 1, lanes)

    # ---- lanes of a warp meet ----
    def _membermask(self, lanes, instruction):
        """u32 for every thread: the lanes that an instruction is for."""
        if instruction.opcode in WARP_WIDE:
            return np.full(lanes.count, FULL_WARP)
        barrier = instruction.opcode in ("bar", "barrier")
        mask = instruction.operands[0 if barrier else -1]
        if isinstance(mask, Integer):
            return np.full(lanes.count, u32(mask.value & 0xFFFFFFFF))
        return self._read(mask, lanes).view(u32)

    def _meet(self, lanes, block):
        """The threads that may execute a collective now (None for nobody); the rest waits."""
        instruction = block.collective
        mask = self._membermask(lanes, instruction)
        member = (mask >> lanes.lane) & u32(1)
        if not member.all():
            message = "executing lane is not in its membermask"
            lanes.fail(instruction.position, message, int(np.argmin(member)))
        if lanes.complete():
            return lanes
        missing = mask & self.chunk.live[lanes.warp] & ~lanes.present()
        ready = missing == 0
        if ready.all():
            return lanes
        if instruction.opcode in ("bar", "barrier"):
            self._meet_at_warp_barriers(lanes, block)
            return None
        if not ready.any():
            self._wait(block.index, lanes)
            return None
        self._wait(block.index, lanes.subset(np.flatnonzero(~ready)))
        return lanes.subset(np.flatnonzero(ready))

    def _meet_at_warp_barriers(self, lanes, block):
        """bar.warp.sync joins lanes wherever they wait: a mask is complete when all are at one."""
        arrivals = [(block.index, lanes)]
        for index, sets in list(self.waiting.items()):
            if self.code.blocks[index].collective.opcode in ("bar", "barrier"):
                arrivals += [(index, waiting) for waiting in sets]
                del self.waiting[index]
        present = np.zeros(self.chunk.warp_count, u32)
        for _, arrived in arrivals:
            np.bitwise_or.at(present, arrived.warp, u32(1) << arrived.lane)
        for index, arrived in arrivals:
            mask = self._membermask(arrived, self.code.blocks[index].collective)
            missing = mask & self.chunk.live[arrived.warp] & ~present[arrived.warp]
            ready = np.flatnonzero(missing == 0)
            if ready.size:
                leaving = arrived if ready.size == arrived.count else arrived.subset(ready)
                self._count_executions(index, leaving)
                leaving.warp_barrier()
                self._push(index + 1, leaving)
            if ready.size < arrived.count:
                late = np.flatnonzero(missing)
                self._wait(index, arrived if not ready.size else arrived.subset(late))

    def _deadlock(self):
        chunk, lines = self.chunk, []
        for index, sets in self.waiting.items():
            instruction = self.code.blocks[index].collective
            for lanes in sets[:2]:
                lines.append(
                    f"{lanes.count} threads wait at PTX line {instruction.line}"
                    f' "{instruction.text}" for lanes that never arrive'
                    f" (e.g. {chunk.thread_name(int(lanes.slots[0]))}, lanes present"
                    f" {int(lanes.present()[0]):#010x}, live"
                    f" {int(chunk.live[lanes.warp[0]]):#010x})"
                )
        lines += self.barriers.describe_waiting()
        raise PtxError(f"{chunk.name}: deadlock: " + "; ".join(lines[:6]))
