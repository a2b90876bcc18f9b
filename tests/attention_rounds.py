"""Rounds for the tests of `collective_attention`, each made for what its kernels do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from tokendance import testing
from tokendance.device.rounds import RoundTensors
from tokendance.testing.work_lists import chunk_of, uses_of_chunks

TILE_KEYS = 64  # the kernels' key tile
TILE_ROWS = 64  # query rows times G of an item, at most


def attention_round(seed, *, num_q_heads=4, num_kv_heads=2, **options):
    """A small round with a Master of more than five key tiles."""
    options = {
        "agents": 3,
        "masters": (331, 45),
        "whole_uses": True,
        "rows": 4,
        "rows_per_item": max(1, TILE_ROWS // (num_q_heads // num_kv_heads)),
    } | options
    return testing.random_round(seed, num_q_heads=num_q_heads, num_kv_heads=num_kv_heads, **options)


def is_demanding(case):
    """Several blocks of a launch, more tiles than a pipeline has stages, uses, an odd tail."""
    size = case.filled.block_size
    chunks = case.arrays["work_chunks"]
    items = [item for item in case.arrays["work"].tolist() if item[0] < item[1]]
    keys = [int((chunks[i[2] : i[3], 2] - chunks[i[2] : i[3], 1]).sum()) for i in items]
    tails = case.arrays["use_length"] % size != 0
    own_tails = case.arrays["own_length"] % size != 0
    return (
        len(items) >= 3
        and max(keys) >= 5 * TILE_KEYS
        and case.filled.uses >= 2
        and (tails.any() or own_tails.any())
    )


def demanding_round(seed, **options):
    """The first of these rounds that is, from a seed on."""
    return first_round(is_demanding, seed, **options)


def first_round(wanted, seed, **options):
    """The first round, from a seed on, that is as wanted."""
    return next(
        case
        for candidate in range(seed, seed + 1000)
        if wanted(case := attention_round(candidate, **options))
    )


def items_of(case):
    """``(positions of the query rows, sources of the chunks)`` of every item."""
    arrays = case.arrays
    return [
        (
            arrays["row_position"][arrays["work_rows"][item[0] : item[1]]].tolist(),
            arrays["work_chunks"][item[2] : item[3], 0].tolist(),
        )
        for item in arrays["work"].tolist()
    ]


def boundary_round(window, own_first=False, *, heads=16, **options):
    """An agent of eight rows whose Master follows its own rows: a warp for each row, where a warp
    has as many query rows as there are heads.

    With this window, what rows see of the Master begins with its first key, its second or the last
    of a tile, and ends with the first or the last of a tile; one tile has a single key. The first
    and the last key that any row sees are those of rows in the second half of a tile of query rows.
    The last own row is the first of a row's window, and just before that of another. All is one
    item: the Master, then own rows, or the other way around.
    """

    def wanted(case):
        [delta, *_], own = case.arrays["use_delta"].tolist(), case.arrays["own_position"]
        count, size = case.arrays["own_length"][0], case.filled.block_size
        return (
            count > 1
            and own[count - 1] == delta - 1
            and case.filled.rows == 8
            and [0, 0, -(-129 // size) * size, 0] in case.arrays["work_chunks"].tolist()
        )

    case = first_round(
        wanted, 0, agents=1, masters=(150,), masks="none", rows=8, private_length=20,
        num_q_heads=heads, num_kv_heads=1, rows_per_item=8, work="planned", **options,
    )  # fmt: skip
    reach = [window + 30, window + 62, 128, window, window - 1, window - 2, 63, 64]
    positions = torch.tensor(reach) + int(case.arrays["use_delta"][0])
    case.round.row_position[:8] = positions
    if own_first:
        for field in (case.round.work_chunks, case.round.work_uses):
            field[:2] = field[:2].flip(0)
    return case


def blind_tile_round(heads=16, **options):
    """An item whose first four rows, a tile of 4 * ``heads`` query rows, see nothing of its only
    chunk.

    What a tile leaves in shared memory is still there when the next one begins.
    """

    def wanted(case):
        return (
            case.filled.rows == 5
            and any(
                len(positions) == 5 and len(chunks) == 1 for positions, chunks in items_of(case)
            )
            and case.arrays["use_delta"][0] > 4
        )

    case = first_round(
        wanted, 0, agents=1, masters=(40,), masks="none", private_length=0, rows=5, start=90,
        num_q_heads=heads, num_kv_heads=1, rows_per_item=5, **options,
    )  # fmt: skip
    case.round.row_position[:4] = torch.arange(4)
    return case


def lonely_round(**options):
    """Agents with a single own row, before and after it; the last row of each comes three positions
    later. Agent 0's own row is all of an item, another's follows a Master."""

    def wanted(case):
        arrays = case.arrays
        if arrays["own_length"][0] != 1:
            return False
        own = arrays["own_position"][arrays["own_page_indptr"][0] * case.filled.block_size]
        items = items_of(case)
        lonely = {-1 - int(agent) for agent in arrays["own_length"].nonzero()[0]}
        return (
            (arrays["row_position"][arrays["row_agent"] == 0] < own).any()
            and any(len(rows) == 4 and chunks == [-1] for rows, chunks in items)
            and any(rows and lonely & set(chunks[1:]) for rows, chunks in items)
        )

    case = first_round(
        wanted, 0, agents=4, masters=(20, 9), masks="none", private_length=1, rows=4,
        room_for_all=True, table_slack=3, **options,
    )  # fmt: skip
    arrays = case.arrays
    for agent in arrays["own_length"].nonzero()[0]:
        own = arrays["own_position"][arrays["own_page_indptr"][agent] * case.filled.block_size]
        last = int((arrays["row_agent"] == agent).nonzero()[0][-1])
        case.round.row_position[last] = int(own) + 3
    return case


def lacking_round(**options):
    """An item that begins with a Master which one of its agents has, and another has not."""

    def wanted(case):
        arrays, size = case.arrays, case.filled.block_size
        if case.filled.uses == case.round.extents.uses:  # no absurd numbers beside the uses
            return False
        for item in arrays["work"].tolist():
            if item[0] == item[1] or item[2] == item[3]:
                continue
            master, first, last, _ = arrays["work_chunks"][item[2]].tolist()
            if (
                master < 0
                or first > 0
                or last == 0
                or case.filled.uses == len(case.round.use_delta)
            ):
                continue
            rows = arrays["work_rows"][item[0] : item[1]]
            uses = case.use_table[arrays["row_agent"][rows], master]
            held = uses >= 0
            reach = arrays["row_position"][rows] - arrays["use_delta"][uses]
            if (~held).any() and (held & (reach >= size)).any():
                return True
        return False

    return first_round(
        wanted, 0, agents=5, masters=(40, 30), masks="none", rows=4, whole_uses=False, **options
    )


def first_keys_hidden_round(heads=16, **options):
    """Uses of which the first row of every page of 32 is hidden, and no other, to whole warps."""
    case = attention_round(
        18, num_q_heads=heads, num_kv_heads=1, masters=(130,), masks="none", block_size=32,
        rows_per_item=4, **options,
    )  # fmt: skip
    case.round.use_masks[: case.filled.use_pages] = 1
    return case


def rising_round(first, second, heads=8, **options):
    """Two rows that see so far, a warp where they have 8 heads: later tiles of keys weigh more."""

    def wanted(case):
        return case.filled.rows == 2

    case = first_round(
        wanted, 0, agents=1, masters=(128,), masks="none", private_length=0, rows=2,
        num_q_heads=heads, num_kv_heads=1, work="planned", **options,
    )  # fmt: skip
    delta = int(case.arrays["use_delta"][0])
    case.round.row_position[:2] = torch.tensor([first, second]) + delta
    pages = torch.from_numpy(case.arrays["master_pages"]).long()
    earlier, later = pages.tensor_split([64 // case.filled.block_size])
    pool = case.k_pool[0]
    if case.k_scale is None:
        pool[later] *= 4
    else:  # elements have an upper limit, their scale has none
        pool[earlier] = (pool[earlier].float() / 4).to(pool.dtype)
        case.k_scale.mul_(4)
    return case


def beyond_the_tables_round(sign=1, which=-1, shift=None, **options):
    """A round without one of its rows and one of its uses, and what puts them in again: the row at
    the first position beyond the tables, the use with ``shift``, or the first beyond them."""

    def uses(case):
        """Uses of several pages that the other rows see."""
        agents = case.round.row_agent[case.real_rows[1:]].numpy()
        seen = np.isin(case.arrays["use_agent"], agents)
        return np.flatnonzero(seen & (case.arrays["use_length"] > 20))

    def wanted(case):
        return len(case.real_rows) >= 3 and len(uses(case)) >= 2

    case = first_round(wanted, 0, masters=(70, 40), rows=2, **options)
    row = int(case.real_rows[0])
    use = int(uses(case)[which])
    agent, length = int(case.round.row_agent[row]), int(case.round.use_length[use])
    limit = case.cos.shape[0]
    shift = sign * limit if shift is None else shift
    case.round.row_agent[row] = -1
    case.round.use_length[use] = 0

    def damage(given):
        given.round.row_agent[row] = agent
        given.round.row_position[row] = limit
        given.round.use_length[use] = length
        given.round.use_shift[use] = shift

    return case, damage


def unnamed_use_round(**options):
    """A round without one of its uses, and what puts it in again without its number in the work
    list: by what the list does not name nothing is seen."""

    def seen(case):
        """Uses of which some row sees more than 20 rows."""
        arrays = case.arrays
        last = dict(zip(arrays["row_agent"], arrays["row_position"], strict=True))
        reach = [last.get(agent, 0) for agent in arrays["use_agent"]] - arrays["use_delta"]
        return np.flatnonzero(np.minimum(reach, arrays["use_length"]) > 20)

    case = first_round(
        lambda case: len(seen(case)) >= 2, 0, masters=(70, 40), masks="none", rows=2, **options
    )
    use = int(seen(case)[0])
    length = int(case.arrays["use_length"][use])
    case.round.use_length[use] = 0

    def damage(given):
        given.round.use_length[use] = length
        uses = given.round.work_uses[: case.filled.work_uses]
        uses[uses == use] = -1

    return case, damage


def nine_partials_round(turn, **options):
    """One query row and nine items of two pages each, merged from the one after the ``turn``-th on.

    With a large scale one of their LSEs is far above the others, at another place for each turn.
    """

    def wanted(case):
        return case.filled.rows == 1

    parts, rows = 9, 16
    case = first_round(
        wanted, 0, agents=1, masters=(rows * parts,), masks="none", private_length=0, rows=1,
        slack=False, block_size=8, rotary_dim=0, work="planned", **options,
    )  # fmt: skip
    place = np.arange(parts, dtype=np.int32)
    zeros, ones = np.zeros_like(place), np.ones_like(place)
    fields = {
        "row_position": case.arrays["use_delta"][:1] + rows * parts - 1,
        "work": np.stack([zeros, ones, place, place + 1, place, zeros, ones, zeros], axis=1),
        "work_rows": zeros[:1],
        "work_chunks": np.stack([zeros, rows * place, rows * (place + 1), zeros], axis=1),
        "work_uses": zeros[:1],
        "row_partial_indptr": np.array([0, parts], dtype=np.int32),
        "row_partials": np.roll(place, turn),
    }
    return with_work(case, fields)


def with_work(case, fields):
    """The same round, without slack, with these fields of a work list."""
    arrays = {**case.arrays, **fields}
    filled = replace(
        case.filled,
        **{name: len(arrays[name]) for name in ("work", "work_rows", "work_chunks", "work_uses")},
        partials=len(arrays["row_partials"]),
    )
    return replace(
        case, arrays=arrays, filled=filled, round=RoundTensors.from_arrays(arrays, filled)
    )


def equal_keys_round(work, heads=2, **options):
    """Queries of zeros: the LSE of a row is the logarithm of the number of keys that it sees, which
    no rounding of queries or keys changes. Numbers of many mantissas, upper and lower.

    Planned work is one item; of random work every row has two partials or more.
    """

    def wanted(case):
        partials = case.arrays["row_partial_indptr"][:17]
        return case.filled.rows == 16 and (work == "planned" or (np.diff(partials) > 1).all())

    case = first_round(
        wanted, 0, agents=1, masters=(50,), masks="none", private_length=0, rows=16,
        num_q_heads=heads, num_kv_heads=1, work=work, **options,
    )  # fmt: skip
    case.q.zero_()
    case.round.row_position[:16] = 1 + 3 * torch.arange(16) + int(case.arrays["use_delta"][0])
    return case


def opposite_values_round(**options):
    """Rows that see two keys each, the same twice, whose values are each other's negatives.

    What elements are widened to shows to the last bit: in the LSEs, for no product of queries and
    keys is rounded, and in outputs other than 0. Each key of a tile is seen.
    """

    def wanted(case):
        return case.filled.rows == 32

    case = first_round(
        wanted, 0, agents=1, masters=(64,), masks="none", private_length=0, rows=32,
        num_q_heads=2, num_kv_heads=1, rotary_dim=0, start=90, work="planned", **options,
    )  # fmt: skip
    pages = torch.from_numpy(case.arrays["master_pages"]).long()
    generator = torch.Generator().manual_seed(0)
    large = torch.randint(0x70, 0x7F, (2, 32, 64), dtype=torch.uint8, generator=generator)
    signs = torch.randint(0, 2, large.shape, dtype=torch.uint8, generator=generator) << 7
    key, value = large | signs
    for pool, pair in ((case.k_pool[0], (key, key)), (case.v_pool[0], (value, value ^ 0x80))):
        shape = (len(pages), case.filled.block_size, 1, 64)
        pool[pages] = torch.stack(pair, dim=1).view(pool.dtype).view(shape)
    case.q.copy_(case.q.sign())
    case.round.row_position[:32] = 1 + 2 * torch.arange(32) + int(case.arrays["use_delta"][0])
    return replace(case, k_scale=None, v_scale=None)


def neighbours_round(heads=1, **options):
    """Neighbours in a tile have their own agent, position and shift where a group has one head."""
    return attention_round(
        17, num_q_heads=heads, num_kv_heads=1, agents=40, masters=(20, 40), private_length=3,
        rows=1, **options,
    )  # fmt: skip


def one_of_four_round(heads=1, **options):
    """An item whose second Master only some of its 16 rows have, each of another agent: the
    first of the first four, the second of the next four, and so on."""

    def chosen(case):
        has_it = case.use_table[case.arrays["row_agent"], 1] >= 0
        rows = []
        for row, has in enumerate(has_it):
            if len(rows) < 16 and has == (len(rows) % 5 == 0):
                rows.append(row)
        return rows

    case = first_round(
        lambda case: len(chosen(case)) == 16, 0, num_q_heads=heads, num_kv_heads=1, agents=80,
        masters=(20, 40), masks="none", private_length=3, rows=1, whole_uses=False, slack=False,
        **options,
    )  # fmt: skip
    arrays, size = case.arrays, case.filled.block_size
    rows = chosen(case)
    rows += sorted(set(range(case.filled.rows)) - set(rows))
    pages = np.diff(arrays["master_page_indptr"]).tolist()
    chunks = [chunk_of(arrays, size, master, 0, pages[master]) for master in (0, 1)]
    for agent in arrays["row_agent"].tolist():
        own = -(-int(arrays["own_length"][agent]) // size)
        chunks.append(chunk_of(arrays, size, -1 - agent, 0, own))
    items, uses = [], []
    for first, last in ((0, 16), (16, len(rows))):
        table = uses_of_chunks(arrays, rows[first:last], chunks)
        items.append([first, last, 0, len(chunks), -1, len(uses), table.shape[1], 0])
        uses += table.reshape(-1).tolist()
    fields = {
        "work": np.array(items, dtype=np.int32),
        "work_rows": np.array(rows, dtype=np.int32),
        "work_chunks": np.array(chunks, dtype=np.int32),
        "work_uses": np.array(uses, dtype=np.int32),
        "row_partial_indptr": np.zeros(len(rows) + 1, dtype=np.int32),
        "row_partials": np.zeros(0, dtype=np.int32),
    }
    return with_work(case, fields)


def by_one_position(case):
    """The same round in which uses are moved by one position up or down."""
    near = case.copy()
    uses = case.filled.uses
    near.round.use_shift[:uses] = torch.tensor([1, -1, -1]).repeat(uses)[:uses]
    return near
