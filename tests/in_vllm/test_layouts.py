"""Caches as vLLM lays them out for GPUs: made by vLLM's own code on the CPU, where its backends'
writers are called, too, over an operator that is written here."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from plain_backend import laid_out
from serving import serving, token_ids
from small_rounds import EXACT, a_round, alone, drawn, nothing_left
from torch import Tensor
from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.utils import allocate_kv_cache

import tokendance as td
from tokendance.device.executor import Executor
from tokendance.device.pool import PagePool
from tokendance.host.plan import Policy
from tokendance.host.scheduler import Scheduler
from tokendance.integrations.vllm.cache import EngineCache

LAYERS, HEADS, DIM, BLOCK, BLOCKS = 3, 2, 64, 16, 12
# Backends of GPUs that write `[B, H, N, 2 * D]` by the same operator of vLLM's.
BACKENDS = {
    "flash_attn": "FlashAttentionImpl",
    "flashinfer": "FlashInferImpl",
    "flex_attention": "FlexAttentionImpl",
}
CASES = [
    *((layout, BLOCK, heads) for layout in KVCacheLayout for heads in (HEADS, 1)),
    # Blocks that the backend has as two each, where vLLM allows it.
    *((layout, BLOCK // 2, HEADS) for layout in (KVCacheLayout.LBNHC, KVCacheLayout.LBHNC)),
]


def reshape_and_cache_flash(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str,
    k_scale: Tensor,
    v_scale: Tensor,
) -> None:
    """What vLLM's operator of this name does, of caches ``[B, N, H, D]``."""
    assert kv_cache_dtype == "auto"
    block, row = slot_mapping // key_cache.shape[1], slot_mapping % key_cache.shape[1]
    key_cache[block, row] = key[: len(slot_mapping)]
    value_cache[block, row] = value[: len(slot_mapping)]


@pytest.fixture(scope="module", autouse=True)
def operator() -> Iterator[None]:
    if hasattr(torch.ops._C_cache_ops, "reshape_and_cache_flash"):
        yield
        return
    library = torch.library.Library("_C_cache_ops", "FRAGMENT")
    library.define(
        "reshape_and_cache_flash(Tensor key, Tensor value, Tensor(a!) key_cache, "
        "Tensor(b!) value_cache, Tensor slot_mapping, str kv_cache_dtype, Tensor k_scale, "
        "Tensor v_scale) -> ()"
    )
    library.impl("reshape_and_cache_flash", reshape_and_cache_flash, "CPU")
    yield
    library._destroy()


class _Anything:
    """A name of flashinfer's, which is not needed to write its cache and not installed."""

    def __class_getitem__(cls, key: Any) -> type:
        return cls


