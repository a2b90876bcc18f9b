"""Tables of `evals.fidelity`: which rounds they are made of, what samples claim, their JSON."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from tiny_model import write_tiny_model

import tokendance as td
from evals.fidelity import __main__ as fidelity
from evals.fidelity import codecs, document, front, repairs, replays, samples, signals, token_kinds
from evals.models import load_model
from tokendance.host import leases
from tokendance.host.decide import RowKind, Source


def figures(number, rows, kl, makers=()):
    agents = dict(zip("abc", kl, strict=True))
    top1 = dict.fromkeys(agents, 0.5)
    return replays.Figures("s", number, 100, rows, 5, list(makers), agents, top1)


def points():
    return {
        front.REFERENCE: [figures(1, 50, (0.1, 0.2, 0.4)), figures(2, 40, (0.1, 0.1, 0.1))],
        "master/leading:8": [
            figures(1, 30, (0, 0.02, 0.04), "a"),
            figures(2, 44, (0.01, 0.0, 0.01), "b"),
        ],
    }


def test_the_front_compares_the_same_siblings():
    found = front.figures_of(points(), "master/leading:8")
    assert found["kl"] == pytest.approx((0.02 + 0.04 + 0.01 + 0.01) / 4)
    assert found["ratio"] == pytest.approx(found["kl"] / ((0.2 + 0.4 + 0.1 + 0.1) / 4))
    assert found["computed"] == pytest.approx(0.37)
    assert found["overridden"] == pytest.approx(0.05)
    assert found["rows_over_pic"] == pytest.approx(1.1)
    assert found["ratio_low"] <= found["ratio"] <= found["ratio_high"]
    assert (found["rounds"], found["siblings"]) == (2, 4)
    assert found["median"] == pytest.approx(0.015)
    lines = front.text(front.write({"x": points(), "y": points()})).splitlines()
    assert lines[0] == "**x**: 2 rounds, 4 to 6 siblings"
    assert lines[4].startswith("| master/leading:8 | 37.0% | 5.0% | 0.02000 | 0.01500 | 0.03400 |")
    high = f"{found['ratio_high']:.4f}"
    assert lines[-1].split(" | ")[1:] == [high, high, high, "0.82 |"]  # fewest rows first


def test_rounds_that_one_way_lacks_count_in_neither():
    some = {**points(), "master/leading:8": points()["master/leading:8"][1:]}
    found = front.figures_of(some, "master/leading:8")
    assert found["ratio"] == pytest.approx(0.1)
    assert (found["rounds"], found["rows"], found["rows_of_pic"]) == (1, 44, 40)
    none = {"master/leading:8": points()["master/leading:8"]}
    assert "master" not in front.text(front.write({"x": none}))


class Characters:
    """A tokenizer."""

    def encode(self, text, add_special_tokens):
        return [ord(character) % 1000 for character in text]


def recorded_session(rounds):
    return [replays.Session([], [replays.Round("s", number, {}, {}) for number in rounds])]


def test_the_front_goes_on_where_it_was_stopped(monkeypatch):
    known, saved, asked = front.write({"x": points()}), [], []
    monkeypatch.setattr(front, "recompute", lambda model, rounds, new_tokens: None)

    def measured(model, way, rounds, before):
        asked.append((way, [one.number for one in rounds]))
        return [figures(one.number, 60, (0.3, 0.2, 0.1)) for one in rounds]

    monkeypatch.setattr(front, "measure", measured)
    monkeypatch.setattr(front, "read_sessions", lambda *_, **__: recorded_session((1, 2)))
    assert front.run(None, None, known, ["x"], list(points()), 12) == known
    assert asked == []  # nothing was left to measure
    monkeypatch.setattr(front, "read_sessions", lambda *_, **__: recorded_session((1, 2, 3)))
    found = front.run(None, None, known, ["x"], ["master/leading:8"], 12, 3, save=saved.append)
    assert asked == [("master/leading:8", [1, 2, 3])]  # a session is run from its beginning
    assert saved == [found]
    assert [one["number"] for one in found["x"]["master/leading:8"]] == [1, 2, 3]
    assert found["x"][front.REFERENCE] == known["x"][front.REFERENCE]


def test_sessions_follow_one_another():
    """As many rounds as are asked for, from the same round of every session on."""
    (usual,) = replays.read_sessions("town_square", Characters(), before=1)
    assert [one.number for one in usual.before + usual.rounds] == [0, 1, 2, 3]
    assert usual.name == "6x4/0"
    assert replays.read_workload("town_square", Characters()) == usual.rounds
    (two,) = replays.read_sessions("town_square", Characters(), rounds=2, agents=3)
    assert [one.number for one in two.rounds] == [1, 2]
    assert two.before == []
    assert [len(one.prompts) for one in two.rounds] == [3, 3]
    (all_,) = replays.read_sessions("town_square", Characters(), rounds=9)
    assert [one.number for one in all_.rounds] == [1, 2, 3]


def test_sessions_begin_with_the_one_that_is_named(monkeypatch, tmp_path):
    block = {"kind": "private", "text": "abc"}
    lines = [
        {"workload": "w", "session": session, "round": number, "t": "", "defs": [], "shared": [],
         "agents": [{"id": "a", "segments": [block]}]}
        for session in ("first", "named", "last")
        for number in range(3)
    ]  # fmt: skip
    path = tmp_path / "w.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setitem(replays.WORKLOADS, str(path), {"session": "named", "rounds": (1, 2)})
    found = replays.read_sessions(str(path), Characters(), rounds=3, before=1)
    assert [(one.name, [r.number for r in one.rounds]) for one in found] == [
        ("named", [1, 2]),
        ("last", [1]),
    ]
    assert [[r.number for r in one.before] for one in found] == [[0], [0]]
    (usual,) = replays.read_sessions(str(path), Characters())
    assert (usual.name, len(usual.rounds), usual.before) == ("named", 1, [])
    (other,) = replays.read_sessions(str(path), Characters(), session="last")
    assert (other.name, [one.number for one in other.rounds]) == ("last", [1])
    with pytest.raises(ValueError, match="session: expected one of first, named, last, got 'no'"):
        replays.read_sessions(str(path), Characters(), session="no")


def test_the_spread_of_known_samples():
    assert samples.spread([4, 1, 2, 3, 10]) == samples.Spread(5, 4.0, 3.0, pytest.approx(7.6))


def test_the_interval_of_a_ratio_of_known_samples():
    pic = [0.1, 0.4, 0.2]
    # A ratio that all agents have leaves nothing to chance, however far they are from each other.
    same = samples.ratio_of_means([([0.01, 0.04, 0.02], pic)] * 3)
    assert (same.value, same.low, same.high) == pytest.approx((0.1, 0.1, 0.1))
    # One agent of one round alone: of one draw in eight it is the only one there is, twice.
    one = samples.ratio_of_means([([1.0, 0.0], [1.0, 1.0])], draws=4000)
    assert (one.value, one.low, one.high) == (0.5, 0.0, 1.0)
    # Rounds are drawn, too: within each of these all agents agree.
    rounds = [([0.0] * 3, [1.0] * 3), ([1.0] * 3, [1.0] * 3)]
    assert samples.ratio_of_means(rounds).low == 0
    assert samples.ratio_of_means(rounds).high == 1
    assert samples.ratio_of_means(rounds, seed=3) == samples.ratio_of_means(rounds, seed=3)
    assert samples.ratio_text([([0.01, 0.04, 0.02], pic)] * 3) == "0.100 (0.100 to 0.100)"
    assert samples.ratio_text([([1.0, 0.0], [1.0, 0.0])]) == "1.000 (no interval)"
    assert samples.ratio_text([([1.0, 0.0], [0.0, 0.0])]) == "-"
    for wrong in ([], [([], [])], [([1.0], [1.0, 2.0])]):
        with pytest.raises(ValueError, match="rounds: expected"):
            samples.ratio_of_means(wrong)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(1)
    covered = above = 0
    for trial in range(100):
        rounds = []
        for _ in range(8):
            level = generator.lognormal(0, 0.5)
            pic = level * generator.lognormal(0, 0.5, 6)
            rounds.append((0.1 * pic * generator.lognormal(-0.125, 0.5, 6), pic))
        found = samples.ratio_of_means(rounds, draws=300, seed=trial)
        covered += found.low <= 0.1 <= found.high
        above += found.high >= 0.1
    assert 88 <= covered <= 100
    assert above >= 93


def document_of(result, **changes):
    fields = {"model": "smollm2", "origin": "Tiny, 4-bit weights", "settings": {"agents": 3}}
    return document.Document(**{"command": "front", **fields, "result": result, **changes})


NOISE = {
    "workload": "town_square",
    "prompts": 2,
    "rows": 900,
    "chunk": 64,
    "dtypes": {
        "float32": {"against float32": 0.0, "chunks": 1e-11, "batch": 2e-11},
        "bfloat16": {"against float32": 3e-3, "chunks": 4e-4, "batch": 0.0},
    },
}


def test_tables_are_rendered_from_json(tmp_path, capsys):
    path = tmp_path / "figures" / "front.json"
    made = document_of(front.write({"x": points()}), noise=NOISE)
    made.write(path)
    assert document.read(path) == made
    assert fidelity.main(["render", str(path)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Model: Tiny, 4-bit weights.\n\nNoise floor: ")
    assert "by 2e-11 in float32, 4e-04 in bfloat16; from fp32 by 3e-03 in bfloat16." in said
    assert said.rstrip("\n").endswith(front.text(made.result))
    document_of(NOISE, command="noise").write(path)
    assert fidelity.main(["render", str(path)]) == 0
    assert "| bfloat16 | 3.0e-03 | 4.0e-04 | 0.0e+00 |" in capsys.readouterr().out
    path.write_text('{"x": {}}')
    assert fidelity.main(["render", str(path)]) == 2
    assert "expected a file that evals.fidelity wrote" in capsys.readouterr().err


def test_pictures_are_drawn_from_json(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path, pictures = tmp_path / "front.json", tmp_path / "pictures"
    document_of(front.write({"x": points(), "y": points()})).write(path)
    assert fidelity.main(["render", str(path), "--pictures", str(pictures)]) == 0
    assert sorted(one.name for one in pictures.iterdir()) == ["x.png", "y.png"]
    assert all(one.read_bytes().startswith(b"\x89PNG") for one in pictures.iterdir())


def test_figures_of_models_do_not_mix(tmp_path):
    path = tmp_path / "front.json"
    assert document.read_known(path, document_of({})) is None
    document_of({"x": {}}).write(path)
    assert document.read_known(path, document_of({})) == {"x": {}}
    for changes in ({"model": "qwen0.5b"}, {"settings": {"agents": 4}}, {"command": "answers"}):
        with pytest.raises(ValueError, match=r"expected figures of .* name another file"):
            document.read_known(path, document_of({}, **changes))


def test_every_command_measures_and_has_a_table(tmp_path, capsys):
    """On a random model of two layers, from the command line to files."""
    model = str(write_tiny_model(tmp_path / "tiny"))
    out = tmp_path / "out"
    common = ["--model", model, "--threads", "1", "--out", str(out)]
    assert fidelity.main([*common, "noise", "--prompts", "1", "--new-tokens", "2"]) == 0
    ways = "pic:0.15,master/leading:4"
    few = ["--rounds", "1", "--agents", "3", "--new-tokens", "2"]
    arguments = ["front", "town_square", "--ways", ways, *few]
    path = tmp_path / "own.json"
    assert fidelity.main([*common, "--json", str(path), *arguments]) == 0
    found = json.loads(path.read_text())
    assert (found["model"], found["origin"]) == (model, "tiny")
    assert list(found["result"]["town_square"]) == ways.split(",")
    assert found["noise"] == json.loads((out / "noise.json").read_text())["result"]
    capsys.readouterr()
    assert fidelity.main(["render", str(path)]) == 0
    assert capsys.readouterr().out == (out / "front.md").read_text()
    assert fidelity.main([*common, "rows", "town_square"]) == 0
    assert (out / "rows.md").read_text().startswith("Model: tiny.\n\nNoise floor: ")
    few = ["--only", "1 leading rows and collecting tokens", "--rounds", "1", "--agents", "2"]
    assert fidelity.main([*common, "ideas", "town_square", *few]) == 0
    found = json.loads((out / "ideas.json").read_text())["result"]
    assert list(found) == ["shared repairs", few[1]]
    assert found[few[1]]["overridden"] > 0
    noise = document.read(out / "noise.json")
    dataclasses.replace(noise, model="another").write(out / "noise.json")
    assert fidelity.main([*common, "rows", "town_square"]) == 0
    assert "Noise floor" not in (out / "rows.md").read_text()


def test_codes_lose_what_they_say_and_bytes_are_counted(tmp_path, capsys):
    model = str(write_tiny_model(tmp_path / "tiny"))
    path = tmp_path / "own.json"
    common = ["--model", model, "--threads", "1", "--out", str(tmp_path), "--json", str(path)]
    arguments = ["codecs", "town_square", "--agents", "2", "--bytes", "town_square"]
    assert fidelity.main([*common, *arguments]) == 0
    made = json.loads(path.read_text())["result"]
    found = made["kl"]["town_square"]["everything"]
    assert list(found) == list(codecs.CODECS)
    assert found["as they are"]["kl"] < 1e-9 < found["int8"]["kl"] < found["int4"]["kl"]
    counted = made["bytes"]
    geometry = codecs.MODELS["Qwen2.5-14B"]
    exact = counted["models"]["Qwen2.5-14B"]["as they are"]
    assert exact["bytes"] == (counted["own_rows"] + counted["master_rows"]) * geometry.row_bytes
    assert exact["smaller"] == counted["dense_rows"] * geometry.row_bytes / exact["bytes"]
    assert "| Qwen2.5-14B | int4 | " in capsys.readouterr().out
    made["kl"]["town_square"] = {}
    path.write_text(json.dumps({**json.loads(path.read_text()), "result": made}))
    assert fidelity.main([*common, *arguments]) == 0  # goes on behind what there is
    assert json.loads(path.read_text())["result"] == made


class Words:
    """A tokenizer of which every token is a word."""

    words = ("a", "end.", "b", "(c)", "d\n", "e ", "?f", "g]  ")

    def __len__(self):
        return len(self.words)

    def batch_decode(self, ids):
        return ["".join(self.words[token] for token in one) for one in ids]


def test_collecting_tokens_end_something():
    assert token_kinds.collecting_tokens(Words()).tolist() == [1, 3, 4, 7]


def test_reused_rows_of_some_tokens_are_repaired():
    """Beside the leading ones, in siblings alone, and the plan computes them."""
    message, other = td.shared([5, 6, 7, 1, 5, 6, 7, 1, 5, 1]), td.shared([8, 1, 8, 8, 8, 8, 1, 8])
    prompts = {
        "a": [td.private([2, 1, 3]), message, other, td.private([4])],
        "b": [td.private([1, 3]), other, message, td.private([4, 1])],
    }
    selection, wanted = td.LeadingTokens(2), np.array([1])
    with repairs.repaired_beside(token_kinds.every(wanted), block_size=8):
        maker, sibling = leases.decide(prompts, lambda _: None, {}, selection, Source.MASTER, 8)
    plain_maker, plain = leases.decide(prompts, lambda _: None, {}, selection, Source.MASTER, 8)
    assert maker.spans == plain_maker.spans  # who computes the Masters reuses nothing
    assert [span for span in plain.spans if span.kind is RowKind.REPAIRED] == [
        (2, 4, RowKind.REPAIRED),
        (10, 12, RowKind.REPAIRED),
    ]
    # The second row of the other message leads it; rows 8, 13, 17 and 19 are added.
    assert [span for span in sibling.spans if span.kind is RowKind.REPAIRED] == [
        (2, 4, RowKind.REPAIRED),
        (8, 9, RowKind.REPAIRED),
        (10, 12, RowKind.REPAIRED),
        (13, 14, RowKind.REPAIRED),
        (17, 18, RowKind.REPAIRED),
        (19, 20, RowKind.REPAIRED),
    ]
    assert sibling.spans[-1].end == sibling.length == 22
    assert sibling.own.tolist() == [0, 1, 2, 3, 8, 10, 11, 13, 17, 19, 20, 21]
    overridden = [use.delta + use.overridden(8) for use in sibling.uses]
    assert np.concatenate(overridden).tolist() == [2, 3, 8, 10, 11, 13, 17, 19]


def test_rows_that_a_model_points_at_are_repaired(tmp_path):
    """Those of a sibling that score highest, by what transformers says of whole prompts."""
    path = write_tiny_model(tmp_path / "tiny", num_hidden_layers=4)
    model, _ = load_model(path)
    message = td.shared(np.arange(7, 47))
    prompts = {
        "a": [td.private([2, 1, 3]), message, td.private(np.arange(60, 80))],
        "b": [td.private([1, 3]), message, td.private(np.arange(80, 100))],
    }
    a, b = (np.concatenate([one.token_ids for one in prompt]) for prompt in prompts.values())
    asked = []
    for ids in (a, b):
        model.set_attn_implementation("eager")
        with torch.inference_mode():
            found = model(input_ids=torch.from_numpy(ids).long()[None], output_attentions=True)
        model.set_attn_implementation("sdpa")
        values = found.past_key_values.layers[2].values[0].transpose(0, 1).flatten(1)
        asked.append((values.numpy(), found.attentions[2][0, :, -16:].mean((0, 1)).numpy()))
    (a_values, a_attention), (b_values, _) = asked
    deviation = np.linalg.norm(b_values[2:42] - a_values[3:43], axis=1)
    wanted = {
        "deviation of values (an oracle)": deviation,
        "the Master agent's attention": a_attention[3:43],
        "their product": deviation * a_attention[3:43],
    }
    assert list(wanted) == list(signals.SCORES)
    for name, scores in wanted.items():
        choose = signals.Signals(model).most(name, 0.25)
        with repairs.repaired_beside(choose, block_size=8):
            maker, sibling = leases.decide(
                prompts, lambda _: None, {}, td.Nothing(), Source.MASTER, 8
            )
        chosen = np.sort(2 + np.argsort(-scores)[:10])
        assert [(use.delta + use.overridden(8)).tolist() for use in sibling.uses] == [
            chosen.tolist()
        ]
        assert np.isin(chosen, sibling.own).all()
        assert maker.own.tolist() == [0, 1, 2, *range(43, 63)]
