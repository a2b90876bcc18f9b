"""Counters of one launch."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class Stats:
    """What a launch did.

    `by_class` counts warp instructions by kind. `global_instr` and `shared_instr` hold, for every
    instruction that accessed that memory (keyed by its position in the kernel), its PTX `line` and
    `text` with `warps`, `sectors`, `ideal` (sectors if its bytes lay together) and `bytes`, or with
    `phases` and `wavefronts`. `buffers` holds `load_bytes`, `store_bytes`, `sectors` and `ideal` of
    every array, keyed by its device address (`Module.ptr`; the array that a slice was cut from).
    Sectors are 32 bytes. Traffic is 0 when it was not counted. `executed` are the positions of the
    instructions that some thread reached, `branches` those of conditional jumps with whether some
    thread jumped (True) or went on (False). `steps` counts what `max_steps` limits: blocks of code
    that sets of threads executed, of the thread blocks that ran together and took the most. `path`
    holds the positions of the instructions that one thread executed, in order, if it was followed.
    """

    warp_instructions: int = 0
    thread_instructions: int = 0
    by_class: dict[str, int] = field(default_factory=dict)
    global_load_bytes: int = 0
    global_store_bytes: int = 0
    shared_load_bytes: int = 0
    shared_store_bytes: int = 0
    global_instr: dict[int, dict] = field(default_factory=dict)
    shared_instr: dict[int, dict] = field(default_factory=dict)
    buffers: dict[int, dict] = field(default_factory=dict)
    executed: set[int] = field(default_factory=set)
    branches: set[tuple[int, bool]] = field(default_factory=set)
    steps: int = 0
    path: list[int] = field(default_factory=list)
    barriers: int = 0
    races: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def sectors(self) -> int:
        """Sectors of global memory that warps touched, each instruction counted by itself."""
        return sum(counters["sectors"] for counters in self.global_instr.values())

    @property
    def ideal_sectors(self) -> int:
        """The same if every warp's bytes lay together."""
        return sum(counters["ideal"] for counters in self.global_instr.values())

    @property
    def bank_conflicts(self) -> int:
        """Wavefronts of shared memory beyond those of conflict-free accesses."""
        return sum(c["wavefronts"] - c["phases"] for c in self.shared_instr.values())

    def of_global_instruction(self, instruction) -> dict:
        """Counters of an instruction that accesses global memory."""
        names = ("warps", "sectors", "ideal", "bytes")
        return _counters(self.global_instr, instruction, names)

    def of_shared_instruction(self, instruction) -> dict:
        """Counters of an instruction that accesses shared memory."""
        return _counters(self.shared_instr, instruction, ("phases", "wavefronts"))

    def of_buffer(self, address) -> dict:
        """Counters of a buffer of global memory."""
        names = ("load_bytes", "store_bytes", "sectors", "ideal")
        return self.buffers.setdefault(address, dict.fromkeys(names, 0))

    def __str__(self) -> str:
        classes = sorted(self.by_class.items(), key=lambda item: -item[1])
        lines = [
            f"warp instructions {self.warp_instructions},"
            f" thread instructions {self.thread_instructions}, {self.seconds:.3f} s",
            "  " + ", ".join(f"{name} {count}" for name, count in classes),
            f"  global: load {self.global_load_bytes} B, store {self.global_store_bytes} B,"
            f" sectors {self.sectors} (ideal {self.ideal_sectors});"
            f" shared bank-conflict wavefronts {self.bank_conflicts}",
        ]
        for per_instruction, name, ideal in (
            (self.global_instr, "sectors", "ideal"),
            (self.shared_instr, "wavefronts", "phases"),
        ):
            lines += [
                f"  line {c['line']}: {c[name]} {name}, ideal {c[ideal]}: {c['text']}"
                for c in per_instruction.values()
                if c[name] > c[ideal]
            ]
        lines += [f"  RACE {race}" for race in self.races]
        lines += [f"  warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def _counters(per_instruction, instruction, names):
    counters = per_instruction.get(instruction.position)
    if counters is None:
        counters = {"line": instruction.line, "text": instruction.text, **dict.fromkeys(names, 0)}
        per_instruction[instruction.position] = counters
    return counters
