"""Segments: what a prompt is made of, matched by content and not by position.

A prompt is a list of segments. A segment that many agents' prompts hold (a message that the round
hands to everybody) is `shared`, one that must never match another agent's is `private`. The digest
of a segment is computed once, when it is made; from then on segments are compared by 16 bytes.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = [
    *("Segment", "TokenIds", "as_token_ids", "chain", "private", "repeated", "shared"),
    *("split_round", "told_apart"),
]

TokenIds: TypeAlias = Sequence[int] | npt.NDArray[np.integer[Any]] | Any
"""One-dimensional token ids, each in ``0 .. 2**31 - 1``: a list, a tensor or another array."""

_DIGEST_SIZE = 16
_MAX_TOKEN_ID = int(np.iinfo(np.int32).max)
_FEW = 16  # token ids that are checked one by one


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Segment:
    """A run of tokens with one content digest. Immutable; made by `private` and `shared`.

    Two segments are equal when their digests and their kinds are.

    Attributes:
        token_ids: ``[length]`` int32, C-contiguous, read-only.
        is_shared: whether another agent's segment of the same digest may be used in its place.
        digest: 16 bytes, keyed BLAKE2b of the token ids. The key is derived from the namespace, so
            that segments of two namespaces never match. It does not depend on ``is_shared``.
        stem: the digest that ``token_ids[:-1]`` has (of no token if ``length <= 1``). The last
            token that an agent samples is often never fed, so that the cache of its output holds
            the rows of the stem only: this is how those rows are found.
        space: 16 bytes, the digest of the namespace: where it differs, equal tokens do not match.
    """

    token_ids: npt.NDArray[np.int32]
    is_shared: bool
    digest: bytes
    stem: bytes
    space: bytes

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.token_ids)

    def __len__(self) -> int:
        return len(self.token_ids)

    def __copy__(self) -> Segment:
        return self

    def __deepcopy__(self, memo: object) -> Segment:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        fields = (self.token_ids, self.is_shared, self.digest, self.stem, self.space)
        return _unpickled, fields

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Segment):
            return NotImplemented
        return self.digest == other.digest and self.is_shared == other.is_shared

    def __hash__(self) -> int:
        return hash((self.digest, self.is_shared))

    def __repr__(self) -> str:
        kind = "shared" if self.is_shared else "private"
        return f"Segment({kind}, length={self.length}, digest={self.digest.hex()})"


def private(token_ids: TokenIds, *, namespace: bytes | str = b"", secret: bytes = b"") -> Segment:
    """A segment that only the agent whose prompt it stands in may reuse.

    Args:
        token_ids: ``[length]`` integers in ``0 .. 2**31 - 1``; copied. May be empty.
        namespace: whatever must keep equal tokens apart: a LoRA's id, the hash of an image that
            placeholder tokens stand for.
        secret: at most 64 bytes, without which nobody can tell from a digest which tokens, or which
            namespace, it may be of. `DiffStore.tenant` has it.

    Raises:
        TypeError: ``token_ids`` are no integers, or ``namespace`` is neither bytes nor str.
        ValueError: ``token_ids`` are not one-dimensional, or one of them is out of range.
    """
    return _segment(as_token_ids(token_ids, "token_ids"), False, _key(namespace, secret))


def shared(token_ids: TokenIds, *, namespace: bytes | str = b"", secret: bytes = b"") -> Segment:
    """A segment that agents of the same namespace may reuse from each other; else as `private`."""
    return _segment(as_token_ids(token_ids, "token_ids"), True, _key(namespace, secret))


def chain(context: bytes, segment_digest: bytes) -> bytes:
    """The 16-byte digest of a context that is ``context`` followed by one more segment.

    ``chain(chain(b"", a.digest), b.digest)`` stands for everything to the left of a segment that
    follows ``a`` and ``b``. It depends on tokens and namespace, not on the kinds of the segments.
    It does depend on how the tokens are cut into segments: it costs a microsecond whatever their
    length, and contexts that are equal but cut differently are merely not recognised as equal.
    Leave empty segments out, or they count as a cut too.

    Args:
        context: ``b""`` for the start of a prompt, or the result of an earlier call.
        segment_digest: `Segment.digest` or `Segment.stem`.

    Raises:
        ValueError: an argument has another length than that.
    """
    if len(context) not in (0, _DIGEST_SIZE):
        raise ValueError(f"context: expected 0 or {_DIGEST_SIZE} bytes, got {len(context)}")
    if len(segment_digest) != _DIGEST_SIZE:
        raise ValueError(
            f"segment_digest: expected {_DIGEST_SIZE} bytes, got {len(segment_digest)}"
        )
    return hashlib.blake2b(
        segment_digest, digest_size=_DIGEST_SIZE, key=context, person=b"tokendance-chain"
    ).digest()


def repeated(segment: Segment, index: int) -> Segment:
    """What a segment that a prompt holds several times is matched by, from its second place on.

    Two agents may have written the same. Each place of such a segment has rows of its own: the
    second one has seen the first. So it has another digest, which depends on how often the segment
    stood in the prompt before; where all prompts hold the messages of a round in one order, each
    place finds the Master of the same place, and the run of reused segments does not break there.

    Args:
        segment: with the digest of its content.
        index: how many times it stood in the prompt before, at least 1.
    """
    count = index.to_bytes(8, "little")
    digest, stem = (
        hashlib.blake2b(
            one, digest_size=_DIGEST_SIZE, key=count, person=b"tokendance-again"
        ).digest()
        for one in (segment.digest, segment.stem)
    )
    return Segment(segment.token_ids, segment.is_shared, digest, stem, segment.space)


def told_apart(prompt: Sequence[Segment]) -> Sequence[Segment]:
    """The segments of a prompt as they are matched: shared ones that repeat as `repeated`."""
    digests = [one.digest for one in prompt if one.is_shared]
    if len(set(digests)) == len(digests):
        return prompt
    before: Counter[bytes] = Counter()
    found = []
    for one in prompt:
        index = before[one.digest]
        if one.is_shared:
            before[one.digest] += 1
        found.append(repeated(one, index) if one.is_shared and index else one)
    return found


def split_round(
    token_ids: TokenIds,
    separator_ids: TokenIds,
    *,
    namespace: bytes | str = b"",
    secret: bytes = b"",
    kind: Literal["shared", "private"] = "shared",
    separators: int | None = None,
) -> list[Segment]:
    """Cuts a prompt after every separator (TokenDance's ``<TTSEP>``).

    The model sees the separator, so it stays in the prompt, as the end of the segment before it.
    No token is lost or added: the segments' token ids put together are ``token_ids``.

    Args:
        token_ids: ``[tokens]`` the whole prompt.
        separator_ids: the separator's token or tokens, at least one. Occurrences do not overlap;
            the leftmost wins.
        namespace, secret: as for `private`.
        kind: of all segments.
        separators: how many the prompt was made with. A tokenizer may have merged one with the text
            beside it; then there is no cut, unless the number is given and is an error.

    Returns:
        The segments in order, none of them empty.

    Raises:
        TypeError, ValueError: as `private`; ``separator_ids`` is empty; ``kind`` is neither of the
            two; another number of separators than ``separators``.
    """
    if kind not in ("shared", "private"):
        raise ValueError(f"kind: expected 'shared' or 'private', got {kind!r}")
    tokens = as_token_ids(token_ids, "token_ids")
    separator = as_token_ids(separator_ids, "separator_ids")
    if len(separator) == 0:
        raise ValueError("separator_ids: expected at least one token, got none")
    key = _key(namespace, secret)
    cuts = [0]
    for end in _ends_of(tokens, separator):
        if end - len(separator) >= cuts[-1]:
            cuts.append(end)
    if separators is not None and len(cuts) - 1 != separators:
        raise ValueError(
            f"separators: expected {separators} times {separator.tolist()} in token_ids, got "
            f"{len(cuts) - 1}; a tokenizer that merges a separator with the text beside it needs "
            "it as a special token, or the parts tokenised one by one"
        )
    if cuts[-1] != len(tokens):
        cuts.append(len(tokens))
    return [
        _segment(_frozen(tokens[start:stop].copy()), kind == "shared", key)
        for start, stop in pairwise(cuts)
    ]


def _ends_of(tokens: npt.NDArray[np.int32], separator: npt.NDArray[np.int32]) -> list[int]:
    """Ends of all occurrences of the separator, overlapping ones too, ascending."""
    starts = len(tokens) - len(separator) + 1
    if starts <= 0:
        return []
    matches = np.ones(starts, dtype=bool)
    for offset, token in enumerate(separator):
        matches &= tokens[offset : offset + starts] == token
    ends: list[int] = (np.flatnonzero(matches) + len(separator)).tolist()
    return ends


def _segment(token_ids: npt.NDArray[np.int32], is_shared: bool, key: bytes) -> Segment:
    # On a little-endian machine this is the array itself: digests are the same on every machine.
    data = token_ids.astype("<i4", copy=False).view(np.uint8).data
    state = hashlib.blake2b(digest_size=_DIGEST_SIZE, key=key, person=b"tokendance-token")
    state.update(data[: max(len(data) - 4, 0)])
    stem = state.digest()  # Leaves the state open: one pass gives both digests.
    state.update(data[max(len(data) - 4, 0) :])
    return Segment(token_ids, is_shared, state.digest(), stem, _space(key))


def space_of(namespace: bytes | str, secret: bytes) -> bytes:
    """What `Segment.space` is of the segments that are made with these."""
    return _space(_key(namespace, secret))


def _space(key: bytes) -> bytes:
    return hashlib.blake2b(key, digest_size=_DIGEST_SIZE, person=b"tokendance-spot").digest()


def _unpickled(token_ids: npt.NDArray[np.int32], *fields: Any) -> Segment:
    """A segment whose token ids are a copy: buffers that pickle hands over may be written."""
    return Segment(_frozen(token_ids.copy()), *fields)


def _key(namespace: bytes | str, secret: bytes) -> bytes:
    if isinstance(namespace, str):
        namespace = namespace.encode()
    if not isinstance(namespace, bytes):
        raise TypeError(f"namespace: expected bytes or str, got {type(namespace).__name__}")
    return hashlib.blake2b(
        namespace, digest_size=64, key=secret, person=b"tokendance-space"
    ).digest()


def _frozen(token_ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    token_ids.setflags(write=False)
    return token_ids


def as_token_ids(token_ids: TokenIds, argument: str) -> npt.NDArray[np.int32]:
    """A read-only int32 copy of the caller's token ids, checked."""
    try:
        ids: npt.NDArray[Any] = np.asarray(on_host(token_ids))
    except ValueError as error:
        raise ValueError(f"{argument}: expected a flat list of ints, got {error}") from error
    if ids.ndim != 1:
        raise ValueError(f"{argument}: expected shape [length], got {list(ids.shape)}")
    if ids.size == 0:
        return _frozen(np.empty(0, dtype=np.int32))
    if ids.dtype.kind == "O":  # What no dtype holds: ints beyond 64 bits, or objects.
        odd = [type(item).__name__ for item in ids if not isinstance(item, int)]
        if odd:
            raise TypeError(f"{argument}: expected integers, got {odd[0]}")
    elif ids.dtype.kind not in "iu":
        raise TypeError(f"{argument}: expected integers, got {ids.dtype}")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high > _MAX_TOKEN_ID:
        bad = low if low < 0 else high
        raise ValueError(f"{argument}: expected token ids in 0 .. {_MAX_TOKEN_ID}, got {bad}")
    return _frozen(np.array(ids, dtype=np.int32, order="C"))


def token_list(token_ids: TokenIds, argument: str) -> list[int]:
    """The caller's token ids, checked; quick where they are a list of a few ints."""
    if (
        type(token_ids) is list
        and len(token_ids) <= _FEW
        and all(type(one) is int and 0 <= one <= _MAX_TOKEN_ID for one in token_ids)
    ):
        return token_ids.copy()
    ids: list[int] = as_token_ids(token_ids, argument).tolist()
    return ids


def on_host(token_ids: TokenIds) -> TokenIds:
    """The same token ids: what lies on a device is fetched, all else is as it was."""
    if hasattr(token_ids, "detach"):  # a tensor, wherever it is
        return token_ids.detach().cpu().numpy()
    if hasattr(token_ids, "__dlpack__") and not isinstance(token_ids, np.ndarray):
        return token_ids.get() if hasattr(token_ids, "get") else np.from_dlpack(token_ids)
    return token_ids
