"""Sampling: the numbers that it takes, and what is refused by name before anything is fed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny_architectures import tiny_model

import tokendance as td

pytest.importorskip("transformers")
from tokendance.integrations.transformers import (
    TransformersEngine,
    geometry_of,
    rope_of,
    sample_token,
)

INF, NAN = math.inf, math.nan
BAD = [
    ({"top_p": 0.0}, "top_p: expected 0 < top_p <= 1, got 0.0"),
    ({"top_p": NAN}, "top_p: expected 0 < top_p <= 1, got nan"),
    ({"top_p": 2.0}, "top_p: expected 0 < top_p <= 1, got 2.0"),
    ({"top_p": -0.5}, "top_p: expected 0 < top_p <= 1, got -0.5"),
    (
        {"temperature": 1e-45},
        "temperature: expected 0, or a number in 1e-05 .. 100000, got 1.*e-45",
    ),
    ({"temperature": -1.0}, "temperature: expected 0, or a number in .* got -1.0"),
    ({"temperature": NAN}, "temperature: expected 0, or a number in .* got nan"),
    ({"temperature": 1e300}, "temperature: expected 0, or a number in .* got 1e\\+300"),
    ({"temperature": INF}, "temperature: expected 0, or a number in .* got inf"),
]
BAD_LOGITS = {
    "nan": [1.0, NAN, 2.0],
    "inf": [1.0, INF, 2.0],
    "-inf": [-INF, -INF],
    "-inf alone": [-INF],
}


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    model = tiny_model("llama")
    store = td.DiffStore(geometry_of(model), rope_of(model, 256), "8MiB")
    return TransformersEngine(model, td.KVCollector(store))


@pytest.mark.parametrize(("options", "message"), BAD, ids=str)
def test_numbers_are_checked(options: Any, message: str, engine: TransformersEngine) -> None:
    with pytest.raises(ValueError, match=message):
        sample_token(torch.tensor([1.0, 2.0]), **{"temperature": 1.0, **options})
    with engine.collector.plan({"a": [td.private([1, 2])]}) as plan:
        logits = engine.prefill(plan)
        for given, tokens in ((logits, 3), (logits, 0), ({}, 3)):
            with pytest.raises(ValueError, match=message):
                engine.generate(plan, given, tokens, **{"temperature": 1.0, **options})
        assert plan.length("a") == 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", BAD_LOGITS)
def test_logits_are_checked(name: str, temperature: float, engine: TransformersEngine) -> None:
    logits = torch.tensor(BAD_LOGITS[name])
    got = name.split()[0]
    message = f"expected numbers or -inf, and one number at least, got a largest of {got}$"
    with pytest.raises(ValueError, match=f"^logits: {message}"):
        sample_token(logits, temperature)
    with engine.collector.plan({"a": [td.private([1, 2])]}) as plan:
        engine.prefill(plan)
        with pytest.raises(ValueError, match=rf"^logits\['a'\]: {message}"):
            engine.generate(plan, {"a": logits}, 3, temperature=temperature)
        assert plan.length("a") == 2


def test_shapes_are_checked() -> None:
    for logits in (torch.zeros(1, 4), torch.zeros(0), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"logits: expected \[vocabulary\], got \["):
            sample_token(logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_extreme_numbers_that_are_taken(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([-INF, 3.0, 60000.0, -60000.0], dtype=dtype)
    for options in (
        {"temperature": 0.0},
        {"temperature": 1e-5},
        {"temperature": 1.0, "top_p": 1e-300},
        {"temperature": 1e5, "top_p": 1e-6},
    ):
        assert sample_token(logits, generator=generator, **options) in (1, 2, 3)
    drawn = {sample_token(logits, 1e5, generator=generator) for _ in range(100)}
    assert drawn == {1, 2, 3}  # never what is -inf


def test_quotients_beyond_fp32_are_refused() -> None:
    huge = torch.tensor([1e35, 1.0])
    assert sample_token(huge, 0.0) == 0
    assert sample_token(huge, 1.0) == 0
    with pytest.raises(ValueError, match=r"logits: expected numbers or -inf, .* largest of"):
        sample_token(huge, 1e-5)
