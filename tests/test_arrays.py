"""Arrays of other libraries go in and out without a copy."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from driving import prefill_steps

import tokendance as td
from tokendance import testing
from tokendance.device import operators as ops
from tokendance.device.arrays import as_output, as_tensor, as_tensors, is_array

HEADS, DIM, LAYERS, BLOCK = 2, 64, 2, 8


def cupy_or_reason():
    """CuPy with a device, or why there is none."""
    try:
        import cupy
    except ImportError:
        return None, "CuPy is not installed: pip install tokendance[cupy]"
    if not torch.cuda.is_available():
        return None, "torch finds no CUDA device"
    if not cupy.cuda.is_available():
        return None, "CuPy finds no CUDA device"
    return cupy, ""


CUPY, NO_CUPY = cupy_or_reason()
with_cupy = pytest.mark.skipif(CUPY is None, reason=NO_CUPY)


# Taking ------------------------------------------------------------------------------------------


def test_tensors_and_none_are_taken_as_they_are():
    tensor = torch.zeros(3)
    assert as_tensor(tensor) is tensor
    assert as_output(tensor) is tensor
    assert as_tensor(None) is None


@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16, "int32", "int64"])
def test_an_array_is_taken_where_it_is(dtype):
    array = np.arange(24).reshape(4, 6).astype(dtype)[::2, 1:4]
    tensor = as_tensor(array)
    assert tensor.data_ptr() == array.ctypes.data
    assert tensor.stride() == (12, 1)
    assert str(tensor.dtype) == f"torch.{array.dtype.name}"
    array[1, 2] = 5
    assert tensor[1, 2] == 5


def test_what_is_no_array_or_cannot_be_one_is_refused():
    assert not is_array([1, 2])
    with pytest.raises(TypeError, match="expected a tensor or an array with __dlpack__, got list"):
        as_tensors([[1, 2]])
    with pytest.raises(ValueError, match="expected strides of at least 0, got \\[-8\\] bytes"):
        as_tensor(np.zeros(3)[::-1])
    with pytest.raises(BufferError):
        as_tensor(np.array(["text"]))


def test_a_read_only_array_is_read_and_not_written():
    array = np.zeros(3, dtype=np.float32)
    array.flags.writeable = False
    assert as_tensor(array).data_ptr() == array.ctypes.data
    with pytest.raises(ValueError, match="expected one that may be written"):
        as_output(array)


# Operators ---------------------------------------------------------------------------------------


def test_operators_take_arrays_and_write_into_them():
    rope = td.Rope.default(head_dim=DIM, theta=10000.0, max_position=64)
    cos, sin = rope.cos.numpy(), rope.sin.numpy()
    x = np.random.default_rng(0).standard_normal((6, HEADS, DIM), dtype=np.float32)
    positions = np.arange(6, dtype=np.int32)
    expected = ops.rope_rotate(
        torch.from_numpy(x), None, None, torch.arange(6, dtype=torch.int32), rope.cos, rope.sin
    )
    result = ops.rope_rotate(x, None, None, positions, cos, sin)
    assert np.from_dlpack(result).ctypes.data == result.data_ptr()
    out = np.zeros_like(x)
    ops.rope_rotate_out(x, None, None, None, positions, cos, sin, False, 1.0, out)
    ops.rope_rotate_(x, None, None, positions, cos, sin)
    for found in (np.from_dlpack(result), out, x):
        np.testing.assert_array_equal(found, expected.numpy())
    out.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        ops.rope_rotate_out(x, None, None, None, positions, cos, sin, False, 1.0, out)


def as_arrays(tensors):
    return [tensor.numpy() for tensor in tensors]


def test_operators_of_rounds_take_arrays():
    case = testing.random_round(7, head_dim=DIM, num_layers=LAYERS, room_for_all=True)
    dense, again = testing.dense_cache(case, 7), testing.dense_cache(case, 7)
    tables = (case.cos.numpy(), case.sin.numpy(), False)
    round_ = td.RoundTensors(case.round.buffer.numpy(), case.round.extents)
    assert round_.buffer.data_ptr() == case.round.buffer.data_ptr()
    pools = as_arrays(case.k_pool), as_arrays(case.v_pool)
    slots = dense.slot_mapping.numpy()
    ops.diff_restore(
        case.k_pool, case.v_pool, case.cos, case.sin, False, case.round, dense.slot_mapping,
        dense.k, dense.v,
    )  # fmt: skip
    ops.diff_restore(*pools, *tables, round_, slots, as_arrays(again.k), as_arrays(again.v))
    for one, other in zip(dense.k + dense.v, again.k + again.v, strict=True):
        testing.assert_same_bits(other, one)
    before = round_.buffer.clone()
    rows = as_arrays(dense.k), as_arrays(dense.v)
    ops.diff_encode(*rows, slots, case.length.numpy(), *pools, *tables, round_)
    filled = slice(0, int(round_.own_length.sum()))
    assert filled.stop > 0
    assert round_.buffer.shape == before.shape


def test_a_compiled_function_takes_tensors_without_a_graph_break():
    rope = td.Rope.default(head_dim=DIM, theta=10000.0, max_position=64)
    x, to = torch.randn(6, HEADS, DIM), torch.arange(6, dtype=torch.int32)

    def rotate(x, to):
        return ops.rope_rotate(x, None, None, to, rope.cos, rope.sin) * 2

    compiled = torch.compile(rotate, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, to), rotate(x, to), rtol=0, atol=0)


# The store and its rounds ------------------------------------------------------------------------


def geometry(dtype=torch.float32):
    return td.KVGeometry(LAYERS, HEADS, HEADS, DIM, dtype)


def random_cache(seed, tokens, make=np.asarray):
    rng = np.random.default_rng(seed)
    shape = (tokens, HEADS, DIM)
    return tuple(
        [make(rng.standard_normal(shape, dtype=np.float32)) for _ in range(LAYERS)]
        for _ in range(2)
    )


def put_and_restore(np_like, device):
    """Two agents' dense caches into a store over arrays, and back into arrays."""
    pages = list(range(12))
    pools = [np_like.zeros((12, BLOCK, HEADS, DIM), dtype=np_like.float32) for _ in range(4)]
    pool = td.PagePool(
        pools[:2], pools[2:], lambda n: [pages.pop() for _ in range(n)], pages.extend
    )
    assert pool.k_pools[0].device.type == device
    rope = td.Rope.default(head_dim=DIM, theta=10000.0, max_position=256)
    store = td.DiffStore(geometry(), rope, pool=pool)
    heard = td.shared(np_like.arange(100, 120))
    layout = {
        "ada": [td.private(np_like.arange(5)), heard],
        "ben": [td.private(np_like.arange(9)), heard],
    }
    dense = {
        agent: random_cache(i, sum(s.length for s in segments), np_like.asarray)
        for i, (agent, segments) in enumerate(layout.items())
    }
    store.put_round(dense, layout)
    for agent, (keys, values) in dense.items():
        rows = store.length(agent)
        k_out, v_out = ([np_like.zeros_like(x) for x in xs] for xs in (keys, values))
        store.restore(agent, range(LAYERS), k_out, v_out, np_like.arange(rows))
        one_k, one_v = np_like.zeros_like(keys[1]), np_like.zeros_like(values[1])
        store.restore(agent, 1, one_k, one_v, np_like.arange(rows)[None])
        if device == "cuda":
            torch.cuda.synchronize()
        for found, given in zip(
            [*k_out, *v_out, one_k, one_v], [*keys, *values, keys[1], values[1]], strict=True
        ):
            assert (found == given).all()
    assert any((np_like.asarray(pool) != 0).any() for pool in pools)


