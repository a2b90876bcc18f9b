"""Rows on disk in fewer bits: how far off they are, how large, and that it happens once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from driving import GEOMETRY, ROPE, run_round, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
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
from tokendance.files.codec import RowCodec

LARGEST = {"int8": 127, "int4": 7}


def through(codec: RowCodec, rows: torch.Tensor) -> torch.Tensor:
    raw = rows.contiguous().view(torch.uint8).reshape(-1).numpy().data
    coded = codec.encode(raw)
    assert len(coded) == codec.size(len(rows))
    back = codec.decode(bytearray(coded))
    return torch.frombuffer(back, dtype=rows.dtype).view(rows.shape)


@given(
    count=st.sampled_from([1, 2, 31, 32, 33, 100]),
    shape=st.sampled_from([(1, 16), (3, 64), (2, 80)]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    kind=st.sampled_from(["int8", "int4"]),
    per_channel=st.booleans(),
    size=st.sampled_from([1e-6, 1.0, 20.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=120, deadline=None)
def test_an_element_is_off_by_half_a_scale(
    count: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    kind: str,
    per_channel: bool,
    size: float,
    seed: int,
) -> None:
    draw = torch.Generator().manual_seed(seed)
    rows = (torch.randn(count, *shape, generator=draw) * size).to(dtype)
    rows[0, 0] = 0
    rows[:, :, 3] *= 50
    found = through(RowCodec(kind, shape, dtype, per_channel), rows).float()
    exact = rows.float()
    if per_channel:
        largest = torch.cat(
            [part.abs().amax(0, keepdim=True).expand_as(part) for part in torch.split(exact, 32)]
        )
    else:
        largest = exact.abs().amax(-1, keepdim=True).expand_as(exact)
    # A scale is rounded up, by a 128th at most; what comes out, to the rows' dtype.
    scale = largest / LARGEST[kind] * (1 + 1 / 128)
    info = torch.finfo(dtype)
    rounding = (exact.abs() + scale) * info.eps / 2 + info.smallest_normal * info.eps
    assert ((found - exact).abs() <= scale / 2 * (1 + 1e-5) + rounding).all()
    assert (found[largest == 0] == 0).all()


def test_keys_of_a_few_large_channels_want_scales_of_channels() -> None:
    keys = torch.randn(256, 2, 64)
    keys[:, :, [5, 40]] *= 60
    errors = [
        (through(RowCodec("int8", (2, 64), torch.float32, per_channel), keys) - keys)[:, :, :5]
        for per_channel in (True, False)
    ]
    assert errors[0].abs().mean() * 20 < errors[1].abs().mean()


def test_the_largest_elements_stay_finite() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        rows = torch.full((3, 1, 16), torch.finfo(dtype).max, dtype=dtype)
        for kind in LARGEST:
            for sign in (1, -1):
                found = through(RowCodec(kind, (1, 16), dtype, per_channel=True), sign * rows)
                assert found.isfinite().all()


def test_what_is_not_finite_does_not_become_so() -> None:
    rows = torch.randn(4, 1, 16)
    rows[2, 0, 3] = torch.nan
    rows[3, 0, 3] = torch.inf
    for kind in LARGEST:
        found = through(RowCodec(kind, (1, 16), torch.float32, per_channel=False), rows)
        assert found[:2].isfinite().all()
        assert not found[2:, 0, 3].isfinite().any()


def test_sizes() -> None:
    """Of 64 rows in bf16."""
    exact = RowCodec("exact", (4, 128), torch.bfloat16, True).size(64)
    sizes = [
        RowCodec(kind, (4, 128), torch.bfloat16, per_channel).size(64) / exact
        for kind in ("int8", "int4")
        for per_channel in (True, False)
    ]
    assert sizes == [1 / 2 + 1 / 32, 1 / 2 + 1 / 128, 1 / 4 + 1 / 32, 1 / 4 + 1 / 128]


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


def test_tenants_rows_are_coded_too(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store", codec=Codec("int8", "int8"))
    tenant = store.tenant("acme", bytes(16), "1MiB")
    run_round(td.KVCollector(tenant), {"ada": [tenant.private(tokens(1, 64))]})
    tenant.flush()
    assert tenant.stats().tiers["disk"].used_bytes < 0.4 * 64 * GEOMETRY.row_bytes


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"values: expected exact, int8 or int4, got 'fp4'"):
        Codec(values="fp4")
    kept = td.Quantization.unit(GEOMETRY)
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
