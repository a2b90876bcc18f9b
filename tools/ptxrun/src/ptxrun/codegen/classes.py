"""Kinds of instructions: what ends a block, what needs a whole warp, and classes for counting."""

from ..program import DROPPED, Instruction

CONTROL = {"bra", "brx", "ret", "exit", "trap", "bar", "barrier"}
COLLECTIVE = {
    "shfl",
    "vote",
    "match",
    "redux",
    "mma",
    "ldmatrix",
    "stmatrix",
    "movmatrix",
    "elect",
}
WARP_WIDE = {"mma", "ldmatrix", "stmatrix", "movmatrix"}  # all 32 lanes, without a membermask
IGNORED = {
    "membar",
    "fence",
    "prefetch",
    "prefetchu",
    "nanosleep",
    "discard",
    "applypriority",
    "griddepcontrol",
    "setmaxnreg",
    "pmevent",
    "brkpt",
    DROPPED,
}
_OWN_CLASS = {
    "mma",
    "ldmatrix",
    "stmatrix",
    "shfl",
    "vote",
    "match",
    "redux",
    "cvt",
    "mov",
    "prmt",
}
_CLASS = {
    "ldu": "ld.global",
    "bar": "bar",
    "barrier": "bar",
    **dict.fromkeys(("bra", "brx", "ret", "exit", "trap"), "branch"),
    **dict.fromkeys(("setp", "set", "selp", "slct"), "cmp/sel"),
    **dict.fromkeys(IGNORED, "fence/hint"),
}
_FUNCTION_UNIT = {"ex2", "lg2", "sin", "cos", "tanh", "rcp", "rsqrt", "sqrt", "div"}
_TYPE_CLASS = {
    "f32": "fp32",
    "f64": "fp64",
    "f16": "fp16",
    "bf16": "fp16",
    "f16x2": "fp16x2",
    "bf16x2": "fp16x2",
}
_SPACES = ("global", "shared", "local", "param", "const")


def is_collective(instruction: Instruction) -> bool:
    """Whether lanes of a warp have to execute it together."""
    return instruction.opcode in COLLECTIVE or (
        instruction.opcode in ("bar", "barrier") and "warp" in instruction.modifiers
    )


def is_control(instruction: Instruction) -> bool:
    """Whether it ends a basic block."""
    return instruction.opcode in CONTROL and not is_collective(instruction)


def spins(instruction: Instruction) -> bool:
    """Whether a loop around it may wait for another thread."""
    modifiers = set(instruction.modifiers)
    if instruction.opcode == "atom":
        return bool(modifiers & {"cas", "exch"})
    return instruction.opcode == "ld" and bool(modifiers & {"volatile", "acquire", "relaxed"})


def instruction_class(instruction: Instruction) -> str:
    """Class under which `Stats.by_class` counts it."""
    opcode, modifiers = instruction.opcode, instruction.modifiers
    if opcode in ("ld", "st", "atom", "red"):
        space = next((modifier for modifier in modifiers if modifier in _SPACES), "generic")
        return f"{opcode}.{space}"
    if opcode == "cp":
        return "cp.async" if len(instruction.operands) > 1 else "cp.async.ctl"
    if opcode in _OWN_CLASS:
        return opcode
    if opcode in _CLASS:
        return _CLASS[opcode]
    if opcode in _FUNCTION_UNIT and any(modifier[0] in "fb" for modifier in modifiers):
        return "sfu/div"
    return _TYPE_CLASS.get(modifiers[-1] if modifiers else "", "int/logic")
