"""Tenants of a store that has a directory: each has one of its own, which opens by name and key."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from driving import GEOMETRY, ROPE, run_round, tokens
from store_books import check_store
from stored_rounds import contents, files_of, flip, open_store, same_contents

import tokendance as td
from tokendance.files.directory import Directory

PAGE = 8 * GEOMETRY.row_bytes
KEYS = {"acme": b"a secret of acme", "zeta": b"a secret of zeta"}


def tenant_of(store: td.DiffStore, name: str, **options: object) -> td.Tenant:
    quota = options.pop("quota", 40 * PAGE)
    return store.tenant(name, KEYS[name], quota, **options)  # type: ignore[arg-type]


def speak(tenant: td.Tenant, agent: str, seed: int) -> td.Plan:
    """A round with a segment that every agent hears, and one of its own."""
    own = tenant.private(tokens(seed, 9))
    return run_round(td.KVCollector(tenant), {agent: [tenant.shared(tokens(1, 64)), own]})


def folders(path: Path) -> list[Path]:
    return sorted((path / "tenants").iterdir())


def test_a_tenant_opens_again_by_its_name_and_key(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    rows = {}
    for name in KEYS:
        tenant = tenant_of(store, name)
        speak(tenant, "ada", 2)
        speak(tenant, "ben", 3)
        rows[name] = contents(tenant)
        tenant.close()
    assert (store.tenants, store.agents) == ({}, [])
    store.close()
    store = open_store(tmp_path / "store")
    assert store.stats().free_pages == store.stats().total_pages
    acme = tenant_of(store, "acme")
    assert acme.agents == ["ada", "ben"]
    assert same_contents(contents(acme), rows["acme"])
    assert speak(acme, "eve", 4).rows_computed < 64  # found by a digest of the same key
    zeta = tenant_of(store, "zeta", agents=["ben"])
    assert (zeta.agents, zeta.resting) == (["ben", "ada"], ["ada"])
    assert same_contents(contents(zeta, ["ben", "ada"]), rows["zeta"])
    check_store(store)
    assert zeta.verify() == acme.verify() == store.verify() == {}


def test_another_key_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    acme = tenant_of(store, "acme")
    speak(acme, "ada", 2)
    want = contents(acme)
    acme.close()
    [folder] = folders(tmp_path / "store")
    before = {one.name: one.read_bytes() for one in folder.iterdir() if one.name != "lock"}
    with pytest.raises(ValueError, match=rf"key: expected that of tenant 'acme' in {folder}"):
        store.tenant("acme", KEYS["zeta"], 40 * PAGE)
    assert before == {one.name: one.read_bytes() for one in folder.iterdir() if one.name != "lock"}
    assert store.tenants == {}
    check_store(store)
    other = store.tenant("acme'", KEYS["acme"], 40 * PAGE)  # another name is another tenant
    assert other.agents == []
    acme = tenant_of(store, "acme")
    assert same_contents(contents(acme), want)
    with pytest.raises(ValueError, match="name: expected one that is not taken, got 'acme'"):
        tenant_of(store, "acme")


def test_neither_keys_nor_equal_digests_are_on_disk(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    for name in KEYS:
        tenant = tenant_of(store, name)
        speak(tenant, "ada", 2)
    store.close()
    digests = []
    for folder in folders(tmp_path / "store"):
        raw = b"".join(one.read_bytes() for one in folder.iterdir())
        assert not any(key in raw or key.hex().encode() in raw for key in KEYS.values())
        directory = Directory.open(folder, writable=False)
        digests.append({row[0] for row in directory.contents.rows["masters"].values()})
        directory.close()
    assert all(digests)
    assert not digests[0] & digests[1]


def test_each_tier_has_a_quota_and_nobody_else_notices(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    zeta = tenant_of(store, "zeta")
    speak(zeta, "ada", 2)
    before = zeta.stats()
    acme = tenant_of(store, "acme", quota=12 * PAGE, disk_quota=24 * PAGE)
    rows = {}
    collector = td.KVCollector(acme)
    for seed in range(4):  # one in the pool, and three on disk
        run_round(collector, {f"agent {seed}": [acme.private(tokens(10 + seed, 60))]})
        rows |= contents(acme, [f"agent {seed}"])
    with pytest.raises(td.OutOfPagesError, match=r"quota of tenant 'acme'.*disk_quota") as error:
        collector.plan({"agent 4": [acme.private(tokens(14, 60))]})
    assert isinstance(error.value.__cause__, OSError)
    assert error.value.__cause__.errno == errno.ENOSPC
    found = acme.stats().tiers
    assert found["device"].used_bytes <= 12 * PAGE
    assert found["disk"].used_bytes <= 24 * PAGE
    assert same_contents(contents(acme, ["agent 3"]), {"agent 3": rows.pop("agent 3")})
    acme.release("agent 3")  # which had no place on disk
    assert same_contents(contents(acme), rows)
    assert zeta.stats() == before
    assert store.agents == []
    check_store(store)


def test_agents_that_do_not_fit_the_quota_may_rest(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    tenant = tenant_of(store, "acme")
    for seed in range(3):
        run_round(td.KVCollector(tenant), {f"{seed}": [tenant.private(tokens(seed, 60))]})
    want = contents(tenant)
    tenant.close()
    few = r"capacity: expected 24 pages for 3 agents of .*, got 12"
    with pytest.raises(td.OutOfPagesError, match=few):
        tenant_of(store, "acme", quota=12 * PAGE)
    assert store.tenants == {}
    check_store(store)
    with pytest.raises(KeyError, match="got \\['x'\\]"):
        tenant_of(store, "acme", agents=["x"])
    tenant = tenant_of(store, "acme", quota=12 * PAGE, agents=())
    assert same_contents(contents(tenant), want)


def test_a_store_that_closes_writes_its_tenants_and_a_crash_keeps_what_was_flushed(
    tmp_path: Path,
) -> None:
    store = open_store(tmp_path / "store")
    tenant = tenant_of(store, "acme")
    speak(tenant, "ada", 2)
    tenant.flush()
    want = contents(tenant)
    speak(tenant, "ben", 3)
    store.close(flush=False)
    assert tenant.agents == ["ada", "ben"]  # in memory they go on
    store = open_store(tmp_path / "store")
    tenant = tenant_of(store, "acme")
    assert same_contents(contents(tenant), want)
    own = tenant.private(tokens(3, 9))
    plan = td.KVCollector(tenant).plan({"eve": [own]})
    with pytest.raises(ValueError, match="that have not ended"):
        tenant.close()
    assert tenant.agents == ["ada"]
    plan.abort()
    store.close()
    tenant.close()
    store = open_store(tmp_path / "store")
    assert tenant_of(store, "acme").agents == ["ada"]


def test_damage_is_one_tenants_alone(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    for name in KEYS:
        speak(tenant_of(store, name), "ada", 2)
    store.close()
    hurt, _ = folders(tmp_path / "store")
    flip(hurt / files_of(hurt)[0], 4096)
    store = open_store(tmp_path / "store")
    found = {name: tenant_of(store, name) for name in KEYS}
    damaged = [name for name, tenant in found.items() if tenant.damaged]
    assert len(damaged) == 1
    [whole] = found.keys() - set(damaged)
    assert found[whole].verify() == store.verify() == {}


def test_a_tenants_directory_is_no_store_and_a_store_in_memory_has_none(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    tenant_of(store, "acme").close()
    [folder] = folders(tmp_path / "store")
    with pytest.raises(ValueError, match=rf"got {folder} of tenant 'acme'; it opens by DiffStore"):
        open_store(folder)
    memory = td.DiffStore(GEOMETRY, ROPE, 80 * PAGE, block_size=8)
    for options in ({"disk_quota": 10 * PAGE}, {"agents": ()}):
        with pytest.raises(ValueError, match=r"disk_quota: expected a store of DiffStore.open"):
            tenant_of(memory, "acme", **options)
    assert memory.stats().free_pages == 80
    with pytest.raises(ValueError, match="disk_quota: expected bytes or text"):
        tenant_of(store, "acme", disk_quota="many")
    check_store(store)
