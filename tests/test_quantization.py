"""Stores whose pages are e4m3 or int8: what they keep is what plain ones keep, rounded."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from driving import GEOMETRY, ROPE, make_store, project, restored, run_prefill, run_step, tokens

import tokendance as td
from tokendance import testing
from tokendance.device.quantization import LARGEST
from tokendance.testing import reference

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = (GEOMETRY.num_layers, GEOMETRY.num_kv_heads)


def quantization(dtype, largest=5.0):
    """Scales by which numbers up to about `largest` fit, others for each layer."""
    scale = torch.full(SHAPE, largest / LARGEST[dtype]) * torch.linspace(1, 1.3, SHAPE[0])[:, None]
    return td.Quantization(dtype, scale, scale * 1.1)


def prompts():
    chat = [td.shared(tokens(seed, 30)) for seed in range(3)]
    return {
        "ada": [td.private(tokens(10, 9)), *chat],
        "bob": [td.private(tokens(11, 21)), chat[1], chat[0], chat[2], td.private(tokens(12, 2))],
        "cy": [chat[2], td.private(tokens(13, 5)), chat[0]],
    }


def half_steps(x, scale, dtype):
    """How far a number may be from what is stored of it."""
    if dtype == torch.int8:
        return torch.full_like(x, 0.5 * scale)
    return (x.abs() * 2**-4).clamp(min=scale * 2**-10)


@pytest.mark.parametrize("selection", [None, td.KeyDeviation(0.2), td.Everything()], ids=str)
@pytest.mark.parametrize("dtype", testing.QUANTIZED, ids=str)
def test_rounds_stay_near_those_of_a_plain_store(dtype, selection):
    outputs, caches = [], []
    for kept in (None, quantization(dtype)):
        store = make_store(quantization=kept)
        collector = td.KVCollector(store, selection=selection)
        plan = collector.plan(prompts())
        out = run_prefill(collector, plan)
        step = collector.step({agent: tokens(20, 3) for agent in prompts()}, prefill=())
        out["decoded"] = run_step(step)
        plan.commit()
        outputs.append(out)
        caches.append({agent: restored(store, agent) for agent in store.agents})
    for agent, plain in outputs[0].items():
        error = (outputs[1][agent] - plain).norm() / plain.norm()
        assert 0 < error < (0.08 if dtype == torch.float8_e4m3fn else 0.05)
    if isinstance(selection, td.KeyDeviation):
        return  # other rows may be chosen
    scales = quantization(dtype)
    for agent, layers in caches[0].items():
        for layer, (k, v) in enumerate(layers):
            kept_k, kept_v = caches[1][agent][layer]
            step_of_v = half_steps(v, scales.v_scale[layer, 0], dtype)
            assert ((kept_v - v).abs() <= step_of_v * 1.001).all()
            # A moved key is rounded once more, and its error has been turned.
            length = k.unflatten(-1, (2, 32)).square().sum(-2, keepdim=True).sqrt()
            pairs = length.expand(-1, -1, 2, -1).flatten(-2)
            step_of_k = half_steps(pairs, scales.k_scale[layer, 0], dtype)
            assert ((kept_k - k).abs() <= 2.5 * step_of_k).all()


@pytest.mark.parametrize("dtype", testing.QUANTIZED, ids=str)
def test_the_agent_that_computed_a_row_has_it_rounded_once(dtype):
    store = make_store(quantization=quantization(dtype))
    collector = td.KVCollector(store)
    ids = tokens(1, 40)
    plan = collector.plan({"ada": [td.private(ids)]})
    run_prefill(collector, plan)
    plan.commit()
    for layer, (k, v) in enumerate(restored(store, "ada")):
        _, fresh_k, fresh_v = project(torch.from_numpy(ids), layer)
        k_scale, v_scale = store.pool.scales(layer)
        arguments = (torch.arange(40), ROPE.cos, ROPE.sin, ROPE.interleaved)
        moved = reference.move_rows(fresh_k, *arguments, dtype=dtype, out_scale=k_scale)
        testing.assert_same_bits(k, reference.dequantize_rows(moved, k_scale))
        stored = reference.quantize_rows(fresh_v, v_scale, dtype)
        testing.assert_same_bits(v, reference.dequantize_rows(stored, v_scale))


@pytest.mark.parametrize("dtype", testing.QUANTIZED, ids=str)
def test_bytes_are_the_pools(dtype):
    plain, store = make_store(), make_store(quantization=quantization(dtype))
    for one in (plain, store):
        collector = td.KVCollector(one)
        plan = collector.plan(prompts())
        run_prefill(collector, plan)
        plan.commit()
    before, after = plain.stats(), store.stats()
    assert after.stored_bytes * 4 == before.stored_bytes  # fp32
    assert after.row_bytes * 4 == before.row_bytes
    assert after.dense_bytes == before.dense_bytes
    assert after.compression == 4 * before.compression
    assert after.padding == before.padding
    assert store.pool.num_pages == 4 * plain.pool.num_pages


@pytest.mark.parametrize("dtype", testing.QUANTIZED, ids=str)
def test_dense_caches_are_rounded_and_come_back(dtype):
    scales = quantization(dtype)
    store = make_store(quantization=scales)
    layout = prompts()
    dense, rounded = {}, {}
    for agent, segments in layout.items():
        ids = torch.from_numpy(np.concatenate([segment.token_ids for segment in segments])).long()
        keys, values = [], []
        for layer in range(GEOMETRY.num_layers):
            _, k, v = project(ids, layer)
            at = torch.arange(len(ids))
            keys.append(reference.move_rows(k, at, ROPE.cos, ROPE.sin, ROPE.interleaved))
            values.append(v)
        dense[agent] = (keys, values)
        rounded[agent] = [
            [reference.quantize_rows(rows, scale[layer], dtype) for layer, rows in enumerate(parts)]
            for parts, scale in ((keys, scales.k_scale), (values, scales.v_scale))
        ]
    store.put_round(dense, layout)
    exact = store.stats().own_rows
    for agent, (keys, values) in rounded.items():
        for layer, (k, v) in enumerate(restored(store, agent)):
            want = reference.dequantize_rows(keys[layer], scales.k_scale[layer])
            testing.assert_same_bits(k, want)
            want = reference.dequantize_rows(values[layer], scales.v_scale[layer])
            testing.assert_same_bits(v, want)
    # Rows in the pool's dtype are taken as they are.
    again = make_store(quantization=scales)
    again.put_round(rounded, layout)
    assert again.stats() == store.stats()
    # Moved rows are rounded twice, and the error of one element of a pair is turned to the other.
    tolerances = {"rtol": 0.1, "atol": 0.4} if dtype != torch.int8 else {"atol": 0.1}
    near = make_store(quantization=scales)
    near.put_round(dense, layout, **tolerances)
    private = sum(s.length for one in layout.values() for s in one if not s.is_shared)
    assert exact > private + 50
    assert near.stats().own_rows < private + 20


@pytest.mark.parametrize("dtype", testing.QUANTIZED, ids=str)
def test_a_saved_store_keeps_its_scales(dtype, tmp_path):
    store = make_store(quantization=quantization(dtype))
    collector = td.KVCollector(store)
    plan = collector.plan(prompts())
    run_prefill(collector, plan)
    plan.commit()
    path = tmp_path / "store"
    store.export_agents(path)
    loaded = td.DiffStore.open(path, GEOMETRY, ROPE, "64MiB")
    assert loaded.pool.quantization.equals(store.pool.quantization)
    for agent in store.agents:
        for mine, want in zip(restored(loaded, agent), restored(store, agent), strict=True):
            for got, expected in zip(mine, want, strict=True):
                testing.assert_same_bits(got, expected)
    loaded.close()
    same = td.PagePool.own(GEOMETRY, 200, 8, "cpu", quantization(dtype))
    td.DiffStore.open(path, GEOMETRY, ROPE, pool=same).close()
    for other, argument in ((quantization(dtype, 6.0), "quantization"), (None, "pool")):
        pool = td.PagePool.own(GEOMETRY, 200, 8, "cpu", other)
        with pytest.raises(ValueError, match=f"{argument}: expected that of .*store, .*, got"):
            td.DiffStore.open(path, GEOMETRY, ROPE, pool=pool)


def test_audits_compare_what_elements_stand_for():
    store = make_store(quantization=quantization(torch.float8_e4m3fn))
    collector = td.KVCollector(store)
    plan = collector.plan(prompts())
    run_prefill(collector, plan)
    audit = collector.audit(plan)
    for step in audit.steps():
        audit.add(run_step(step)[step.logit_rows].flatten(1))
    found = [one for agent in audit.report().agents.values() for one in agent.segments]
    for one in found:
        # Fresh keys depend on the token alone: what differs is that moved ones are rounded again.
        assert (one.deviation > 0) == (one.reused > 0)
        assert one.deviation < 0.05
    assert any(one.reused for one in found)


def test_an_engines_pool_may_be_quantized():
    shape = (40, 8, 1, 64)
    pools = [torch.empty(shape, dtype=torch.float8_e4m3fn) for _ in range(4)]
    pool = td.PagePool(pools[:2], pools[2:], lambda count: [], lambda pages: None)
    assert pool.quantization.equals(td.Quantization.unit(GEOMETRY))
    td.DiffStore(GEOMETRY, ROPE, pool=pool)
    with pytest.raises(ValueError, match="quantization: expected that of the pool, got one"):
        td.DiffStore(GEOMETRY, ROPE, pool=pool, quantization=td.Quantization.unit(GEOMETRY))
    wrong = td.Quantization.unit(GEOMETRY, torch.int8)
    text = re.escape(
        "quantization: expected torch.float8_e4m3fn with scales [2, 1], got torch.int8"
    )
    with pytest.raises(ValueError, match=text):
        td.PagePool(pools[:2], pools[2:], lambda count: [], lambda pages: None, wrong)
    other = td.PagePool([pools[0].half()], [pools[1].half()], lambda count: [], lambda pages: None)
    one = td.KVGeometry(1, 2, 1, 64, torch.float32)
    with pytest.raises(ValueError, match=r"pool: expected torch.float32 or a quantized dtype"):
        td.DiffStore(one, ROPE, pool=other)


def test_layers_that_are_not_adjacent_have_their_scales():
    pool = td.PagePool.own(td.KVGeometry(4, 1, 1, 64), 1, 8, "cpu")
    assert pool.scales(1) == pool.scales_of([1]) == (None, None)
    scale = torch.arange(1.0, 5)[:, None]
    kept = td.Quantization(torch.int8, scale, 2 * scale)
    pool = td.PagePool.own(td.KVGeometry(4, 1, 1, 64), 1, 8, "cpu", kept)
    for layers in ([0, 1, 2, 3], [1, 2], [3], [0, 2], [2, 0]):
        for got, want in zip(pool.scales_of(layers), (scale, 2 * scale), strict=True):
            assert torch.equal(got, want[layers])
            assert got.is_contiguous()


def test_scales_of_samples():
    generator = torch.Generator().manual_seed(1)
    keys = [torch.randn(3, 10, 2, 64, generator=generator) * (layer + 1) for layer in range(2)]
    for dtype in testing.QUANTIZED:
        made = td.Quantization.from_samples(keys, [k * 2 for k in keys], dtype, margin=1.5)
        largest = torch.stack([k.abs().amax((0, 1, 3)) for k in keys])
        torch.testing.assert_close(made.k_scale, largest * 1.5 / LARGEST[dtype])
        torch.testing.assert_close(made.v_scale, largest * 3 / LARGEST[dtype])
    zeros = td.Quantization.from_samples([keys[0] * 0], [keys[0] * 0])
    assert (zeros.k_scale > 0).all()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: td.Quantization(torch.float16, *[torch.ones(2, 1)] * 2), "dtype: expected one of"),
        (lambda: td.Quantization(torch.int8, torch.ones(2), torch.ones(2)), "k_scale: expected"),
        (
            lambda: td.Quantization(torch.int8, torch.ones(2, 1), torch.ones(2, 2)),
            "v_scale: expected [2, 1], got [2, 2]",
        ),
        (
            lambda: td.Quantization(torch.int8, torch.ones(1, 1), torch.zeros(1, 1)),
            "v_scale: expected positive, finite scales",
        ),
        (lambda: td.Quantization.from_samples([], []), "values: expected 1 layers, got 0"),
        (
            lambda: td.Quantization.from_samples([torch.ones(1, 1)], [torch.ones(1, 1)], margin=0),
            "margin: expected a positive number, got 0",
        ),
        (
            lambda: td.Quantization.from_samples(
                [torch.ones(1, 1)], [torch.ones(1, 1)], torch.float16
            ),
            "dtype: expected one of",
        ),
    ],
)
def test_what_does_not_fit_is_named(make, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        make()


def test_heads_without_samples_and_scales_of_the_caller():
    zero = torch.ones(1, 5, 2, 64) * torch.tensor([0.0, 448.0])[:, None]
    made = td.Quantization.from_samples([*zero], [*zero], margin=1.0)
    assert made.k_scale.tolist() == made.v_scale.tolist() == [[1.0, 1.0]]
    scales = np.full(SHAPE, 0.5, dtype=np.float32)
    kept = td.Quantization(torch.int8, scales, scales)
    scales[:] = 7
    assert (kept.k_scale == 0.5).all()
    assert (kept.v_scale == 0.5).all()
