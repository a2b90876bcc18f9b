"""Simulated serving: its costs and planners by hand, and what every run must hold."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from evals.capacity.calibration import Fitted, at, predict, rounds_of
from evals.capacity.collective import Collective, work_of
from evals.capacity.cost import CostModel, Shares, Work
from evals.capacity.limits import SYSTEMS, Setting, agents_within, make, together
from evals.capacity.machines import MACHINES, MODELS, Machine, kv_bytes
from evals.capacity.rounds import SHAPES, Shape, Society, arrivals
from evals.capacity.serve import serve
from evals.capacity.systems import BLOCK, Dense, PerRequestBlend, PrefixCache, hashes_of
from evals.cli import main
from evals.cli.capacity import machines
from tokendance.host.plan import Policy

SHAPE = Shape(system=64, own=96, output=32, board=0, tail=16)
SETTING = Setting(MACHINES["a100"], MODELS["qwen2.5-7b"], SHAPE, rate=0.5, rounds=2)
PLAIN = Machine("plain", 80 * 10**9, 1e12, 1e14, 1e11)
WHOLE = Shares(1.0, 1.0, 1.0, 1.0, 0.5, 0.25, 0.0, 0.0)


def test_a_decode_row_costs_the_weights_and_its_keys():
    model = MODELS["llama-3.1-8b"]
    assert model.row_bytes == 2 * 2 * 32 * 8 * 128
    assert 2 * model.weights == pytest.approx(15e9, rel=0.01)  # 8.03e9 less 0.53e9 of the table
    work = Work(row_layers=32, logit_rows=1, pairs=1000 * 32, kv_rows=1000 * 32)
    cost = CostModel(PLAIN, model, WHOLE)
    assert cost.linear_seconds(work) == pytest.approx(2 * model.weights / 1e12)
    assert cost.attention_seconds(work) == pytest.approx(1000 * model.row_bytes / 1e12)
    work.is_collective = True  # assumed to reach half of it
    assert cost.attention_seconds(work) == pytest.approx(2 * 1000 * model.row_bytes / 1e12)
    assert cost.seconds(Work()) == 0


def test_many_rows_cost_their_flops():
    model = MODELS["llama-3.1-8b"]
    work = Work(row_layers=4096 * 32, logit_rows=0, pairs=4096 * 4097 // 2 * 32, kv_rows=4096 * 32)
    cost = CostModel(PLAIN, model, WHOLE)
    elements = model.weights - 4096 * 128256
    assert cost.linear_seconds(work) == pytest.approx(2 * elements * 4096 / 1e14)
    assert cost.attention_seconds(work) == pytest.approx(4 * 32 * 128 * work.pairs / 1e14)
    moved = Work(row_layers=32, moved_rows=10)
    assert cost.copy_seconds(moved) == pytest.approx(20 * model.row_bytes / 1e12)


def test_two_ranks_share_the_work_and_add_up_their_results():
    model = MODELS["qwen3-32b"]
    work = Work(row_layers=64)
    seconds = CostModel(PLAIN, model, WHOLE).linear_seconds(work)
    sums = 64 * 2 * 5120 * 2 / 1e11  # 2 (2 - 1) / 2 of a row, twice a layer
    assert seconds == pytest.approx(model.weights / 1e12 + sums)


def test_a_model_that_does_not_fit_is_refused():
    small = Machine("small", 10**10, 1e12, 1e14, 1e11)
    with pytest.raises(ValueError, match="expected room for 15 GB of weights, got 1 x 10 GB"):
        kv_bytes(small, MODELS["qwen2.5-7b"])


def test_blocks_are_found_by_all_tokens_before_them():
    society = Society(0, 2, SHAPE)
    one, other = society.round(0, 0.0).requests
    first, second = hashes_of(one.prompt), hashes_of(other.prompt)
    assert len(first) == one.length // BLOCK
    assert first[:4] == second[:4]  # the system prompt's 64 tokens
    assert not set(first[4:]) & set(second[4:])
    again = society.round(1, 1.0).requests[0]
    assert hashes_of(again.prompt)[:10] == first[:10]  # and the agent's own 96


def test_unused_blocks_make_room_the_longest_unused_first():
    cache = PrefixCache(4)
    assert cache.take([1, 2], 1)
    cache.give_back([1, 2], 1)
    assert cache.take([3], 0)
    cache.give_back([3], 0)
    assert cache.held == 0
    assert cache.matched([1, 2, 9]) == 2
    assert cache.take([4, 5], 0)
    assert (cache.matched([1]), cache.matched([2]), cache.matched([3])) == (0, 1, 1)
    assert not cache.take([2, 3], 1)  # used ones are never evicted
    assert cache.held == 2
    assert cache.peak == 3


def rows_of(system, rounds):
    """Rows that each round's prompts took through the layers."""
    cost = CostModel(SETTING.machine, SETTING.model)
    found = []
    for one in rounds:
        served = serve(system, cost, [one])
        decoded = sum(request.output - 1 for request in one.requests)
        found.append(served.row_layers / SETTING.model.num_layers - decoded)
    return found


