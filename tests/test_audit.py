"""Audits, the gate and opting out: what is recomputed, found, told and given back."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from driving import (
    GEOMETRY,
    make_store,
    prefill_steps,
    restored,
    run_step,
    same_snapshot,
    snapshot,
    tokens,
)
from torch import Tensor

import tokendance as td
from tokendance.audit import divergence_of
from tokendance.host.gate import AgentAudit, SegmentAudit, judge

A, B, C = (td.shared(tokens(seed, count)) for seed, count in ((1, 40), (2, 30), (3, 17)))
Prompts = Mapping[str, Sequence[td.Segment]]


def prompts() -> dict[str, list[td.Segment]]:
    """``first`` makes the Masters; ``second`` and ``third`` reuse them; ``alone`` has none."""
    return {
        "first": [td.private(tokens(10, 13)), A, B, C, td.private(tokens(13, 4))],
        "second": [td.private(tokens(11, 29)), B, A, td.private(tokens(14, 4))],
        "third": [td.private(tokens(12, 5)), C, A, td.private(tokens(15, 4))],
        "alone": [td.private(tokens(16, 21))],
    }


def weights(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1


EMBEDDING = weights(0, 1000, 128) * 10
PROJECTIONS = [weights(seed, 128, 256) for seed in (1, 2)]


def run(step: td.Step) -> Tensor:
    """Logits of ``step.logit_rows`` of a model whose keys depend on context: attention alone."""
    with step:
        hidden = EMBEDDING[step.token_ids % 1000]
        for layer in range(GEOMETRY.num_layers):
            q, k, v = (hidden @ PROJECTIONS[layer]).split([128, 64, 64], dim=-1)
            out = step.attend(layer, q, k, v)
            (hidden,) = step.keep(hidden)
            hidden = hidden + 3 * out.flatten(1)
    return hidden[step.logit_rows] @ EMBEDDING.T * 0.02


def prefill(collector: td.KVCollector, plan: td.Plan) -> dict[str, Tensor]:
    logits: dict[str, Tensor] = {}
    for step in prefill_steps(collector, plan):
        rows = run(step)
        logits.update(zip(step.logit_agents, rows, strict=True))
    return logits


def audit(
    collector: td.KVCollector,
    plan: td.Plan,
    logits: Mapping[str, Tensor] | None = None,
    max_rows: int = 8192,
    **options: object,
) -> td.AuditReport:
    one = collector.audit(plan, **options)  # type: ignore[arg-type]
    for step in one.steps(max_rows):
        one.add(run(step))
    return one.report(logits)


def collector_of(gate: td.Gate | None = None, **options: object) -> td.KVCollector:
    options = {"selection": td.LeadingTokens(4), **options}
    return td.KVCollector(make_store(), gate=gate, **options)  # type: ignore[arg-type]


def expected_logits(round_: Prompts) -> dict[str, Tensor]:
    """Each prompt on its own in a store of its own."""
    collector = collector_of(selection=td.Everything())
    found = {}
    for agent, segments in round_.items():
        plan = collector.plan({agent: [td.private(s.token_ids) for s in segments]})
        found |= prefill(collector, plan)
        plan.abort()
    return found


def divergence(p: Tensor, q: Tensor) -> float:
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("max_rows", [8192, 17])
def test_report_says_how_far_each_agent_is_from_full_recompute(max_rows: int) -> None:
    collector = collector_of()
    plan = collector.plan(prompts())
    logits = prefill(collector, plan)
    report = audit(collector, plan, logits, max_rows)
    assert list(report.agents) == ["second", "third"]  # the others are exact
    full = expected_logits(prompts())
    for agent, one in report.agents.items():
        assert one.kl == pytest.approx(divergence(full[agent], logits[agent]), rel=1e-3, abs=1e-9)
        assert one.kl is not None
        assert one.kl > 1e-6
        assert one.top1 == float(full[agent].argmax() == logits[agent].argmax())
        assert one.tokens == 1
        assert one.rows == sum(segment.length for segment in prompts()[agent])
    assert report.rows == 103 + 66
    assert report.kl == pytest.approx(np.mean([one.kl for one in report.agents.values()]))
    stats = collector.stats()
    assert (stats.audits, stats.audited_agents, stats.audited_rows) == (1, 2, 169)
    assert (stats.audited_tokens, stats.kl, stats.findings) == (2, report.kl, 0)
    assert stats.worst_kl == max(one.kl or 0.0 for one in report.agents.values())


def test_segments_deviate_where_rows_are_reused_and_not_in_the_first_layer() -> None:
    collector = collector_of()
    plan = collector.plan(prompts())
    prefill(collector, plan)
    second = audit(collector, plan).agents["second"]
    assert [(one.begin, one.end, one.reused) for one in second.segments] == [
        (0, 29, 0),
        (29, 59, 26),
        (59, 99, 36),
        (99, 103, 0),
    ]
    assert [one.digest for one in second.segments] == [s.digest for s in prompts()["second"]]
    own, b, a, last = second.segments
    # The last segment is computed over the first layer's rows, which are full recompute's.
    assert own.deviation < 1e-5
    assert last.deviation < 1e-5
    for one in (b, a):
        # Keys and values of the first layer depend on the token alone.
        assert one.keys[0] < 1e-5
        assert one.values[0] < 1e-5
        assert one.keys[1] > 1e-3
        assert one.deviation == max(one.keys[1], one.values[1])
    assert second.kl is None
    assert second.tokens == 0


def test_key_deviation_and_earlier_rounds_are_counted_by_what_is_reused() -> None:
    collector = collector_of(selection=td.KeyDeviation(0.2))
    plan = collector.plan(prompts())
    prefill(collector, plan)
    second = audit(collector, plan, agents="second").agents["second"]
    assert [one.reused for one in second.segments] == [0, 24, 32, 0]
    plan.commit()
    later = {"second": [*prompts()["second"], td.private([1, 2, 3])]}
    plan = collector.plan(later)
    prefill(collector, plan)
    second = audit(collector, plan).agents["second"]
    assert [one.reused for one in second.segments] == [0, 24, 32, 0, 0]


def test_decoded_tokens_are_compared_too() -> None:
    collector = collector_of()
    plan = collector.plan(prompts())
    logits = {agent: [row] for agent, row in prefill(collector, plan).items()}
    ids = [5, 6, 7]
    for token in ids:
        step = collector.step({agent: [token] for agent in logits}, prefill=())
        for agent, row in zip(logits, run(step), strict=True):
            logits[agent].append(row)
    stacked = {agent: torch.stack(rows) for agent, rows in logits.items()}
    report = audit(collector, plan, stacked)
    longer = {a: [*p, td.private(ids[:n])] for n in (3,) for a, p in prompts().items()}
    assert report.agents["second"].tokens == 4
    assert report.agents["second"].segments[-1].end == 106
    last = divergence(expected_logits(longer)["second"], stacked["second"][3])
    full = collector_of(selection=td.Everything())
    reference = full.plan({"second": prompts()["second"]})
    rows = [prefill(full, reference)["second"]]
    rows += [run(full.step({"second": [token]}, prefill=()))[0] for token in ids]
    kls = [divergence(p, q) for p, q in zip(rows, stacked["second"], strict=True)]
    assert kls[-1] == pytest.approx(last, rel=1e-3, abs=1e-9)
    assert report.agents["second"].kl == pytest.approx(np.mean(kls), rel=1e-3, abs=1e-9)
    assert audit(collector, plan, stacked, tokens=1).agents["second"].tokens == 2


def decoded(collector: td.KVCollector, plan: td.Plan, ids: Sequence[int]) -> dict[str, Tensor]:
    """Logits of each prompt's last row and of ``ids``, fed to all."""
    rows = {agent: [row] for agent, row in prefill(collector, plan).items()}
    for token in ids:
        step = collector.step({agent: [token] for agent in rows}, prefill=())
        for parts, row in zip(rows.values(), run(step), strict=True):
            parts.append(row)
    return {agent: torch.stack(parts) for agent, parts in rows.items()}


