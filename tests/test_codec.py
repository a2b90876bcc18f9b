"""Stores whose lower tiers keep rows in fewer bits: how far off, how large, and that it happens
once. `test_coded_pages.py` has the bounds of each code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from driving import GEOMETRY, ROPE, run_prefill, run_round, run_step, tokens
from stored_rounds import (
    contents,
    continued,
    flip,
    group_of,
    open_store,
    play,
    prompts,
    put,
    same_contents,
)
from test_store_command import said

import tokendance as td
from tokendance import Codec


@pytest.mark.parametrize("codec", [Codec("int8", "int8"), Codec("exact", "int4"), Codec()])
def test_rows_are_coded_once_however_often_they_move(tmp_path: Path, codec: Codec) -> None:
    store = open_store(tmp_path / "store", codec=codec)
    rows = put(store, {"ada": 45, "ben": 60})
    store.flush()
    assert same_contents(contents(store), rows)  # in the pool they are as they were
    store.rest(["ada", "ben"])
    store.evict(1000)
    first = contents(store)
    for agent, want in rows.items():
        off = (first[agent] - want).abs().amax(dim=(1, 2, 3, 4))
        assert (off[0] > 0) == (codec.keys != "exact")
        assert (off[1] > 0) == (codec.values != "exact")
        assert off.max() < {"exact": 1e-9, "int8": 0.03, "int4": 0.4}[codec.values]
    store.rest(["ada", "ben"])
    store.evict(1000)
    assert same_contents(contents(store), first)
    assert store.verify() == {}
    store.close()
    again = open_store(tmp_path / "store")  # as in the directory
    assert same_contents(contents(again), first)
    size = again.stats().tiers["disk"].used_bytes / (105 * GEOMETRY.row_bytes)
    assert size < {Codec(): 1.01, Codec("int8", "int8"): 0.4, Codec("exact", "int4"): 0.7}[codec]
    again.close()
    other = Codec("int4", "int4")
    with pytest.raises(
        ValueError, match=r"codec: expected that of .*Codec.*, got Codec\(keys='int"
    ):
        open_store(tmp_path / "store", codec=other)


def test_rounds_go_on_over_coded_rows(tmp_path: Path) -> None:
    """As much is reused as of rows that never moved."""
    with open_store(tmp_path / "exact") as store:
        play(td.KVCollector(store), prompts())
        want = play(td.KVCollector(store), continued(prompts())).rows_computed
    with open_store(tmp_path / "coded", codec=Codec("int8", "int8")) as store:
        play(td.KVCollector(store), prompts())
    store = open_store(tmp_path / "coded")
    assert play(td.KVCollector(store), continued(prompts())).rows_computed == want


def test_what_passes_between_directories(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_store(tmp_path / "coded", codec=Codec("int8", "int4")) as store:
        run_round(td.KVCollector(store), {"ada": [td.private(tokens(1, 50))]})
    with open_store(tmp_path / "coded") as store:
        want = contents(store)
        store.export_agents(tmp_path / "exported")
    exact = open_store(tmp_path / "exact")
    assert exact.import_agents(tmp_path / "exported") == ["ada"]
    off = (contents(exact)["ada"] - want["ada"]).abs().max()
    assert off < 0.02  # an export is coded once more
    exact.close()
    status, _, errors = said(capsys, "import", tmp_path / "exact", tmp_path / "coded")
    assert status == 1
    assert "codec: expected that of" in errors
    file, begin = group_of(tmp_path / "coded", "ada")
    flip(file, begin + 7)
    assert list(open_store(tmp_path / "coded").damaged) == ["ada"]


def test_masters_and_own_rows_apart(tmp_path: Path) -> None:
    """What many share may be kept as it is, and what each has alone in fewer bits."""
    with open_store(tmp_path / "store", codec=Codec("int4", "int4", "exact", "exact")) as store:
        rows = put(store, {"ada": 45})
    store = open_store(tmp_path / "store")
    found = contents(store)["ada"]
    assert torch.equal(found[:, :, 5:], rows["ada"][:, :, 5:])  # its segment's Master
    assert not torch.equal(found[:, :, :5], rows["ada"][:, :, :5])
    assert store.verify() == {}
    store.export_agents(tmp_path / "exported")
    store.close()
    assert same_contents(contents(open_store(tmp_path / "exported")), {"ada": found})
    with pytest.raises(ValueError, match=r"codec: expected that of .*master_keys='exact'"):
        open_store(tmp_path / "store", codec=Codec("int4", "int4"))


def test_an_export_has_what_the_store_had(tmp_path: Path) -> None:
    """Rows that were coded are coded again to the same."""
    with open_store(tmp_path / "store", codec=Codec("int8", "e4m3")) as store:
        put(store, {"ada": 45, "ben": 70})
    store = open_store(tmp_path / "store")
    before = contents(store)
    store.export_agents(tmp_path / "exported", ["ben"])
    store.release("ben")
    assert store.import_agents(tmp_path / "exported") == ["ben"]
    store.rest(["ada", "ben"])
    assert same_contents(contents(store), before)


# Host memory --------------------------------------------------------------------------------------

PAGE = 8 * GEOMETRY.row_bytes


@pytest.mark.parametrize("code", ["e4m3", "int8", "int4"])
def test_rows_in_host_memory_are_coded_once(code: str) -> None:
    codec = Codec(code, code)
    store = td.DiffStore(
        GEOMETRY, ROPE, "1MiB", block_size=8, host_capacity="64KiB", host_codec=codec
    )
    rows = put(store, {"ada": 45})
    store.rest("ada")
    store.evict(1000)  # the pool has the Master still, as it was
    used = store.stats().tiers["host"].used_bytes
    assert used == 6 * store.executor.host.page_bytes  # 5 own rows, and a Master of 40
    assert used < 0.4 * 6 * PAGE
    first = contents(store)
    off = (first["ada"] - rows["ada"]).abs()
    assert 0 < off.max() < {"e4m3": 0.3, "int8": 0.03, "int4": 0.4}[code]
    for _ in range(3):
        store.rest("ada")
        store.evict(1000)
        assert same_contents(contents(store), first)


def test_the_disk_gets_what_host_memory_has(tmp_path: Path) -> None:
    codec = Codec("int8", "int8")
    options = {"host_capacity": "64KiB", "codec": codec, "host_codec": codec}
    store = open_store(tmp_path / "store", **options)
    put(store, {"ada": 45, "ben": 30})
    store._tiers.to_host(["ada", "ben"])
    store.evict(1000)
    store.flush()
    there = contents(store)
    store.close()
    assert same_contents(contents(open_store(tmp_path / "store", **options)), there)


def test_suspended_agents_are_coded_too() -> None:
    """Rows that a page has no more of do not count."""
    stores = [
        td.DiffStore(GEOMETRY, ROPE, "1MiB", block_size=8, host_capacity="64KiB", host_codec=codec)
        for codec in (None, Codec("int8", "int8"))
    ]
    found = []
    for store in stores:
        for pool in (*store.pool.k_pools, *store.pool.v_pools):
            pool.fill_(torch.nan)
        collector = td.KVCollector(store)
        plan = collector.plan({"ada": [td.private(tokens(1, 21))]})
        run_prefill(collector, plan)
        for token in range(3):
            run_step(collector.step({"ada": [token]}, prefill=()))
        plan.suspend("ada", to="host")
        plan.resume("ada")
        run_step(collector.step({"ada": [7]}, prefill=()))
        plan.commit()
        found.append(contents(store)["ada"])
    off = (found[1] - found[0]).abs()
    assert 0 < off.max() <= found[0].abs().max() / 254 * 1.01
    assert not off[:, :, -1].any()


def test_a_tenants_host_memory_holds_more_in_fewer_bits() -> None:
    store = td.DiffStore(
        *(GEOMETRY, ROPE, "1MiB"),
        block_size=8,
        host_capacity=f"{20 * PAGE}",
        host_codec=Codec("int4", "int4"),
    )
    tenant = store.tenant("acme", bytes(16), "128KiB", 10 * PAGE)
    assert tenant.scheduler.host_pages.limit > 30
    run_round(td.KVCollector(tenant), {"ada": [tenant.private(tokens(1, 64))]})
    tenant.rest("ada")
    assert tenant.stats().tiers["host"].used_bytes < 0.3 * 64 * GEOMETRY.row_bytes
    tenant.close()
    assert not any(store.executor.host.pages_of(part, np.arange(20))[0].any() for part in range(4))


def test_tenants_rows_are_coded_too(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store", codec=Codec("int8", "int8"))
    tenant = store.tenant("acme", bytes(16), "1MiB")
    run_round(td.KVCollector(tenant), {"ada": [tenant.private(tokens(1, 64))]})
    tenant.flush()
    assert tenant.stats().tiers["disk"].used_bytes < 0.4 * 64 * GEOMETRY.row_bytes


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"values: expected exact, e4m3, int8 or int4, got 'fp4'"):
        Codec(values="fp4")
    made = {"capacity": "1MiB", "host_capacity": "1MiB"}
    with pytest.raises(ValueError, match="host_codec: expected one for Masters and own rows"):
        td.DiffStore(GEOMETRY, ROPE, **made, host_codec=Codec("int4", "int4", "exact"))
    with pytest.raises(ValueError, match="host_codec: expected one beside host_capacity"):
        td.DiffStore(GEOMETRY, ROPE, "1MiB", host_codec=Codec("int4", "int4"))
    kept = td.Quantization.unit(GEOMETRY)
    with pytest.raises(ValueError, match="host_codec: expected none beside a quantized pool"):
        td.DiffStore(GEOMETRY, ROPE, **made, quantization=kept, host_codec=Codec("int8", "int8"))
    with pytest.raises(ValueError, match="codec: expected none beside a quantized pool"):
        td.DiffStore.open(
            tmp_path / "store",
            GEOMETRY,
            ROPE,
            "1MiB",
            quantization=kept,
            codec=Codec("int8", "int8"),
        )
    with open_store(tmp_path / "exact") as store:
        put(store, {"ada": 20})
    with pytest.raises(ValueError, match="codec: expected that of"):
        open_store(tmp_path / "exact", codec=Codec("int8", "int8"))
    assert open_store(tmp_path / "exact", codec=Codec()).agents == ["ada"]
