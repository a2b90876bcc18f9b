"""Work lists of collective attention: random ones, and whether one covers what its rows see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from tokendance.device.rounds import RoundTensors
from tokendance.host.round import CHUNK_FIELDS, WORK_FIELDS, IntArray, RoundExtents


def int32_array(values: object) -> IntArray:
    return np.asarray(values, dtype=np.int64).astype(np.int32)


def index_pointers(counts: Sequence[int]) -> IntArray:
    return int32_array([0, *np.cumsum(counts, dtype=np.int64).tolist()])


def random_work(
    arrays: dict[str, IntArray], extents: RoundExtents, rng: np.random.Generator, max_rows: int
) -> dict[str, IntArray]:
    """A work list for collective attention that no planner would make, and that is right.

    Pages of Masters and own pages are cut into random chunks and dealt to random groups; the rows
    that may see something of a group are cut into random tiles, agents mixed. Items that do
    nothing, items without chunks and chunks without rows are among them.

    Args:
        arrays: the other fields of the round, at the sizes of ``extents``.
        max_rows: most query rows of an item.

    Returns:
        The fields ``work``, ``work_rows``, ``work_chunks``, ``work_uses``, ``row_partial_indptr``
        and ``row_partials``.
    """
    size = extents.block_size
    row_agent = arrays["row_agent"].tolist()
    with_rows = set(row_agent)
    pages_of_source: dict[int, int] = {}
    agents_of_source: dict[int, set[int]] = {}
    for agent, master, length in zip(
        *(arrays[name].tolist() for name in ("use_agent", "use_master", "use_length")), strict=True
    ):
        if agent in with_rows:
            pages_of_source[master] = max(pages_of_source.get(master, 0), -(-length // size))
            agents_of_source.setdefault(master, set()).add(agent)
    for agent in with_rows:
        pages_of_source[-1 - agent] = -(-int(arrays["own_length"][agent]) // size)
        agents_of_source[-1 - agent] = {agent}

    pieces: list[tuple[int, int, int]] = []
    for source, pages in pages_of_source.items():
        cuts = sorted({0, pages, *rng.integers(0, pages + 1, int(rng.integers(0, 3))).tolist()})
        pieces += [(source, begin, end) for begin, end in pairwise(cuts)]
        if rng.random() < 0.2:
            pieces.append((source, pages, pages))
    groups: list[list[tuple[int, int, int]]] = [[] for _ in range(int(rng.integers(1, 4)))]
    for index in rng.permutation(len(pieces)).tolist():
        groups[int(rng.integers(0, len(groups)))].append(pieces[index])

    chunks: list[list[int]] = []
    items: list[tuple[list[int], int, int]] = []
    seen: set[int] = set()
    for group in groups:
        agents = set().union(*(agents_of_source[source] for source, _, _ in group))
        rows = [row for row, agent in enumerate(row_agent) if agent in agents]
        begin = len(chunks)
        chunks += [chunk_of(arrays, size, source, first, last) for source, first, last in group]
        items += [(tile, begin, len(chunks)) for tile in _tiles(rng, rows, max_rows)]
        seen.update(rows)
    unseen = [row for row in range(len(row_agent)) if row not in seen]
    items += [(tile, 0, 0) for tile in _tiles(rng, unseen, max_rows)]
    for _ in range(int(rng.integers(0, 3))):
        items.insert(int(rng.integers(0, len(items) + 1)), ([], 0, len(chunks)))

    times = np.zeros(len(row_agent), dtype=np.int64)
    for tile, _, _ in items:
        times[tile] += 1
    work: list[list[int]] = []
    work_rows: list[int] = []
    work_uses: list[int] = []
    partials_of_row: list[list[int]] = [[] for _ in row_agent]
    partials = 0
    for tile, chunk_begin, chunk_end in items:
        alone = all(times[row] == 1 for row in tile) and rng.random() < 0.8
        partial_begin = -1 if alone else partials
        if not alone:
            for offset, row in enumerate(tile):
                partials_of_row[row].append(partials + offset)
            partials += len(tile)
        row_begin = len(work_rows)
        work_rows += tile
        uses = uses_of_chunks(arrays, tile, chunks[chunk_begin:chunk_end])
        row_range = [row_begin, len(work_rows)]
        work.append(
            [*row_range, chunk_begin, chunk_end, partial_begin, len(work_uses), uses.shape[1], 0]
        )
        work_uses += uses.reshape(-1).tolist()
    merged = [rng.permutation(row).astype(int).tolist() for row in partials_of_row]
    return {
        "work": int32_array(work).reshape(-1, WORK_FIELDS),
        "work_rows": int32_array(work_rows),
        "work_chunks": int32_array(chunks).reshape(-1, CHUNK_FIELDS),
        "work_uses": int32_array(work_uses),
        "row_partial_indptr": index_pointers([len(row) for row in merged]),
        "row_partials": int32_array([partial for row in merged for partial in row]),
    }


def chunk_of(
    arrays: Mapping[str, IntArray], block_size: int, source: int, first: int, last: int
) -> list[int]:
    """A chunk of these pages of a Master, or of an agent's own rows (``-1 - agent``)."""
    begin, end = first * block_size, last * block_size
    if source >= 0:
        return [source, begin, end, int(arrays["master_page_indptr"][source])]
    length = int(arrays["own_length"][-1 - source])
    page_list = int(arrays["own_page_indptr"][-1 - source])
    return [source, min(begin, length), min(end, length), page_list]