def writer(backend: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A backend's own object, with no more in it than its cache writer asks for."""
    from vllm import _custom_ops

    name = f"vllm.v1.attention.backends.{backend}"
    if backend == "flashinfer":
        for part in ("flashinfer", "flashinfer.decode", "flashinfer.prefill", "flashinfer.utils"):
            stand_in = ModuleType(part)
            stand_in.__getattr__ = lambda _: _Anything  # type: ignore[method-assign]
            monkeypatch.setitem(sys.modules, part, stand_in)
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(name)
    if backend == "flash_attn":  # which takes it from there on a GPU
        ours = _custom_ops.reshape_and_cache_flash
        monkeypatch.setattr(module, "reshape_and_cache_flash", ours, raising=False)
    impl = object.__new__(getattr(module, BACKENDS[backend]))
    impl.head_size, impl.attn_type = DIM, "decoder"
    impl.kv_cache_dtype = impl.cache_dtype = "auto"
    impl.kv_sharing_target_layer_name = None
    impl.nvfp4_fa2 = impl.is_kvcache_nvfp4 = False
    return impl


def layers_of(
    layout: KVCacheLayout, impl: Any, kernel_block: int = BLOCK, heads: int = HEADS
) -> list[Any]:
    """Attention layers with the caches that vLLM makes for a GPU."""
    names = [f"model.layers.{i}.self_attn.attn" for i in range(LAYERS)]
    spec = FullAttentionSpec(
        block_size=BLOCK, num_kv_heads=heads, head_size=DIM, dtype=torch.float32
    )
    cache = SimpleNamespace(
        get_resolved_kv_cache_layout=lambda: layout,
        num_gpu_blocks_override=BLOCKS,
        prefix_cache_retention_interval=None,
    )
    config = SimpleNamespace(
        cache_config=cache, attention_config=SimpleNamespace(hisparse_config=None)
    )
    groups = [KVCacheGroupSpec(names, spec)]
    plan = get_kv_cache_config_from_groups(config, groups, 1 << 30)
    assert plan.num_blocks == BLOCKS
    caches = allocate_kv_cache(plan, torch.device("cpu"), layout, [kernel_block])
    one = torch.ones(())
    return [
        SimpleNamespace(
            kv_cache=caches[name],
            impl=impl,
            num_kv_heads=heads,
            head_size=DIM,
            _k_scale=one,
            _v_scale=one,
        )
        for name in names
    ]


@pytest.mark.parametrize("of", BACKENDS)
@pytest.mark.parametrize(("layout", "kernel_block", "heads"), CASES)
def test_rows_are_written_and_read_where_the_backend_has_them(
    layout: KVCacheLayout,
    of: str,
    kernel_block: int,
    heads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers = layers_of(layout, writer(of, monkeypatch), kernel_block, heads)
    cache = EngineCache(layers, BLOCKS)
    assert cache.block_size == BLOCK
    assert cache.views is not None
    # What backends call the layout is what was found.
    for layer, *views in zip(layers, *cache.views, strict=True):
        theirs = layer.kv_cache.transpose(1, 2).split(DIM, dim=-1)
        for view, other in zip(views, theirs, strict=True):
            assert view.data_ptr() == other.data_ptr()
            assert view.shape == other.shape
            sizes = zip(view.shape, view.stride(), other.stride(), strict=True)
            assert all(mine == its for size, mine, its in sizes if size > 1)
    # The backend's writer, and reading.
    slots = np.random.default_rng(0).permutation(BLOCKS * BLOCK)[:50].astype(np.int64)
    wanted = [torch.randn(2, 50, heads, DIM) for _ in layers]
    for layer, (k, v) in zip(layers, wanted, strict=True):
        layer.impl.do_kv_cache_update(layer, k, v, layer.kv_cache, torch.from_numpy(slots))
    keys, values = cache.read(slots)
    for k, v, both in zip(keys, values, wanted, strict=True):
        assert torch.equal(torch.stack([k, v]), both)


@pytest.mark.parametrize("layout", KVCacheLayout, ids=lambda one: one.name)
def test_a_round_is_restored_into_all_layers_by_one_launch(
    layout: KVCacheLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokendance.device import executor as executing

    geometry = td.KVGeometry(LAYERS, 2 * HEADS, HEADS, DIM, torch.float32)
    pool = PagePool.own(geometry, 64, 8, "cpu")
    for one in (*pool.k_pools, *pool.v_pools):
        one.normal_()
    executor = Executor(geometry, td.Rope.default(head_dim=DIM, theta=1e4, max_position=512), pool)
    scheduler = Scheduler(executor.profile)
    shared = td.shared(range(5, 45))
    prompts = {f"agent {i}": [td.private(range(100 * i, 100 * i + 9 + i)), shared] for i in (1, 2)}
    plan = scheduler.plan(prompts, Policy(td.Nothing()))
    while step := scheduler.step(max_rows=1024):
        step.finish()
    lengths = {agent: plan.length(agent) for agent in prompts}
    blocks = {"agent 1": [7, 2, 11, 4], "agent 2": [1, 9, 3, 5]}
    slots = np.full((2, max(lengths.values())), -1, dtype=np.int64)
    for row, agent in enumerate(prompts):
        at = np.arange(4, lengths[agent] - 1)  # what vLLM has found and computes is left out
        slots[row, at] = np.array(blocks[agent])[at // BLOCK] * BLOCK + at % BLOCK
    record = plan.restore(list(prompts), slots)
    dense = [[torch.empty(BLOCKS * BLOCK, HEADS, DIM) for _ in range(LAYERS)] for _ in range(2)]
    executor.restore(record, range(LAYERS), *dense)

    launches = []
    launch = executing.ops.diff_restore
    monkeypatch.setattr(
        executing.ops, "diff_restore", lambda *given: (launches.append(1), launch(*given))
    )
    layers = layers_of(layout, writer("flash_attn", monkeypatch))
    for layer in layers:
        layer.kv_cache.fill_(torch.nan)
    cache = EngineCache(layers, BLOCKS)
    cache.write(executor, record)
    assert len(launches) == 1
    written = np.sort(slots[slots >= 0])
    keys, values = cache.read(written)
    at = torch.from_numpy(written)
    for layer in range(LAYERS):
        assert torch.equal(keys[layer], dense[0][layer][at])
        assert torch.equal(values[layer], dense[1][layer][at])
        # Nothing else was.
        assert int((~layers[layer].kv_cache.isnan()).sum()) == written.size * 2 * HEADS * DIM


@pytest.mark.parametrize("layout", KVCacheLayout, ids=lambda one: one.name)
def test_a_round_is_computed_in_blocks_of_the_cache_as_in_pages_of_ones_own(
    layout: KVCacheLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The views are a pool, bit for bit."""
    geometry = td.KVGeometry(LAYERS, 2 * HEADS, HEADS, DIM, torch.float32)
    rope = td.Rope.default(head_dim=DIM, theta=1e4, max_position=512)
    cache = EngineCache(layers_of(layout, writer("flash_attn", monkeypatch)), BLOCKS)
    assert cache.views is not None
    shared = td.shared(range(5, 45))
    prompts = {f"agent {i}": [td.private(range(100 * i, 100 * i + 9)), shared] for i in (1, 2)}
    outputs = []
    for pool in (PagePool(*cache.views), PagePool.own(geometry, BLOCKS, BLOCK, "cpu")):
        collector = td.KVCollector(td.DiffStore(geometry, rope, pool=pool))
        plan = collector.plan(prompts)
        while step := collector.step(prefill=plan.prefilling, max_rows=32):
            with step:
                ids = step.token_ids
                for layer in range(LAYERS):
                    generator = torch.Generator().manual_seed(layer)
                    rows = torch.randn(400, 4 * HEADS, DIM, generator=generator)[ids]
                    q, k, v = rows.split([2 * HEADS, HEADS, HEADS], dim=1)
                    outputs.append(step.attend(layer, q, k, v))
                    (ids,) = step.keep(ids)
        assert plan.rows_computed < plan.rows
        plan.commit()
    half = len(outputs) // 2
    assert half > LAYERS
    assert all(torch.equal(*both) for both in zip(outputs[:half], outputs[half:], strict=True))


def test_rows_that_a_backend_packs_have_no_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """As keys on a CPU: they go through its writer, a few layers at a time."""
    impl = writer("flash_attn", monkeypatch)
    plain = impl.do_kv_cache_update

    def packed(layer: Any, k: Tensor, v: Tensor, cache: Tensor, slots: Tensor) -> None:
        order = torch.arange(DIM).view(2, -1).T.flatten()  # halves of a row are interleaved
        plain(layer, k[..., order], v, cache, slots)

    impl.do_kv_cache_update = packed
    layers = layers_of(KVCacheLayout.LBNHC, impl)
    cache = EngineCache(layers, BLOCKS)
    assert cache.views is None
    slots = np.array([3, 40, 17], dtype=np.int64)
    wanted = [torch.randn(2, 3, HEADS, DIM) for _ in layers]
    for layer, (k, v) in zip(layers, wanted, strict=True):
        packed(layer, k, v, layer.kv_cache, torch.from_numpy(slots))
    for k, v, both in zip(*cache.read(slots), wanted, strict=True):
        assert torch.equal(torch.stack([k, v]), both)


@pytest.mark.parametrize(
    ("layout", "shared"),
    [
        pytest.param(KVCacheLayout.LBNHC, True, marks=pytest.mark.slow),
        (KVCacheLayout.BLHNC, False),
        pytest.param(KVCacheLayout.BLNHC, False, marks=pytest.mark.slow),
        pytest.param(KVCacheLayout.LHBNC, False, marks=pytest.mark.slow),
    ],
    ids=lambda one: getattr(one, "name", f"shared={one}"),
)
def test_an_engine_whose_cache_is_as_on_a_gpu_answers_as_vllm_alone(
    tiny: Path, layout: KVCacheLayout, shared: bool
) -> None:
    """With an attention backend of these tests."""
    prompts, others = a_round(45), a_round(46, agents=2)
    options = EXACT | {"shared_decode": shared}
    engine_of = {"model": str(tiny), "block_size": 16, "enable_prefix_caching": True}
    with laid_out(layout), serving(options, **engine_of) as engine:
        assert (engine.rounds.shared is not None) == shared
        views = engine.worker._cache.views
        assert views is not None
        strides = views[0][0].stride()
        assert (strides[1] > strides[2]) == layout.name.endswith("NHC")
        free = engine.free_blocks()
        expected = alone(engine, "laid out", prompts), alone(engine, "others", others, new=30)
        for agent, segments in others.items():
            engine.add(f"other {agent}", token_ids(segments), None, 30)
        assert engine.serve("laid out", prompts) == expected[0]
        assert {agent: engine.done[f"other {agent}"] for agent in others} == expected[1]
        # What was said is read from the cache, or is in the store already.
        longer = {
            agent: [*segments, td.private([*expected[0][agent], *drawn(5, 9)])]
            for agent, segments in prompts.items()
        }
        engine.counts()
        assert engine.serve("longer", longer) == alone(engine, "longer", longer)
        assert engine.counts()["rows_computed"] == 4 * (1 + 9)
        engine.scheduler.reset_prefix_cache()
        nothing_left(engine, free)