def test_prefix_caching_computes_what_follows_the_prefix():
    agents, society = 4, Society(0, 4, SHAPE)
    first, second = rows_of(
        Dense(10**5, SETTING.model.num_layers, 8192), [society.round(0, 0.0), society.round(1, 0.0)]
    )
    length = 64 + 96 + agents * 32 + 16
    assert first == agents * length - (agents - 1) * 64
    assert second == agents * (length - 160)


def test_plain_paged_caches_compute_all():
    society = Society(0, 4, SHAPE)
    length = 64 + 96 + 4 * 32 + 16
    rounds = [society.round(0, 0.0), society.round(1, 0.0)]
    assert rows_of(Dense(10**5, SETTING.model.num_layers, 8192, caches=False), rounds) == [
        4 * length,
        4 * length,
    ]


def test_blend_computes_a_share_of_what_it_reuses():
    agents, society = 4, Society(0, 4, SHAPE)
    layers = SETTING.model.num_layers
    _, second = rows_of(
        PerRequestBlend(10**5, layers, 8192, 0.15), [society.round(0, 0.0), society.round(1, 0.0)]
    )
    said = agents * 32
    repaired = np.ceil(0.15 * said)
    alone = said  # each message once
    each = (said + 16) / layers + (16 + repaired) * (layers - 1) / layers
    assert second == pytest.approx(alone + agents * each)
    _, second = rows_of(
        PerRequestBlend(10**5, layers, 8192, 0.0), [society.round(0, 0.0), society.round(1, 0.0)]
    )
    assert second == pytest.approx(alone + agents * 16)


def test_our_rows_are_those_that_the_plan_says():
    society = Society(0, 4, SHAPE)
    rounds = [society.round(0, 0.0), society.round(1, 0.0)]
    ours = Collective(10**5, SETTING.model, 8192)
    found = rows_of(ours, rounds)
    again, expected = Collective(10**5, SETTING.model, 8192).scheduler, []
    for one in rounds:
        plan = again.plan(
            {request.agent: request.prompt for request in one.requests}, Policy(SETTING.selection)
        )
        while step := again.step():
            step.finish()
        expected.append(plan.rows_computed)
        plan.commit()
    assert found == expected
    assert found[1] < rows_of(Dense(10**5, 28, 8192), rounds)[1]


def test_a_master_is_read_once_for_all_query_rows_of_a_tile():
    society = Society(0, 3, SHAPE)
    ours = Collective(10**5, SETTING.model, 8192)
    one = society.round(0, 0.0)
    plan = ours.scheduler.plan({request.agent: request.prompt for request in one.requests})
    while step := ours.scheduler.step():
        step.finish()
    step = ours.scheduler.step({agent: [0] for agent in plan.agents})
    work = work_of(step.record, SETTING.model)
    layers, length = SETTING.model.num_layers, one.requests[0].length
    assert (work.row_layers, work.logit_rows) == (3 * layers, 3)
    assert work.pairs == 3 * (length + 1) * layers
    # 3 agents x 7 heads of a group fit one tile; own: 96 + 16, repaired and decoded rows.
    masters = 64 + 3 * 32
    own = work.kv_rows / layers - masters
    assert 3 * (96 + 16 + 1) <= own <= 3 * (length + 1) - masters


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("rows", [10**5, 900])
def test_every_request_is_served_whatever_the_room(name, rows):
    """Also where one round does not fit, and where nobody's rows can be kept."""
    system = make(name, SETTING)
    system = type(system)(rows, *_arguments(system))
    rounds = list(arrivals(3, SHAPE, rate=20.0, rounds=6, societies=2))
    served = serve(system, CostModel(SETTING.machine, SETTING.model), rounds)
    assert (len(served.ended), served.late) == (6, 0)
    requests = [request for one in rounds for request in one.requests]
    assert all(request.tokens == request.output for request in requests)
    assert all(one.arrival < one.first < one.last for one in requests)
    assert served.peak_rows <= rows
    for society in (0, 1):  # a round begins when the one before has ended
        own = [one for one in rounds if one.society == society]
        for before, after in pairwise(own):
            assert after.requests[0].first > max(one.last for one in before.requests)


