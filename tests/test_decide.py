"""What a round reuses and what it computes."""

from __future__ import annotations

import numpy as np
import pytest
from driving import make_store, run_prefill, run_round, run_step, tokens

import tokendance as td
from tokendance.host.decide import RowKind

A, B, C = (tokens(seed, count) for seed, count in ((1, 20), (2, 30), (3, 17)))
MINE, YOURS = tokens(10, 13), tokens(11, 29)


def kinds(plan: td.Plan, agent: str) -> list[tuple[int, int, RowKind]]:
    return [(span.begin, span.end, span.kind) for span in plan.spans(agent)]


def test_spans_tile_every_prompt() -> None:
    collector = td.KVCollector(make_store())
    prompts = {
        "a": [td.private(MINE), td.shared(A), td.shared(B), td.private(C)],
        "b": [td.private(YOURS), td.shared(B), td.shared(A), td.shared(B)],
        "c": [],
    }
    plan = collector.plan(prompts)
    for agent, segments in prompts.items():
        spans = plan.spans(agent)
        ends = [0, *[span.end for span in spans]]
        assert [span.begin for span in spans] == ends[:-1]
        assert ends[-1] == sum(segment.length for segment in segments)
    plan.abort()


def test_master_agent_is_the_one_that_covers_most_and_siblings_repair_the_start_of_a_run() -> None:
    plan = td.KVCollector(make_store(), selection=td.LeadingTokens(4)).plan(
        {
            "few": [td.private(YOURS), td.shared(A), td.private(C)],
            "most": [td.private(MINE), td.shared(A), td.shared(B), td.private(C)],
            "run": [td.private(YOURS), td.shared(A), td.shared(B), td.private(C)],
            "swapped": [td.private(YOURS), td.shared(B), td.shared(A), td.private(C)],
        }
    )
    assert plan.master_agents == ["most"]
    assert kinds(plan, "most")[1:3] == [(13, 33, RowKind.MASTER), (33, 63, RowKind.MASTER)]
    # One repair for the whole run of A and B, one for each where the run is broken.
    assert kinds(plan, "run")[1:4] == [
        (29, 33, RowKind.REPAIRED),
        (33, 49, RowKind.REUSED),
        (49, 79, RowKind.REUSED),
    ]
    assert [o for _, _, o in kinds(plan, "swapped")[1:5]] == [
        RowKind.REPAIRED,
        RowKind.REUSED,
        RowKind.REPAIRED,
        RowKind.REUSED,
    ]


def test_short_segments_do_not_break_a_run() -> None:
    newline = td.shared([7])
    plan = td.KVCollector(make_store()).plan(
        {
            "a": [td.private(MINE), td.shared(A), newline, td.shared(B), td.private(C)],
            "b": [td.private(YOURS), td.shared(A), newline, td.shared(B), td.private(C)],
        }
    )
    assert [o for _, _, o in kinds(plan, "b")] == [
        RowKind.OWN,
        RowKind.REPAIRED,
        RowKind.REUSED,
        RowKind.OWN,
        RowKind.REUSED,
        RowKind.OWN,
    ]


def test_a_second_master_agent_covers_what_the_first_lacks() -> None:
    plan = td.KVCollector(make_store()).plan(
        {
            "a": [td.private(MINE), td.shared(A), td.shared(B), td.private(C)],
            "b": [td.private(YOURS), td.shared(A), td.shared(C), td.private(B)],
            "c": [td.shared(C), td.shared(B), td.private(A)],
        }
    )
    assert plan.master_agents == ["a", "b"]
    made = [b for b, _, kind in kinds(plan, "b") if kind is RowKind.MASTER]
    assert made == [29 + 20]


def test_common_prefix_is_reused_exactly_under_every_selection() -> None:
    for selection in (td.Everything(), td.LeadingTokens(4), td.Nothing(), td.KeyDeviation()):
        plan = td.KVCollector(make_store(), selection=selection).plan(
            {
                "a": [td.shared(A), td.shared(B), td.private(MINE)],
                "b": [td.shared(A), td.shared(B), td.private(YOURS)],
            }
        )
        assert kinds(plan, "b") == [
            (0, 20, RowKind.EXACT),
            (20, 50, RowKind.EXACT),
            (50, 79, RowKind.OWN),
        ]


