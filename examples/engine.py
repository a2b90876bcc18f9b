"""A serving engine to be read: continuous batching of rounds of agents over `KVCollector`.

A step is one forward pass: a token of every agent that decodes, and prompts' rows. Short of pages,
idle agents' KV goes first, then the youngest are suspended. Run: engine.py MODEL_DIRECTORY
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Container, Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer

import tokendance as td


class Model:
    """Runs the rows of a step through a Llama or a Qwen2; weights have the checkpoint's names."""

    def __init__(self, directory: str | Path, device: str = "cpu", dtype=torch.float32) -> None:
        at = Path(directory)
        config = SimpleNamespace(**json.loads((at / "config.json").read_text()))
        kind, window = config.model_type, getattr(config, "use_sliding_window", False)
        if kind not in ("llama", "qwen2") or config.hidden_act != "silu" or window:
            raise ValueError(f"config: expected a plain llama or qwen2, got {vars(config)}")
        index = at / "model.safetensors.index.json"
        names = json.loads(index.read_text())["weight_map"].values() if index.is_file() else ()
        loaded = [load_file(at / name, device) for name in set(names) or ["model.safetensors"]]
        self.weights = {name: one.to(dtype) for part in loaded for name, one in part.items()}
        self.weights.setdefault("lm_head.weight", self.weights["model.embed_tokens.weight"])
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", heads)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.geometry = td.KVGeometry(config.num_hidden_layers, heads, kv_heads, head_dim, dtype)
        self.rope = td.Rope.from_config(config)
        self.vocabulary, self.epsilon = config.vocab_size, config.rms_norm_eps

    def __call__(self, rows: td.Step) -> torch.Tensor:
        """Logits ``[len(rows.logit_rows), vocabulary]``."""
        hidden = F.embedding(rows.token_ids, self.weights["model.embed_tokens.weight"])
        size = (-1, self.geometry.head_dim)
        for number in range(self.geometry.num_layers):
            at = f"model.layers.{number}."
            x = self._norm(f"{at}input_layernorm", hidden)
            q, k, v = (self._linear(f"{at}self_attn.{n}_proj", x).unflatten(1, size) for n in "qkv")
            x = rows.attend(number, q, k, v)  # rotates, writes keys and values, attends
            hidden = rows.keep(hidden)[0] + self._linear(f"{at}self_attn.o_proj", x.flatten(1))
            x = self._norm(f"{at}post_attention_layernorm", hidden)
            gate, up = (self._linear(f"{at}mlp.{n}_proj", x) for n in ("gate", "up"))
            hidden = hidden + self._linear(f"{at}mlp.down_proj", F.silu(gate) * up)
        return self._linear("lm_head", self._norm("model.norm", hidden[rows.logit_rows]))

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.epsilon)


@dataclass(eq=False)
class Request:
    """One agent's turn in a round, and the async iterator of its tokens."""

    agent: str
    prompt: tuple[td.Segment, ...]
    round: Hashable
    max_new_tokens: int
    stop: Container[int]
    plan: td.Plan | None = None  # from its admission on
    output: list[int] = field(default_factory=list)
    is_cancelled: bool = False
    news: asyncio.Queue = field(default_factory=asyncio.Queue)  # tokens, then an error or None

    @property
    def phase(self) -> td.Phase:
        return self.plan.phase(self.agent) if self.plan else td.Phase.WAITING

    def cancel(self) -> None:
        """No more tokens come; before the next step the pages are back, and the iterator ends."""
        self.is_cancelled = True

    async def __aiter__(self) -> AsyncIterator[int]:
        while isinstance(news := await self.news.get(), int):
            yield news
        self.news.put_nowait(news)  # whoever asks again is told again
        if news is not None:
            raise news


