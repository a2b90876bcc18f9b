"""Cases of kernels over Mirrors: restore and encode; see `kernel_cases`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import test_cuda_launches
import test_diff_encode
import test_diff_restore
import torch
from kernel_variants import (
    E4M3,
    F32,
    Case,
    Variant,
    checked,
    known,
    last_block_first,
    round_options,
)

from tokendance import testing


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
    sizes = round_options(variant)
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
    yield known("bad indices", module, case, dense, expected)
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


def _lacks_all_masters(**options: Any) -> testing.RandomRound:
    """A round whose first agent has a prompt and no Master, and whose second has one."""
    rounds = (testing.random_round(seed, agents=2, **options) for seed in itertools.count())
    return next(c for c in rounds if c.arrays["use_agent"].tolist() == [1] and c.length[0] > 0)


def _restored(name: str, variant: Variant, out_dtype: torch.dtype, **options: Any) -> Case:
    """Three agents that use Masters of pages of 8 rows whole."""
    options = {"masters": (9, 20), **round_options(variant), **options}
    case = testing.random_round(8, agents=3, whole_uses=True, block_size=8, **options)
    layout = "heads_first" if variant.wide else "unaligned"
    dense = testing.dense_cache(case, 1, layout=layout, dtype=out_dtype)
    return checked(test_diff_restore, name, case, dense)


def _in_a_tile(case: testing.RandomRound) -> testing.RandomRound:
    """A round before encoding, in whose comparison a block has all the agents."""
    with_room = test_cuda_launches.with_capacity(case, master_pages=600)
    return test_diff_encode.forget_mirrors(with_room)


def _in_all_slots(name: str, case: Any, dense: Any, **tolerances: float) -> Iterator[Case]:
    """Cases of two agents. The comparison has instructions of its own for every other agent of a
    tile: with tiles of one agent, both have the first ones."""
    blank = test_diff_encode.forget_mirrors(case)
    yield checked(test_diff_encode, name, blank, dense, **tolerances)
    in_a_tile = _in_a_tile(case)
    yield checked(test_diff_encode, f"{name} in a tile", in_a_tile, dense, **tolerances)


def diff_encode(variant: Variant) -> Iterator[Case]:
    module = test_diff_encode
    rotary_dim = 32 if variant.wide else 34
    sizes = {**round_options(variant), "room_for_all": True}
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
    halfway = module.halfway_round(**round_options(variant))
    dense = module.restored(halfway, layout=in_layout)
    yield from _in_all_slots("halfway", halfway, dense)
    near = module.forget_mirrors(small)
    long, dense = module.long_prompts(**round_options(variant))
    long_prompts = checked(module, "long prompts", module.forget_mirrors(long), dense)
    yield long_prompts
    yield last_block_first(long_prompts)
    yield checked(module, "one own row", *module.one_own_row(**round_options(variant)))
    yield checked(module, "little room", *module.little_room(1, **round_options(variant)))
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
    page = module.uses_that_end_with_a_page(**round_options(variant))
    yield checked(module, "uses that end with a page", *page)
    yield checked(module, "early ends", *module.prompts_that_end_early(**round_options(variant)))
    many_heads = 9 if variant.plain is None else 17
    for heads, head_dim in ((3, 80), (many_heads, 256) if variant.wide else (5, 64)):
        rows = module.wide_rows(heads, head_dim, **round_options(variant))
        dense = module.restored(rows, layout=in_layout)
        for agent, length in enumerate(rows.length.tolist()):
            for head in (1, 2):
                module.alter_key(dense, agent, slice(agent + 2 * head - 2, length, 4), head, dim=0)
        yield checked(module, f"{heads} heads of {head_dim}", module.forget_mirrors(rows), dense)
    blank, dense, expected = test_cuda_launches.encode_with_bad_indices(**round_options(variant))
    yield known("bad indices", module, blank, dense, expected)
    yield checked(module, "tolerances", near, altered(small, 3), atol=0.02, rtol=0.5)
    dense = altered(small, 3)
    yield checked(module, "tolerances in a tile", _in_a_tile(near), dense, atol=0.02, rtol=0.5)
    yield checked(module, "a relative tolerance in a tile", _in_a_tile(near), dense, rtol=0.5)
    plain = testing.random_round(
        4, agents=1, masters=(130,), whole_uses=True, masks="none", private_length=0, slack=False,
        num_kv_heads=1,
        **sizes,
    )  # fmt: skip
    near = _by_one_position(small)
    dense = altered(near, 9)
    yield checked(module, "by one position", module.forget_mirrors(near), dense)
    blank, dense = module.rows_at_the_tolerance(**round_options(variant))
    yield from _in_all_slots("at the tolerance", blank, dense, atol=0.5)
    blank, dense = module.one_element_each(**round_options(variant))
    yield checked(module, "an element of each row", _in_a_tile(blank), dense, atol=0.5)
    blank, same, changed = module.zeros_and_nans(**round_options(variant))
    yield from _in_all_slots("bits", blank, same)
    yield from _in_all_slots("bits of a zero", blank, changed)
    yield from _in_all_slots("absolute tolerance", blank, changed, atol=1e-3)
    yield from _in_all_slots("relative tolerance", blank, changed, rtol=1e-3)
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
            yield from _in_all_slots("every code", every, dense)
        blank, dense = module.one_nan_in_every_row(**options)
        for tolerances in ({"atol": 40.0}, {"rtol": 0.2}):
            yield from _in_all_slots("a NaN in every row", blank, dense, **tolerances)
        blank, dense = module.one_step_in_every_row(E4M3, **options)
        yield from _in_all_slots("a step in every row", blank, dense, atol=1.5)
    lacking = _lacks_all_masters(masters=(9,), **sizes)
    dense = altered(lacking, 2)
    lacks = checked(module, "an agent without Masters", module.forget_mirrors(lacking), dense)
    yield last_block_first(lacks)  # or a mask of this agent's might be written over
    many, dense = test_cuda_launches.encode_of_many_agents(**round_options(variant))
    yield checked(module, "many agents", module.forget_mirrors(many), dense)
