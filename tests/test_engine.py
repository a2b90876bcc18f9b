"""examples/engine.py: transformers' tokens, the rounds' tokens; all requests end in any pool."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Sequence
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
    with pytest.raises(ValueError, match="config: expected a plain llama or qwen2, got"):
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
    engine: Engine,
    prompts: dict[str, list[td.Segment]],
    number: int,
    trickles: bool,
    count: int = 8,
) -> dict[str, list[int]]:
    """All together, or each as soon as the former has its first token."""
    requests, output = [], {}
    for agent, prompt in prompts.items():
        requests.append(engine.submit(agent, prompt, number, count))
        output[agent] = [await anext(aiter(requests[-1]))] if trickles else []
    for request in requests:
        output[request.agent] += await all_of(request)
    return output


@pytest.mark.parametrize("source", ["master", "producer"])
@pytest.mark.parametrize(
    ("selection", "trickles"),
    [
        (None, False),
        (None, True),
        (td.Nothing(), True),
        # Which rows deviate is asked of the agents that are there.
        (td.KeyDeviation(0.15, layer=0), False),
    ],
    ids=str,
)
def test_a_round_equals_the_same_plan_by_hand(
    llama: tuple[Any, Model], selection: Any, source: str, trickles: bool
) -> None:
    """And the rounds after it, that hear what all have said.

    Requests that wait together are planned at once. Of a round that trickles in, whoever comes
    knows only those before it, so that other agents may make the Masters.
    """
    reference, model = llama
    watched, mine = Watched(model), collector(model, selection, source=source)
    by_hand = TransformersEngine(reference, collector(model, selection, source=source))

    async def serve() -> None:
        said: list[td.Segment] = []
        async with Engine(watched, mine, max_rows=1000) as engine:
            for number in (1, 2):
                watched.logits.clear()
                prompts = {a: [one[0], *said, *one[1:]] for a, one in round_of(5).items()}
                output = await serve_round(engine, prompts, number, trickles)
                if trickles:
                    plan, logits = by_hand.collector.plan({}), {}
                    for agent, prompt in prompts.items():
                        plan.add({agent: prompt})
                        logits |= by_hand.prefill(plan)
                else:
                    plan = by_hand.collector.plan(prompts)
                    logits = by_hand.prefill(plan)
                for agent, row in logits.items():
                    torch.testing.assert_close(watched.logits[agent][0], row, **CLOSE)
                assert by_hand.generate(plan, logits, 8) == output
                plan.commit()
                said = [td.shared(tokens) for tokens in output.values()]

    run(serve())


def test_a_decoder_gives_the_same_tokens(llama: tuple[Any, Model]) -> None:
    """Its buffers hold four agents: steps of more are eager."""
    prompts = round_of(6)

    async def serve(fixed: bool) -> tuple[dict[str, list[int]], int]:
        mine, prepared = collector(llama[1]), []
        decoder = mine.decoder(4, 4, max_pages=200) if fixed else None
        if decoder is not None:
            prepare = decoder.prepare
            decoder.prepare = lambda ids: prepared.append(len(ids)) or prepare(ids)
        async with Engine(llama[1], mine, decoder=decoder) as engine:
            few = await serve_round(engine, dict(list(prompts.items())[:4]), 1, False)
            return few | await serve_round(engine, prompts, 2, False), len(prepared)

    eager, _ = run(serve(False))
    found, prepared = run(serve(True))
    assert found == eager
    assert prepared >= 7


def turns_of(agents: int, turns: int, seed: int) -> dict[str, list[list[td.Segment]]]:
    """Prompts of each agent's turns: what it is, what it has heard so far, and a question."""
    rng = np.random.default_rng(seed)
    news = [td.shared(tokens(1000 + n, int(rng.integers(3, 30)))) for n in range(12)]
    result = {}
    for a in range(agents):
        mine = [td.private(tokens(2000 + a, int(rng.integers(1, 30))))]
        prompts = []
        for turn in range(turns):
            if rng.random() < 0.6:
                mine = [*mine, *rng.choice(news, int(rng.integers(0, 3)))]
            else:  # forgets: another order from the beginning on
                mine = [mine[0], *rng.permutation(np.array(mine[1:], dtype=object))[:3]]
            prompts.append([*mine, td.private(tokens(3000 + 50 * a + turn, 4))])
        result[f"agent {a}"] = prompts
    return result


