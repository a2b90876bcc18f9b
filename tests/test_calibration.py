"""`tokendance calibrate`: what it measures on a tiny random model, and what it makes of that."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny_architectures import tiny_model
from tiny_model import write_tiny_model

import tokendance as td
from tokendance.cli import main

pytest.importorskip("transformers")

from tokendance.integrations import calibration, calibration_rounds
from tokendance.integrations.full_recompute import (
    Noise,
    continue_greedily,
    noise_of,
    recompute,
)
from tokendance.integrations.transformers import fingerprint_of

SHARED = ["What the first one said, and why.", "The second says something else here.", "Third."]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny(directory):
    return calibration.load_model(str(directory), "auto", "cpu")


def lines() -> list[dict[str, list[dict[str, str]]]]:
    """Two rounds of three agents who hear the same in other orders."""
    return [
        {
            name: [
                {"private": f"{name} is number {index} of round {number}. " * (index + 1)},
                *({"shared": f"{number}: {text}"} for text in np.roll(SHARED, index).tolist()),
                {"private": "And you?"},
            ]
            for index, name in enumerate(("ada", "bo", "cy"))
        }
        for number in range(2)
    ]


def test_full_recompute_is_the_models_own_forward(tiny):
    model, tokenizer = tiny
    ids = tokenizer.encode("A prompt of some length, longer than one chunk. " * 3)
    found = continue_greedily(model, ids, 5)
    with torch.no_grad():
        own = model(torch.tensor([[*ids, *found.fed]])).logits[0, len(ids) - 1 :]
    assert torch.allclose(found.logits, own, atol=1e-4)
    assert found.fed == own[:-1].argmax(-1).tolist()
    for how in ({}, {"chunk": 64}, {"chunk": 3}, {"chunk": 1}, {"copies": 2}):
        assert torch.allclose(recompute(model, found, **how), own, atol=1e-4), how
    noise = noise_of(model, [found])
    assert 0 <= noise.chunks < 1e-8
    assert 0 <= noise.batch < 1e-8


@pytest.mark.parametrize("name", ["mistral", "gemma3", "gpt_oss", "smollm3", "qwen3_moe"])
def test_chunks_of_other_architectures_are_their_whole(name):
    """Windows shorter than the prompt, several rotations and none, sinks, experts."""
    model = tiny_model(name).eval()
    found = continue_greedily(model, [(7 * index) % 331 for index in range(75)], 6)
    with torch.no_grad():
        own = model(torch.tensor([[*found.token_ids, *found.fed]])).logits[0, 74:]
    assert torch.allclose(found.logits, own, atol=1e-3)
    for how in ({}, {"chunk": 64}, {"chunk": 7}, {"copies": 2}):
        assert torch.allclose(recompute(model, found, **how), own, atol=1e-3), how


def test_one_token_is_enough(tiny):
    model, tokenizer = tiny
    found = continue_greedily(model, tokenizer.encode("x"), 1)
    assert found.fed == []
    assert torch.allclose(recompute(model, found), found.logits, atol=1e-5)
    rounds = [calibration_rounds.round_of(lines()[0], tokenizer)]
    assert len(calibration.calibrate(model, rounds, [td.Everything()], 1).reuses[0].kl) > 0


def test_rounding_is_found(tiny, directory):
    """The floor of bf16 against what fp32 found is no zero."""
    exact, tokenizer = tiny
    model, _ = calibration.load_model(str(directory), "bfloat16", "cpu")
    assert model.dtype == torch.bfloat16
    found = continue_greedily(exact, tokenizer.encode("A prompt of some length. " * 8), 8)
    noise = noise_of(model, [found])
    assert 1e-6 < noise.chunks < 1
    assert 1e-6 < noise.batch < 1


def test_reuse_is_compared_with_full_recompute(tiny):
    model, tokenizer = tiny
    rounds = [calibration_rounds.round_of(one, tokenizer) for one in lines()]
    selections = [td.Everything(), td.Nothing(), td.LeadingTokens(16)]
    found = calibration.calibrate(model, rounds, selections, 4)
    everything, nothing, leading = found.reuses
    rows = sum(segment.length for one in rounds for prompt in one.values() for segment in prompt)
    assert found.prompt_rows == rows
    assert max(everything.kl) < 1e-6
    assert everything.top1 == 1
    assert everything.mean < leading.mean < nothing.mean
    assert nothing.rows < leading.rows < everything.rows <= rows
    assert len({len(one.kl) for one in found.reuses}) == 1
    assert 0 < len(nothing.kl) < 6  # Master agents do not count
    # The rule with the fewest rows of those within the limit.
    assert found.recommended(nothing.mean) is nothing
    assert found.recommended(leading.mean) is leading
    assert found.recommended(leading.mean / 2) is everything
    assert found.recommended(-1.0) is None


def test_rounds_without_siblings_are_refused(tiny):
    model, tokenizer = tiny
    parts = {"ada": [{"private": "Alone."}, {"shared": "But not so much."}], "bo": []}
    parts["bo"] = [{"private": "Neither."}, {"shared": "Something else."}]
    alone = [calibration_rounds.round_of(parts, tokenizer)]
    with pytest.raises(ValueError, match=r"rounds: expected agents that reuse .* got none"):
        calibration.calibrate(model, alone, [td.Nothing()])
    with pytest.raises(ValueError, match="expected some of each, got 0 and 1"):
        calibration.calibrate(model, [], [td.Nothing()])


def test_a_model_is_refused_before_it_is_run(directory, monkeypatch):
    model, tokenizer = calibration.load_model(str(directory), "auto", "cpu")
    monkeypatch.setattr(calibration, "continue_greedily", None)
    rounds = [calibration_rounds.round_of(lines()[0], tokenizer)]
    with pytest.raises(ValueError, match="model: expected eval mode"):
        calibration.calibrate(model.train(), rounds, [td.Nothing()])


def test_many_short_segments_have_room(tiny):
    """Each begins a page of its own, and rounds stay in the store."""
    model, tokenizer = tiny
    words = ["The town", "is small", "and", "everybody hears", "what the", "others say", "of it"]
    made = [
        {
            name: [
                {"private": f"{name}, {number}:"},
                *({"shared": f" {word} {number} "} for word in np.roll(words, index).tolist()),
            ]
            for index, name in enumerate("abcdef")
        }
        for number in range(3)
    ]
    rounds = [calibration_rounds.round_of(one, tokenizer) for one in made]
    found = calibration.calibrate(model, rounds, [td.Nothing(), td.Everything()], 3)
    assert found.reuses[0].rows < found.reuses[1].rows <= found.prompt_rows
    assert max(found.reuses[1].kl) < 1e-6


def test_the_round_that_comes_along_is_shared(tiny):
    _, tokenizer = tiny
    found = calibration_rounds.sample_round(tokenizer)
    shared = [[one.digest for one in prompt if one.is_shared] for prompt in found.values()]
    assert len(shared) == 6
    assert len({frozenset(one) for one in shared}) == 1  # everybody hears everything
    assert len({tuple(one) for one in shared}) == 6  # in an order of their own


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", r"rounds\.jsonl:2: expected an object of agents, got \[1\]"),
        ("{}", r"rounds\.jsonl:2: expected an object of agents, got \{\}"),
        ('{"a": 1}', r"rounds\.jsonl:2: a: expected a list of parts, got 1"),
        ('{"a": []}', r"rounds\.jsonl:2: a: expected a prompt with at least one token, got none"),
        ('{"a": [{"shared": 1}]}', r'rounds\.jsonl:2: a: expected parts .*, got \{"shared": 1\}'),
        ('{"a": [{"text": "b"}]}', r'rounds\.jsonl:2: a: expected parts .*, got \{"text": "b"\}'),
        (
            '{"a": [{"shared": "b", "private": "c"}]}',
            r"rounds\.jsonl:2: a: expected parts .*, got \{.*\}",
        ),
        ("{", r"rounds\.jsonl:2: "),
    ],
)
def test_other_rounds_are_refused(tiny, tmp_path, line, message):
    path = tmp_path / "rounds.jsonl"
    path.write_text("\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        calibration_rounds.read_rounds(path, tiny[1])


def test_the_command_recommends(directory, tmp_path, capsys):
    path, report = tmp_path / "rounds.jsonl", tmp_path / "report.json"
    path.write_text("\n".join(json.dumps(one) for one in lines()))
    arguments = ["calibrate", str(directory), "--rounds", str(path), "--new-tokens", "4"]
    arguments += ["--selections", "nothing,everything", "--json", str(report)]
    assert main([*arguments, "--kl", "1e-6"]) == 0
    said = capsys.readouterr().out.splitlines()
    found = json.loads(report.read_text())
    assert said[0] == f"{found['prompt_rows']} prompt tokens, 4 siblings"
    assert said[-2].startswith("| everything               |")
    assert said[-2].endswith("|   0.00000 |   0.00000 |   0.00000 |   1.000 |")
    assert said[-1].startswith("Recommended: Everything(), or everything: siblings are 0.00000")
    assert found["limit"] == 1e-6
    nothing = np.mean(found["selections"]["nothing"]["kl"])
    assert f"|   {nothing:.5f} |" in said[-3]
    assert main([*arguments, "--kl", str(2 * nothing)]) == 0
    assert "Recommended: Nothing(), or nothing:" in capsys.readouterr().out
    arguments[-3] = "nothing"
    assert main([*arguments, "--kl", str(nothing / 2)]) == 1
    assert "None of these stays within" in capsys.readouterr().out


def test_the_command_refuses(directory, tmp_path, capsys):
    for more, message in (
        (["--selections", "leading"], "selection: expected leading:COUNT"),
        (["--new-tokens", "0"], "--new-tokens: expected at least 1, got 0"),
        (["--dtype", "nothing"], "dtype: expected auto or the name of a torch dtype"),
        (["--rounds", str(tmp_path / "none.jsonl")], "No such file"),
    ):
        assert main(["calibrate", str(directory), *more]) == 2
        assert message in capsys.readouterr().err


def test_a_limit_below_the_noise_has_no_answer():
    from tokendance.cli.calibrate import _chosen, _recommendation

    found = calibration.Calibration(
        100, Noise(1e-3, 2e-3), [calibration.Reuse(td.Nothing(), 10.0, [1e-4], [0], 1.0)]
    )
    assert _recommendation(found, ["nothing"], 1.9e-3).startswith("No answer: the limit of 0.0019")
    assert _chosen(found, ["nothing"], 1.9e-3) is None
    assert _recommendation(found, ["nothing"], 2e-3).startswith("Recommended: Nothing()")


def test_the_upper_end_of_known_siblings():
    def upper(kl, rounds):
        return calibration.Reuse(td.Nothing(), 1.0, kl, rounds, 1.0).upper

    assert upper([0.2, 0.2, 0.2], [0, 0, 1]) == pytest.approx(0.2)
    # Of four siblings one is far: one draw in twenty has it three times, one in 256 four times.
    assert upper([1.0, 0.0, 0.0, 0.0], [0, 0, 0, 0]) == pytest.approx(0.75)
    # Siblings of a round agree, so rounds are what is drawn: a quarter of the draws are far alone.
    assert upper([1.0, 1.0, 0.0, 0.0], [0, 0, 1, 1]) == pytest.approx(1.0)


def test_a_stored_calibration_is_for_one_model(tiny, directory, tmp_path, capsys):
    model, _ = tiny
    path = tmp_path / "calibration.json"
    rounds = tmp_path / "rounds.jsonl"
    rounds.write_text("\n".join(json.dumps(one) for one in lines()))
    arguments = ["calibrate", str(directory), "--rounds", str(rounds), "--new-tokens", "2"]
    arguments += ["--selections", "leading:1,everything", "--json", str(path)]
    assert main([*arguments, "--kl", "1e-6"]) == 0
    said = capsys.readouterr().out
    found = td.StoredCalibration.read(path)
    fingerprint = fingerprint_of(model)
    assert (found.fingerprint, found.chosen, found.limit) == (fingerprint, "everything", 1e-6)
    assert found.selection_for(fingerprint) == td.Everything()
    assert set(found.selections) == {"leading:1", "everything"}
    assert set(found.noise) == {"chunks", "batch"}
    leading = found.selections["leading:1"]
    assert leading["mean"] == pytest.approx(np.mean(leading["kl"]))
    assert leading["upper"] > leading["mean"]
    assert f"| {leading['mean']:.5f} ".replace(" ", "") in said.replace(" ", "")
    assert f"{leading['upper']:.5f}" in said
    found.write(path)
    assert td.StoredCalibration.read(path) == found
    assert [one.name for one in tmp_path.iterdir() if one.name.endswith(".part")] == []
    # Another dtype's outputs are others.
    other, _ = calibration.load_model(str(directory), "bfloat16", "cpu")
    with pytest.raises(ValueError, match=f"fingerprint: expected {fingerprint} .*, got [0-9a-f]+"):
        found.selection_for(fingerprint_of(other))
    # None of one selection is near enough: it is stored, and nothing is chosen.
    arguments[arguments.index("leading:1,everything")] = "leading:1"
    assert main([*arguments, "--kl", "1e-6"]) == 1
    with pytest.raises(
        ValueError, match="chosen: expected a selection within 1e-06 nats, got none"
    ):
        td.StoredCalibration.read(path).selection_for(fingerprint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2 instead of 1"),
        ({"format": None}, "KeyError"),
        ({"more": 1}, "unexpected keyword argument 'more'"),
        ({"noise": None}, "missing 1 required positional argument: 'noise'"),
        ({"selections": {"all of it": {}}}, "expected leading:COUNT"),
        ({"chosen": "leading:9"}, "'leading:9' chosen of leading:8"),
        ({"selections": []}, "'leading:8' chosen of "),
    ],
)
def test_other_stored_calibrations_are_refused(tmp_path, change, message):
    path = tmp_path / "calibration.json"
    found = td.StoredCalibration("m", "00ff", 0.1, "leading:8", 9, {}, {"leading:8": {}})
    found.write(path)
    whole = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({name: one for name, one in whole.items() if one is not None}))
    with pytest.raises(
        ValueError, match=r"calibration\.json: expected a file that .* got"
    ) as error:
        td.StoredCalibration.read(path)
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "3"])
def test_files_that_are_none_are_refused(tmp_path, text):
    path = tmp_path / "calibration.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"calibration\.json: expected a file that .* got"):
        td.StoredCalibration.read(path)