def test_a_store_over_numpy_arrays():
    put_and_restore(np, "cpu")


def test_a_pool_of_read_only_arrays_is_refused():
    pool = np.zeros((2, BLOCK, HEADS, DIM), dtype=np.float32)
    pool.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        td.PagePool([pool], [pool], lambda n: [], lambda pages: None)


def attend(np_like, make_sinks):
    """One prefill step of arrays; the attention's outputs."""
    rope = td.Rope.default(head_dim=DIM, theta=10000.0, max_position=256)
    device = "cpu" if np_like in (np, torch) else "cuda"
    store = td.DiffStore(geometry(), rope, capacity="1MiB", device=device, block_size=BLOCK)
    collector = td.KVCollector(store)
    heard = td.shared(range(100, 120))
    plan = collector.plan({"ada": [td.private([1, 2]), heard], "ben": [td.private([3]), heard]})
    outs = []
    for step in prefill_steps(collector, plan):
        with step:
            for layer in range(LAYERS):
                rng = np.random.default_rng(layer)
                q, k, v = (
                    rng.standard_normal((step.num_rows, HEADS * DIM), dtype=np.float32)
                    for _ in range(3)
                )
                q, k, v = (make_sinks(x) for x in (q, k, v))
                sinks = make_sinks(np.ones(HEADS, np.float32))
                outs.append(step.attend(layer, q, k, v, sinks=sinks))
                (kept,) = step.keep(q)
                assert isinstance(kept, torch.Tensor)
    plan.commit()
    return outs