def most_pages(prompt: Sequence[td.Segment], output: int, selection: Any) -> int:
    """That a request alone can need: each segment has pages of its own, and where what is reused is
    repaired, any of its rows may be computed a second time."""
    again = 0 if selection == td.Everything() else sum(map(len, prompt))
    return sum(-(-rows // 8) for rows in [*map(len, prompt), again, output])


def held_by_agents(store: td.DiffStore) -> int:
    """Pages of Mirrors, and of the Masters that they use."""
    pages: set[int] = set()
    for mirror in store.mirrors.values():
        pages.update(mirror.own_pages.tolist())
        for master in mirror.uses.masters:
            pages.update(master.pages.tolist())
    return len(pages)


@pytest.mark.parametrize(
    ("selection", "source"),
    [
        (td.Everything(), "producer"),
        (None, "master"),
        (None, "alone"),
        (td.KeyDeviation(0.2), "master"),
    ],
    ids=str,
)
def test_200_requests_end_in_a_pool_too_small_for_all(
    llama: tuple[Any, Model], monkeypatch: pytest.MonkeyPatch, selection: Any, source: str
) -> None:
    """They come and are cancelled at random; nobody fails and no page is lost."""
    _, model = llama
    turns = turns_of(20, 10, seed=1)
    counts = {agent: [1 + 13 * (n + a) % 40 for n in range(10)] for a, agent in enumerate(turns)}
    suspended: list[object] = []
    suspend = td.Plan.suspend
    monkeypatch.setattr(
        td.Plan, "suspend", lambda plan, who: (suspended.append(who), suspend(plan, who))
    )

    async def live(engine: Engine, agent: str, rng: np.random.Generator, leaves: float) -> None:
        for n, (prompt, count) in enumerate(zip(turns[agent], counts[agent], strict=True)):
            await asyncio.sleep(rng.exponential(0.003))
            request = engine.submit(agent, prompt, n, count)
            last = int(rng.integers(0, count)) if rng.random() < leaves else count
            if last == 0:
                await asyncio.sleep(rng.exponential(0.003))
                request.cancel()
            async for _ in request:
                if len(request.output) >= last:
                    request.cancel()
            outputs[agent, n] = request.output
            if last == count:
                assert len(request.output) == count

    async def serve(pages: int, leaves: float) -> tuple[td.DiffStore, Watched]:
        mine, watched = collector(model, selection, pages, source=source), Watched(model)
        rng = np.random.default_rng(2)
        async with Engine(watched, mine, max_rows=64) as engine:
            await asyncio.gather(*(live(engine, agent, rng, leaves) for agent in turns))
        return mine.store, watched

    pages = max(
        most_pages(prompt, count, selection)
        for agent in turns
        for prompt, count in zip(turns[agent], counts[agent], strict=True)
    )
    outputs: dict[tuple[str, int], list[int]] = {}
    store, watched = run(serve(pages, leaves=0.2))
    assert len(outputs) == 200
    assert len(suspended) > 3
    assert store.stats().evictions > 20
    assert any(len({one for one in step if one}) > 3 for step in watched.steps)
    stats = store.stats()
    assert stats.held_pages == held_by_agents(store)
    assert stats.used_pages == stats.held_pages + stats.evictable_pages
    assert stats.free_pages == pages - stats.used_pages
    pressed, outputs = outputs, {}
    if selection == td.Everything():
        _, watched = run(serve(8192, leaves=0))
        gaps = torch.stack([row for rows in watched.logits.values() for row in rows]).topk(2).values
        assert (gaps[:, 0] - gaps[:, 1]).min() > 1e-5  # no token hangs on a rounding
        for turn, found in pressed.items():
            assert found == outputs[turn][: len(found)]
    for agent in store.agents:
        store.release(agent)
    assert store.stats().held_pages == 0
    store.clear()
    assert store.stats().free_pages == pages


def test_preemption_takes_the_youngest_and_resumes_the_oldest(
    llama: tuple[Any, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, model = llama
    prompts = {agent: [td.private(tokens(a, 24))] for a, agent in enumerate("abcd")}
    did: list[tuple[str, str]] = []
    suspend, resume = td.Plan.suspend, td.Plan.resume
    monkeypatch.setattr(
        td.Plan, "suspend", lambda plan, who: (did.append(("suspend", who)), suspend(plan, who))
    )
    monkeypatch.setattr(
        td.Plan, "resume", lambda plan, who: (did.append(("resume", who)), resume(plan, who))
    )

    async def serve() -> dict[str, list[int]]:
        # 4 agents need 12 pages for their prompts, and 5 pages each for 40 tokens.
        async with Engine(Watched(model), collector(model, None, 17)) as engine:
            requests = [engine.submit(agent, prompt, 1, 40) for agent, prompt in prompts.items()]
            return {request.agent: await all_of(request) for request in requests}

    output = run(serve())
    for agent, prompt in prompts.items():
        assert output[agent] == greedy(reference, prompt, 40)[0]
    suspended = [who for verb, who in did if verb == "suspend"]
    assert suspended[:2] == ["d", "c"]
    assert "a" not in suspended
    assert next(who for verb, who in did if verb == "resume") == "c"


def test_a_later_round_computes_what_is_new(llama: tuple[Any, Model]) -> None:
    _, model = llama
    watched, prompts = Watched(model), round_of(4)

    async def serve() -> tuple[int, int]:
        async with Engine(watched, collector(model, source="producer")) as engine:
            said = await serve_round(engine, prompts, 1, False)
            rows = sum(map(len, watched.steps))
            watched.steps.clear()
            heard = [td.shared(one) for one in said.values()]
            later = {agent: [*prompt, *heard] for agent, prompt in prompts.items()}
            await serve_round(engine, later, 2, False, count=1)
            return rows, sum(map(len, watched.steps))

    rows, later = run(serve())
    prompt_rows = sum(len(one) for prompt in prompts.values() for one in prompt)
    assert rows < 0.7 * prompt_rows + 4 * 7
    # The own beginning is taken over, and what is heard is repaired: at most all of it is computed.
    assert later < 4 * 4 * 8


def test_what_cannot_be_served_ends_with_an_error_and_hurts_nobody(
    llama: tuple[Any, Model],
) -> None:
    _, model = llama

    async def serve() -> None:
        mine = collector(model, None, pages=20)
        async with Engine(model, mine) as engine:
            good = engine.submit("good", [td.private(tokens(1, 60))], 1, 20)
            too_long = engine.submit("long", [td.private(tokens(2, 8 * 21))], 1)
            grows = engine.submit("grows", [td.private(tokens(3, 8 * 19))], 1, 20)
            with pytest.raises(ValueError, match="agent: expected no request of it"):
                engine.submit("good", [td.private([1])], 2)
            for prompt, count in (
                ([], 1),
                ([td.private([])], 1),
                ([td.private([331])], 1),
                ([td.private([1])], 0),
                ([td.private([1] * 1000)], 26),
            ):
                with pytest.raises(ValueError, match=r"prompt: expected 1\.\..* below 331, got"):
                    engine.submit("bad", prompt, 1, count)
            assert len(await all_of(good)) == 20
            for request, made in ((too_long, 0), (grows, 9)):
                for _ in range(2):
                    with pytest.raises(td.OutOfPagesError):
                        await all_of(request)
                assert len(request.output) == made
            assert len(await all_of(engine.submit("long", [td.private([5])], 1, 3))) == 3
        assert mine.store.agents == ["long"]
        assert mine.store.stats().held_pages == held_by_agents(mine.store) == 2

    run(serve())


def test_a_step_that_fails_ends_the_rounds_in_it(llama: tuple[Any, Model]) -> None:
    _, model = llama

    class Failing(Watched):
        def __call__(self, rows: td.Step) -> torch.Tensor:
            logits = super().__call__(rows)
            if len(self.steps) == 3:
                raise ArithmeticError("the third step")
            return logits

    async def serve() -> None:
        mine = collector(model)
        async with Engine(Failing(model), mine) as engine:
            requests = [engine.submit(agent, PROMPTS[agent], 1) for agent in "ab"]
            for request in requests:
                with pytest.raises(ArithmeticError, match="the third step"):
                    await all_of(request)
                assert len(request.output) == 2
            assert mine.store.agents == []
            assert mine.store.stats().held_pages == 0
            assert len(await all_of(engine.submit("a", PROMPTS["a"], 1))) == 16
        assert mine.store.agents == ["a"]

    run(serve())


def test_cancelled_requests_give_their_pages_back(llama: tuple[Any, Model]) -> None:
    """In the queue, in prefill and in decode; and a closed engine ends all."""
    _, model = llama

    async def serve() -> None:
        mine = collector(model, pages=60)
        async with Engine(model, mine, max_rows=8) as engine:
            decodes = engine.submit("decodes", PROMPTS["d"], 1, 100)
            assert [token async for token in take(decodes, 3)] == decodes.output[:3]
            prefills = engine.submit("prefills", PROMPTS["a"], 1)
            waits = engine.submit("waits", [td.private(tokens(9, 400))], 2)
            while prefills.phase is not td.Phase.PREFILL:
                await asyncio.sleep(0)
            assert waits.phase is td.Phase.WAITING
            for request in (waits, prefills, decodes):
                request.cancel()
            for request in (waits, prefills, decodes):
                await all_of(request)
            assert prefills.output == waits.output == []
            assert mine.store.stats().used_pages == 0
            left = engine.submit("left", PROMPTS["a"], 3, 100)
            assert len([token async for token in take(left, 1)]) == 1
            with pytest.raises(ValueError, match="agent: expected no request of it"):
                engine.submit("left", PROMPTS["d"], 3)
        await all_of(left)
        assert 1 <= len(left.output) < 100
        with pytest.raises(ValueError, match="and an open engine, got 'late'"):
            engine.submit("late", PROMPTS["d"], 3)
        assert mine.store.stats().held_pages == 0
        assert mine.store.agents == []

    run(serve())


def test_an_engine_that_breaks_leaves_nobody_waiting(
    llama: tuple[Any, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = llama

    async def serve() -> None:
        async with Engine(model, collector(model)) as engine:
            request = engine.submit("a", PROMPTS["a"], 1)
            async for _ in request:
                monkeypatch.setattr(engine.collector, "step", lambda *_, **__: 1 / 0)
            with pytest.raises(ValueError, match="and an open engine"):
                engine.submit("b", PROMPTS["b"], 1)

    with pytest.raises(ZeroDivisionError):
        run(serve())


async def take(request: Request, count: int) -> AsyncIterator[int]:
    """The first tokens of a request."""
    left = count
    async for token in request:
        yield token
        left -= 1
        if left == 0:
            return


@pytest.mark.model
def test_smollm2_says_what_transformers_says(smollm2: tuple[Any, Any]) -> None:
    from evals.models import model_path

    reference, tokenizer = smollm2
    model = Watched(Model(model_path("smollm2")))
    story = "The agents met at noon and told each other what they had seen in the town. "
    heard = td.shared(tokenizer(story * 10).input_ids)
    prompts = {
        name: [td.private(tokenizer(f"I am {name}. ").input_ids), heard, end]
        for name, end in (("Ada", td.private([28])), ("Ben", td.private([30])))
    }

    async def serve() -> dict[str, list[int]]:
        async with Engine(model, collector(model.model, td.Everything())) as engine:
            return await serve_round(engine, prompts, 1, trickles=True, count=6)

    output = run(serve())
    for name, prompt in prompts.items():
        expected, logits = greedy(reference, prompt, 6)
        assert output[name] == expected
        assert (torch.stack(model.logits[name]) - logits).abs().max() <= 2e-3
