"""A compact set of cases per operator that executes every instruction of its kernels.

``tools/mutate.py`` runs them against mutated kernels and ``tools/coverage.py`` looks for what they
do not reach. A case is one of the operators' own tests with its data, so that it compares with the
reference as those do; the reference is computed once. ``CASES`` has an entry per operator: a
function of a variant of its kernels. By default some variants stand for all, since the kernels of
an operator are one template.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import attention_rounds
import illegal_rounds
import test_collective_attention
import torch
from kernel_variants import (
    ALL,
    BF16,
    F16,
    F32,
    REPRESENTATIVE,
    Case,
    Variant,
    checked,
    round_options,
    variant_name,
)
from mirror_cases import diff_encode, diff_restore
from row_cases import key_deviation, merge_states, rope_rotate

__all__ = [
    "ALL",
    "CASES",
    "REPRESENTATIVE",
    "Case",
    "Variant",
    "cases_of",
    "has_kernels",
    "variant_name",
]


def collective_attention(variant: Variant) -> Iterator[Case]:
    module = test_collective_attention
    sinks = torch.tensor([0.5, -3.0, 8.0, -torch.inf])
    # Its kernels have accesses of 16 bytes alone.
    sizes = round_options(replace(variant, wide=True))
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
    if variant.dtype in (BF16, F16):
        yield from tall_tiles(sizes)


def tall_tiles(sizes: dict[str, Any]) -> Iterator[Case]:
    """Items of more than 64 query rows, which meet tiles of 128 where kernels have them."""
    module = test_collective_attention
    tall = {**sizes, "rows_per_item": 16}
    many = {**tall, "num_q_heads": 36}  # 18 to a row: of four rows on, items are tall
    most = {**tall, "num_q_heads": 72}
    sinks = torch.linspace(-3.0, 3.0, 144)

    def attention(name: str, seed: int, *, check: dict[str, Any], **options: Any) -> Case:
        case = attention_rounds.attention_round(seed, **{"masters": (70, 20), **many, **options})
        return checked(module, f"tall, {name}", case, **check)

    yield checked(module, "tall, demanding", attention_rounds.demanding_round(1, **many))
    for check in ({}, {"sinks": sinks[:36]}):
        yield attention(
            "outputs of single items", 0, agents=2, work="planned", rows=9, masters=(40,),
            check=check,
        )  # fmt: skip
    yield attention(
        "window, cap and sinks", 2, masters=(150, 20), rotary_dim=34,
        check={
            "window": 70, "soft_cap": 20.0, "sinks": sinks[:36], "attention_factor": 1.2,
        },
    )  # fmt: skip
    for interleaved in (False, True):
        for rotary_dim in (34, 64):
            yield attention(
                "both styles", 2, masters=(40, 70), rotary_dim=rotary_dim, interleaved=interleaved,
                work="planned", check={"attention_factor": 1.2},
            )  # fmt: skip
    for block_size in (8, 32):
        yield attention(
            f"pages of {block_size}", 3, block_size=block_size, agents=4, repeat=True,
            masters=(70, 40, 30), check={"window": 40 if block_size == 8 else 0},
        )  # fmt: skip
    yield attention(
        "rows of several tiles", 22, num_q_heads=4, num_kv_heads=1, rows=40, rows_per_item=80,
        check={"sinks": sinks[:4]},
    )  # fmt: skip
    for seed in (1000, 1023):
        yield attention(
            "rows that see nothing", seed, masters=(33, 20, 9), whole_uses=False, agents=5,
            cut=True, holes=True, private_length=3, num_q_heads=144,
            check={"window": 2, "sinks": sinks},
        )  # fmt: skip
    for heads in (8, 32):  # of 8 rows: a tile of 64, and two of 128
        for own_first, window in ((False, 64), (True, 64), (False, 1)):
            case = attention_rounds.boundary_round(64, own_first, heads=heads, **sizes)
            yield checked(module, f"first and last keys, {heads} heads", case, window=window)
    hidden = attention_rounds.first_keys_hidden_round(heads=32, **sizes)
    yield checked(module, "tall, hidden first keys of pages", hidden)
    yield attention(
        "masks of small pages", 19, agents=6, masters=(70,), masks="half", rows=2, block_size=8,
        num_q_heads=72, check={},
    )  # fmt: skip
    yield attention("windows of one row", 15, masters=(40, 20), work="planned", check={"window": 1})
    blind = attention_rounds.blind_tile_round(heads=32, **sizes)
    yield checked(module, "tall, nothing for the first rows", blind)
    lonely = attention_rounds.lonely_round(**many)
    for window in (0, 3):
        yield checked(module, "tall, single own rows", lonely, window=window)
    for first, second in ((31, 127), (127, 31)):
        case = attention_rounds.rising_round(first, second, heads=40, rotary_dim=0, **tall)
        yield checked(module, "tall, maxima that rise", case)
    for work in ("random", "planned"):
        case = attention_rounds.equal_keys_round(work=work, heads=10, **tall)
        yield checked(module, "tall, equal keys", case, lse_tolerance=1e-6)
        case = attention_rounds.neighbours_round(work=work, heads=5, **sizes, rows_per_item=40)
        yield checked(module, "tall, five heads for each agent", case, attention_factor=1.2)
        yield checked(module, "tall, by one position", attention_rounds.by_one_position(case))
    for sign in (1, -1):
        for which, work in ((-1, "random"), (0, "planned"), (1, "planned")):
            case, damage = attention_rounds.beyond_the_tables_round(sign, which, work=work, **most)
            yield checked(module, f"tall, beyond the tables, {sign} {which}", case, damage=damage)
    yield attention(
        "several Masters without rotation", 2, agents=1, masters=(40, 40), rotary_dim=0,
        work="planned", check={},
    )  # fmt: skip
    yield checked(module, "tall, Masters that some lack", attention_rounds.lacking_round(**many))
    yield checked(module, "tall, one of four", attention_rounds.one_of_four_round(8, **sizes))
    case, damage = illegal_rounds.illegal_items(**most)
    yield checked(module, "tall, items that there are not", case, damage=damage)
    for legal in (0, 2, 5):
        for block_size in (8, 16):
            case, damage = illegal_rounds.missing_pages(
                -1 if legal else 1 << 20, legal, block_size=block_size, **most
            )
            yield checked(module, "tall, pages that there are not", case, damage=damage)
    for field, value in illegal_rounds.INDICES:
        check_index = functools.partial(
            illegal_rounds.check_illegal_index, field=field, value=value, block_size=8, **most
        )
        yield Case(f"tall, {field} {value}", check_index)


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