def _arguments(system):
    if isinstance(system, Collective):
        return SETTING.model, 8192, 1 << 17, system.policy.selection
    if isinstance(system, PerRequestBlend):
        return system.num_layers, 8192, system.ratio
    return system.num_layers, 8192, system.caches


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_run_is_the_same_every_time(name):
    (one, _), (other, _) = SETTING.run(name, 5), SETTING.run(name, 5)
    assert one == other
    assert one.ended


def test_first_rounds_delay_no_others():
    rounds = list(arrivals(2, SHAPE, rate=2.0, rounds=6, societies=2, lead=100.0))
    assert [one.arrival for one in rounds] == [0.0, 0.5, 101.0, 101.5, 102.0, 102.5]
    assert [(one.society, one.number) for one in rounds[1:4]] == [(1, 0), (0, 1), (1, 1)]


def test_a_run_ends_when_a_measured_round_is_late():
    served, _ = SETTING.run("prefix", 8, give_up=0.01)
    assert served.late == 1
    assert served.percentile(0.9) == float("inf")


@pytest.mark.parametrize("most", [0, 1, 2, 3, 7, 8, 9, 64, 100])
def test_the_largest_number_that_holds_is_found(most):
    asked = []

    def holds(count):
        asked.append(count)
        return count <= most

    assert agents_within(holds, 64) == min(most, 64)
    assert max(asked) <= 64
    assert len(asked) <= 14


def test_command_writes_what_it_prints(tmp_path, capsys):
    path = tmp_path / "found.json"
    arguments = ["--agents", "2", "--rates", "0.5", "--most", "4", "--rounds", "1"]
    for question in ("agents", "bytes", "prefill", "machines", "host"):
        assert main(["capacity", question, *arguments, "--json", str(path)]) == 0
        report = json.loads(path.read_text())
        lines = capsys.readouterr().out.splitlines()
        assert report["question"] == question
        assert lines[0] == "| " + " | ".join(report["rows"][0]) + " |"
        assert len(lines) == 2 + len(report["rows"])


def test_a_machine_is_found_in_its_plain_runs():
    """Runs of a machine whose figures are known, and of ours on a machine that is slower."""
    known = Fitted(flops=8e10, bandwidth=9e9, step_seconds=4e-3)
    setting = Setting(PLAIN, MODELS["smollm2"], SHAPES["all-gather"].scaled(8), rate=1e-4, rounds=1)
    runs = []
    for name, system, slower in (("vllm", "plain", 1), ("tokendance", "tokendance", 1.5)):
        for agents in (1, 8):
            served, _ = at(setting, known).run(system, agents)
            seconds = {
                "round p50, s": slower * served.ended[0],
                "all first tokens p50, s": slower * served.first[0],
            }
            run = {"rounds/s": "closed", "agents": agents, "system": name, **seconds}
            runs.append(run | {"outputs alike": [" ".join(map(str, range(agents)))] * 2})
    given = {"workload": "all-gather", "societies": 1, "scale": 8, "rounds": 1}
    given["selection"] = "leading:12"
    report = {"setting": given | {"max_rows": 8192, "cache_gib": 4}, "runs": runs}
    fitted, rows = predict(report)
    assert fitted.flops == pytest.approx(known.flops, rel=0.02)
    # A step of few rows takes its weights' bytes and what is neither: only their sum is seen.
    step = [4 * setting.model.weights / one.bandwidth + one.step_seconds for one in (known, fitted)]
    assert step[1] == pytest.approx(step[0], rel=0.02)
    assert [row["off"] for row in rows[2:]] == ["-33%"] * 2
    assert [row["round off"] for row in rows[2:]] == ["-33%"] * 2
    with pytest.raises(ValueError, match="report: expected closed rounds"):
        predict({"setting": given, "runs": runs[2:]})


