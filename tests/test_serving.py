"""`python -m evals serving`, against a server in this process that says what it is told to."""

from __future__ import annotations

import json
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evals.capacity.rounds import SHAPES, Shape
from evals.cli import main
from evals.cli import serving as command
from evals.serving.client import Metrics, complete, get
from evals.serving.figures import agreement, figures_of, percentile
from evals.serving.limits import agents_of_each
from evals.serving.prompts import Ask, Recorded, Trace
from evals.serving.rounds import Arrivals, RoundServed, Served, hold, serve
from evals.serving.servers import ENGINE, SYSTEMS, Held, Setup, command_of, running
from evals.workloads import read_rounds

SHAPE = Shape(system=8, own=6, output=4, board=0, tail=2)
TEXT = np.arange(10, 1000, dtype=np.int32)


def spoken(prompt: Sequence[int], count: int) -> list[int]:
    """What the fake model says: it depends on all of the prompt."""
    return [(sum(prompt) * 31 + 7 * i) % 900 + 10 for i in range(count)]


class Fake:
    """An OpenAI-compatible server, and what it has been asked.

    Attributes:
        asked: bodies of completions, in the order in which they came.
        fails: says of a body what goes wrong: a status, "short", "cut" or nothing.
        delay: seconds before the first token.
        together: how many completions must be there before one is answered, by the round's name.
    """

    name = "vllm"

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.fails: Callable[[dict[str, Any]], Any] = lambda body: None
        self.says = spoken
        self.delay = 0.0
        self.forgotten = 0
        self.rows = 0
        self._open: Counter[str] = Counter()
        self._most: Counter[str] = Counter()
        self._news = threading.Condition()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                if self.path != "/metrics":
                    self._say(404, "nothing there")
                    return
                self._say(200, f'tokens_total{{kind="row"}} {fake.rows}\n# a comment\nup 1\n')

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake._complete(self, body)

            def _say(self, status: int, text: str) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def held(self) -> Held:
        with self._news:
            return Held(1000 * sum(self._open.values()) + 500, self.rows)

    def forget(self) -> None:
        self.forgotten += 1

    def _complete(self, handler: Any, body: dict[str, Any]) -> None:
        told = body["kv_transfer_params"]["tokendance"]
        name = told["round"]
        with self._news:
            self.asked.append(body)
            self._open[name] += 1
            self._most[name] = max(self._most[name], self._open[name])
            self._news.notify_all()
            # All of a round are open at once, or this fails after a second.
            whole = self._news.wait_for(lambda: self._most[name] == told["agents"], 1)
            self.rows += len(body["prompt"])
        time.sleep(self.delay)
        wrong = self.fails(body)
        try:
            if wrong == 500 or not whole:
                handler._say(500, json.dumps({"error": {"message": "not all are there"}}))
                return
            handler.send_response(200)
            handler.send_header("Transfer-Encoding", "chunked")
            handler.end_headers()
            ids = self.says(body["prompt"], body["max_tokens"] - (wrong == "short"))
            for part in (ids[:1], ids[1:]):  # several tokens may come at once
                choice = {"index": 0, "text": "", "token_ids": part}
                self._event(handler, json.dumps({"choices": [choice]}))
            if wrong != "cut":
                self._event(handler, "[DONE]")
            handler.wfile.write(b"0\r\n\r\n")
        finally:
            with self._news:
                self._open[name] -= 1

    def _event(self, handler: Any, text: str) -> None:
        line = f"data: {text}\n\n".encode()
        handler.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")


@pytest.fixture
def fake() -> Iterator[Fake]:
    server = Fake()
    yield server
    server.close()


def trace(agents: int = 3, name: str = "a") -> Trace:
    return Trace(name, 0, agents, SHAPE, TEXT)


def test_a_round_is_asked_at_once_and_gathered(fake: Fake) -> None:
    society = trace()
    found = hold(fake.url, society, 0, {})
    assert not found.failures  # the server answers when all three are there
    assert {one["kv_transfer_params"]["tokendance"]["agents"] for one in fake.asked} == {3}
    for one in fake.asked:
        told = one["kv_transfer_params"]["tokendance"]
        assert told["round"] == "a 0"
        assert (one["temperature"], one["ignore_eos"], one["max_tokens"]) == (0, True, 4)
        assert told["shared"] == [[0, 8], [14, 18], [18, 22], [22, 26]]
        assert found.said[told["agent"].removeprefix("a/")] == spoken(one["prompt"], 4)
    assert found.prompt_rows == 3 * (8 + 6 + 3 * 4 + 2)
    assert 0 < max(found.first.values()) <= found.latency
    assert found.between.keys() == found.said.keys()


