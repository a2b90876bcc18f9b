"""torch's default dtype and default device change nothing: every tensor names its own."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from driving import GEOMETRY, ROPE, restored, run_prefill, run_step, tokens

import tokendance as td

DEFAULTS = {
    "bfloat16": (torch.bfloat16, "cpu"),
    "float16": (torch.float16, "cpu"),
    "float64": (torch.float64, "cpu"),
    # What names no device would have no memory.
    "meta": (torch.float32, "meta"),
}


@contextmanager
def defaults(dtype: torch.dtype, device: str) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)


@pytest.fixture(params=DEFAULTS)
def default(request: Any) -> tuple[torch.dtype, str]:
    return DEFAULTS[request.param]


def prompts(number: int) -> dict[str, list[td.Segment]]:
    a, b = td.shared(tokens(1, 40)), td.shared(tokens(2, 21))
    return {
        "one": [td.private(tokens(3, 9)), a, b, td.private(tokens(4 + number, 3))],
        "two": [td.private(tokens(5, 30)), b, a],
        "three": [td.private(tokens(6, 2)), a, td.private(tokens(7, 11)), b],
    }


def rounds(
    directory: Path, selection: td.KeyDeviation | None, quantization: td.Quantization | None
) -> list[torch.Tensor]:
    """Two rounds, decoding, an audit, dense caches, and a file: all that comes out."""
    ropes = [ROPE, None]
    store = td.DiffStore(GEOMETRY, ropes, "16MiB", block_size=8, quantization=quantization)
    collector = td.KVCollector(store, selection=selection)
    found: list[torch.Tensor] = []
    for number in range(2):
        plan = collector.plan(prompts(number))
        out = run_prefill(collector, plan)
        found += [out[agent] for agent in sorted(out)]
        if number:
            audit = collector.audit(plan)
            for step in audit.steps(100):
                audit.add(run_step(step)[step.logit_rows].flatten(1))
            report = audit.report({agent: row.flatten() for agent, row in out.items()})
            found.append(torch.tensor(report.kl, dtype=torch.float64, device="cpu"))
        found.append(run_step(collector.step({"one": [1, 2], "three": [3]}, prefill=())))
        plan.commit()
    dense = {agent: restored(store, agent) for agent in ("one", "two")}
    found += [x for layers in dense.values() for pair in layers for x in pair]
    other = td.DiffStore(GEOMETRY, ropes, "16MiB", block_size=8, quantization=quantization)
    caches = {agent: tuple(zip(*layers, strict=True)) for agent, layers in dense.items()}
    other.put_round(caches, {agent: store.mirror(agent).segments for agent in dense}, 1e-3)
    with tempfile.TemporaryDirectory(dir=directory) as exported:
        store.export_agents(exported)
        loaded = td.DiffStore.open(exported, GEOMETRY, ropes, "16MiB")
        for one in (other, loaded):
            found += [x for agent in dense for pair in restored(one, agent) for x in pair]
    return found


def check(directory: Path, default: tuple[torch.dtype, str], *arguments: Any) -> None:
    expected = rounds(directory, *arguments)
    with defaults(*default):
        found = rounds(directory, *arguments)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("selection", [None, td.KeyDeviation(0.2, layer=1)], ids=str)
def test_rounds_are_the_same(tmp_path: Path, default: Any, selection: Any) -> None:
    check(tmp_path, default, selection, None)


def test_rounds_of_quantized_stores_are_the_same(tmp_path: Path, default: Any) -> None:
    with defaults(*default):
        unit = td.Quantization.unit(GEOMETRY, torch.float8_e4m3fn)
    check(tmp_path, default, None, unit)


def test_scales_are_the_same(default: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randn(9, 1, 64, generator=generator) for _ in range(GEOMETRY.num_layers)]
    samples[1].zero_()
    for dtype in (torch.float8_e4m3fn, torch.int8):
        expected = td.Quantization.from_samples(samples, samples, dtype)
        unit = td.Quantization.unit(GEOMETRY, dtype)
        with defaults(*default):
            assert td.Quantization.from_samples(samples, samples, dtype).equals(expected)
            assert td.Quantization.unit(GEOMETRY, dtype).equals(unit)


def test_pools_of_an_engine_have_scales_of_one(default: Any) -> None:
    shape = (4, 8, 1, 64)
    with defaults(*default):
        pools = [torch.zeros(shape, dtype=torch.int8, device="cpu") for _ in range(4)]
        pool = td.PagePool(pools[:2], pools[2:], lambda count: list(range(count)), lambda _: None)
    assert pool.quantization is not None
    assert pool.quantization.equals(td.Quantization.unit(GEOMETRY, torch.int8))


PARAMETERS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_rotation_tables_are_the_same(name: str, default: Any) -> None:
    from types import SimpleNamespace

    config = SimpleNamespace(
        model_type="llama",
        head_dim=64,
        max_position_embeddings=256,
        rope_parameters={"rope_theta": 10000.0, **PARAMETERS[name]},
    )
    expected = td.Rope.from_config(config)
    with defaults(*default):
        found = td.Rope.from_config(config)
        plain = td.Rope.default(64, 10000.0, 16)
    assert found.fingerprint == expected.fingerprint
    assert torch.equal(found.cos, expected.cos)
    assert torch.equal(found.sin, expected.sin)
    assert plain.fingerprint == td.Rope.default(64, 10000.0, 16).fingerprint


def test_models_run_the_same(default: Any) -> None:
    transformers = pytest.importorskip("transformers")
    from tiny_architectures import tiny_model

    from tokendance.integrations.transformers import (
        TransformersEngine,
        geometry_of,
        quantization_of,
        rope_of,
    )

    assert transformers
    models = [tiny_model("gemma3"), tiny_model("glm")]  # one that is listed, one that is tried
    # transformers' caches, which the scales are taken from, are made on the default device.
    scales_of = {id(model): quantization_of(model, [list(range(20))]) for model in models}

    def run() -> list[torch.Tensor]:
        found = []
        for model in models:
            for quantization in (None, scales_of[id(model)]):
                store = td.DiffStore(
                    geometry_of(model), rope_of(model, 256), "8MiB", quantization=quantization
                )
                engine = TransformersEngine(model, td.KVCollector(store))
                plan = engine.collector.plan(
                    {"a": [td.shared(tokens(1, 20) % 300)], "b": [td.private([4]), *prompt]}
                )
                logits = engine.prefill(plan)
                generator = torch.Generator().manual_seed(0)
                said = engine.generate(plan, logits, 4, temperature=0.7, generator=generator)
                found += [*logits.values(), torch.tensor(list(said.values()), device="cpu")]
        return found

    prompt = [td.shared(tokens(1, 20) % 300)]
    expected = run()
    with defaults(*default):
        found = run()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_baselines_run_the_same(default: Any) -> None:
    pytest.importorskip("transformers")
    from tiny_architectures import tiny_model

    from evals.baselines import PerRequestBlend, PrefixCaching

    model = tiny_model("llama", vocab_size=1000)

    def run() -> list[torch.Tensor]:
        found = []
        for system in (PrefixCaching(model), PerRequestBlend(model)):
            found += system.prefill_round(prompts(0)).values()
            found += system.decode({"one": [3], "two": [4]}).values()
        return found

    expected = run()
    with defaults(*default):
        found = run()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
