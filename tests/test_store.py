"""DiffStore: what is put comes back bit for bit, and nothing is stored twice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from driving import GEOMETRY, ROPE, make_store, restored, tokens
from torch import Tensor

import tokendance as td
from tokendance.sizes import parse_bytes

A, B, C = (tokens(seed, count) for seed, count in ((1, 20), (2, 30), (3, 17)))
MINE, YOURS = tokens(10, 13), tokens(11, 29)
Dense = dict[str, tuple[list[Tensor], list[Tensor]]]


def segments_of_all() -> dict[str, list[td.Segment]]:
    return {
        "a": [td.private(MINE), td.shared(A), td.shared(B), td.private(C)],
        "b": [td.private(YOURS), td.shared(B), td.shared(A), td.shared(B)],
        "c": [td.shared(B), td.private(C)],
    }


def random_dense(
    prompts: dict[str, list[td.Segment]], geometry: td.KVGeometry, seed: int = 0
) -> Dense:
    generator = torch.Generator().manual_seed(seed)
    heads = (geometry.num_kv_heads, geometry.head_dim)

    def rows(length: int) -> list[Tensor]:
        return [
            torch.randn(length, *heads, generator=generator).to(geometry.dtype)
            for _ in range(geometry.num_layers)
        ]

    lengths = {agent: sum(segment.length for segment in p) for agent, p in prompts.items()}
    return {agent: (rows(length), rows(length)) for agent, length in lengths.items()}


def dense_of(store: td.DiffStore, agent: str) -> tuple[list[Tensor], list[Tensor]]:
    geometry, length = store.geometry, store.length(agent)
    shape = (length, geometry.num_kv_heads, geometry.head_dim)
    layers = range(geometry.num_layers)
    k = [torch.full(shape, torch.nan, dtype=geometry.dtype) for _ in layers]
    v = [torch.full(shape, torch.nan, dtype=geometry.dtype) for _ in layers]
    store.restore(agent, list(layers), k, v, torch.arange(length))
    return k, v


def same(a: tuple[list[Tensor], list[Tensor]], b: tuple[list[Tensor], list[Tensor]]) -> bool:
    return all(
        torch.equal(x, y)
        for one, two in zip(a, b, strict=True)
        for x, y in zip(one, two, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block_size", [8, 16, 32])
def test_restore_is_bit_for_bit_what_was_put(dtype: torch.dtype, block_size: int) -> None:
    geometry = td.KVGeometry(2, 2, 2, 64, dtype)
    store = td.DiffStore(geometry, ROPE, "64MiB", block_size=block_size)
    dense = random_dense(segments_of_all(), geometry)
    store.put_round(dense, segments_of_all())
    for agent, cache in dense.items():
        assert same(dense_of(store, agent), cache)
    master = next(agent for agent in ("a", "b") if store.mirror(agent).uses[0].shift == 0)
    for use in store.mirror(master).uses:
        if use.shift == 0:
            assert not use.masks.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_sibling_made_by_restore_and_altered_in_r_rows_keeps_exactly_r_rows(
    dtype: torch.dtype,
) -> None:
    geometry = td.KVGeometry(2, 2, 2, 64, dtype)
    prompts = {
        "a": [td.private(MINE), td.shared(A), td.shared(B)],
        "b": [td.private(YOURS), td.shared(B), td.shared(A)],
    }
    first = td.DiffStore(geometry, ROPE, "64MiB", block_size=8)
    dense = random_dense(prompts, geometry)
    # With an endless tolerance nothing is overridden: b is private rows and moved Master rows.
    first.put_round(dense, prompts, atol=float("inf"))
    assert first.stats().own_rows == len(MINE) + len(YOURS)
    sibling = dense_of(first, "b")

    altered = [29, 40, 41, 58, 59, 78]
    for n, row in enumerate(altered):
        tensors = sibling[n % 2][n % geometry.num_layers]
        tensors[row, n % 2, n] = torch.nextafter(
            tensors[row, n % 2, n], torch.tensor(9.0, dtype=dtype)
        )
    second = td.DiffStore(geometry, ROPE, "64MiB", block_size=8)
    second.put_round({"a": dense["a"], "b": sibling}, prompts)
    assert second.stats().own_rows == len(MINE) + len(YOURS) + len(altered)
    own = second.mirror("b").own_position.tolist()
    assert own == [*range(29), *altered]
    assert same(dense_of(second, "b"), sibling)


def test_tolerance_bounds_the_error() -> None:
    prompts = {
        "a": [td.private(MINE), td.shared(B)],
        "b": [td.private(YOURS), td.shared(B)],
    }
    dense = random_dense(prompts, GEOMETRY)
    exact = make_store()
    exact.put_round(dense, prompts, atol=float("inf"))
    near = dense_of(exact, "b")
    noise = [[t + 1e-3 * torch.randn_like(t).clamp(-1, 1) for t in side] for side in near]
    store = make_store()
    store.put_round({"a": dense["a"], "b": (noise[0], noise[1])}, prompts, atol=1.01e-3)
    assert store.stats().own_rows == len(MINE) + len(YOURS)
    for side, wanted in zip(dense_of(store, "b"), noise, strict=True):
        for got, want in zip(side, wanted, strict=True):
            assert (got - want).abs().max() <= 1.02e-3
    assert store.mirror("b").exact_length == len(YOURS)


def test_rows_that_a_tolerance_may_have_replaced_are_not_exact() -> None:
    store = make_store()
    prompts = {"a": [td.private(MINE), td.shared(B), td.private(C)]}
    prompts["b"] = [*prompts["a"][:2], td.private(A)]  # at the same positions: not moved
    dense = random_dense(prompts, GEOMETRY)
    store.put_round(dense, prompts, atol=float("inf"))
    assert same(dense_of(store, "a"), dense["a"])
    assert not same(dense_of(store, "b"), dense["b"])
    exact = {agent: store.mirror(agent).exact_length for agent in "ab"}
    assert exact == {"a": store.length("a"), "b": len(MINE)}
    store.put_round(dense, prompts)
    exact = {agent: store.mirror(agent).exact_length for agent in "ab"}
    assert exact == {agent: store.length(agent) for agent in "ab"}


def test_put_round_with_one_table_per_layer() -> None:
    ropes = [td.Rope.default(64, 1e6, 4096, interleaved=True), None]
    store = td.DiffStore(GEOMETRY, ropes, "64MiB", block_size=8)
    dense = random_dense(segments_of_all(), GEOMETRY)
    store.put_round(dense, segments_of_all())
    for agent, cache in dense.items():
        assert same(dense_of(store, agent), cache)


def test_restore_of_many_agents_through_pages_and_skips() -> None:
    store = make_store()
    dense = random_dense(segments_of_all(), GEOMETRY)
    store.put_round(dense, segments_of_all())
    pages = torch.full((64, 4, 1, 64), torch.nan)
    v_pages = torch.full((64, 4, 1, 64), torch.nan)
    lengths = [store.length(agent) for agent in ("a", "c")]
    slots = torch.full((2, max(lengths) + 3), -1)
    slots[0, : lengths[0]] = torch.arange(lengths[0]).flip(0)
    slots[1, 5 : lengths[1]] = 150 + torch.arange(5, lengths[1])
    store.restore(["a", "c"], 1, pages, v_pages, slots)
    flat = pages.view(-1, 1, 64)
    assert torch.equal(flat[: lengths[0]], dense["a"][0][1].flip(0))
    assert torch.equal(flat[155 : 150 + lengths[1]], dense["c"][0][1][5:])
    assert flat[lengths[0] : 155].isnan().all()
    assert flat[150 + lengths[1] :].isnan().all()


def test_restore_of_a_numpy_layer_and_into_one_tensor() -> None:
    store = make_store()
    dense = random_dense(segments_of_all(), GEOMETRY)
    store.put_round(dense, segments_of_all())
    out = torch.empty(2, store.length("a"), 1, 64)
    store.restore("a", np.int64(1), out[0], out[1], torch.arange(out.shape[1]))  # type: ignore[arg-type]
    assert torch.equal(out[1], dense["a"][1][1])
    with pytest.raises(ValueError, match="v_cache: expected memory of its own, got that of k_c"):
        store.restore("a", 1, out[0], out[0], torch.arange(out.shape[1]))


def test_put_again_replaces_and_release_gives_back() -> None:
    store = make_store()
    dense = random_dense(segments_of_all(), GEOMETRY)
    store.put_round(dense, segments_of_all())
    again = random_dense(segments_of_all(), GEOMETRY, seed=1)
    store.put_round(again, segments_of_all())
    for agent, cache in again.items():
        assert same(dense_of(store, agent), cache)
    for agent in segments_of_all():
        store.release(agent)
    with pytest.raises(KeyError, match="agent: expected one of"):
        store.release("a")
    stats = store.stats()
    assert (stats.agents, stats.own_rows, stats.dense_rows) == (0, 0, 0)
    assert stats.used_pages * 8 >= stats.master_rows > 0


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d, p: d.pop("b"), r"prompts: expected agents \['a', 'c'\], got \['a', 'b', 'c'\]"),
        (lambda d, p: d["a"][0].pop(), r"dense\['a'\] keys: expected 2 layers, got 1"),
        (
            lambda d, p: d["a"][1].__setitem__(1, d["a"][1][1][1:]),
            r"dense\['a'\] values\[1\]: expected \[80, 1, 64\], got \[79, 1, 64\]",
        ),
        (
            lambda d, p: d["a"][1].__setitem__(0, d["a"][1][0].half()),
            r"dense\['a'\] values\[0\]: expected torch.float32 on cpu, got torch.float16 on cpu",
        ),
    ],
)
def test_bad_dense_caches_change_nothing(change: object, text: str) -> None:
    store = make_store()
    store.put_round(random_dense(segments_of_all(), GEOMETRY), segments_of_all())
    before = store.stats(), restored(store, "b")
    dense, prompts = random_dense(segments_of_all(), GEOMETRY, seed=1), segments_of_all()
    change(dense, prompts)  # type: ignore[operator]
    with pytest.raises(ValueError, match=text):
        store.put_round(dense, prompts)
    assert store.stats() == before[0]
    for (k, v), (old_k, old_v) in zip(restored(store, "b"), before[1], strict=True):
        assert torch.equal(k, old_k)
        assert torch.equal(v, old_v)


def test_put_round_reads_segments_once() -> None:
    store = make_store()
    dense = random_dense(segments_of_all(), GEOMETRY)
    store.put_round(dense, {agent: iter(mine) for agent, mine in segments_of_all().items()})  # type: ignore[misc]
    for agent, cache in dense.items():
        assert store.length(agent) == len(cache[0][0])
        assert same(dense_of(store, agent), cache)
    with pytest.raises(
        TypeError, match=r"prompts\['c'\]: expected segments \(private.*\), got int"
    ):
        store.put_round(dense, {**segments_of_all(), "c": [1, 2]})  # type: ignore[dict-item]


def test_put_round_without_room_changes_nothing() -> None:
    store = td.DiffStore(GEOMETRY, ROPE, 20 * 8 * GEOMETRY.row_bytes, block_size=8)
    small = {"x": [td.private(C)]}
    store.put_round(random_dense(small, GEOMETRY), small)
    before = store.stats()
    with pytest.raises(td.OutOfPagesError, match="capacity"):
        store.put_round(random_dense(segments_of_all(), GEOMETRY), segments_of_all())
    assert store.stats() == before


def test_what_can_never_fit_evicts_nothing() -> None:
    store = td.DiffStore(GEOMETRY, ROPE, 9 * 8 * GEOMETRY.row_bytes, block_size=8)
    prompts = {"a": [td.private(range(16))], "b": [td.shared(tokens(1, 32))]}
    store.put_round(random_dense(prompts, GEOMETRY), prompts)
    store.release("b")
    before = store.stats()
    with pytest.raises(td.OutOfPagesError, match="capacity: expected 8 free pages"):
        store.books.take_pages(8)
    assert store.stats() == before
    assert len(store.books.take_pages(7)) == 7
    assert store.stats().evictions == 1


def test_put_round_evicts_no_master_that_it_uses() -> None:
    store = td.DiffStore(GEOMETRY, ROPE, 9 * 8 * GEOMETRY.row_bytes, block_size=8)
    heard, fresh = td.shared(tokens(1, 64)), td.shared(tokens(2, 16))
    first = {"a": [heard]}
    dense = random_dense(first, GEOMETRY)
    store.put_round(dense, first)
    store.release("a")
    second = {"c": [heard, fresh, td.private(range(8))]}
    later = random_dense(second, GEOMETRY, seed=1)
    for side, stored in zip(later["c"], dense["a"], strict=True):
        for rows, same_rows in zip(side, stored, strict=True):
            rows[:64] = same_rows
    before = store.stats()
    with pytest.raises(td.OutOfPagesError, match="capacity: expected 2 free pages"):
        store.put_round(later, second)
    assert store.stats() == before
    small = {"c": [heard, td.private(range(8))]}
    fits = {"c": tuple([rows[:72] for rows in side] for side in later["c"])}
    store.put_round(fits, small)  # type: ignore[arg-type]
    assert store.stats().own_rows == 8
    assert same(dense_of(store, "c"), fits["c"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: td.KVGeometry(1, 3, 2, 64),
            "num_q_heads: expected a multiple of num_kv_heads=2, got 3",
        ),
        (
            lambda: td.KVGeometry(1, 0, 2, 64),
            "num_q_heads: expected a multiple of num_kv_heads=2, got 0",
        ),
        (lambda: td.KVGeometry(1, 2, 0, 64), "num_kv_heads: expected at least 1, got 0"),
        (lambda: td.KVGeometry(1, 2, 2, 72), r"head_dim: expected one of \(64, .*\), got 72"),
        (lambda: td.KVGeometry(0, 2, 2, 64), "num_layers: expected at least 1, got 0"),
        (lambda: td.KVGeometry(1, 2, 2, 64, torch.int8), "dtype: expected one of"),
        (lambda: td.DiffStore(GEOMETRY, ROPE), "capacity: expected either capacity or pool"),
        (lambda: td.DiffStore(GEOMETRY, ROPE, 8), "capacity: expected at least one page"),
        (lambda: td.DiffStore(GEOMETRY, ROPE, "8 pages"), "capacity: expected bytes or text"),
        (lambda: td.DiffStore(GEOMETRY, ROPE, 1e6), "capacity: expected bytes or text .* got 1000"),
        (
            lambda: td.DiffStore(GEOMETRY, ROPE, "1MiB", block_size=12),
            "block_size: expected one of",
        ),
        (lambda: td.DiffStore(GEOMETRY, [ROPE], "1MiB"), "rope: expected 2 layers, got 1"),
        (
            lambda: td.DiffStore(GEOMETRY, td.Rope.default(128, 1e4, 64), "1MiB"),
            "rope: expected rotary_dim <= head_dim=64, got 128",
        ),
        (
            lambda: td.PagePool([torch.zeros(2, 8, 1, 64)], [], lambda n: [], lambda p: None),
            "v_pools: expected 1 layers, got 0",
        ),
        (
            lambda: td.PagePool(
                [torch.zeros(2, 8, 1, 64)], [torch.zeros(2, 8, 64, 1)], lambda n: [], lambda p: None
            ),
            r"v_pools\[0\]: expected \[2, 8, 1, 64\]",
        ),
        (
            lambda: td.PagePool(
                [torch.zeros(2, 8, 1, 128)[..., ::2]],
                [torch.zeros(2, 8, 1, 128)[..., ::2]],
                lambda n: [],
                lambda p: None,
            ),
            r"k_pools\[0\]: expected innermost stride 1, got 2",
        ),
        (
            lambda: td.PagePool(
                [torch.zeros(1, 8, 1, 64).expand(2, 8, 1, 64)],
                [torch.zeros(1, 8, 1, 64).expand(2, 8, 1, 64)],
                lambda n: [],
                lambda p: None,
            ),
            r"k_pools\[0\]: expected no stride of 0, got \[0, 64, 64, 1\]",
        ),
        (
            lambda: td.PagePool(*([torch.zeros(2, 8, 1, 64)],) * 2, lambda n: [], lambda p: None),
            r"v_pools\[0\]: expected memory of its own, got that of k_pools\[0\]",
        ),
    ],
)
def test_constructors_name_what_is_wrong(make: object, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ([0, 1], r"3 page ids, got \[2\]"),
        ([0.0, 1.0, 2.0], "integers, got float64"),
        ([0, 1, 4], r"pages 0\.\.3, got 0\.\.4"),
        ([-1, 1, 2], r"pages 0\.\.3, got -1\.\.2"),
        ([0, 1, 1], "3 different pages, got 2"),
        ([2, 3, 0], r"pages not in use, got \[3\]"),
    ],
)
def test_pages_of_an_allocator_are_checked_and_given_back(given: list[int], text: str) -> None:
    answers, back = [[3], given], []  # type: ignore[var-annotated]
    pools = [torch.zeros(4, 8, 1, 64) for _ in range(4)]
    pool = td.PagePool(pools[:2], pools[2:], lambda n: answers.pop(0), back.extend)
    store = td.DiffStore(GEOMETRY, ROPE, pool=pool)
    store.books.take_pages(1)
    with pytest.raises(ValueError, match=f"allocate: expected {text}"):
        store.books.take_pages(3)
    assert back == [page for page in given if page != 3]
    assert store.stats().used_pages == 1


def test_parse_bytes() -> None:
    assert parse_bytes("8GiB") == 8 << 30
    assert parse_bytes("1.5 MB") == 3 << 19
    assert parse_bytes(" 4096 ") == parse_bytes(4096) == 4096


def test_position_of_own_rows_stays_within_the_prompt() -> None:
    store = make_store()
    store.put_round(random_dense(segments_of_all(), GEOMETRY), segments_of_all())
    for agent in segments_of_all():
        own = store.mirror(agent).own_position
        assert (np.diff(own) > 0).all()
        assert own.size == 0 or 0 <= own[0] <= own[-1] < store.length(agent)
