"""Segments: digests, what they tell apart, how a round is split, and what is refused."""

from __future__ import annotations

import hashlib
import pickle
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokendance.host.segments import (
    chain,
    private,
    repeated,
    shared,
    split_round,
    token_list,
    told_apart,
)

IDS = [5, 1, 0, 49151, 2**31 - 1]
tokens = st.lists(st.integers(0, 2**31 - 1), max_size=40)
few_tokens = st.lists(st.integers(0, 2), max_size=60)


@pytest.mark.parametrize(
    "given_ids",
    [
        IDS,
        tuple(IDS),
        np.array(IDS),
        np.array(IDS, dtype=np.uint32),
        np.array([[i, 7] for i in IDS])[:, 0],
        torch.tensor(IDS),
        torch.tensor(IDS, dtype=torch.int32),
        torch.tensor([[i, 7] for i in IDS])[:, 0],
    ],
)
def test_token_ids_of_any_source_give_one_segment(given_ids):
    segment = shared(given_ids)
    assert segment.token_ids.dtype == np.int32
    assert segment.token_ids.flags["C_CONTIGUOUS"]
    assert segment.token_ids.tolist() == IDS
    assert segment.length == len(segment) == 5
    assert segment == shared(IDS)
    assert hash(segment) == hash(shared(IDS))


def test_segments_are_immutable_and_keep_no_callers_memory():
    ids = np.array(IDS, dtype=np.int32)
    segment = shared(ids)
    ids[0] = 9
    assert segment.token_ids[0] == 5
    with pytest.raises(ValueError, match="read-only"):
        segment.token_ids[0] = 9
    with pytest.raises(AttributeError):
        segment.digest = b""
    with pytest.raises((AttributeError, TypeError)):
        segment.other = 1
    assert pickle.loads(pickle.dumps(segment)) == segment


def test_digest_is_keyed_blake2b_of_little_endian_token_ids():
    key = hashlib.blake2b(b"tenant", digest_size=64, person=b"tokendance-space").digest()
    data = struct.pack("<5i", *IDS)
    keyed = {"digest_size": 16, "key": key, "person": b"tokendance-token"}
    segment = shared(IDS, namespace="tenant")
    assert segment.digest == hashlib.blake2b(data, **keyed).digest()
    assert segment.stem == hashlib.blake2b(data[:-4], **keyed).digest()


@given(tokens, tokens)
def test_digests_are_equal_exactly_when_token_ids_are(a, b):
    assert (shared(a).digest == shared(b).digest) == (a == b)


@given(tokens)
def test_stem_is_the_digest_without_the_last_token(ids):
    assert shared(ids).stem == shared(ids[:-1]).digest
    assert shared([*ids, 3]).stem == shared(ids).digest


def test_kind_is_no_part_of_the_digest_but_of_equality():
    assert private(IDS).digest == shared(IDS).digest
    assert private(IDS) != shared(IDS)
    assert not private(IDS).is_shared
    assert shared(IDS).is_shared
    assert shared(IDS) != IDS


def test_namespaces_never_match():
    segments = [shared(IDS, namespace=name) for name in (b"", b"a", b"b", b"a" * 500, "é")]
    assert len({segment.digest for segment in segments}) == len(segments)
    assert len({segment.stem for segment in segments}) == len(segments)
    assert len({shared([], namespace=name).digest for name in (b"", b"a")}) == 2
    assert shared(IDS, namespace="é") == shared(IDS, namespace="é".encode())


def test_chain_is_of_order_and_content():
    a, b = shared([1, 2]), private([3])
    digests = {
        chain(b"", a.digest),
        chain(chain(b"", a.digest), b.digest),
        chain(chain(b"", b.digest), a.digest),
        chain(b"", b.digest),
        chain(b"", shared([1, 2, 3]).digest),
    }
    assert len(digests) == 5
    assert all(len(digest) == 16 for digest in digests)
    as_private = chain(chain(b"", private([1, 2]).digest), shared([3]).digest)
    assert as_private == chain(chain(b"", a.digest), b.digest)
    with pytest.raises(ValueError, match="context: expected 0 or 16 bytes, got 3"):
        chain(b"abc", a.digest)
    with pytest.raises(ValueError, match="segment_digest: expected 16 bytes, got 0"):
        chain(b"", b"")


def test_repeated_segments_are_matched_by_their_place():
    said, other, mine = shared([1, 2, 3]), shared([4, 5]), private([1, 2, 3])
    assert told_apart([said, other, mine, mine]) == [said, other, mine, mine]
    apart = told_apart([said, mine, other, said, shared([1, 2, 3]), other])
    assert apart[:3] == [said, mine, other]
    assert apart[3:] == [repeated(said, 1), repeated(said, 2), repeated(other, 1)]
    assert len({one.digest for one in apart if one.is_shared}) == 5
    assert len({one.stem for one in apart if one.is_shared}) == 5
    assert apart[3].token_ids.tolist() == [1, 2, 3]
    assert apart[3].space == said.space
    key = (1).to_bytes(8, "little")
    expected = hashlib.blake2b(said.digest, digest_size=16, key=key, person=b"tokendance-again")
    assert apart[3].digest == expected.digest()


