"""Replays: what is measured, and what the command refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tokendance as td
from evals.baselines import ModelFlops, causal_pairs
from evals.cli import main
from evals.replay import (
    SYSTEMS,
    CollectiveReuse,
    RoundResult,
    make_system,
    replay_round,
    summarize,
)
from tokendance.audit import divergence_of


def tiny_llama() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=512,
    )
    config._attn_implementation = "sdpa"
    return transformers.LlamaForCausalLM(config).eval()


def prompts(seed: int = 0) -> dict[str, list[td.Segment]]:
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> torch.Tensor:
        return torch.randint(0, 97, (count,), generator=generator)

    a, b = td.shared(ids(30)), td.shared(ids(21))
    return {
        "x": [td.private(ids(9)), a, b, td.private(ids(4))],
        "y": [td.private(ids(17)), b, a, td.private(ids(4))],
    }


def test_everything_and_prefix_caching_diverge_from_nothing() -> None:
    model = tiny_llama()
    ours = CollectiveReuse(model, selection=td.Everything(), capacity="64MiB")
    systems = [make_system("full", model), make_system("prefix", model), ours]
    for seed in (0, 1):
        result = replay_round(systems, prompts(seed), 4)
        assert (result.agents, result.prompt_tokens, result.distinct_tokens) == (2, 136, 85)
        for name in ("prefix", "tokendance"):
            assert abs(result.systems[name].kl or 0.0) < 1e-8
            assert result.systems[name].top1 == 1.0


def test_our_counts_follow_from_the_plan() -> None:
    model = tiny_llama()
    ours = CollectiveReuse(model, selection=td.LeadingTokens(4), capacity="64MiB")
    result = replay_round([make_system("full", model), ours], prompts(), 3)
    full, ours = result.systems["full"], result.systems["tokendance"]
    # x computes all 64 rows, y its private 21 and the first four of each of two broken runs.
    assert (full.rows, ours.rows, ours.rows_overridden) == (136, 64 + 21 + 8, 8)
    assert ours.kv_bytes_dense == full.kv_bytes_dense == full.kv_bytes_stored
    assert ours.kv_bytes_stored < ours.kv_bytes_dense
    assert ours.linear_flops < full.linear_flops
    assert ours.attention_flops < full.attention_flops
    flops = ModelFlops.from_config(model.config)
    assert full.linear_flops == 2 * 136 * flops.row + 2 * flops.head
    assert ours.linear_flops == 2 * (64 + 21 + 8) * flops.row + 2 * flops.head
    pairs = causal_pairs(0, 64) + causal_pairs(0, 72)
    assert full.attention_flops == 2 * pairs * flops.pair
    assert full.flops == full.linear_flops + full.attention_flops
    assert ours.kl_siblings == pytest.approx(2 * (ours.kl or 0.0))  # x is the Master agent
    assert full.kl == 0.0


def test_divergence() -> None:
    p, q = torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.5, 0.5]]).log()
    expected = 0.25 * torch.tensor(0.5).log() + 0.75 * torch.tensor(1.5).log()
    assert divergence_of(p, q).item() == pytest.approx(expected.item())
    assert divergence_of(p, p + 3).item() == pytest.approx(0.0, abs=1e-12)


def test_summary_adds_costs_and_averages_divergences_by_agents() -> None:
    model = tiny_llama()
    results: list[RoundResult] = []
    for seed in (0, 1):
        systems = [make_system("full", model), CollectiveReuse(model, capacity="64MiB")]
        results.append(replay_round(systems, prompts(seed), 2))
    total = summarize(results)["tokendance"]
    parts = [result.systems["tokendance"] for result in results]
    assert total["rows"] == sum(part.rows for part in parts)
    assert total["kl"] == pytest.approx(sum(part.kl or 0.0 for part in parts) / 2)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nowhere.jsonl"], "workload: expected a .jsonl file"),
        (["town_square", "--session", "none"], "session"),
        (["town_square", "--rounds", "9:"], "round"),
        (["town_square", "--agents", "0"], "agents: expected at least 1, got 0"),
        (["town_square", "--selection", "few"], "selection: expected leading:COUNT"),
    ],
)
def test_the_command_names_what_is_wrong(arguments: list[str], text: str, capsys: Any) -> None:
    assert main(["replay", *arguments]) == 2
    assert text in capsys.readouterr().err


def test_the_command_names_the_line_of_a_bad_file(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"workload": "w"}\n')
    assert main(["replay", str(path)]) == 2
    assert f"{path}:1:" in capsys.readouterr().err


@pytest.mark.model
def test_report_has_the_agreed_fields(smollm2: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    options = ["--rounds", "0:1", "--agents", "2", "--new-tokens", "3", "--json", str(path)]
    assert main(["replay", "town_square", *options]) == 0
    report = json.loads(path.read_text())
    assert set(report) == {"model", "workload", "threads", "rounds", "summary"}
    fields = {"prefill_s", "rows", "rows_overridden", "linear_flops", "attention_flops"}
    fields |= {"kv_bytes_dense", "kv_bytes_stored", "decode_tokens_per_s"}
    fields |= {"kl", "kl_siblings", "top1"}
    (one,) = report["rounds"]
    assert (one["round"], one["agents"]) == (0, 2)
    assert set(one["systems"]) == set(report["summary"]) == set(SYSTEMS)
    assert all(set(system) == fields for system in one["systems"].values())
    assert one["systems"]["tokendance"]["rows"] < one["systems"]["full"]["rows"]


def test_a_system_repairs_what_is_selected() -> None:
    model = tiny_llama()

    def overridden(selection: td.LeadingTokens | td.Nothing) -> int:
        system = make_system("tokendance", model, selection, capacity="64MiB")
        system.prefill_round(prompts())
        return system.stats.rows_overridden

    assert overridden(td.Nothing()) == 0
    assert 0 < overridden(td.LeadingTokens(1)) < overridden(td.LeadingTokens(4))