def test_last_row_is_always_computed() -> None:
    prompts = {
        "a": [td.private(MINE), td.shared(A)],
        "b": [td.private(YOURS), td.shared(A)],
        "c": [td.private(MINE), td.shared(A)],
    }
    for selection in (td.Everything(), td.LeadingTokens(0), td.Nothing(), td.KeyDeviation()):
        store = make_store()
        collector = td.KVCollector(store, selection=selection)
        plan = collector.plan(prompts)
        assert set(run_prefill(collector, plan)) == set(prompts)
        plan.commit()
        again = collector.plan(prompts)
        assert all(
            again.spans(agent)[-1].end - again.spans(agent)[-1].begin == 1 for agent in prompts
        )
        assert set(run_prefill(collector, again)) == set(prompts)
        assert again.rows_computed == 3
        again.abort()


def test_own_prefix_of_an_earlier_round_is_taken_over_by_token() -> None:
    store = make_store()
    collector = td.KVCollector(store)
    run_round(collector, {"a": [td.private(MINE), td.shared(A), td.private(C)]})
    changed = np.concatenate([C[:9], C[:9] + 1])
    plan = collector.plan({"a": [td.private(MINE), td.shared(A), td.private(changed)]})
    assert kinds(plan, "a") == [(0, 42, RowKind.EARLIER), (42, 51, RowKind.OWN)]
    other = collector.plan({"b": [td.private(MINE), td.shared(A), td.private(C)]})
    # Private rows never serve another agent, but the shared segment stands in the same context.
    assert kinds(other, "b") == [
        (0, 13, RowKind.OWN),
        (13, 33, RowKind.EXACT),
        (33, 50, RowKind.OWN),
    ]


def test_own_prefix_is_taken_over_however_it_was_cut() -> None:
    store = make_store()
    collector = td.KVCollector(store, selection=td.Everything())
    plan = collector.plan({"a": [td.private(MINE), td.shared(A), td.private(C)]})
    run_prefill(collector, plan)
    said = [int(token) for token in tokens(20, 12)]
    run_step(collector.step({"a": said[:-1]}, prefill=()))
    plan.commit()
    tail = tokens(21, 5)
    rows = 13 + 20 + 17 + 11
    for segments in (
        [td.private(MINE), td.shared(A), td.private([*C, *said, *tail])],
        [td.private(MINE), td.shared(A), td.private(C[:5]), td.private([*C[5:], *said, *tail])],
        [td.private([*MINE, *A, *C, *said[:3]]), td.private(said[3:]), td.private(tail)],
    ):
        plan = collector.plan({"a": segments})
        begin, end, kind = kinds(plan, "a")[0]
        assert (begin, end, kind) == (0, end, RowKind.EARLIER)
        taken = [end for _, end, kind in kinds(plan, "a") if kind is RowKind.EARLIER]
        assert taken[-1] == rows
        run_prefill(collector, plan)
        assert plan.rows_computed == 1 + 5
        plan.abort()
    changed = td.private([*MINE, *A[:7], A[7] + 1, *A[8:]])
    plan = collector.plan({"a": [changed]})
    assert kinds(plan, "a")[0] == (0, 20, RowKind.EARLIER)
    plan.abort()
    # A shared segment is taken over as a whole, or not at all,
    plan = collector.plan({"a": [td.private(MINE), td.shared([*A, 3, 4]), td.private(C)]})
    assert kinds(plan, "a")[0] == (0, 13, RowKind.EARLIER)
    plan.abort()
    # unless the earlier prompt ends in it: what was said is cut as one with what stands around it.
    for taken_over, segment in (
        (rows, td.shared([*C, *said, *tail])),
        (33, td.shared([*C, *said[:-2], 3, 4, *tail])),  # something else was said
        (33, td.shared([*C, *said, *tokens(22, 40)])),  # most of it is new
        (33, td.shared([*C, *said, *tail], namespace="another")),
    ):
        plan = collector.plan({"a": [td.private(MINE), td.shared(A), segment]})
        taken = [end for _, end, kind in kinds(plan, "a") if kind is RowKind.EARLIER]
        assert taken[-1] == taken_over
        run_prefill(collector, plan)
        assert plan.rows_computed == 13 + 20 + segment.length - taken_over
        plan.abort()