def test_a_step_takes_arrays():
    for found, expected in zip(attend(np, np.asarray), attend(torch, torch.tensor), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_audits_and_scales_take_arrays():
    scales = np.full((LAYERS, HEADS), 0.5, np.float32)
    kept = td.Quantization(torch.int8, scales, torch.from_numpy(scales))
    assert torch.equal(kept.k_scale, kept.v_scale)
    with pytest.raises(ValueError, match=r"v_scale: expected \[2, 2\], got \[1, 2\]"):
        td.Quantization(torch.int8, scales, scales[:1])

    rope = td.Rope.default(head_dim=DIM, theta=10000.0, max_position=256)
    store = td.DiffStore(geometry(), rope, capacity="1MiB", block_size=BLOCK)
    collector = td.KVCollector(store)
    heard = td.shared(range(100, 120))
    plan = collector.plan({"ada": [td.private([1, 2]), heard], "ben": [td.private([3]), heard]})

    def run(step):
        with step:
            for layer in range(LAYERS):
                rows = torch.ones(step.num_rows, HEADS, DIM)
                out = step.attend(layer, rows, rows, rows)
                (out,) = step.keep(out)
        return out.flatten(1)[step.logit_rows].numpy()

    logits = {}
    for step in prefill_steps(collector, plan):
        rows = run(step)
        logits.update(zip(step.logit_agents, rows, strict=True))
    audit = collector.audit(plan, agents=["ada", "ben"])
    for step in audit.steps():
        audit.add(run(step))
    report = audit.report(logits)
    assert (report.tokens, report.top1) == (2, 1.0)


# CuPy --------------------------------------------------------------------------------------------


@pytest.mark.gpu
@with_cupy
def test_a_store_over_cupy_arrays():
    put_and_restore(CUPY, "cuda")


@pytest.mark.gpu
@with_cupy
def test_cupy_arrays_go_in_and_out_without_a_copy():
    array = CUPY.arange(12, dtype=CUPY.float32).reshape(3, 4)
    tensor = as_tensor(array)
    assert tensor.data_ptr() == array.data.ptr
    assert CUPY.from_dlpack(tensor).data.ptr == array.data.ptr


@pytest.mark.gpu
@with_cupy
def test_an_array_still_being_computed_is_waited_for():
    """Its stream is not torch's: without the wait the copy would see zeros."""
    rows = CUPY.zeros((1 << 14, HEADS, DIM), dtype=CUPY.float32)
    rope = td.Rope.default(head_dim=DIM, theta=10000.0, max_position=64).to("cuda")
    matrix = CUPY.ones((4096, 4096), dtype=CUPY.float32)
    CUPY.cuda.Device().synchronize()
    with CUPY.cuda.Stream(non_blocking=True):
        for _ in range(20):
            matrix @ matrix
        rows += 1
        out = ops.rope_rotate(rows, None, None, None, rope.cos, rope.sin)
    assert bool((out == 1).all())


@pytest.mark.gpu
@with_cupy
def test_a_step_takes_cupy_arrays():
    for found, expected in zip(
        attend(CUPY, CUPY.asarray), attend(torch, torch.tensor), strict=True
    ):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)
