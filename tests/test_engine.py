"""examples/engine.py: transformers' tokens, the rounds' tokens; all requests end in any pool."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tokendance as td

transformers = pytest.importorskip("transformers")
from examples.engine import Engine, Model, Request  # noqa: E402
from tokendance.integrations.transformers import TransformersEngine  # noqa: E402

SMALL = {
    "vocab_size": 331,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied-llama3-bias": (
        "Llama",
        {
            "tie_word_embeddings": True,
            "rope_parameters": LLAMA3,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "qwen2": ("Qwen2", {"hidden_size": 256, "head_dim": None}),
    "qwen2-one-kv-head": ("Qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
}
CLOSE = {"rtol": 1e-4, "atol": 1e-3}


def write_model(directory: Path, name: str, max_shard_size: str = "1GB") -> Any:
    """Saves a random model; returns it as transformers runs it."""
    kind, changes = MODELS[name]
    torch.manual_seed(0)
    fields = {key: one for key, one in {**SMALL, **changes}.items() if one is not None}
    model = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**fields)
    )
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):  # transformers starts them at zero
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return model.eval()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Model]:
    directory = tmp_path_factory.mktemp("llama")
    return write_model(directory, "llama"), Model(directory)


class Watched:
    """A model that notes what it was given and what it gave."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.vocabulary = model.vocabulary
        self.steps: list[list[str | None]] = []
        self.logits: dict[str, list[torch.Tensor]] = {}

    def __call__(self, rows: td.Step) -> torch.Tensor:
        logits = self.model(rows)
        self.steps.append(rows.agents)
        for agent, row in zip(rows.logit_agents, logits, strict=True):
            self.logits.setdefault(agent, []).append(row)
        return logits


def tokens(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 331, count)


def ids_of(prompt: Sequence[td.Segment]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([one.token_ids for one in prompt])).long()[None]


def greedy(model: Any, prompt: Sequence[td.Segment], count: int) -> tuple[list[int], torch.Tensor]:
    """transformers' own tokens, and the logits that each was chosen by."""
    ids = ids_of(prompt)
    with torch.inference_mode():
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return made.sequences[0, ids.shape[1] :].tolist(), torch.cat(made.logits)


def collector(model: Model, selection: Any = None, pages: int = 4096, **kwargs: Any) -> Any:
    capacity = pages * 8 * model.geometry.row_bytes
    store = td.DiffStore(model.geometry, model.rope, capacity, block_size=8)
    return td.KVCollector(store, selection=selection, **kwargs)


def run(work: Awaitable[Any], seconds: float = 120) -> Any:
    """A test that hangs is a test that fails."""
    return asyncio.run(asyncio.wait_for(work, seconds))


async def all_of(request: Request) -> list[int]:
    return [token async for token in request]


A, B, C = (td.shared(tokens(seed, count)) for seed, count in ((1, 70), (2, 45), (3, 26)))
PROMPTS = {
    "a": [td.private(tokens(4, 31)), A, B, td.private(tokens(5, 6))],
    "b": [C, td.private(tokens(6, 57)), B, A, B],
    "c": [C, A, td.private(tokens(7, 3))],
    "d": [td.private(tokens(8, 1))],
}
COUNTS = {"a": 9, "b": 5, "c": 12, "d": 7}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("max_rows", [1024, 23])
def test_everything_gives_transformers_tokens_and_logits(
    tmp_path: Path, name: str, max_rows: int
) -> None:
    """Prompts, chunks of prompts and decoding in the same steps: others begin while one decodes."""
    reference, model = write_model(tmp_path, name), Watched(Model(tmp_path))

    async def serve() -> dict[str, list[int]]:
        async with Engine(model, collector(model.model, td.Everything()), max_rows) as engine:
            requests = [engine.submit("a", PROMPTS["a"], 1, COUNTS["a"])]
            async for _ in requests[0]:
                break
            for agent in "bcd":
                requests.append(engine.submit(agent, PROMPTS[agent], 1, COUNTS[agent]))
            for request in requests:
                await all_of(request)
            return {request.agent: request.output for request in requests}

    output = run(serve())
    for agent, prompt in PROMPTS.items():
        expected, logits = greedy(reference, prompt, COUNTS[agent])
        assert output[agent] == expected
        torch.testing.assert_close(torch.stack(model.logits[agent]), logits, **CLOSE)
    assert any(step.count("a") == 1 and step.count("b") > 1 for step in model.steps)
    assert max(map(len, model.steps)) <= max_rows


def test_a_checkpoint_in_shards_is_read_by_its_index(tmp_path: Path) -> None:
    write_model(tmp_path / "one", "qwen2")
    write_model(tmp_path / "many", "qwen2", max_shard_size="200KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = Model(tmp_path / "one"), Model(tmp_path / "many")
    assert one.weights.keys() == many.weights.keys()
    for name, weight in one.weights.items():
        assert torch.equal(weight, many.weights[name])


@pytest.mark.parametrize(
    "changes",
    [{"model_type": "qwen3"}, {"hidden_act": "gelu"}, {"use_sliding_window": True}],
    ids=str,
)
def test_other_architectures_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_model(tmp_path, "qwen2")
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ValueError, match=r"expected (llama or qwen2|silu and full attention)"):
        Model(tmp_path)


def round_of(agents: int, seed: int = 0) -> dict[str, list[td.Segment]]:
    """The same three segments, for each agent in another order and behind another beginning."""
    shared = [td.shared(tokens(seed + one, 40 + 9 * one)) for one in range(3)]
    rng = np.random.default_rng(seed)
    return {
        f"agent {a}": [
            td.private(tokens(100 + a, 20 + 7 * a)),
            *[shared[one] for one in rng.permutation(3)],
            td.private(tokens(200 + a, 3)),
        ]
        for a in range(agents)
    }


async def serve_round(
    engine: Engine, prompts: dict[str, list[td.Segment]], number: int, pause: float, count: int = 8
) -> dict[str, list[int]]:
    requests = []
    for agent, prompt in prompts.items():
        requests.append(engine.submit(agent, prompt, number, count))
        if pause:
            await asyncio.sleep(pause)
    return {request.agent: await all_of(request) for request in requests}


@pytest.mark.parametrize("source", ["master", "producer"])
@pytest.mark.parametrize(
    ("selection", "pause"),
    [
        (None, 0.02),
        (td.Nothing(), 0.02),
        # Which rows deviate is asked of the agents that are there.
        (td.KeyDeviation(0.15, layer=0), 0),
    ],
    ids=str,
)
def test_a_trickling_round_equals_the_round_at_once(
    llama: tuple[Any, Model], selection: Any, source: str, pause: float
) -> None:
    """And the rounds after it, that hear what all have said."""
    reference, model = llama
    watched, mine = Watched(model), collector(model, selection, source=source)
    at_once = TransformersEngine(reference, collector(model, selection, source=source))

    async def serve() -> None:
        said: list[td.Segment] = []
        async with Engine(watched, mine, max_rows=1000) as engine:
            for number in (1, 2):
                watched.logits.clear()
                prompts = {a: [one[0], *said, *one[1:]] for a, one in round_of(5).items()}
                output = await serve_round(engine, prompts, number, pause)
                plan = at_once.collector.plan(prompts)
                logits = at_once.prefill(plan)
                for agent, row in logits.items():
                    torch.testing.assert_close(watched.logits[agent][0], row, **CLOSE)
                assert at_once.generate(plan, logits, 8) == output
                plan.commit()
                said = [td.shared(tokens) for tokens in output.values()]

    run(serve())