class Engine:
    """Serves requests while its ``async with`` block is open; the store is its own until then.

    A thread computes a step; everything is decided in the event loop, between two steps.
    """

    def __init__(self, model: Model, collector: td.KVCollector, max_rows=1024, decoder=None):
        self.model, self.collector, self.store = model, collector, collector.store
        self.max_rows, self.decoder = max_rows, decoder  # of a step; captured where there is a GPU
        self._requests, self._rounds = {}, {}  # by agent, the oldest first; plans by round
        self._arrival, self._is_open = asyncio.Event(), True

    def submit(
        self, agent: str, prompt: Iterable[td.Segment], round: Hashable, max_new_tokens=16, stop=()
    ) -> Request:
        """A request of an agent that has no other one; those of a round share a plan."""
        prompt = tuple(prompt)
        length, most = sum(map(len, prompt)), self.store.max_position - max_new_tokens + 1
        highest = max((one.token_ids.max(initial=0) for one in prompt), default=0)
        if agent in self._requests or not self._is_open:
            raise ValueError(f"agent: expected no request of it and an open engine, got {agent!r}")
        if max_new_tokens < 1 or not 1 <= length <= most or highest >= self.model.vocabulary:
            wanted = f"1..{most} tokens below {self.model.vocabulary}"
            raise ValueError(f"prompt: expected {wanted}, got {length} tokens up to {highest}")
        request = self._requests[agent] = Request(agent, prompt, round, max_new_tokens, stop)
        self._arrival.set()
        return request

    async def __aenter__(self) -> "Engine":
        self._task = asyncio.create_task(self._serve())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._is_open = False
        self._arrival.set()
        await self._task

    async def _serve(self) -> None:
        try:
            while self._is_open:
                self._arrival.clear()
                step = self._next_step()
                await (self._finish(step) if step else self._arrival.wait())
        finally:
            self._is_open = False
            for request in list(self._requests.values()):
                self._end(request)

    async def _finish(self, step: td.Step) -> None:
        try:
            tokens = await asyncio.to_thread(self._run, step)
        except Exception as error:  # it has aborted the plans in the step, if it could begin
            for request in self._in(td.Phase.ENDED) or list(self._requests.values()):
                self._end(request, error)
            return
        for agent, token in zip(step.logit_agents, tokens, strict=True):
            request = self._requests[agent]
            if request.is_cancelled or len(request.output) > len(request.plan.output(agent)):
                continue  # after a suspension rows are computed again: the token is known
            request.output.append(token)
            request.news.put_nowait(token)
            if token in request.stop or len(request.output) == request.max_new_tokens:
                request.plan.commit(agent)
                self._end(request)

    def _run(self, step: td.Step) -> list[int]:
        with step, torch.inference_mode():
            if isinstance(step, td.Step):
                return self.model(step).argmax(-1).tolist()
            tokens = self.decoder.replay(lambda: self.model(self.decoder).argmax(-1))
            return tokens[: step.num_rows].tolist()

    def _in(self, *phases: td.Phase) -> list[Request]:
        return [one for one in self._requests.values() if one.phase in phases]

    def _next_step(self) -> td.Step | None:
        for request in [one for one in self._requests.values() if one.is_cancelled]:
            self._end(request)
        self._admit()
        while running := self._in(td.Phase.PREFILL, td.Phase.DECODE):
            decode = {one.agent: one.output[-1:] for one in self._in(td.Phase.DECODE)}
            try:
                if self.decoder and len(decode) == len(running) and self.decoder.fits(decode):
                    return self.decoder.prepare(decode)
                return self.collector.step(decode, max_rows=self.max_rows)
            except td.OutOfPagesError as error:
                self._make_room(error)

    def _admit(self) -> None:
        """Starts and resumes requests as far as pages are there; those of a round together."""
        most = len(self._requests)
        while queue := self._in(td.Phase.WAITING, td.Phase.SUSPENDED):
            first, stats = queue[0], self.store.stats()
            running = self._in(td.Phase.PREFILL, td.Phase.DECODE)
            plan = first.plan or self._rounds.get(first.round)
            if plan is None or (first.plan is None and first.agent in plan.agents):
                plan = self._rounds[first.round] = self.collector.plan({})
            alike = [o for o in queue[:most] if o.plan is first.plan and o.round == first.round]
            prompts = {o.agent: o.prompt for o in alike if o.agent not in plan.agents}
            needed = plan.pages_to_resume(first.agent) if first.plan else plan.pages_needed(prompts)
            spare = len(running) + max(len(prompts), 1)  # for what each decodes next
            fits = needed + spare * (spare > 1) <= stats.free_pages + stats.evictable_pages
            if not fits and len(prompts) > 1:
                most = len(prompts) // 2
            elif not fits:
                if running and self._requests.keys() >= set(self.store.agents):
                    return
                self._make_room(td.OutOfPagesError(f"prompt: too few pages for {first.agent!r}"))
            elif first.plan:
                plan.resume(first.agent)
            else:
                plan.add(prompts)
                for agent in prompts:
                    self._requests[agent].plan = plan

    def _make_room(self, error: td.OutOfPagesError) -> None:
        """Lets one agent's KV go; if there is none but that of one request, ends it."""
        running = self._in(td.Phase.PREFILL, td.Phase.DECODE)
        if idle := [agent for agent in self.store.agents if agent not in self._requests]:
            self.store.release(idle[0])
        elif len(running) > 1:
            running[-1].plan.suspend(running[-1].agent)
        elif agents := self.store.agents:
            self.store.release(agents[0])
        else:
            self._end((running or self._in(td.Phase.WAITING, td.Phase.SUSPENDED))[0], error)

    def _end(self, request: Request, error: Exception | None = None) -> None:
        """Gives back what the request has, unless it was committed, and ends its iterator."""
        del self._requests[request.agent]
        if request.phase not in (td.Phase.WAITING, td.Phase.ENDED):
            request.plan.abort(request.agent)
        if (plan := self._rounds.get(request.round)) and plan.ended:
            del self._rounds[request.round]
        request.news.put_nowait(error)


async def main(directory: str) -> None:
    """Three agents, two rounds: in the second, each hears what all have said in the first."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = Model(directory, device), Tokenizer.from_file(f"{directory}/tokenizer.json")
    store, said = td.DiffStore(model.geometry, model.rope, "256MiB", device), []
    collector, requests = td.KVCollector(store, source="producer"), {}
    async with Engine(model, collector, decoder=collector.decoder(4, 4, 512)) as engine:
        for number in (1, 2):
            for name in ("Ada", "Ben", "Cleo"):
                ids = tokenizer.encode(f"{name}, of the council:", add_special_tokens=False).ids
                requests[name] = engine.submit(name, [td.private(ids), *said], number)
            for request in requests.values():
                said.append(td.shared([token async for token in request]))
                print(number, request.agent, tokenizer.decode(request.output))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
