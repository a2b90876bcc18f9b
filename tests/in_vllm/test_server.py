"""vLLM's own server and the `openai` client: agents that know nothing of rounds but a separator."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
from server import Server, running

OPTIONS = {"separator": "<|im_end|>", "block_size": 8, "patience": 0.5, "max_rows": 64}
TOLD = re.compile(r"round (\S+): (\d+) agents, (\d+) rows, (\d+) computed, (\d+) reused")


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tiny, tmp_path_factory.mktemp("server"), OPTIONS) as server:
        yield server


def ask_all(url: str, conversations: dict[str, list[dict[str, str]]], **more: Any) -> Any:
    """Every agent's answer, asked at the same time."""
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key="none")

    def ask(messages: Any) -> str:
        answer = client.chat.completions.create(
            model="tiny", messages=messages, temperature=0, max_tokens=12, **more
        )
        return answer.choices[0].message.content or ""

    with ThreadPoolExecutor(len(conversations)) as pool:
        return dict(zip(conversations, pool.map(ask, conversations.values()), strict=True))


def test_chats_that_share_messages_are_a_round(server: Server) -> None:
    url, log = server.url, server.log
    names = ["Ada", "Ben", "Cleo", "Dan"]
    talks = {
        name: [{"role": "system", "content": f"You are {name}, who likes {name[::-1]} best."}]
        for name in names
    }
    said = {name: f"{name} says: the square is at its best in the morning." for name in names}
    for turn in range(3):
        for i, name in enumerate(names):  # each sees the messages in an order of its own
            order = names[i:] + names[:i]
            talks[name] += [{"role": "user", "content": said[other]} for other in order]
        answers = ask_all(url, talks)
        alone = {"extra_body": {"kv_transfer_params": {"tokendance": False}}}
        plain = ask_all(url, talks, **alone)
        assert answers["Ada"] == plain["Ada"]  # whose rows the others reuse
        for name in names:
            talks[name].append({"role": "assistant", "content": answers[name]})
        said = {name: f"{name} at {turn}: {answers[name]}" for name in names}
    told = [tuple(map(int, one[1:])) for one in TOLD.findall(log.read_text())]
    assert [agents for agents, *_ in told] == [4, 4, 4]
    for turn, (_, rows, computed, reused) in enumerate(told):
        assert rows == computed + reused
        assert computed < (0.75 if turn == 0 else 0.5) * rows


def test_the_api_takes_what_a_request_says_of_its_round(server: Server) -> None:
    from openai import OpenAI

    url, log = server.url, server.log
    client = OpenAI(base_url=url, api_key="none")
    shared = list(range(10, 60))

    def ask(agent: int) -> Any:
        told = {"round": "spans", "agent": f"agent {agent}", "agents": 3, "shared": [[9, 59]]}
        return client.completions.create(
            model="tiny",
            prompt=[*range(70 + agent, 79 + agent), *shared, 7],
            temperature=0,
            max_tokens=4,
            extra_body={"kv_transfer_params": {"tokendance": told}},
        )

    with ThreadPoolExecutor(3) as pool:
        assert [one.usage.completion_tokens for one in pool.map(ask, range(3))] == [4] * 3
    found = [one for one in TOLD.findall(log.read_text()) if one[0] == "spans"]
    assert [one[1:3] for one in found] == [("3", "180")]
    assert int(found[0][3]) < 110


def test_metrics_count_rounds(server: Server) -> None:
    found = server.metrics()
    assert found["vllm:tokendance_rounds_total"] == 4
    assert found["vllm:tokendance_members_total"] == 4 * 3 + 3
    computed = found["vllm:tokendance_rows_computed_total"]
    assert 0 < computed < found["vllm:tokendance_rows_total"]
    page = 8 * 2 * 2 * 2 * 64 * 4  # rows, layers, keys and values, heads, dims, bytes
    assert found["vllm:tokendance_bytes_held"] > 0  # agents' rows are kept
    assert found["vllm:tokendance_bytes_held"] % page == 0


@pytest.mark.slow
def test_agents_of_autogen_know_nothing_but_the_separator(server: Server) -> None:
    """The example, in an environment of its own: AutoGen and vLLM want other protobufs."""
    from tools.environments import NotRunError, kept

    wanted = ["autogen-agentchat==0.7.5", "autogen-ext[openai]==0.7.5"]
    try:
        python = kept("autogen0.7.5", lambda: sys.executable, wanted)
    except NotRunError as error:
        pytest.skip(f"NOT RUN: {error}")
    example = Path(__file__).parents[2] / "examples" / "vllm_agents.py"
    command = [str(python), str(example), "--url", server.url, "--tokens", "16"]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    told = re.findall(r"6 agents in 1 rounds: (\d+) of (\d+) prompt rows", outcome.stdout)
    assert len(told) == 3
    for number, (computed, rows) in enumerate(told):
        assert int(computed) < (0.9, 0.8, 0.8)[number] * int(rows), outcome.stdout


def leave(server: Server, body: dict[str, Any], answers: int) -> None:
    """Asks, and goes away after so many parts of the answer, or after a moment."""
    sent = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: tiny\r\nContent-Length: {len(sent)}\r\n"
    with socket.create_connection(("127.0.0.1", urlparse(server.url).port)) as connection:
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + sent)
        time.sleep(0.2)
        got = b""
        while got.count(b"data: ") < answers:
            got += connection.recv(4096)


@pytest.mark.parametrize("answers", [0, 1, 20])
def test_a_client_that_goes_away_leaves_the_others_right(server: Server, answers: int) -> None:
    """Before its round has begun or while it is computed, and while it decodes."""
    from openai import OpenAI

    client = OpenAI(base_url=server.url, api_key="none")
    shared = list(range(10, 250)) * 3

    def body(agent: int, told: dict[str, Any]) -> dict[str, Any]:
        spans = {"agent": f"agent {agent}", "shared": [[9, 9 + len(shared)]], **told}
        return {
            "model": "tiny",
            "prompt": [*range(70 + agent, 79 + agent), *shared, 7],
            "temperature": 0,
            "max_tokens": 40,
            "stream": True,
            "ignore_eos": True,
            "kv_transfer_params": {"tokendance": spans},
        }

    def ask(agent: int, told: dict[str, Any]) -> str:
        given = body(agent, told) | {"stream": False}
        more = {name: given.pop(name) for name in ("ignore_eos", "kv_transfer_params")}
        return client.completions.create(**given, extra_body=more).choices[0].text

    name = f"left-{answers}"
    # One that never comes keeps the first round from beginning before somebody has left.
    members = {"round": name, "agents": 4 if answers else 5, "patience": 60 if answers else 1}
    with ThreadPoolExecutor(4) as pool:
        whole = {"round": f"whole-{answers}", "agents": 4}
        named = [whole | {"agent": f"whole {agent}"} for agent in range(4)]
        expected = list(pool.map(ask, range(4), named))
        others = [pool.submit(ask, agent, members) for agent in range(3)]
        leave(server, body(3, members), answers)
        found = [one.result(60) for one in others]
    assert found[0] == expected[0]  # whose rows the others reuse
    assert all(len(one) for one in found)
    server.wait_until(num_requests_running=0, num_requests_waiting=0)
    rounds = [int(one[1]) for one in TOLD.findall(server.log.read_text()) if one[0] == name]
    assert sum(rounds) == (4 if answers else 3)
