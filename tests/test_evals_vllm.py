"""`python -m evals.vllm`: its arguments and tables, from canned results; no vLLM is needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evals import vllm

ROUNDS = [{"Ada": ([1, 2, 3], [[1, 3]]), "Ben": ([4, 2, 3], [[1, 3]])}] * 2
SECONDS = {"vllm": 4.0, "vllm_prefix": 2.0, "tokendance": 1.0, "tokendance_shared": 0.5}


class Canned:
    """An engine that answers at once: with the seconds of its system, and one more in round 1."""

    made: list[Canned]

    def __init__(self, python: Path, variables: dict[str, str], task: dict[str, Any]) -> None:
        self.variables, self.task, self.ended = variables, task, False
        self.asked: list[Any] = []
        self.name = "vllm_prefix" if task["prefix_caching"] else "vllm"
        if task["connector"] is not None:
            shared = task["connector"].get("shared_decode")
            self.name = "tokendance_shared" if shared else "tokendance"
        Canned.made.append(self)

    def ask(self, what: Any) -> dict[str, Any]:
        self.asked.append(what)
        name, prompts = what[:2]
        seconds = SECONDS[self.name] + (name == "round 1")
        first = 8 if self.name == "tokendance" and name == "round 1" else 7
        return {
            "first": seconds,
            "last": 2 * seconds,
            "processor": 3 * seconds + len([one for one in self.asked if one[0] == name]),
            "longest_step": seconds / 10,
            "decode_step": None if self.name == "vllm_prefix" else seconds / 100,
            "bytes_held": int(seconds * 1e6),
            "steps": 5,
            "hooks": {"start_load_kv": [5, 1e-3, 5e-4], "attention": [15, 3e-3, 2.5e-3]},
            "tokens": {agent: [first if agent == "Ben" else 7, 5] for agent in prompts},
        }

    def end(self) -> None:
        self.ended = True


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Canned]:
    Canned.made = []
    monkeypatch.setattr(vllm, "Engine", Canned)
    monkeypatch.setattr(vllm, "environment", lambda given: (Path("python"), {"GIVEN": str(given)}))
    monkeypatch.setattr(vllm, "recorded", lambda *asked: ROUNDS)
    monkeypatch.setattr("evals.models.model_path", lambda name: Path("model"))
    return Canned.made


def test_systems_take_turns_and_the_best_counts(
    engines: list[Canned], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found" / "vllm.json"
    given = ["agentsociety", "--agents", "2", "--repeat", "2", "--max-rows", "64", "--threads", "3"]
    assert vllm.main([*given, "--environment", "there", "--out", str(out)]) == 0
    assert [one.name for one in engines] == [*SECONDS] * 2
    assert all(one.ended for one in engines)
    for one in engines:
        assert one.variables["GIVEN"] == "there"
        assert one.variables["OMP_NUM_THREADS"] == "3"
        assert one.task["max_rows"] == 64
        assert one.task["max_tokens"] == 2048
        assert one.asked == [["round 0", ROUNDS[0]], ["round 1", ROUNDS[1]]]
    assert engines[2].task["connector"] == {"max_rows": 64}
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "agentsociety, 2 agents, 2 rounds, seconds:",
        "  vllm              first tokens    9.00  last   18.00  processor   29.00  "
        "longest wait beside  0.50  KV held      5 MB  decode step   50.0 ms  "
        "first tokens as vllm 8/8",
        "  vllm_prefix       first tokens    5.00  last   10.00  processor   17.00  "
        "longest wait beside  0.30  KV held      3 MB  decode step    none  "
        "first tokens as vllm 8/8",
        "  tokendance        first tokens    3.00  last    6.00  processor   11.00  "
        "longest wait beside  0.20  KV held      2 MB  decode step   20.0 ms  "
        "first tokens as vllm 6/8",
        "  tokendance_shared first tokens    2.00  last    4.00  processor    8.00  "
        "longest wait beside  0.15  KV held      2 MB  decode step   15.0 ms  "
        "first tokens as vllm 8/8",
    ]
    found = json.loads(out.read_text())
    assert (found["workload"], found["agents"], found["threads"]) == ("agentsociety", 2, 3)
    assert [one["first"] for one in found["systems"]["tokendance"]] == [1, 2]


def test_some_systems_are_compared_with_the_first_of_them(
    engines: list[Canned], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    which = ["--systems", "tokendance,tokendance_shared", "--out", str(tmp_path / "vllm.json")]
    assert vllm.main(which) == 0
    assert [one.name for one in engines] == ["tokendance", "tokendance_shared"]
    assert engines[1].task["connector"] == {"max_rows": 512, "shared_decode": True}
    first, second = capsys.readouterr().out.splitlines()[1:]
    assert first.endswith("first tokens as tokendance 4/4")
    assert second.endswith("first tokens as tokendance 3/4")


def test_what_is_in_no_round_is_served_with_and_without_in_turns(
    engines: list[Canned], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "vllm.json"
    assert vllm.main(["untouched", "--repeat", "3", "--layers", "1", "--out", str(out)]) == 0
    without, with_it, control, clocks = engines
    assert without.task["connector"] is None
    assert control.task == without.task
    assert with_it.task["connector"] == {"separator": "<|im_end|>"}
    assert without.task | {"connector": 0} == with_it.task | {"connector": 0}
    assert with_it.task | {"hooks": True} == clocks.task
    assert not with_it.task["hooks"]
    assert without.task["layers"] == 1
    assert [one[0] for one in with_it.asked] == ["turn 0", "turn 1", "turn 2"]
    assert with_it.asked == without.asked == control.asked == clocks.asked
    assert all(joins is False for *_, joins in with_it.asked)
    assert with_it.asked[0][1] != with_it.asked[1][1]  # which would be in vLLM's prefix cache
    said = capsys.readouterr().out
    # 7 seconds without it and 4 with it, in five steps.
    assert "with: 3 pairs, 7.000 s of the processor without it" in said
    assert "more     -42.86 % (95 %: -42.86 .. -42.86)" in said
    assert "a step  -600000.00 us" in said
    assert "control: 3 pairs" in said
    assert "more      +0.00 % (95 %: +0.00 .. +0.00)" in said
    # 4 ms of 2 seconds of the wall, and 3 of 4 of the processor.
    assert "in its hooks: 3 turns, 4 calls a step" in said
    assert "of the wall       0.200 % (most of a turn 0.200 %), 800 us a step" in said
    assert "of the processor  0.075 % (most of a turn 0.075 %), 600 us a step" in said
    assert "us a step: attention 500.0, start_load_kv 100.0" in said
    assert json.loads(out.read_text())["seconds"]["with"] == [4.0] * 3


def test_an_engine_that_fails_ends_the_others(engines: list[Canned], tmp_path: Path) -> None:
    def fail(self: Canned, what: Any) -> Any:
        raise RuntimeError("vLLM ended with 1")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Canned, "ask", fail)
        with pytest.raises(RuntimeError, match="ended with 1"):
            vllm.main(["--out", str(tmp_path / "vllm.json")])
    assert all(one.ended for one in engines)


def test_a_few_pairs_say_how_little_they_know() -> None:
    without = [1.0, 1.0, 1.0, 1.0, 1.0]
    lines = vllm.compare("with", without, [1.01, 1.02, 1.00, 1.05, 0.99], 10)
    assert lines[1].split("(")[0].split() == ["more", "+1.00", "%"]
    low, high = lines[1].split("95 %: ")[1].rstrip(")").split(" .. ")
    assert float(low) <= -0.5
    assert float(high) >= 2


@pytest.mark.parametrize(
    "wrong", [["--agents", "six"], ["--colour", "red"], ["--systems", "vllm,sglang"]]
)
def test_wrong_arguments_are_named(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        vllm.main(wrong)
    assert wrong[0] in capsys.readouterr().err