def test_outputs_that_were_alike_are_alike_where_they_are_predicted():
    setting = Setting(PLAIN, MODELS["smollm2"], Shape(32, 16, 40, 32, 1))
    run = {"system": "tokendance", "agents": 3}

    def rows(outputs: str) -> float:
        """Of a round whose prompts hold these outputs of the round before."""
        passes = rounds_of(setting, run | {"outputs alike": ["0 1 2", outputs, "6 7 8"]})[1]
        return sum(work.row_layers for work in passes.works) / setting.model.num_layers

    decoded, masters, own, repaired = 3 * 39, 32 + 3 * 40, 3 * 1, 2 * 12
    assert rows("3 4 5") == decoded + masters + own + repaired
    # Two have written the same: it stands in two places, and the run does not break.
    assert rows("3 4 3") == rows("3 4 5")
    # What was written once more is stored since the round before.
    assert rows("0 1 2") < rows("3 4 5") - 40


def test_real_runs_are_predicted_by_the_command(tmp_path, capsys):
    path, written = tmp_path / "report.json", tmp_path / "found.json"
    run = {"rounds/s": "closed", "agents": 2, "system": "vllm", "outputs alike": ["0 1", "2 3"]}
    seconds = {"round p50, s": 2.0, "all first tokens p50, s": 1.0}
    given = {"workload": "all-gather", "societies": 1, "scale": 8, "rounds": 1, "max_rows": 64}
    given["selection"] = "leading:12"
    report = {"setting": given | {"cache_gib": 4}, "runs": [run | seconds]}
    path.write_text(json.dumps(report))
    given = ["capacity", "predict", "--report", str(path), "--json", str(written)]
    assert main(given) == 0
    found = json.loads(written.read_text())
    assert found["setting"].keys() == {"flops", "bandwidth", "step_seconds"}
    assert [row["round off"] for row in found["rows"]] == ["+0%"]  # three figures for two
    assert "| 2 | vllm | 1 | 1 |" in capsys.readouterr().out
    assert main(["capacity", "predict"]) == 2
    assert "report: expected JSON" in capsys.readouterr().err


def test_machines_are_replicas_of_one():
    """One society of 50 takes a while; as many fit an interval as its rounds leave room for."""
    setting = replace(SETTING, rounds=1)
    served, _ = replace(setting, rate=1e-3).run("prefix", 50)
    seconds = served.ended[0]
    limit, interval = 1.5 * seconds, 3.2 * seconds
    rows = machines(setting, ["prefix"], [50, 1000], limit, interval, 8)
    agents = rows[0]["agents of a machine"]
    assert 50 <= agents <= 200
    assert rows[0]["machines for 1,000"] == -(-1000 // agents)
    none = machines(setting, ["prefix"], [50], seconds / 2, interval, 8)
    assert none == [{"system": "prefix", "agents of a machine": 0, "machines for 50": "none"}]


def test_the_scheduler_is_measured_with_room_for_all():
    served, system = together(replace(SETTING, rounds=1), 3, 4)
    assert (len(served.ended), served.late) == (4, 0)
    assert system.plans >= 2  # first rounds, and those that are measured
    assert system.uses == 2 * 4 * 3 * (3 + 3)
    # All of a time are served at once: their decode steps are one another's.
    assert served.steps < 2 * (SHAPE.output + 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--machine", "abacus"], "machine: expected one of"),
        (["--model", "gpt"], "model: expected one of"),
        (["--shape", "round"], "shape: expected one of"),
        (["--systems", "other"], "system: expected one of"),
        (["--agents", "2,x"], "agents: expected positive numbers"),
        (["--rates", "0"], "rates: expected positive numbers"),
        (["--limit", "0"], "limit: expected more than 0"),
        (["--scale", "-1"], "scale: expected more than 0"),
    ],
)
def test_command_names_what_is_wrong(arguments, message, capsys):
    assert main(["capacity", "agents", *arguments]) == 2
    assert message in capsys.readouterr().err