def uses_of_chunks(
    arrays: Mapping[str, IntArray], rows: Sequence[int], chunks: Sequence[Sequence[int]]
) -> IntArray:
    """Uses by which rows of one item see its chunks: ``[chunks, rows]``, -1 = by none.

    ``[chunks, 1]`` where one use is that of all rows in each chunk.
    """
    use_of = {
        (agent, master): use
        for use, (agent, master) in enumerate(
            zip(arrays["use_agent"].tolist(), arrays["use_master"].tolist(), strict=True)
        )
    }
    agents = arrays["row_agent"][list(rows)].tolist()
    table = [[use_of.get((agent, chunk[0]), -1) for agent in agents] for chunk in chunks]
    uses = int32_array(table).reshape(len(chunks), len(agents))
    return uses[:, :1] if (uses == uses[:, :1]).all() else uses


def planned_work(
    arrays: dict[str, IntArray],
    extents: RoundExtents,
    rng: np.random.Generator,
    max_rows: int,
    window: int,
) -> dict[str, IntArray]:
    """The planner's work list, for a device of random size."""
    from tokendance import _planner

    planned = _planner.plan_work(
        **{name: arrays[name] for name in _PLANNED_FROM},
        block_size=extents.block_size,
        max_tile_rows=max_rows,
        target_items=int(rng.choice([1, 8, 132])),
        read_bound_rows=1,
        max_splits=int(rng.choice([1, 4, 32])),
        window=window,
    )
    return {name: np.asarray(field) for name, field in planned.items()}


_PLANNED_FROM = (
    "row_agent",
    "row_position",
    "use_agent",
    "use_master",
    "use_delta",
    "use_length",
    "master_page_indptr",
    "own_length",
    "own_page_indptr",
    "own_position",
)


def _tiles(rng: np.random.Generator, rows: list[int], max_rows: int) -> list[list[int]]:
    """Cuts rows into tiles of random sizes and members, ascending within a tile."""
    shuffled = rng.permutation(rows).astype(int).tolist()
    tiles = []
    while shuffled:
        count = int(rng.integers(1, max_rows + 1))
        tiles.append(sorted(shuffled[:count]))
        shuffled = shuffled[count:]
    return tiles