def test_tenants_never_match() -> None:
    store = make_store()
    collector = td.KVCollector(store)
    run_round(collector, {"a": [td.private(A, namespace="one"), td.private([1])]})
    plan = collector.plan({"a": [td.private(A, namespace="two"), td.private([1])]})
    # Not an agent's own earlier rows either.
    assert {kind for _, _, kind in kinds(plan, "a")} == {RowKind.OWN}
    plan.abort()
    run_round(collector, {"a": [td.shared(A, namespace="one")]})
    plan = collector.plan({"b": [td.shared(A, namespace="two")]})
    assert kinds(plan, "b") == [(0, 20, RowKind.MASTER)]


def test_alone_computes_segments_without_context() -> None:
    collector = td.KVCollector(make_store(), source="alone", selection=td.LeadingTokens(4))
    plan = collector.plan(
        {
            "a": [td.private(MINE), td.shared(A), td.shared(B), td.private(C)],
            "b": [td.private(YOURS), td.shared(B), td.shared(A), td.private(C)],
        }
    )
    assert plan.master_agents == []
    assert [o for _, _, o in kinds(plan, "a")][1:5] == [
        RowKind.REPAIRED,
        RowKind.REUSED,
        RowKind.REPAIRED,
        RowKind.REUSED,
    ]
    run_prefill(collector, plan)
    assert plan.rows_computed == 50 + 13 + 29 + 2 * 17 + 4 * 4
    plan.commit()


def test_each_segment_may_have_a_source_of_its_own() -> None:
    given = td.shared(A)
    asked: list[td.Segment] = []

    def source(segment: td.Segment) -> str:
        asked.append(segment)
        return "alone" if segment == given else "master"

    collector = td.KVCollector(make_store(), source, td.LeadingTokens(4))
    prompts = {
        "a": [td.private(MINE), given, td.shared(B), td.private(C)],
        "b": [td.private(YOURS), td.shared(B), given, td.private(C)],
    }
    plan = collector.plan(prompts)
    assert asked == [given, td.shared(B)]  # once each, and nothing private
    assert plan.master_agents == ["a"]
    repaired_and_reused = [RowKind.REPAIRED, RowKind.REUSED]
    own = [RowKind.OWN]
    found = {agent: [o for _, _, o in kinds(plan, agent)] for agent in prompts}
    assert found["a"] == [*own, *repaired_and_reused, RowKind.MASTER, *own]
    assert found["b"] == [*own, *repaired_and_reused, *repaired_and_reused, *own]
    assert [master.context for master in plan._live.state("b").uses.masters][1] == b""
    run_prefill(collector, plan)
    assert plan.rows_computed == 50 + 13 + 29 + 2 * 17 + 3 * 4
    plan.commit()
    # What is there serves whatever the source, and a segment of nobody else's that was computed
    # without a context carries nothing of one.
    plan = collector.plan({"c": [td.private(C), *prompts["a"][1:3]], "d": [given, td.shared(C)]})
    assert [o for _, _, o in kinds(plan, "c")][1:3] == repaired_and_reused
    assert [o for _, _, o in kinds(plan, "d")] == [RowKind.EXACT, RowKind.MASTER]
    plan.abort()


def test_segments_of_one_agent_are_reused_only_if_computed_without_a_context() -> None:
    def source(segment: td.Segment) -> str:
        return "alone" if segment == td.shared(A) else "master"

    collector = td.KVCollector(make_store(), source, td.LeadingTokens(4))
    both = [td.shared(A), td.shared(B)]
    run_round(collector, {"a": [td.private(MINE), *both], "b": [td.private(YOURS), *both]})
    plan = collector.plan({"b": [td.private(C), *both, td.private(MINE)], "c": [td.private(YOURS)]})
    assert [o for _, _, o in kinds(plan, "b")] == [
        RowKind.OWN,
        RowKind.REPAIRED,
        RowKind.REUSED,
        RowKind.OWN,
        RowKind.OWN,
    ]
    plan.abort()


