"""A thin OpenAI-compatible front of the small engine, `examples/engine.py`.

    python -m evals.serving.front MODEL_DIRECTORY [--port 8000] [--capacity 1GiB] [--max-rows 1024]
                                  [--patience 0.2]

``/v1/completions`` takes a prompt as text or token ids, ``max_tokens``, ``ignore_eos``, ``stream``
and ``return_token_ids``, and says greedy tokens. Rounds are told as to vLLM with the connector
(docs/vllm.md), by ``kv_transfer_params``: ``round``, ``agent``, ``agents`` and ``shared``. A round
begins when all its agents are there, or nobody has come for as long as it has patience.
``/v1/models``, ``/health``, ``/metrics`` and ``/reset_prefix_cache``, which forgets everything
that is stored, are there too.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

import tokendance as td
from examples.engine import Engine, Model, Request
from tokendance.host.selection import DEFAULT_NAME, parse_selection


class CountedModel(Model):
    """A model that counts the rows that it has computed."""

    rows = 0

    def __call__(self, rows: td.Step) -> torch.Tensor:
        self.rows += rows.num_rows
        return super().__call__(rows)


@dataclass
class Member:
    """A request that waits for its round; ``begun`` is the engine's once it has."""

    agent: str
    prompt: list[td.Segment]
    max_new_tokens: int
    stop: list[int]
    begun: asyncio.Future[Request]


@dataclass
class Gathering:
    """Requests of a round that has not begun."""

    members: list[Member] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    is_whole: bool = False


