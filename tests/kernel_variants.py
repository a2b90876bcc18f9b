"""Variants of the kernels of an operator, and cases that try them; `kernel_cases` has the cases."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Variant:
    """What tells kernels of an operator apart. ``wide``: accesses of 16 bytes. ``plain``: the dtype
    of which quantized rows are made, as which they are read out, and of queries."""

    dtype: torch.dtype
    interleaved: bool
    wide: bool
    plain: torch.dtype | None = None


REPRESENTATIVE = (
    Variant(BF16, interleaved=False, wide=True),
    Variant(F16, interleaved=True, wide=False),
    Variant(F32, interleaved=True, wide=True),
    Variant(E4M3, interleaved=False, wide=True, plain=BF16),
    Variant(E4M3, interleaved=True, wide=False, plain=F16),
)
ALL = tuple(
    Variant(*chosen) for chosen in itertools.product((F32, F16, BF16), (False, True), (True, False))
) + tuple(
    Variant(E4M3, *chosen)
    for chosen in itertools.product((False, True), (True, False), (F32, F16, BF16))
)


@dataclass(frozen=True)
class Case:
    """``run(backend)`` raises where the backend's results are not what the reference says."""

    name: str
    run: Callable[[Any], object]


def checked(module: ModuleType, name: str, *arguments: Any, **options: Any) -> Case:
    """The check of an operator's test module, with the reference's results known beforehand."""
    of_check = ("lse_tolerance", "damage", "place")
    tolerances = {name: options.pop(name) for name in of_check if name in options}
    expected = module.expectation(*arguments, **options)
    return Case(
        name,
        lambda backend: module.check(
            backend, *arguments, **options, **tolerances, expected=expected
        ),
    )


def last_block_first(case: Case) -> Case:
    """The case with blocks in descending order, where the backend knows of an order."""

    def run(backend: Any) -> None:
        options = getattr(backend, "options", {})
        options["last_block_first"] = True
        try:
            case.run(backend)
        finally:
            del options["last_block_first"]

    return Case(f"{case.name}, last block first", run)


def known(name: str, module: ModuleType, case: Any, dense: Any, expected: Any) -> Case:
    """A check whose results come from elsewhere."""
    return Case(name, lambda backend: module.check(backend, case, dense, expected=expected))


def variant_name(variant: Variant) -> str:
    names = {F32: "f32", F16: "f16", BF16: "bf16", E4M3: "e4m3"}
    style = "interleaved" if variant.interleaved else "half"
    plain = f"{names[variant.plain]}_" if variant.plain else ""
    return f"{plain}{names[variant.dtype]}_{style}_{'wide' if variant.wide else 'narrow'}"


def round_options(variant: Variant) -> dict[str, Any]:
    return {
        "dtype": variant.dtype,
        "interleaved": variant.interleaved,
        "layout": "padded" if variant.wide else "unaligned",
    }
