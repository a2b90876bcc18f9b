"""The segments of one tenant: keyed by its secret, and told from all others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from tokendance.host import segments
from tokendance.host.segments import Segment, TokenIds, space_of

_KEY_BYTES = (16, 64)


class TenantSegments:
    """Makes the segments of a tenant, and knows them again.

    Args:
        tenant: its name, for errors.
        key: its secret, 16 to 64 bytes.

    Raises:
        TypeError: a key that is no bytes.
        ValueError: a key of another length.
    """

    def __init__(self, tenant: str, key: bytes) -> None:
        if not isinstance(key, bytes):
            raise TypeError(f"key: expected bytes, got {type(key).__name__}")
        least, most = _KEY_BYTES
        if not least <= len(key) <= most:
            raise ValueError(f"key: expected {least} to {most} bytes, got {len(key)}")
        self._tenant = tenant
        self._key = key
        self._named: set[bytes | str] = set()  # namespaces
        self._known: set[bytes] = set()  # their spaces
        self._secret(b"")

    def private(self, token_ids: TokenIds, *, namespace: bytes | str = b"") -> Segment:
        """As `tokendance.private`."""
        return segments.private(token_ids, namespace=namespace, secret=self._secret(namespace))

    def shared(self, token_ids: TokenIds, *, namespace: bytes | str = b"") -> Segment:
        """As `tokendance.shared`, for the agents of the tenant."""
        return segments.shared(token_ids, namespace=namespace, secret=self._secret(namespace))

    def split_round(
        self,
        token_ids: TokenIds,
        separator_ids: TokenIds,
        *,
        namespace: bytes | str = b"",
        kind: Literal["shared", "private"] = "shared",
        separators: int | None = None,
    ) -> list[Segment]:
        """As `tokendance.split_round`."""
        return segments.split_round(
            token_ids,
            separator_ids,
            namespace=namespace,
            secret=self._secret(namespace),
            kind=kind,
            separators=separators,
        )

    def check(self, argument: str, given: Iterable[Segment]) -> None:
        """Raises ``ValueError`` for a segment that was not made here."""
        for segment in given:
            if segment.space not in self._known:
                raise ValueError(
                    f"{argument}: expected segments of tenant {self._tenant!r} (its private(ids), "
                    f"shared(ids)), got {segment} of another or of none"
                )

    def _secret(self, namespace: bytes | str) -> bytes:
        if namespace not in self._named:
            self._known.add(space_of(namespace, self._key))
            self._named.add(namespace)
        return self._key