def test_alone_for_all_segments_one_by_one_is_alone() -> None:
    prompts = {
        "a": [td.private(MINE), td.shared(A), td.shared(B), td.private(C)],
        "b": [td.private(YOURS), td.shared(B), td.shared(C), td.shared(A)],
        "c": [td.shared(C), td.private(A)],
    }
    for selection in (td.LeadingTokens(4), td.KeyDeviation(), td.Everything(), td.Nothing()):
        found = []
        for source in ("alone", lambda _: "alone"):
            collector = td.KVCollector(make_store(), source, selection)
            collector.opt_out("c")
            plan = collector.plan(prompts)
            found.append([kinds(plan, agent) for agent in prompts])
        assert found[0] == found[1]


def test_outputs_become_masters_by_the_source_of_their_segment() -> None:
    said = {"a": [1, 2, 3, 4, 5], "b": [6, 7, 8, 9, 10]}

    def source(segment: td.Segment) -> str:
        return "producer" if segment == td.shared(said["a"]) else "alone"

    store = make_store()
    collector = td.KVCollector(store, source)
    plan = collector.plan({"a": [td.private(MINE)], "b": [td.private(YOURS)]})
    run_prefill(collector, plan)
    run_step(collector.step(said, prefill=()))
    plan.commit()
    assert store.scheduler.find(td.shared(said["a"])) is not None
    assert store.scheduler.find(td.shared(said["b"])) is None


def test_an_unknown_source_of_a_segment_is_refused() -> None:
    store = make_store()
    answers = {td.shared(A): "master"}
    collector = td.KVCollector(store, lambda segment: answers.get(segment, "nobody"))
    wanted = r"source: expected one of \['master', 'alone', 'producer'\], got 'nobody' of Segment"
    with pytest.raises(ValueError, match=wanted):
        collector.plan({"a": [td.private(MINE), td.shared(B)], "b": [td.shared(B)]})
    plan = collector.plan({"a": [td.private(MINE), td.shared(A)], "b": [td.shared(A)]})
    run_prefill(collector, plan)
    run_step(collector.step({"b": [1, 2]}, prefill=()))
    with pytest.raises(ValueError, match=wanted):
        plan.commit()
    assert store.agents == []
    plan.truncate("b", len(A))
    plan.commit()
    assert store.agents == ["a", "b"]


@pytest.mark.parametrize("source", ["master", "producer"])
def test_decoded_output_is_found_by_others_only_when_promoted(source: str) -> None:
    store = make_store()
    collector = td.KVCollector(store, source=source, selection=td.LeadingTokens(4))
    plan = collector.plan({"a": [td.private(MINE)], "b": [td.private(YOURS)]})
    run_prefill(collector, plan)
    said = [int(token) for token in tokens(20, 12)]

    for token in said[:-1]:
        run_step(collector.step({"a": [token]}, prefill=()))
    plan.commit()
    # The last token was never fed: the other eleven rows are there.
    again = collector.plan(
        {
            "a": [td.private(MINE), td.shared(said), td.private(C)],
            "b": [td.private(YOURS), td.shared(said), td.private(C)],
        }
    )
    assert kinds(again, "a")[0] == (0, 13 + 11, RowKind.EARLIER)
    if source == "producer":
        assert kinds(again, "b")[1:4] == [
            (29, 33, RowKind.REPAIRED),
            (33, 40, RowKind.REUSED),
            (40, 41, RowKind.OWN),
        ]
    else:
        assert kinds(again, "b")[1] == (29, 41, RowKind.MASTER)
    assert kinds(again, "b")[0] == (0, 29, RowKind.EARLIER)


def test_what_no_other_agent_has_is_not_reused_from_another_context() -> None:
    store = make_store()
    collector = td.KVCollector(store, selection=td.LeadingTokens(4))
    first = {"a": [td.private(MINE), td.shared(A)], "b": [td.private(YOURS), td.shared(A)]}
    run_round(collector, first)
    history = [td.private(C), td.shared(A), td.private(MINE)]
    plan = collector.plan({"b": history, "c": [td.private(YOURS)]})
    assert kinds(plan, "b") == [(0, 17, RowKind.OWN), (17, 37, RowKind.OWN), (37, 50, RowKind.OWN)]
    plan.abort()
    # An agent alone cannot tell, two agents share.
    assert kinds(collector.plan({"b": history}), "b")[1] == (17, 21, RowKind.REPAIRED)
    plan = collector.plan({"b": history, "c": [td.private(YOURS), *history[1:]]})
    assert kinds(plan, "b")[1] == (17, 21, RowKind.REPAIRED)