@pytest.mark.parametrize("max_rows", [8192, 17])
def test_sampled_rows_are_compared_with_their_repair(max_rows: int) -> None:
    collector = collector_of()
    plan = collector.plan(prompts())
    logits = decoded(collector, plan, [5, 6])
    report = audit(collector, plan, logits, max_rows, rows=0.25, seed=3)
    second = report.agents["second"]
    assert second.rows == sum(one.compared for one in second.segments)
    assert 0.15 * 103 < second.rows < 0.35 * 103 + 3
    assert second.segments[-1].compared == 2  # decoded tokens are always recomputed
    assert second.tokens == 3
    whole = audit(collector, plan, logits).agents["second"]
    assert [one.compared for one in whole.segments] == [29, 30, 40, 4, 2]
    assert second.kl is not None
    assert whole.kl is not None
    assert 0 < second.kl < 2 * whole.kl
    # The first segment is exact; keys and values of layer 0 depend on the token alone.
    assert second.segments[0].deviation < 1e-5
    for one in second.segments[1:3]:
        assert one.compared
        assert one.keys[0] < 1e-5
        assert one.keys[1] > 1e-3
    assert (
        second.rows + report.agents["third"].rows
        == report.rows
        == collector.stats().audited_rows - (whole.rows + 66 + 2)
    )


