"""A compact set of cases per operator that executes every instruction of its kernels.

``tools/mutate.py`` runs them against mutated kernels and ``tools/coverage.py`` looks for what they
do not reach. A case is one of the operators' own tests with its data, so that it compares with the
reference as those do; the reference is computed once. ``CASES`` has an entry per operator: a
function of a variant of its kernels. By default some variants stand for all, since the kernels of
an operator are one template.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import attention_rounds
import illegal_rounds
import test_collective_attention
import test_cuda_launches
import test_diff_encode
import test_diff_restore
import test_key_deviation
import test_merge_states
import test_rope_rotate
import torch

from tokendance import testing

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


def _known(name: str, module: ModuleType, case: Any, dense: Any, expected: Any) -> Case:
    """A check whose results come from elsewhere."""
    return Case(name, lambda backend: module.check(backend, case, dense, expected=expected))


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
    yield checked(module, "one destination", module.random_moves(6, rows=40, **sizes))
    wide_rows = module.random_moves(7, rows=3, heads=18, head_dim=256, block_size=1, **sizes)
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
    yield checked(test_rope_rotate, "copies, which nothing scales", copied)


def key_deviation(variant: Variant) -> Iterator[Case]:
    module = test_key_deviation
    sizes = {
        "dtype": variant.dtype,
        "interleaved": variant.interleaved,
        "layout": "padded" if variant.wide else "unaligned",
        "cached_layout": "heads_first" if variant.wide else "unaligned",
    }
    some = module.random_keys(1, rotary_dim=32, heads=6 if variant.wide else 2, scale=1.3, **sizes)
    yield checked(module, "some agents", some)
    many = module.random_keys(
        2, agents=7, tokens=19, head_dim=128, heads=6, block_size=16, lacking=0.0, **sizes
    )
    yield checked(module, "many heads", many)
    fresh = module.random_keys(3, agents=7, tokens=3, fresh_position=False, **sizes)
    yield checked(module, "fresh keys", fresh)
    near = module.random_keys(4, agents=3, tokens=40, max_position=3, **sizes)
    yield checked(module, "by one position", near)
    without_angles = module.random_keys(5, agents=3, rotary_dim=0, **sizes)
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
    for count in (0, 1, 2, 3, 4, 7, 9, 33, 49, 65, 81, 97, 113, 130):
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


def _round_options(variant: Variant) -> dict[str, Any]:
    return {
        "dtype": variant.dtype,
        "interleaved": variant.interleaved,
        "layout": "padded" if variant.wide else "unaligned",
    }


def _by_one_position(case: testing.RandomRound) -> testing.RandomRound:
    """The same round in which uses are moved by one position up or down."""
    near = case.copy()
    uses = case.filled.uses
    near.round.use_shift[:uses] = torch.tensor([1, -1]).repeat(uses)[:uses]
    return near


def diff_restore(variant: Variant) -> Iterator[Case]:
    yield from restorations(variant, variant.dtype)
    if variant.plain is not None:
        for case in restorations(variant, variant.plain):
            yield replace(case, name=f"{case.name} (to {variant.plain})")


def restorations(variant: Variant, out_dtype: torch.dtype) -> Iterator[Case]:
    """diff_restore to rows of a dtype."""
    module = test_diff_restore
    dense_cache = functools.partial(testing.dense_cache, dtype=out_dtype)
    rotary_dim = 32 if variant.wide else 34
    sizes = _round_options(variant)
    out_layout = "heads_first" if variant.wide else "unaligned"
    small = testing.random_round(
        1, agents=3, masters=(9, 20), num_layers=2, rotary_dim=rotary_dim, block_size=8, **sizes
    )
    dense = dense_cache(small, 1, layout=out_layout, skip=0.1)
    yield checked(module, "some agents", small, dense)
    near = dense_cache(small, 1, layout=out_layout)
    yield checked(module, "by one position", _by_one_position(small), near)
    for pool, out in (
        (("mixed", "mixed"),) if variant.wide else (("mixed", "unaligned"), ("unaligned", "mixed"))
    ):
        mixed = testing.random_round(7, agents=2, masters=(20,), **{**sizes, "layout": pool})
        yield checked(module, f"{pool} and {out}", mixed, dense_cache(mixed, 1, layout=out))
    large = testing.random_round(
        1, agents=5, masters=(20, 16), whole_uses=True, num_layers=5, **sizes
    )
    large = test_cuda_launches.with_capacity(large, own_pages=600)
    dense = dense_cache(large, 1, layout=sizes["layout"], page_size=None)
    yield checked(module, "agents and layers in a block", large, dense)
    halfway = module.halfway_round(out_dtype=out_dtype, **sizes)
    yield checked(module, "halfway", halfway, dense_cache(halfway, 1, layout=out_layout))
    if variant.plain is not None:
        options = {"interleaved": variant.interleaved, "layout": sizes["layout"]}
        for every in module.every_code_rounds(out_dtype, **options):
            dense = dense_cache(every, 1, layout=out_layout)
            expected = module.expectation(every, dense)
            any_nan = out_dtype != E4M3
            check = functools.partial(
                module.check, case=every, dense=dense, expected=expected, any_nan=any_nan
            )
            yield Case("every code", check)
        bare = replace(small, k_scale=None, v_scale=None)
        yield checked(module, "no scales", bare, dense_cache(bare, 1, layout=out_layout))
    case, dense, expected = test_cuda_launches.restore_with_bad_indices(
        out_dtype=out_dtype, **sizes
    )
    yield _known("bad indices", module, case, dense, expected)
    many = testing.random_round(
        3, agents=12, masters=(35,), private_length=2, block_size=32, num_kv_heads=1, **sizes
    )
    dense = dense_cache(many, 1, layout=out_layout)
    yield checked(module, "many agents", many, dense)
    one = testing.random_round(
        4, agents=1, masters=(9,), whole_uses=True, num_kv_heads=3 if variant.wide else 1,
        head_dim=96, slack=False, **sizes,
    )  # fmt: skip
    dense = dense_cache(one, 1, layout=out_layout)
    yield checked(module, "one agent", one, dense)
    lacking = _lacks_the_last_master(masters=(9, 12), block_size=8, **sizes)
    dense = dense_cache(lacking, 1, layout=out_layout)
    yield checked(module, "an agent without the last Master", lacking, dense)
    alone = testing.random_round(6, agents=2, masters=0, slack=False, **sizes)
    alone = test_cuda_launches.with_capacity(alone, master_pages=2)
    yield checked(module, "no Masters", alone, dense_cache(alone, 1, layout=out_layout))
    heads = testing.random_round(
        2, agents=2, masters=(19,), num_q_heads=3, num_kv_heads=3, head_dim=256, whole_uses=True,
        block_size=8 if F32 in (variant.dtype, out_dtype) else 16, cut=True, holes=True, **sizes,
    )  # fmt: skip
    dense = dense_cache(heads, 1, layout=out_layout, spare_columns=0)
    dense = replace(dense, slot_mapping=dense.slot_mapping[:, :-4])
    yield checked(module, "several groups of heads", heads, dense)
    yield _restored(
        "a page in one pass", variant, out_dtype, rotary_dim=32, num_kv_heads=1, masters=(20, 9, 17)
    )
    heads_of_36_tasks = 3 if F32 in (variant.dtype, out_dtype) else 6  # 7 at once of 8, if wide
    yield _restored(
        "one row in the last pass", variant, out_dtype, head_dim=96, num_q_heads=heads_of_36_tasks,
        num_kv_heads=heads_of_36_tasks,
    )  # fmt: skip
    unmoved = testing.random_round(
        5, agents=2, masters=(9,), whole_uses=True, rotary_dim=0, **sizes
    )
    unmoved = replace(unmoved, cos=torch.empty(1, 0), sin=torch.empty(1, 0))
    yield checked(module, "no rotation", unmoved, dense_cache(unmoved, 1))
    beyond = module.own_rows_beyond_the_last(out_dtype, **sizes)
    yield checked(module, "own rows beyond the last", *beyond)


def _lacks_the_last_master(**options: Any) -> testing.RandomRound:
    """A round, one of whose agents has the first Master and not the last."""
    rounds = (testing.random_round(seed, agents=2, **options) for seed in itertools.count())
    return next(c for c in rounds if ((c.use_table[:, 0] >= 0) & (c.use_table[:, -1] < 0)).any())


def _restored(name: str, variant: Variant, out_dtype: torch.dtype, **options: Any) -> Case:
    """Three agents that use Masters of pages of 8 rows whole."""
    options = {"masters": (9, 20), **_round_options(variant), **options}
    case = testing.random_round(8, agents=3, whole_uses=True, block_size=8, **options)
    layout = "heads_first" if variant.wide else "unaligned"
    dense = testing.dense_cache(case, 1, layout=layout, dtype=out_dtype)
    return checked(test_diff_restore, name, case, dense)


def diff_encode(variant: Variant) -> Iterator[Case]:
    module = test_diff_encode
    rotary_dim = 32 if variant.wide else 34
    sizes = {**_round_options(variant), "room_for_all": True}
    in_layout = "heads_first" if variant.wide else "unaligned"

    def altered(case, every, **options):
        dense = module.restored(case, layout=in_layout, **options)
        for agent, length in enumerate(case.length.tolist()):
            module.alter(dense, agent, range(agent, length, every), layer=agent % len(dense.k))
        return dense

    small = testing.random_round(
        1, agents=3, masters=(9, 20), num_layers=2, rotary_dim=rotary_dim, block_size=8, **sizes
    )
    dense = altered(small, 5)
    yield checked(module, "some agents", module.forget_mirrors(small), dense)
    large = testing.random_round(2, agents=6, masters=(20, 16), num_layers=3, **sizes)
    dense = altered(large, 5, page_size=None)
    large = test_cuda_launches.with_capacity(large, master_pages=600)
    yield checked(module, "agents in a tile", module.forget_mirrors(large), dense)
    halfway = module.halfway_round(**_round_options(variant))
    dense = module.restored(halfway, layout=in_layout)
    yield checked(module, "halfway", module.forget_mirrors(halfway), dense)
    near = module.forget_mirrors(small)
    long, dense = module.long_prompts(**_round_options(variant))
    long_prompts = checked(module, "long prompts", module.forget_mirrors(long), dense)
    yield long_prompts
    yield last_block_first(long_prompts)
    yield checked(module, "one own row", *module.one_own_row(**_round_options(variant)))
    yield checked(module, "little room", *module.little_room(1, **_round_options(variant)))
    blank = testing.random_round(
        18, agents=2, masters=(9,), num_layers=8, num_q_heads=1, num_kv_heads=1, **sizes
    )
    dense = module.restored(blank, spare_columns=72 * 256)  # blocks enough for two layers in each
    yield checked(module, "layers in a block", module.forget_mirrors(blank), dense)
    dense = module.restored(small, layout=in_layout)
    first_of_second_half = rotary_dim + (64 - rotary_dim) // 2
    for agent, length in enumerate(small.length.tolist()):
        module.alter_key(dense, agent, slice(0, length, 2), head=1, dim=first_of_second_half)
    yield checked(module, "a dim that is not rotated", module.forget_mirrors(small), dense)
    page = module.uses_that_end_with_a_page(**_round_options(variant))
    yield checked(module, "uses that end with a page", *page)
    yield checked(module, "early ends", *module.prompts_that_end_early(**_round_options(variant)))
    many_heads = 9 if variant.plain is None else 17
    for heads, head_dim in ((3, 80), (many_heads, 256) if variant.wide else (5, 64)):
        rows = module.wide_rows(heads, head_dim, **_round_options(variant))
        dense = module.restored(rows, layout=in_layout)
        for agent, length in enumerate(rows.length.tolist()):
            for head in (1, 2):
                module.alter_key(dense, agent, slice(agent + 2 * head - 2, length, 4), head, dim=0)
        yield checked(module, f"{heads} heads of {head_dim}", module.forget_mirrors(rows), dense)
    blank, dense, expected = test_cuda_launches.encode_with_bad_indices(**_round_options(variant))
    yield _known("bad indices", module, blank, dense, expected)
    yield checked(module, "tolerances", near, altered(small, 3), atol=0.02, rtol=0.5)
    in_a_tile = module.forget_mirrors(test_cuda_launches.with_capacity(near, master_pages=600))
    dense = altered(small, 3)
    yield checked(module, "tolerances in a tile", in_a_tile, dense, atol=0.02, rtol=0.5)
    yield checked(module, "a relative tolerance in a tile", in_a_tile, dense, rtol=0.5)
    plain = testing.random_round(
        4, agents=1, masters=(130,), whole_uses=True, masks="none", private_length=0, slack=False,
        num_kv_heads=1,
        **sizes,
    )  # fmt: skip
    near = _by_one_position(small)
    dense = altered(near, 9)
    yield checked(module, "by one position", module.forget_mirrors(near), dense)
    blank, dense = module.rows_at_the_tolerance(**_round_options(variant))
    yield checked(module, "at the tolerance", blank, dense, atol=0.5)
    in_a_tile = module.forget_mirrors(test_cuda_launches.with_capacity(blank, master_pages=600))
    yield checked(module, "at the tolerance in a tile", in_a_tile, dense, atol=0.5)
    blank, dense = module.one_element_each(**_round_options(variant))
    in_a_tile = module.forget_mirrors(test_cuda_launches.with_capacity(blank, master_pages=600))
    yield checked(module, "an element of each row", in_a_tile, dense, atol=0.5)
    blank, same, changed = module.zeros_and_nans(**_round_options(variant))
    yield checked(module, "bits", blank, same)
    yield checked(module, "bits of a zero", blank, changed)
    yield checked(module, "absolute tolerance", blank, changed, atol=1e-3)
    yield checked(module, "relative tolerance", blank, changed, rtol=1e-3)
    for pool, dense_rows in (
        (("mixed", "mixed"),) if variant.wide else (("mixed", "unaligned"), ("unaligned", "mixed"))
    ):
        options = {**sizes, "layout": pool}
        mixed = testing.random_round(7, agents=2, masters=(20,), rotary_dim=32, **options)
        dense = module.restored(mixed, layout=dense_rows)
        module.alter(dense, 0, range(0, int(mixed.length[0]), 3))
        yield checked(module, f"{pool} and {dense_rows}", module.forget_mirrors(mixed), dense)
    blank = module.forget_mirrors(plain)
    yield checked(module, "any element", blank, altered(plain, 1), atol=0.02, rtol=0.02)
    unmoved = testing.random_round(
        5, agents=2, masters=(9,), whole_uses=True, rotary_dim=0, **sizes
    )
    blank = replace(module.forget_mirrors(unmoved), cos=torch.empty(1, 0), sin=torch.empty(1, 0))
    yield checked(module, "no rotation", blank, module.restored(unmoved))
    alone = testing.random_round(6, agents=2, masters=0, slack=False, **sizes)
    alone = test_cuda_launches.with_capacity(alone, master_pages=2)
    yield checked(module, "no Masters", module.forget_mirrors(alone), module.restored(alone))
    if variant.plain is not None:
        options = {"interleaved": variant.interleaved, "layout": sizes["layout"]}
        for every in module.every_code_rounds(**options):
            dense = module.restored(every, layout=in_layout)
            yield checked(module, "every code", module.forget_mirrors(every), dense)
        blank, dense = module.one_nan_in_every_row(**options)
        for tolerances in ({"atol": 40.0}, {"rtol": 0.2}):
            yield checked(module, "a NaN in every row", blank, dense, **tolerances)
        blank, dense = module.one_step_in_every_row(E4M3, **options)
        yield checked(module, "a step in every row", blank, dense, atol=1.5)
    many, dense = test_cuda_launches.encode_of_many_agents(**_round_options(variant))
    yield checked(module, "many agents", module.forget_mirrors(many), dense)


def collective_attention(variant: Variant) -> Iterator[Case]:
    module = test_collective_attention
    sinks = torch.tensor([0.5, -3.0, 8.0, -torch.inf])
    sizes = _round_options(variant)
    if variant.plain is not None:
        sizes["query_dtype"] = variant.plain

    def attention(name: str, seed: int, *, check: dict[str, Any], **options: Any) -> Case:
        case = attention_rounds.attention_round(seed, **{"masters": (70, 20), **sizes, **options})
        return checked(module, name, case, **check)

    yield checked(module, "demanding", attention_rounds.demanding_round(1, **sizes))
    for check in ({}, {"sinks": sinks}):
        yield attention(
            "outputs of single items", 0, agents=2, work="planned", rows=9, masters=(40,),
            check=check,
        )  # fmt: skip
    # Of 8, 12 and 14 query rows: the last is the last that a warp writes at a time.
    for rows in (4, 7, 8):
        yield attention(
            f"outputs of up to {rows} rows", 0, agents=1, work="planned", rows=rows, masters=(40,),
            check={},
        )  # fmt: skip
    yield attention(
        "window, cap and sinks", 2, masters=(150, 20), rotary_dim=34,
        check={"window": 70, "soft_cap": 20.0, "sinks": sinks, "attention_factor": 1.2},
    )  # fmt: skip
    yield attention(
        "the other style", 2, masters=(40,), rows=2, rotary_dim=34,
        interleaved=not variant.interleaved, check={},
    )  # fmt: skip
    for block_size in (8, 32):
        yield attention(
            f"pages of {block_size}", 3, block_size=block_size, agents=4, repeat=True, rows=2,
            masters=(70, 40, 30), check={"window": 40 if block_size == 8 else 0},
        )  # fmt: skip
    yield attention(
        "rows of several tiles", 22, num_q_heads=2, num_kv_heads=1, rows=40, rows_per_item=80,
        check={"sinks": sinks[:2]},
    )  # fmt: skip
    for seed in (1000, 1023):  # in one item, and in several
        yield attention(
            "rows that see nothing", seed, masters=(33, 20, 9), whole_uses=False, agents=5,
            cut=True, holes=True, private_length=3, check={"window": 2, "sinks": sinks},
        )  # fmt: skip
    for own_first, window in ((False, 64), (True, 64), (False, 1)):
        case = attention_rounds.boundary_round(64, own_first, **sizes)
        yield checked(module, "first and last keys", case, window=window)
    hidden = attention_rounds.first_keys_hidden_round(**sizes)
    yield checked(module, "hidden first keys of pages", hidden)
    yield attention(
        "masks of small pages", 19, agents=6, masters=(70,), masks="half", rows=2, block_size=8,
        check={},
    )  # fmt: skip
    yield attention("windows of one row", 15, masters=(40, 20), work="planned", check={"window": 1})
    if variant.plain is not None:
        bare = attention_rounds.attention_round(2, masters=(70, 20), **sizes)
        bare = replace(bare, k_scale=None, v_scale=None)
        for soft_cap in (0.0, 2.0):
            yield checked(module, "no scales", bare, scale=0.001, soft_cap=soft_cap)
        opposite = attention_rounds.opposite_values_round(**sizes)
        yield checked(module, "opposite values", opposite, window=2, lse_tolerance=1e-5)
    yield checked(module, "nothing for the first rows", attention_rounds.blind_tile_round(**sizes))
    lonely = attention_rounds.lonely_round(**sizes)
    for window in (0, 3):
        yield checked(module, "single own rows", lonely, window=window)
    for first, second in ((63, 127), (127, 63)):
        case = attention_rounds.rising_round(first, second, rotary_dim=0, **sizes)
        yield checked(module, "maxima that rise", case)
    for work in ("random", "planned"):
        case = attention_rounds.equal_keys_round(work=work, **sizes)
        yield checked(module, "equal keys", case, lse_tolerance=1e-6)
    yield attention(
        "partials far apart", 19, num_q_heads=3, num_kv_heads=3, work="planned", agents=4, rows=1,
        rows_per_item=2, masters=(300,), rotary_dim=0, check={"scale": 60.0},
    )  # fmt: skip
    # Of items that begin with such a use, and of others.
    for sign in (1, -1):
        for which, work in ((-1, "random"), (0, "planned"), (1, "planned")):
            case, damage = attention_rounds.beyond_the_tables_round(sign, which, work=work, **sizes)
            yield checked(module, f"beyond the tables, {sign} {which}", case, damage=damage)
    unmoved = attention_rounds.attention_round(
        4, masters=(40, 70), rows=2, rotary_dim=0, work="planned", **sizes
    )
    unmoved = replace(unmoved, cos=torch.empty(1, 0), sin=torch.empty(1, 0))
    unmoved.round.use_shift[: unmoved.filled.uses] = 5
    yield checked(module, "no rotation, and shifts beyond the tables", unmoved)
    yield attention(
        "several Masters without rotation", 2, agents=1, masters=(40, 40), rows=2, rotary_dim=0,
        work="planned", check={},
    )  # fmt: skip
    for turn in range(9):
        case = attention_rounds.nine_partials_round(turn, **sizes)
        yield checked(module, "nine partials", case, scale=60.0)
    yield checked(
        module, "nine partials that weigh alike", attention_rounds.nine_partials_round(0, **sizes)
    )
    yield checked(module, "Masters that some lack", attention_rounds.lacking_round(**sizes))
    yield checked(module, "one of four", attention_rounds.one_of_four_round(**sizes))
    for work in ("random", "planned"):
        case = attention_rounds.neighbours_round(work=work, **sizes)
        yield checked(module, "a head for each agent", case)
        yield checked(module, "by one position", attention_rounds.by_one_position(case))
    for interleaved in (True, False):
        yield attention(
            "a factor of angles", 2, masters=(40, 70), rows=4, interleaved=interleaved,
            num_q_heads=2, work="planned", check={"attention_factor": 1.2},
        )  # fmt: skip
    case, damage = illegal_rounds.illegal_items(**sizes)
    yield checked(module, "items that there are not", case, damage=damage)
    for legal in (0, 2, 5):
        for block_size in (8, 16):
            case, damage = illegal_rounds.missing_pages(
                -1 if legal else 1 << 20, legal, block_size=block_size, **sizes
            )
            yield checked(module, "pages that there are not", case, damage=damage)
    for field, value in illegal_rounds.INDICES:
        check_index = functools.partial(
            illegal_rounds.check_illegal_index, field=field, value=value, block_size=8, **sizes
        )
        yield Case(f"{field} {value}", check_index)
    yield attention(
        "many partials", 19, num_q_heads=3, num_kv_heads=3, work="planned", agents=4, rows=1,
        rows_per_item=2, masters=(300,), check={},
    )  # fmt: skip


CASES: dict[str, Callable[[Variant], Iterable[Case]]] = {
    "rope_rotate": rope_rotate,
    "key_deviation": key_deviation,
    "merge_states": merge_states,
    "diff_restore": diff_restore,
    "diff_encode": diff_encode,
    "collective_attention": collective_attention,
}


def has_kernels(operator: str, variant: Variant) -> bool:
    """Whether an operator has kernels of a variant."""
    if operator in ("key_deviation", "merge_states"):
        return variant.plain is None
    return operator != "collective_attention" or variant.plain != F32


def cases_of(operator: str, variants: Iterable[Variant] = REPRESENTATIVE) -> list[Case]:
    """The cases of an operator for those of these variants of which it has kernels.

    Each has a name of its own.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found: list[Case] = []
        times: Counter[str] = Counter()
        for variant in filter(functools.partial(has_kernels, operator), variants):
            for case in CASES[operator](variant):
                name = f"{variant_name(variant)}: {case.name}"
                times[name] += 1
                found.append(Case(f"{name}, {times[name]}" if times[name] > 1 else name, case.run))
        return found


def variant_name(variant: Variant) -> str:
    names = {F32: "f32", F16: "f16", BF16: "bf16", E4M3: "e4m3"}
    style = "interleaved" if variant.interleaved else "half"
    plain = f"{names[variant.plain]}_" if variant.plain else ""
    return f"{plain}{names[variant.dtype]}_{style}_{'wide' if variant.wide else 'narrow'}"