def test_what_agents_write_is_handed_out_for_the_next_round(fake: Fake) -> None:
    served = serve(fake, [trace()], Arrivals(rounds=2))
    assert [one.number for one in served.rounds] == [1, 2]
    by_round: dict[str, list[Any]] = {}
    for one in fake.asked:
        by_round.setdefault(one["kv_transfer_params"]["tokendance"]["round"], []).append(one)
    assert list(by_round) == ["a 0", "a 1", "a 2"]
    for before, after in (("a 0", "a 1"), ("a 1", "a 2")):
        order = sorted(by_round[before], key=lambda one: agent_of(one))
        written = [token for one in order for token in spoken(one["prompt"], 4)]
        for one in by_round[after]:
            assert one["prompt"][14:26] == written
    assert fake.forgotten == 1
    # Of the rounds that are measured: the first is none of them.
    assert served.rows_computed == sum(one.prompt_rows for one in served.rounds)
    assert served.between_bytes == 500


def agent_of(body: dict[str, Any]) -> str:
    agent: str = body["kv_transfer_params"]["tokendance"]["agent"]
    return agent


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [(500, "status 500"), ("short", "expected 4 tokens, got 3"), ("cut", "before [DONE]")],
)
def test_a_failure_is_told_and_rounds_go_on(fake: Fake, wrong: Any, reason: str) -> None:
    fake.fails = lambda body: wrong if agent_of(body) == "a/0/1" else None
    served = serve(fake, [trace()], Arrivals(rounds=2))
    assert [list(one.failures) for one in served.rounds] == [["0/1"], ["0/1"]]
    assert reason in served.rounds[0].failures["0/1"]
    figures = figures_of(served)
    assert figures["failures"] == 2
    assert figures["round p90, s"] == math.inf


def test_a_server_that_is_gone_is_a_failure() -> None:
    answer = complete("http://127.0.0.1:1", Ask("a", [1], [], 1), "round", 1)
    assert answer.failure is not None
    assert answer.failure.startswith("ConnectionRefusedError")


def test_bytes_are_watched_while_rounds_are_served(fake: Fake) -> None:
    fake.delay = 0.2
    served = serve(fake, [trace()], Arrivals(rounds=1), watch_every=0.01)
    assert served.peak_bytes == 3 * 1000 + 500
    assert served.between_bytes == 500


def test_rounds_come_at_equal_intervals_and_wait_for_those_before(fake: Fake) -> None:
    fake.delay = 0.15
    societies = [trace(2, "a"), trace(2, "b")]
    served = serve(fake, societies, Arrivals(rate=20.0, rounds=3))
    assert sorted((one.society, one.number) for one in served.rounds) == [
        (name, number) for name in "ab" for number in (1, 2, 3)
    ]
    for name, index in (("a", 0), ("b", 1)):
        own = [one for one in served.rounds if one.society == name]
        due = [(2 * (one.number - 1) + index) / 20.0 for one in own]
        ends = [at + one.latency for at, one in zip(due, own, strict=True)]
        assert own[0].late < 0.1
        # Each takes 0.15 s or more and the next is due after 0.1 s.
        assert own[2].late == pytest.approx(ends[1] - due[2], abs=0.05)
        assert own[2].latency > own[0].latency
    fake.delay = 0.0
    slow = serve(fake, [trace(2)], Arrivals(rate=5.0, rounds=2))
    assert slow.seconds >= 0.2  # the second is due after so long
    assert max(one.late for one in slow.rounds) < 0.1


def test_closed_rounds_come_after_a_think(fake: Fake) -> None:
    served = serve(fake, [trace(2)], Arrivals(think=0.1, rounds=2))
    assert served.seconds >= 0.2
    assert all(one.latency < 0.1 for one in served.rounds)


def test_no_round_begins_after_one_that_was_too_late(fake: Fake) -> None:
    served = serve(fake, [trace(2)], Arrivals(rounds=3), limit=0.0)
    assert [one.number for one in served.rounds] == [1]


LINES = [
    {
        "workload": "w",
        "session": "s",
        "round": number,
        "t": "",
        "defs": [{"id": f"own {who}", "text": f"I am {who}."} for who in "ABC"]
        if not number
        else [],
        "shared": [{"id": f"{who}{number - 1}", "text": f"{who} said {number}"} for who in "ABC"]
        if number
        else [],
        "agents": [
            {
                "id": who,
                "segments": [
                    {"kind": "private", "ref": f"own {who}"},
                    *(
                        {"kind": "shared", "ref": f"{other}{number - 1}"}
                        for other in "ABC"
                        if number
                    ),
                    {"kind": "task", "text": "Say."},
                ],
                "out": f"{who}{number}",
            }
            for who in "ABC"
        ],
    }
    for number in range(3)
]