def test_sampled_rows_see_what_the_round_has_and_each_other() -> None:
    """Nothing differs in an exact prompt, and all rows together are full recompute."""
    collector = collector_of()
    plan = collector.plan(prompts())
    logits = decoded(collector, plan, [5, 6])
    alone = audit(collector, plan, logits, agents="alone", rows=0.5).agents["alone"]
    assert alone.kl == pytest.approx(0.0, abs=1e-9)
    assert max(one.deviation for one in alone.segments) < 1e-5
    whole = audit(collector, plan, logits).agents["second"]
    nearly = audit(collector, plan, logits, rows=1 - 1e-12).agents["second"]
    assert nearly.rows == whole.rows == 105
    assert nearly.kl == pytest.approx(whole.kl, rel=1e-3)
    for one, other in zip(nearly.segments, whole.segments, strict=True):
        np.testing.assert_allclose(one.keys, other.keys, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(one.values, other.values, rtol=1e-3, atol=1e-6)


def test_sampled_rows_follow_from_the_seed_and_differ_between_audits() -> None:
    def rows(seed: int) -> list[int]:
        collector = collector_of(selection=td.KeyDeviation(0.3))
        plan = collector.plan(prompts())
        prefill(collector, plan)
        return [audit(collector, plan, rows=0.3, seed=seed).rows for _ in range(8)]

    found = rows(1)
    assert found == rows(1) != rows(2)
    assert len(set(found)) > 2
    assert 0.2 < sum(found) / (8 * (103 + 66)) < 0.4


@pytest.mark.parametrize("rows", [1.0, 0.4])
@pytest.mark.parametrize("source", ["master", "alone", "producer"])
def test_audits_leave_the_store_and_the_plan_as_they_were(source: str, rows: float) -> None:
    collector = collector_of(source=source)
    plan = collector.plan(prompts())
    prefill(collector, plan)
    plan.commit()
    plan = collector.plan(prompts())
    logits = prefill(collector, plan)
    before = snapshot(collector.store)
    audit(collector, plan, logits, agents=list(prompts()), rows=rows)
    assert same_snapshot(snapshot(collector.store), before)

    # Left in the middle, by its end, by an exception in a step, or without logits.
    one = collector.audit(plan, agents="second", rows=rows)
    steps = one.steps(20)
    next(steps)
    steps.close()  # type: ignore[attr-defined]
    assert same_snapshot(snapshot(collector.store), before)
    steps = collector.audit(plan, "second", rows=rows).steps()
    with pytest.raises(LookupError), next(steps):
        raise LookupError("the engine's own mistake")
    one = collector.audit(plan, agents="second")
    with pytest.raises(ValueError, match=r"audit: expected add\(\) after every step"):
        list(map(run, one.steps()))
    with pytest.raises(ValueError, match="all steps to be run before the report"):
        one.report()
    assert same_snapshot(snapshot(collector.store), before)
    assert not plan.ended
    run(collector.step({"second": [1]}, prefill=()))
    plan.commit()


def test_samples_follow_from_the_seed() -> None:
    round_ = {f"agent {n}": [td.private(tokens(20 + n, 9 + n)), A] for n in range(30)}

    def drawn(**options: object) -> list[list[str]]:
        collector = collector_of()
        plan = collector.plan(round_)
        prefill(collector, plan)
        return [collector.audit(plan, **options).agents for _ in range(20)]  # type: ignore[arg-type]

    third = drawn(fraction=0.3, seed=1)
    assert third == drawn(fraction=0.3, seed=1) != drawn(fraction=0.3, seed=2)
    assert 0.25 < sum(map(len, third)) / (20 * 29) < 0.35
    assert len({tuple(one) for one in third}) > 10  # others in every audit
    assert all(len(one) == 29 for one in drawn())  # the first is the Master agent
    named = drawn(agents=["agent 3", "agent 1"])
    assert all(one == ["agent 1", "agent 3"] for one in named)


def test_a_sample_of_nobody_costs_nothing() -> None:
    collector = collector_of(td.Gate(kl=0.0))
    plan = collector.plan({"alone": prompts()["alone"]})
    logits = prefill(collector, plan)
    report = audit(collector, plan, logits)
    assert (report.rows, report.tokens, report.kl, report.top1) == (0, 0, None, None)
    assert collector.stats() == td.CollectorStats(audits=1)


def test_the_gate_warns_and_changes_nothing_else() -> None:
    collector = collector_of(td.Gate(kl=0.0, top1=1.0, deviation=0.0))
    plan = collector.plan(prompts())
    logits = prefill(collector, plan)
    with pytest.warns(td.ReuseWarning, match="agent 'second': expected KL <= 0") as told:
        report = audit(collector, plan, logits)
    assert len(told) == len(report.findings) == collector.stats().findings
    assert (report.fallen_agents, report.fallen_segments) == ((), ())
    rows = plan.rows_computed
    plan.abort()
    collector.store.clear()  # of the Masters that the first plan has finished
    again = collector.plan(prompts())
    prefill(collector, again)
    assert again.rows_computed == rows


def test_nothing_is_said_within_the_limits() -> None:
    collector = collector_of(td.Gate(kl=100.0, top1=0.0, deviation=100.0, action="fall back"))
    plan = collector.plan(prompts())
    logits = prefill(collector, plan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert audit(collector, plan, logits).findings == ()


def test_an_agent_falls_back_to_full_recompute_and_back() -> None:
    collector = collector_of(td.Gate(kl=1e-9, action="fall back"))
    plan = collector.plan(prompts())
    logits = prefill(collector, plan)
    before = plan.rows_computed
    with pytest.warns(td.ReuseWarning, match="agent 'second'"):
        report = audit(collector, plan, logits, agents=["second"])
    assert report.fallen_agents == ("second",)
    assert collector.stats().agents_opted_out == 1
    plan.commit()
    for _ in range(2):  # its inexact rows of the round before are not taken over either
        plan = collector.plan(prompts())
        logits = prefill(collector, plan)
        full = expected_logits(prompts())
        torch.testing.assert_close(logits["second"], full["second"], rtol=1e-5, atol=1e-5)
        assert plan._live.state("second").exact_length == 103
        report = audit(collector, plan, logits, agents=["second"])
        assert report.agents["second"].kl == pytest.approx(0.0, abs=1e-9)
        assert all(one.reused == 0 for one in report.agents["second"].segments)
        assert report.findings == ()
        assert divergence(full["third"], logits["third"]) > 1e-6
        plan.commit()
    collector.opt_in("second")
    assert collector.stats().agents_opted_out == 0
    for agent in prompts():
        collector.store.release(agent)
    plan = collector.plan({**prompts(), "first": [*prompts()["first"], td.private([1])]})
    prefill(collector, plan)
    assert plan.rows_computed < before


def test_a_segment_falls_back_in_every_prompt_and_no_other_does() -> None:
    collector = collector_of(td.Gate(deviation=0.0, action="fall back"))
    plan = collector.plan({agent: prompts()[agent] for agent in ("first", "third")})
    prefill(collector, plan)
    with pytest.warns(td.ReuseWarning, match=r"segment \d \("):
        report = audit(collector, plan)
    assert report.fallen_segments == (C.digest, A.digest)
    assert report.fallen_agents == ()
    plan.commit()
    plan = collector.plan(prompts())
    prefill(collector, plan)
    origins = {
        agent: {(span.begin, span.kind.value) for span in plan.spans(agent)} for agent in prompts()
    }
    assert (59, "own") in origins["second"]  # A
    assert {(29, "repaired"), (33, "reused")} <= origins["second"]  # B
    assert plan.spans("third")[0].end == 5  # what was reused of C is not taken over
    assert all(origin == "own" for begin, origin in origins["third"] if begin >= 5)
    third = audit(collector, plan, agents="third").agents["third"]
    assert all(one.reused == 0 for one in third.segments)
    plan.commit()
    # Computed in the agent's own context it stays: the next round takes it over.
    plan = collector.plan({"third": [*prompts()["third"], td.private([1, 2])]})
    assert plan.spans("third")[0].end == 66
    plan.abort()


def test_a_segment_that_was_found_by_its_stem_can_be_opted_out() -> None:
    collector = collector_of(source="producer")
    heard, said = td.shared(tokens(20, 20)), tokens(21, 21).tolist()
    plan = collector.plan(
        {
            "first": [td.private(tokens(22, 9)), heard, td.private([1])],
            "second": [td.private(tokens(23, 5)), heard, td.private([1])],
        }
    )
    prefill(collector, plan)
    run(collector.step({"first": said[:-1]}, prefill=()))  # the last token is never fed
    plan.commit()
    output = td.shared(said)
    prompt = [td.private(tokens(23, 5)), heard, td.private([1]), output, td.private([5])]
    plan = collector.plan({"second": prompt})
    prefill(collector, plan)
    plan.commit()
    collector.opt_out(segments=[output])
    plan = collector.plan({"second": [*prompt, td.private([6])]})
    assert plan.spans("second")[0].end == 26  # where the output begins
    plan.abort()


def test_tokens_without_probability_add_nothing_to_a_divergence() -> None:
    logits = torch.tensor([[1.0, 2.0, -torch.inf]])
    assert divergence_of(logits, logits).item() == 0
    assert divergence_of(logits, torch.tensor([[1.0, -torch.inf, 2.0]])).item() == torch.inf


def test_a_deviation_that_is_no_number_is_beyond_every_limit() -> None:
    keys, values = np.array([0.1]), np.array([np.nan])
    segment = SegmentAudit("ada", 0, b"x", 0, 8, 8, 8, keys, values)
    report = judge(td.Gate(deviation=1.0), {"ada": AgentAudit(8, 0, None, None, (segment,))})
    assert "expected deviation <= 1, got nan" in report.findings[0]


@pytest.mark.parametrize("source", ["master", "alone", "producer"])
@pytest.mark.parametrize(
    "selection", [td.LeadingTokens(4), td.KeyDeviation(0.3), td.Nothing()], ids=repr
)
def test_whoever_has_opted_out_has_full_recomputes_rows_bit_for_bit(
    source: str, selection: td.LeadingTokens
) -> None:
    everything = collector_of(selection=td.Everything())
    collector = collector_of(selection=selection, source=source)
    collector.opt_out(prompts())
    plans = [one.plan(prompts()) for one in (everything, collector)]
    logits = [prefill(one, plan) for one, plan in zip((everything, collector), plans, strict=True)]
    for plan in plans:
        plan.commit()
    for agent in prompts():
        if source == "alone":  # no Masters: the same sums in another order
            torch.testing.assert_close(*[each[agent] for each in logits], rtol=1e-5, atol=1e-5)
            continue
        assert torch.equal(logits[0][agent], logits[1][agent])
        for a, b in zip(
            restored(everything.store, agent), restored(collector.store, agent), strict=True
        ):
            assert torch.equal(a[0], b[0])
            assert torch.equal(a[1], b[1])

    # One alone: keys that depend on the token are known bit for bit whatever the others do.
    collector = collector_of(selection=selection, source=source)
    collector.opt_out("second", [C])
    plan = collector.plan(prompts())
    for step in prefill_steps(collector, plan):
        run_step(step)
    assert {span.kind.value for span in plan.spans("second")} <= {"own", "master"}
    assert all(one.shift == 0 for one in plan._live.state("second").uses)
    plan.commit()
    alone = collector_of(selection=td.Everything())
    plan = alone.plan({"second": prompts()["second"]})
    for step in prefill_steps(alone, plan):
        run_step(step)
    plan.commit()
    for a, b in zip(
        restored(alone.store, "second"), restored(collector.store, "second"), strict=True
    ):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


def test_everything_takes_over_no_inexact_row_of_an_earlier_round() -> None:
    collector = collector_of(selection=td.Nothing())
    finished(collector).commit()
    collector.selection = td.Everything()
    plan = collector.plan(prompts())
    logits = prefill(collector, plan)
    for agent, row in expected_logits(prompts()).items():
        torch.testing.assert_close(logits[agent], row, rtol=1e-5, atol=1e-5)
    plan.abort()


def test_exact_rows_are_reused_by_those_who_have_opted_out() -> None:
    collector = collector_of()
    collector.opt_out(["x", "y"], [A])
    plan = collector.plan({name: [A, td.private([index])] for index, name in enumerate("xy")})
    prefill(collector, plan)
    assert plan.rows_computed == 40 + 2
    plan.abort()


def finished(collector: td.KVCollector) -> td.Plan:
    plan = collector.plan(prompts())
    prefill(collector, plan)
    return plan


def run_audit_twice(collector: td.KVCollector) -> None:
    one = collector.audit(finished(collector), agents="second")
    for step in one.steps():
        one.add(run(step))
    one.report()
    one.report()


def add_too_few(collector: td.KVCollector) -> None:
    one = collector.audit(finished(collector), agents="second")
    for step in one.steps():
        one.add(run(step)[:0])


def audit_ended(collector: td.KVCollector) -> None:
    plan = finished(collector)
    plan.commit("second")
    collector.audit(plan, "second")


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda c: c.audit(c.plan({}), fraction=0.0), ValueError, "fraction: expected 0 < frac"),
        (lambda c: c.audit(c.plan({}), fraction=1.5), ValueError, "fraction: expected 0 < frac"),
        (lambda c: c.audit(c.plan({}), rows=0.0), ValueError, "rows: expected 0 < rows <= 1"),
        (lambda c: c.audit(c.plan({}), seed=-1), ValueError, "seed: expected at least 0, got -1"),
        (lambda c: c.audit(c.plan({}), tokens=-1), ValueError, "tokens: expected at least 0"),
        (lambda c: c.audit(c.plan({}), "x"), KeyError, "agent: expected one of"),
        (lambda c: c.audit(collector_of().plan({})), ValueError, "plan: expected one of this"),
        (audit_ended, ValueError, "agent: expected one that has not ended, got 'second'"),
        (
            lambda c: list(c.audit(c.plan(prompts()), "second").steps()),
            ValueError,
            "audit: expected a finished prefill, got 'second' in prefill",
        ),
        (lambda c: c.audit(c.plan({})).steps(0), ValueError, "max_rows: expected at least 1"),
        (lambda c: c.audit(c.plan({})).add(torch.zeros(1, 9)), ValueError, "a step that was run"),
        (add_too_few, ValueError, r"logits: expected \[1, vocabulary\], got \[0, 1000\]"),
        (run_audit_twice, ValueError, "audit: expected one report, got a second"),
        (
            lambda c: audit(c, finished(c), {"second": torch.zeros(3)}),
            ValueError,
            r"logits\['second'\]: expected \[rows, 1000\], got \[3\]",
        ),
        (lambda c: c.opt_out(agents=[1]), TypeError, "agents: expected names, got int"),
        (lambda c: c.opt_out(segments=["x"]), TypeError, "segments: expected segments or their"),
        (lambda c: td.Gate(kl=-1.0), ValueError, "kl: expected at least 0, got -1"),
        (lambda c: td.Gate(top1=1.5), ValueError, r"top1: expected 0 \.\. 1, got 1.5"),
        (lambda c: td.Gate(deviation=float("nan")), ValueError, "deviation: expected at least 0"),
        (lambda c: td.Gate(action="stop"), ValueError, r"action: expected one of \['warn', 'fall"),
        (lambda c: td.KVCollector(c.store, gate=0.1), ValueError, "gate: expected a Gate, got 0.1"),
    ],
)
def test_errors_name_the_argument(make: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make(collector_of())  # type: ignore[operator]
