"""Cases of kernels over single rows: rotation, deviation, merging; see `kernel_cases`."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import test_cuda_launches
import test_key_deviation
import test_merge_states
import test_rope_rotate
import torch
from kernel_variants import (
    E4M3,
    Case,
    Variant,
    checked,
)

from tokendance import testing


def rope_rotate(variant: Variant) -> Iterator[Case]:
    if variant.plain is None:
        yield from moves(variant, variant.dtype, variant.dtype)
        return
    for pair in (
        (variant.dtype, variant.dtype),
        (variant.dtype, variant.plain),
        (variant.plain, variant.dtype),
    ):
        for case in moves(variant, *pair):
            yield replace(case, name=f"{case.name} ({pair[0]} to {pair[1]})")


def _move_sizes(variant: Variant, dtype: torch.dtype, out_dtype: torch.dtype) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "out_dtype": out_dtype,
        "interleaved": variant.interleaved,
        "layout": "padded" if variant.wide else "unaligned",
        "out_layout": "heads_first" if variant.wide else "unaligned",
    }


def moves(variant: Variant, dtype: torch.dtype, out_dtype: torch.dtype) -> Iterator[Case]:
    """rope_rotate of rows of one dtype to rows of another, or of the same."""
    module = test_rope_rotate
    sizes = _move_sizes(variant, dtype, out_dtype)
    several = module.random_moves(
        5, rows=7, heads=3, rotary_dim=32, destinations=3, skip=0.3, scale=1.25, **sizes
    )
    yield checked(module, "several destinations", several)
    # A divisor that is no power of two: each bit of a row counts.
    one = module.random_moves(6, rows=40, block_size=3, **sizes)
    yield checked(module, "one destination", one)
    # Of which the last has fewer heads than the others. A head more would be one of numbers.
    wide_rows = module.random_moves(7, rows=3, heads=19, head_dim=256, block_size=1, **sizes)
    gaps = testing.whole_storage(wide_rows.x)
    gaps.copy_(gaps.float().nan_to_num(1.0))
    yield checked(module, "rows of several blocks", wide_rows)
    yield checked(module, "halfway", module.halfway_moves(**sizes))
    yield checked(module, "halfway by scale", module.halfway_moves(by_scale=True, **sizes))
    yield checked(module, "no rotation", module.random_moves(12, rotary_dim=0, **sizes))
    near = module.random_moves(9, rows=40, max_position=3, **sizes)
    yield checked(module, "by one position", near)
    bad, expected = test_cuda_launches.moves_with_bad_indices(**sizes)
    yield Case("bad indices", lambda backend: module.check(backend, bad, expected))
    if dtype == out_dtype:
        yield Case(
            "in place",
            lambda backend: test_cuda_launches.check_in_place(
                backend, dtype, variant.wide, variant.interleaved
            ),
        )
    if E4M3 in (dtype, out_dtype):
        yield from conversions(sizes)
    yield from copies(variant, dtype, out_dtype)
    in_order = module.random_moves(9, rows=5, rotary_dim=32, **sizes)
    in_order.x.copy_(torch.randn(in_order.x.shape).to(dtype))
    rows = in_order.x.shape[0] * in_order.x.shape[1]
    in_order.row_in = in_order.row_out = in_order.position_from = None
    in_order.position_to = torch.arange(rows, dtype=torch.int32).flip(0)
    in_order.out = module.row_tensor(rows, 2, 64, out_dtype, sizes["out_layout"], 8)
    yield checked(module, "all rows in order", in_order)


def conversions(sizes: dict[str, Any]) -> Iterator[Case]:
    """rope_rotate with scales, and of numbers that hardly any scale brings about."""
    module = test_rope_rotate
    types = {"dtype": sizes["dtype"], "out_dtype": sizes["out_dtype"]}
    options = {name: value for name, value in sizes.items() if name not in types}
    several = module.conversion(
        10, *types.values(), heads=3, destinations=2, rows=13, rotary_dim=32, scale=1.25, **options
    )
    yield checked(module, "scales", several)
    copied = module.conversion(11, *types.values(), scale=1.25, **options)
    copied.position_from = copied.position_to = None
    yield checked(module, "copies with scales", copied)
    if types["dtype"] == E4M3:
        any_nan = types["out_dtype"] != E4M3
        for name, made in (("code", module.every_code), ("scaled code", module.scaled_codes)):
            every = made(types["out_dtype"], **options)
            expected = module.expectation(every)
            check = functools.partial(module.check, moves=every, expected=expected, any_nan=any_nan)
            yield Case(f"every {name}", check)
    else:
        yield checked(module, "every interval", module.every_interval(types["dtype"], **options))


def copies(
    variant: Variant, dtype: torch.dtype | None = None, out_dtype: torch.dtype | None = None
) -> Iterator[Case]:
    """rope_rotate where nothing is rotated."""
    sizes = _move_sizes(variant, dtype or variant.dtype, out_dtype or variant.dtype)
    copied = test_rope_rotate.random_moves(8, destinations=2, skip=0.3, scale=1.25, **sizes)
    copied.position_from = copied.position_to = None
    if sizes["dtype"] == sizes["out_dtype"]:
        copied.x.copy_(test_rope_rotate.any_bits(copied.x.shape, copied.x.dtype))
    yield checked(test_rope_rotate, "copies, which nothing scales", copied)


def key_deviation(variant: Variant) -> Iterator[Case]:
    module = test_key_deviation
    sizes = {
        "dtype": variant.dtype,
        "interleaved": variant.interleaved,
        "layout": "padded" if variant.wide else "unaligned",
        "cached_layout": "heads_first" if variant.wide else "unaligned",
    }
    # The third and the fourth agent's keys are asked for by instructions of their own.
    some = module.random_keys(
        1, agents=4, rotary_dim=32, heads=6 if variant.wide else 2, scale=1.3, **sizes
    )
    yield checked(module, "some agents", some)
    many = module.random_keys(
        2, agents=7, tokens=19, head_dim=128, heads=6, block_size=16, lacking=0.0, **sizes
    )
    yield checked(module, "many heads", many)
    # Divisors that are no powers of two: each bit of a row and of a share of a row counts.
    odd = module.random_keys(
        7, agents=5, tokens=19, head_dim=80, heads=3, block_size=3, lacking=0.0, **sizes
    )
    yield checked(module, "pages of three rows", odd)
    fresh = module.random_keys(3, agents=7, tokens=3, fresh_position=False, **sizes)
    yield checked(module, "fresh keys", fresh)
    near = module.random_keys(4, agents=3, tokens=40, max_position=3, **sizes)
    yield checked(module, "by one position", near)
    without_angles = module.random_keys(5, agents=4, rotary_dim=0, **sizes)
    without_angles[6] = without_angles[7] = torch.empty(1, 0)
    yield checked(module, "no rotation", without_angles)
    for agents in (0, 1):
        few = module.random_keys(6, agents=agents, tokens=3, **sizes)
        yield checked(module, f"{agents} agents", few)
    keys, expected = test_cuda_launches.keys_with_bad_indices(
        variant.dtype, variant.interleaved, sizes["layout"]
    )
    yield Case("bad indices", lambda backend: module.check(backend, keys, expected))
    stay = module.equal_keys_that_stay(**sizes)
    yield Case("turned by nothing", lambda backend: module.check_equal(backend, stay))
    equal = module.equal_keys(**sizes)
    yield Case("equal keys", lambda backend: module.check_equal(backend, equal))


def merge_states(variant: Variant) -> Iterator[Case]:
    module = test_merge_states
    sinks = torch.tensor([0.5, -2.0, 4.0])
    place = torch.clone if variant.wide else module.unaligned
    # With 8 groups of threads, as of fp32, and with 16 a group of each has one partial too few for
    # every one of the eight that it asks for at once.
    for count in (0, 1, 2, 3, 4, 7, *range(9, 66, 8), 81, 97, 113, 130):
        for spread in (3.0, 200.0):
            rows = 7 if count < 10 else 2
            out, lse = module.partials(
                count, count, rows, 3, 80, variant.dtype, blind=0.3, spread=spread
            )
            few = sinks if spread == 3.0 else None
            yield checked(module, f"{count} partials, spread {spread}", out, lse, few, place=place)
    for count in (5, 9):
        out, lse = module.partials(count, count, 3, 3, 80, variant.dtype)
        lse[-1] += 500
        yield checked(module, f"the last of {count} far above", out, lse, place=place)
    broken = functools.partial(
        module.check_broken, dtype=variant.dtype, broken=torch.nan, others=0.0, place=place
    )
    yield Case("LSEs of NaN", broken)
    outputs = module.broken_outputs(variant.dtype, torch.nan)
    yield Case(
        "outputs of NaN",
        lambda backend: module.check_broken_outputs(backend, *outputs, place=place),
    )
    other_place = module.unaligned if variant.wide else torch.clone
    out, lse = module.partials(4, 3, 7, 3, 80, variant.dtype, blind=0.3)
    yield checked(module, "results elsewhere", out, lse, sinks, place=other_place)
    # So many heads that a block has several, of which the last has one.
    out, lse = module.partials(1, 3, 1411, 3, 64, variant.dtype, blind=0.3)
    yield checked(module, "heads of many rows", out, lse, sinks, place=place)
    for count in (5, 256):
        check = functools.partial(
            module.check_halfway,
            **dict(
                zip(
                    ("partial_out", "partial_lse", "mean"),
                    module.halfway_partials(variant.dtype, count),
                    strict=True,
                )
            ),
            place=place,
        )
        yield Case(f"halfway of {count}", check)