def encode(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def recorded(tmp_path: Path, agents: int) -> Recorded:
    path = tmp_path / "w.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return Recorded("w", read_rounds(path), encode, agents)


def test_recorded_rounds_have_what_is_written_now(tmp_path: Path) -> None:
    society = recorded(tmp_path, 2)
    assert society.rounds == 2  # how long the third one's outputs are stands nowhere
    first = society.asks(0, {})
    assert [one.token_ids for one in first] == [encode(f"I am {who}.Say.") for who in "AB"]
    assert [one.output for one in first] == [len("A said 1")] * 2
    second = society.asks(1, {"A": [1, 2, 3], "B": [4]})
    assert [one.token_ids for one in second] == [
        [*encode(f"I am {who}."), 1, 2, 3, 4, *encode("Say.")] for who in "AB"
    ]
    assert second[0].shared == [(7, 10), (10, 11)]
    assert society.asks(0, {}) == first


def test_recorded_rounds_have_so_many_agents(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"agents: expected 1..3 of .*w.jsonl:1, got 4"):
        recorded(tmp_path, 4)


def test_scaled_shapes_lose_no_part() -> None:
    assert SHAPES["board-2k"].scaled(8) == Shape(128, 64, 16, 256, 1)
    assert SHAPES["all-gather"].scaled(1000) == Shape(1, 1, 1, 0, 1)


def round_of(number: int, **said: list[int]) -> RoundServed:
    return RoundServed("s", number, 0.0, 1.0, {}, {}, said, {}, 0)


def test_agreement_is_by_round_and_by_output() -> None:
    plain = [round_of(1, a=[1], b=[2]), round_of(2, a=[3], b=[4]), round_of(3, a=[5], b=[6])]
    found = [round_of(1, a=[1], b=[2]), round_of(2, a=[3], b=[9]), round_of(4, a=[5], b=[6])]
    assert agreement(found, plain) == {"rounds as plain": "1/2", "outputs as plain": "3/4"}


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(one) for one in range(1, 11)]
    assert [percentile(values, share) for share in (0.5, 0.9, 0.99)] == [6.0, 10.0, 10.0]
    assert percentile([], 0.5) == math.inf


def test_figures_are_of_all_agents_and_rounds() -> None:
    one = RoundServed("s", 1, 0.0, 2.0, {"a": 0.5, "b": 1.5}, {"a": 0.1}, {}, {}, 30)
    other = RoundServed("s", 2, 0.0, 4.0, {"a": 1.0}, {"a": 0.3}, {}, {}, 12)
    first = RoundServed("s", 0, 0.0, 9.0, {}, {}, {"a": [1], "b": [2], "c": [1]}, {}, 12)
    figures = figures_of(Served([one, other], int(5e6), int(2e6), 7, 6.0, [first]))
    assert figures["outputs alike"] == ["0 1 0", "", ""]
    assert (figures["round p50, s"], figures["round p90, s"]) == (4.0, 4.0)
    assert (figures["first token p50, s"], figures["first token p90, s"]) == (1.0, 1.5)
    assert (figures["prompt rows"], figures["rows computed"]) == (42, 7)
    assert (figures["peak KV, MB"], figures["KV between rounds, MB"]) == (5.0, 2.0)


def test_systems_take_turns_in_the_search() -> None:
    asked: list[tuple[str, int]] = []
    limits = {"one": 3, "other": 9}

    def holds(name: str, count: int) -> bool:
        asked.append((name, count))
        return count <= limits[name]

    assert agents_of_each(["one", "other"], holds, 16) == limits
    assert asked[:6] == [(name, count) for count in (1, 2, 4) for name in limits]


def test_metrics_are_summed_by_name_and_labels() -> None:
    text = '# HELP a\na{kind="x",of="1"} 2\na{kind="y"} 3.5\nb 1e3\nc{blocks="17"} 1.0\n'
    metrics = Metrics.parse(text)
    assert (metrics.sum("a"), metrics.sum("a", kind="y"), metrics.sum("none")) == (5.5, 3.5, 0)
    assert metrics.sum("b") == 1000
    assert metrics.label("c", "blocks") == "17"
    with pytest.raises(ValueError, match="metrics: expected d with the label"):
        metrics.label("d", "blocks")


def test_an_answer_of_another_status_is_an_error(fake: Fake) -> None:
    assert Metrics.parse(get(fake.url, "/metrics")).sum("tokens_total", kind="row") == 0
    with pytest.raises(ValueError, match="/other: status 404: nothing there"):
        get(fake.url, "/other")