@pytest.mark.parametrize(
    ("ids", "separator", "expected"),
    [
        ([], [9], []),
        ([9], [9], [[9]]),
        ([1, 2], [9], [[1, 2]]),
        ([1, 9, 2, 9], [9], [[1, 9], [2, 9]]),
        ([9, 9, 1], [9], [[9], [9], [1]]),
        ([1, 8, 9, 2, 9, 8, 9], [8, 9], [[1, 8, 9], [2, 9, 8, 9]]),
        ([8, 8, 8, 1], [8, 8], [[8, 8], [8, 1]]),  # the leftmost occurrence wins
        ([8], [8, 9], [[8]]),
    ],
)
def test_split_round_cuts_after_separators(ids, separator, expected):
    segments = split_round(ids, separator)
    assert [segment.token_ids.tolist() for segment in segments] == expected
    assert all(segment.is_shared for segment in segments)
    assert segments == [shared(part) for part in expected]


@given(few_tokens, st.lists(st.integers(0, 2), min_size=1, max_size=3))
def test_split_round_keeps_every_token(ids, separator):
    segments = split_round(torch.tensor(ids, dtype=torch.int64), separator, kind="private")
    assert [token for segment in segments for token in segment.token_ids] == ids
    assert all(segment.length and not segment.is_shared for segment in segments)
    # Each segment but the last ends in a separator, and none holds one anywhere else.
    width = len(separator)
    for segment in segments[:-1]:
        assert segment.token_ids[-width:].tolist() == separator
    for segment in segments:
        run = segment.token_ids.tolist()
        found = [i for i in range(len(run) - width + 1) if run[i : i + width] == separator]
        assert not found or found[0] == len(run) - width


def test_split_round_takes_namespace_and_refuses_bad_arguments():
    assert split_round([1, 2], [2], namespace="a") == [shared([1, 2], namespace="a")]
    with pytest.raises(ValueError, match="separator_ids: expected at least one token, got none"):
        split_round([1], [])
    with pytest.raises(ValueError, match="kind: expected 'shared' or 'private', got 'public'"):
        split_round([1], [1], kind="public")
    with pytest.raises(ValueError, match=r"separator_ids: expected token ids in .* got -1"):
        split_round([1], [-1])


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([1.0], TypeError, "token_ids: expected integers, got float64"),
        ([True], TypeError, "token_ids: expected integers, got bool"),
        (["a"], TypeError, "token_ids: expected integers, got <U1"),
        ([None], TypeError, "token_ids: expected integers, got NoneType"),
        (torch.ones(2), TypeError, "token_ids: expected integers, got float32"),
        ([[1, 2]], ValueError, r"token_ids: expected shape \[length\], got \[1, 2\]"),
        ([[1], [1, 2]], ValueError, "token_ids: expected a flat list of ints"),
        (7, ValueError, r"token_ids: expected shape \[length\], got \[\]"),
        ([1, -2], ValueError, r"token_ids: expected token ids in 0 \.\. 2147483647, got -2"),
        ([2**31], ValueError, r"token_ids: expected token ids in .* got 2147483648"),
        ([2**63], ValueError, r"token_ids: expected token ids in .* got 9223372036854775808"),
        ([2**70], ValueError, r"token_ids: expected token ids in .* got 1180591620717411303424"),
    ],
)
def test_bad_token_ids_are_named(ids, error, message):
    with pytest.raises(error, match=message):
        shared(ids)
    with pytest.raises(error, match=message):
        private(ids)


def test_a_list_of_tokens_is_checked_as_an_array_is():
    assert token_list([3, 2**31 - 1], "ids") == [3, 2**31 - 1]
    assert token_list(np.array([3]), "ids") == token_list((3,), "ids") == [3]
    given_ids = [1, 2]
    assert token_list(given_ids, "ids") is not given_ids
    assert token_list([*range(100)], "ids") == [*range(100)]
    for ids, error in (([-1], ValueError), ([2**31], ValueError), ([1.5], TypeError)):
        with pytest.raises(error, match="ids: expected"):
            token_list(ids, "ids")


def test_bad_namespace_is_named():
    with pytest.raises(TypeError, match="namespace: expected bytes or str, got int"):
        shared([1], namespace=3)


def test_empty_segments_are_allowed():
    empty = shared([])
    assert empty.length == 0
    assert empty.token_ids.dtype == np.int32
    assert empty.digest == empty.stem == shared(torch.empty(0, dtype=torch.int64)).digest


def test_the_number_of_separators_can_be_insisted_on():
    """A tokenizer that merged the separator leaves one segment, silently."""
    ids, separator = [4, 9, 9, 5, 9, 9, 6], [9, 9]
    assert [len(part) for part in split_round(ids, separator, separators=2)] == [3, 3, 1]
    merged = [4, 99, 5, 9, 9, 6]
    assert [len(part) for part in split_round(merged, separator)] == [5, 1]
    expected = r"separators: expected 2 times \[9, 9\] in token_ids, got 1; a tokenizer that merges"
    with pytest.raises(ValueError, match=expected):
        split_round(merged, separator, separators=2)
    assert split_round([], separator, separators=0) == []
    with pytest.raises(ValueError, match=r"separators: expected 0 times .* got 2"):
        split_round(ids, separator, separators=0)