def assert_work_covers(round: RoundTensors, max_rows: int, window: int = 0) -> None:
    """Checks a work list: each row meets each page that it sees a key of, and none twice.

    Also that it meets them by its agent's use, and that chunks know where their pages are listed;
    that items have at most ``max_rows`` rows, ascending and not padding; that each other row
    has an item; that a row with several items has a partial of each, in its own slot, and a row
    with one either writes its output or has one partial. Raises ``AssertionError``.
    """
    size = round.extents.block_size
    row_agent, row_position = round.row_agent.tolist(), round.row_position.tolist()
    use_of = {
        pair: use
        for use, pair in enumerate(
            zip(round.use_agent.tolist(), round.use_master.tolist(), strict=True)
        )
    }
    met: list[list[tuple[int, int]]] = [[] for _ in row_agent]
    items: list[int] = [0] * len(row_agent)
    partials: list[list[int]] = [[] for _ in row_agent]
    work_rows, work_chunks = round.work_rows.tolist(), round.work_chunks.tolist()
    for item in round.work.tolist():
        row_begin, row_end, chunk_begin, chunk_end, partial_begin, use_begin, each, rest = item
        assert rest == 0
        rows = work_rows[row_begin:row_end]
        assert len(rows) == row_end - row_begin <= max_rows
        assert rows == sorted(set(rows)), f"rows of an item ascend, got {rows}"
        chunks = work_chunks[chunk_begin:chunk_end]
        assert each in (1, len(rows)) or not rows or not chunks
        pages = []
        for number, (source, first, last, page_list) in enumerate(chunks if rows else []):
            if first < last:
                pages += [(source, page) for page in range(first // size, -(-last // size))]
            lists = round.master_page_indptr if source >= 0 else round.own_page_indptr
            assert page_list == int(lists[source if source >= 0 else -1 - source])
            for offset, row in enumerate(rows if source >= 0 else []):
                use = int(round.work_uses[use_begin + number * each + min(offset, each - 1)])
                assert use == use_of.get((row_agent[row], source), -1), f"row {row}: use {use}"
        for offset, row in enumerate(rows):
            assert row_agent[row] >= 0, f"row {row} is padding"
            items[row] += 1
            met[row] += pages
            if partial_begin >= 0:
                partials[row].append(partial_begin + offset)
    merged = round.row_partials.tolist()
    indptr = round.row_partial_indptr.tolist()
    every_partial = [partial for row in partials for partial in row]
    assert len(set(every_partial)) == len(every_partial), "two rows write one partial"
    assert all(partial < round.extents.partials for partial in every_partial)
    for row, agent in enumerate(row_agent):
        assert sorted(merged[indptr[row] : indptr[row + 1]]) == sorted(partials[row])
        if agent < 0:
            continue
        assert items[row] >= 1, f"row {row} has no item"
        assert len(partials[row]) == items[row] or (items[row] == 1 and not partials[row])
        own = [page for page in met[row] if page[0] == -1 - agent]
        uses = [
            (source, page) for source, page in met[row] if source >= 0 and (agent, source) in use_of
        ]
        assert len(set(own + uses)) == len(own + uses), f"row {row} meets a page twice"
        needed = _pages_seen(round, agent, row_position[row], size, window)
        missing = needed - set(own + uses)
        assert not missing, f"row {row} does not meet {sorted(missing)}"


def _pages_seen(
    round: RoundTensors, agent: int, position: int, size: int, window: int
) -> set[tuple[int, int]]:
    """(source, page) of every page with a key that the row sees, whatever the masks are."""

    def sees(key: int) -> bool:
        return key <= position and (window == 0 or position - key < window)

    seen = set()
    for use in range(int(round.agent_use_indptr[agent]), int(round.agent_use_indptr[agent + 1])):
        delta, master = int(round.use_delta[use]), int(round.use_master[use])
        rows = range(int(round.use_length[use]))
        seen |= {(master, row // size) for row in rows if sees(delta + row)}
    begin = int(round.own_page_indptr[agent]) * size
    own = round.own_position[begin : begin + int(round.own_length[agent])].tolist()
    return seen | {(-1 - agent, row // size) for row, key in enumerate(own) if sees(key)}