@pytest.mark.parametrize("name", SYSTEMS)
def test_servers_differ_in_what_is_compared_alone(name: str, tmp_path: Path) -> None:
    setup = Setup(
        tmp_path, 2048, 256, threads=3, cache_gib=4, selection="leading:3",
        vllm=(Path("python"), {"A": "b"}),
    )  # fmt: skip
    arguments, variables = command_of(name, setup, 8123)
    text = " ".join(arguments)
    assert variables["OMP_NUM_THREADS"] == "3"
    assert "8123" in arguments
    if name == ENGINE:
        assert "--capacity 4GiB --max-rows 256" in text
        assert text.endswith("--selection leading:3")
        return
    assert (arguments[0], variables["A"]) == ("python", "b")
    assert ("--no-enable-prefix-caching" in arguments) == (name == "vllm")
    assert ("--kv-transfer-config" in arguments) == name.startswith("tokendance")
    held = int(variables["VLLM_CPU_KVCACHE_SPACE"])
    if name.startswith("tokendance"):
        given = json.loads(arguments[-1])["kv_connector_extra_config"]
        assert (given["max_rows"], given["selection"]) == (256, "leading:3")
        assert given.get("shared_decode", False) == (name == "tokendance_shared")
        held += int(given["capacity"].removesuffix("GiB"))
    assert held == 4


def test_a_server_that_does_not_start_is_told_with_its_words(tmp_path: Path) -> None:
    """The small engine's front, on a folder that holds a config and no model."""
    config = {"num_attention_heads": 2, "hidden_size": 8, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    setup = Setup(tmp_path, 64, 64)
    with (
        pytest.raises(RuntimeError, match=r"engine does not answer:\n[\s\S]*Error"),
        running([ENGINE], setup, tmp_path / "logs"),
    ):
        pass


@contextmanager
def fakes(names: Sequence[str], *_: Any) -> Iterator[list[Fake]]:
    found = [Fake() for _ in names]
    for one, name in zip(found, names, strict=True):
        one.name = name
    if "engine" in names:
        found[names.index("engine")].says = lambda prompt, count: [1] * count
    yield found
    for one in found:
        one.close()


@pytest.fixture
def command_with_fakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 64}')
    monkeypatch.setattr("evals.models.model_path", lambda name: tmp_path)
    monkeypatch.setattr("evals.serving.servers.running", fakes)
    monkeypatch.setattr("tools.test_vllm.environment", lambda given: (Path("python"), {}))
    monkeypatch.setattr(
        command,
        "societies_of",
        lambda arguments, model: lambda agents: [trace(agents, f"w-{agents}")],
    )


@pytest.mark.usefixtures("command_with_fakes")
def test_the_command_compares_systems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, picture = tmp_path / "found.json", tmp_path / "found.png"
    given = ["serving", "rounds", "--agents", "2,3", "--rounds", "2", "--systems", "vllm,engine"]
    assert main([*given, "--json", str(path), "--plot", str(picture)]) == 0
    report = json.loads(path.read_text())
    rows = report["rows"]
    assert [(one["agents"], one["system"]) for one in rows] == [
        (count, name) for count in (2, 3) for name in ("vllm", "engine")
    ]
    for one in rows:
        whole = one["system"] == "vllm"
        assert one["rounds as plain"] == ("2/2" if whole else "0/2")
        assert one["failures"] == 0
        assert one["computed"] == one["rows"]
    assert report["setting"]["rounds"] == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| " + " | ".join(rows[0]) + " |"
    assert picture.stat().st_size > 1000


@pytest.mark.usefixtures("command_with_fakes")
def test_the_command_finds_the_most_agents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Systems whose rounds take as many seconds as they have agents, or half of it."""

    def canned(server: Fake, societies: Any, arrivals: Arrivals, limit: Any = None) -> Served:
        count = len(societies[0].asks(0, {}))
        seconds = count / (2 if server.name == "engine" else 1)
        assert limit in (None, 3.0)
        return Served([RoundServed("s", 1, 0.0, seconds, {}, {}, {}, {}, 0)])

    monkeypatch.setattr("evals.serving.rounds.serve", canned)
    path = tmp_path / "found.json"
    given = ["serving", "agents", "--times", "3", "--most", "64", "--systems", "vllm,engine"]
    assert main([*given, "--rates", "closed,0.5", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(one["rounds/s"], one["vllm"], one["engine"]) for one in rows] == [
        ("closed", 3, 6),
        (0.5, 3, 6),
    ]
    assert rows[0]["limit, s"] == 3 * rows[0]["one agent, s"]


@pytest.mark.usefixtures("command_with_fakes")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["rounds", "--systems", "other"], "system: expected one of"),
        (["agents", "--systems", "engine"], "systems: expected vllm first"),
        (["rounds", "--rates", "fast"], "rates: expected positive numbers"),
        (["rounds", "--scale", "0"], "scale: expected more than 0"),
    ],
)
def test_the_command_names_what_is_wrong(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serving", *given]) == 2
    assert message in capsys.readouterr().err