class Front:
    """Answers requests over HTTP/1.1 with an engine that is open, one request a connection.

    Args:
        engine: whose store it reports.
        model: the engine's.
        tokenizer: the model's.
        stop: token ids that end an answer.
        patience: seconds without another member after which a round begins.
    """

    def __init__(
        self,
        engine: Engine,
        model: CountedModel,
        tokenizer: Tokenizer,
        stop: Sequence[int] = (),
        patience: float = 0.2,
    ) -> None:
        self._engine, self._model, self._tokenizer = engine, model, tokenizer
        self._stop, self._patience = list(stop), patience
        self._gathering: dict[str, Gathering] = {}
        self._numbers = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()
        self._running = 0
        self._decode_rows = 0  # all tokens but a request's last are fed again

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            method, target = head[0].split(" ")[:2]
            fields = dict(line.lower().split(": ", 1) for line in head[1:] if ": " in line)
            body = await reader.readexactly(int(fields.get("content-length", 0)))
            await self._answer(method, target.partition("?")[0], body, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # who asked has gone away
        finally:
            writer.close()

    async def _answer(
        self, method: str, path: str, body: bytes, writer: asyncio.StreamWriter
    ) -> None:
        if (method, path) == ("POST", "/v1/completions"):
            await self._complete(body, writer)
        elif (method, path) == ("POST", "/reset_prefix_cache"):
            try:
                self._engine.store.clear()
            except ValueError as error:  # somebody is being served
                _send(writer, HTTPStatus.CONFLICT, _error(error))
            else:
                _send(writer, HTTPStatus.OK, json.dumps({"success": True}))
        elif (method, path) == ("GET", "/v1/models"):
            _send(writer, HTTPStatus.OK, json.dumps({"object": "list", "data": [MODEL]}))
        elif (method, path) == ("GET", "/metrics"):
            _send(writer, HTTPStatus.OK, self._metrics(), "text/plain")
        elif (method, path) == ("GET", "/health"):
            _send(writer, HTTPStatus.OK, "{}")
        else:
            _send(
                writer, HTTPStatus.NOT_FOUND, _error(f"path: expected one of the API, got {path}")
            )
        await writer.drain()

    def _metrics(self) -> str:
        stats = self._engine.store.stats()
        page_bytes = self._engine.store.pool.page_bytes
        return (
            f"tokendance_bytes_held {stats.held_pages * page_bytes}\n"
            f"tokendance_rows_total {self._model.rows}\n"
            f"tokendance_decode_rows_total {self._decode_rows}\n"
            f"tokendance_requests_running {self._running}\n"
        )

    async def _complete(self, body: bytes, writer: asyncio.StreamWriter) -> None:
        try:
            asked = json.loads(body)
            request = await self._submit(asked)
        except (ValueError, TypeError, KeyError) as error:
            _send(writer, HTTPStatus.BAD_REQUEST, _error(error))
            return
        self._running += 1
        try:
            if asked.get("stream"):
                await self._stream(request, asked, writer)
            else:
                choices = [one async for one in self._choices(request, asked)]
                _send(writer, HTTPStatus.OK, json.dumps(_joined(choices, request)))
        except (td.OutOfPagesError, RuntimeError) as error:  # the engine's, while it served
            if not asked.get("stream"):
                _send(writer, HTTPStatus.INTERNAL_SERVER_ERROR, _error(error))
            else:
                writer.write(f"data: {_error(error)}\n\n".encode())
        finally:
            self._running -= 1
            if request.phase is not td.Phase.ENDED:
                request.cancel()

    async def _stream(
        self, request: Request, asked: dict[str, Any], writer: asyncio.StreamWriter
    ) -> None:
        writer.write(_head(HTTPStatus.OK, "text/event-stream"))
        async for choice in self._choices(request, asked):
            writer.write(f"data: {json.dumps(_completion(choice))}\n\n".encode())
            await writer.drain()
        writer.write(b"data: [DONE]\n\n")

    async def _choices(
        self, request: Request, asked: dict[str, Any]
    ) -> AsyncIterator[dict[str, Any]]:
        """A choice for every token, as it comes."""
        said = ""
        ids: list[int] = []
        async for token in request:
            self._decode_rows += bool(ids)
            ids.append(token)
            text = self._tokenizer.decode(ids)
            ended = len(ids) == request.max_new_tokens or token in request.stop
            choice = {
                "index": 0,
                "text": text[len(said) :],
                "logprobs": None,
                "finish_reason": _reason(token in request.stop) if ended else None,
            }
            said = text
            yield choice | ({"token_ids": [token]} if asked.get("return_token_ids") else {})

    async def _submit(self, asked: dict[str, Any]) -> Request:
        """Submits a request once its round begins.

        Raises:
            ValueError, TypeError, KeyError: what is asked is not understood.
        """
        prompt = asked["prompt"]
        ids = self._tokenizer.encode(prompt).ids if isinstance(prompt, str) else prompt
        if asked.get("temperature", 0) or asked.get("n", 1) != 1:
            raise ValueError("temperature: expected 0 and one answer, got others")
        told = (asked.get("kv_transfer_params") or {}).get("tokendance") or {}
        segments = _segments(ids, told.get("shared", []))
        agent = str(told.get("agent", f"nobody {next(self._numbers)}"))
        stop = [] if asked.get("ignore_eos") else self._stop
        begun: asyncio.Future[Request] = asyncio.get_running_loop().create_future()
        member = Member(agent, segments, int(asked.get("max_tokens", 16)), stop, begun)
        name = str(told.get("round", agent))
        if name not in self._gathering:
            self._gathering[name] = Gathering()
            task = asyncio.create_task(self._begin(name))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        gathering = self._gathering[name]
        gathering.members.append(member)
        gathering.is_whole = len(gathering.members) >= int(told.get("agents", 1))
        gathering.news.set()
        return await begun

    async def _begin(self, name: str) -> None:
        """Waits for a round's members and submits them together, in the order of their names."""
        gathering = self._gathering[name]
        while not gathering.is_whole:
            gathering.news.clear()
            try:
                await asyncio.wait_for(gathering.news.wait(), self._patience)
            except asyncio.TimeoutError:
                break
        del self._gathering[name]
        for one in sorted(gathering.members, key=lambda one: one.agent):
            try:
                request = self._engine.submit(
                    one.agent, one.prompt, name, one.max_new_tokens, one.stop
                )
            except ValueError as error:
                one.begun.set_exception(error)
            else:
                one.begun.set_result(request)


MODEL = {"id": "model", "object": "model", "owned_by": "tokendance"}


def _segments(ids: Sequence[int], spans: Sequence[Sequence[int]]) -> list[td.Segment]:
    found, at = [], 0
    for begin, end in spans:
        if not at <= begin < end <= len(ids):
            raise ValueError(f"shared: expected ascending spans of the prompt, got {spans}")
        if at < begin:
            found.append(td.private(ids[at:begin]))
        found.append(td.shared(ids[begin:end]))
        at = end
    return [*found, td.private(ids[at:])] if at < len(ids) else found


def _reason(is_stopped: bool) -> str:
    return "stop" if is_stopped else "length"


def _completion(choice: dict[str, Any]) -> dict[str, Any]:
    kind = {"id": "completion", "object": "text_completion", "created": 0, "model": "model"}
    return {**kind, "choices": [choice]}


def _joined(choices: list[dict[str, Any]], request: Request) -> dict[str, Any]:
    whole = choices[-1] | {"text": "".join(one["text"] for one in choices)}
    if "token_ids" in whole:
        whole["token_ids"] = list(request.output)
    prompt = sum(map(len, request.prompt))
    usage = {"prompt_tokens": prompt, "completion_tokens": len(choices)}
    return _completion(whole) | {"usage": usage | {"total_tokens": prompt + len(choices)}}


def _error(error: object) -> str:
    return json.dumps({"error": {"message": str(error), "type": type(error).__name__}})


def _head(status: HTTPStatus, kind: str) -> bytes:
    return (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {kind}\r\nConnection: close\r\n"
    ).encode() + (b"\r\n" if kind == "text/event-stream" else b"")


def _send(
    writer: asyncio.StreamWriter, status: HTTPStatus, text: str, kind: str = "application/json"
) -> None:
    body = text.encode()
    writer.write(_head(status, kind) + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)


async def serve(options: argparse.Namespace) -> None:
    """Serves until it is cancelled."""
    directory = Path(options.model)
    model = CountedModel(directory)
    store = td.DiffStore(model.geometry, model.rope, options.capacity)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    eos = json.loads((directory / "config.json").read_text()).get("eos_token_id")
    stop = [] if eos is None else eos if isinstance(eos, list) else [eos]
    collector = td.KVCollector(store, selection=parse_selection(options.selection))
    async with Engine(model, collector, max_rows=options.max_rows) as engine:
        front = Front(engine, model, tokenizer, stop, options.patience)
        server = await asyncio.start_server(front.handle, options.host, options.port, limit=1 << 20)
        async with server:
            await server.serve_forever()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m evals.serving.front", description=__doc__.split("\n")[0]
    )
    parser.add_argument("model", help="a directory with a Llama or a Qwen2")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--capacity", default="1GiB", help="bytes of the store")
    parser.add_argument("--max-rows", type=int, default=1024, help="rows of a forward pass")
    parser.add_argument("--patience", type=float, default=0.2, help="seconds")
    parser.add_argument("--selection", default=DEFAULT_NAME, help="reused rows computed again")
    options = parser.parse_args(arguments)
    asyncio.run(serve(options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