def test_a_better_informed_agent_takes_over_the_first_segments() -> None:
    """What the first agent has in front was computed without what others have there."""
    a, b, c = td.shared(A), td.shared(B), td.shared(C)
    prompts = {
        "first": [td.private(tokens(30, 9)), a, b, c],
        "second": [td.private(tokens(31, 9)), b, c, a],
        "third": [td.private(tokens(32, 9)), c, b, a],
        "fourth": [td.private(tokens(33, 9)), b, c, a],
    }
    plan = td.KVCollector(make_store(), selection=td.LeadingTokens(4)).plan(prompts)
    assert plan.master_agents == ["first", "second"]
    assert kinds(plan, "first")[1:3] == [(9, 29, RowKind.OWN), (29, 59, RowKind.MASTER)]
    assert kinds(plan, "second")[-1] == (9 + 47, 9 + 67, RowKind.MASTER)
    plan.abort()
    # Reused exactly by one of its users, a segment stays with the first agent.
    prompts["fourth"] = list(prompts["first"])
    plan = td.KVCollector(make_store(), selection=td.LeadingTokens(4)).plan(prompts)
    assert plan.master_agents == ["first"]
    assert kinds(plan, "fourth")[1] == (9, 29, RowKind.EXACT)


def repeating(*names: str) -> dict[str, list[td.Segment]]:
    """Prompts of a round in which two agents have written the same, A."""
    said = [td.shared(A), td.shared(B), td.shared(A), td.shared(C)]
    return {name: [td.private(tokens(40 + i, 9)), *said] for i, name in enumerate(names)}


@pytest.mark.parametrize("selection", [td.LeadingTokens(4), td.KeyDeviation(0.3), td.Nothing()])
def test_a_repeated_segment_has_a_master_for_each_place(selection: object) -> None:
    collector = td.KVCollector(make_store(), selection=selection)  # type: ignore[arg-type]
    plan = run_round(collector, repeating("a", "b", "c"))
    made = [kind for _, _, kind in kinds(plan, "a")]
    assert made == [RowKind.OWN, *[RowKind.MASTER] * 4]
    first = plan.rows_computed
    if isinstance(selection, td.LeadingTokens):
        # One run: its first rows and the prompt's last one are repaired.
        assert first == 3 * 9 + 20 + 30 + 20 + 17 + 2 * (4 + 1)
    # A later round finds them all, whoever asks.
    later = run_round(collector, repeating("d", "e"))
    assert RowKind.MASTER not in {kind for agent in "de" for _, _, kind in kinds(later, agent)}


def test_places_of_a_repeated_segment_are_exact_where_the_contexts_are() -> None:
    collector = td.KVCollector(make_store(), selection=td.Everything())
    said = [td.shared(A), td.shared(B), td.shared(A), td.shared(A)]
    plan = run_round(collector, {name: [*said, td.private(MINE)] for name in "ab"})
    assert [kind for _, _, kind in kinds(plan, "b")][:4] == [RowKind.EXACT] * 4


def test_a_segment_that_is_computed_alone_has_one_master_for_all_places() -> None:
    collector = td.KVCollector(make_store(), source="alone", selection=td.LeadingTokens(4))
    plan = run_round(collector, repeating("a", "b"))
    assert plan.rows_computed == 20 + 30 + 17 + 2 * (9 + 4 * 4 + 1)


def test_agents_that_join_find_the_places_of_a_repeated_segment() -> None:
    collector = td.KVCollector(make_store(), selection=td.LeadingTokens(4))
    prompts = repeating("a", "b")
    plan = collector.plan({"a": prompts["a"]})
    plan.add({"b": prompts["b"]})
    assert RowKind.MASTER not in {kind for _, _, kind in kinds(plan, "b")}
    assert RowKind.OWN not in {kind for _, _, kind in kinds(plan, "b")[1:-1]}
    plan.abort()


def test_a_segment_that_has_opted_out_has_in_all_its_places() -> None:
    collector = td.KVCollector(make_store(), selection=td.LeadingTokens(4))
    collector.opt_out(segments=[td.shared(A)])
    plan = collector.plan(repeating("a", "b"))
    begins = {begin for begin, _, kind in kinds(plan, "b") if kind is RowKind.REUSED}
    assert not begins & set(range(9, 29))
    assert not begins & set(range(59, 79))
    plan.abort()
