"""The directory of a tenant, in that of its store: it opens by name and key.

Each tenant has page files, a catalogue and a lock of its own. In a catalogue for all, one tenant's
flush would wait for another's, and damage to a record would be everybody's.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path

from tokendance.files.directory import Directory
from tokendance.files.identity import Identity

TENANTS = "tenants"
"""The folder of a store's directory in which those of tenants are."""


def open_tenant(
    store: str | os.PathLike[str], name: str, key: bytes, identity: Identity
) -> Directory:
    """Opens the directory of a tenant, or makes it.

    Args:
        store: the directory of the store.
        name: of the tenant.
        key: its secret.
        identity: of the store's rows.

    Raises:
        StoreInUseError: somebody else has it open.
        OSError: it cannot be read or written.
        DamagedError: its catalogue is not as it was written.
        ValueError: the tenant has another key, or its rows are of another model, geometry, dtype,
            block size or quantization; nothing has been read or changed.
    """
    folder = Path(store) / TENANTS
    folder.mkdir(mode=0o700, exist_ok=True)
    digest = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=16)
    directory = Directory.open(folder / digest.hexdigest(), create=True)
    try:
        if directory.is_new:
            directory.begin(identity, tenant=lambda store: (name, check_of(key, store)))
        elif directory.tenant != name:
            raise ValueError(
                f"name: expected {directory.tenant!r}, whose directory {directory.path} is, got "
                f"{name!r}"
            )
        elif not hmac.compare_digest(directory.key_check, check_of(key, directory.store)):
            raise ValueError(
                f"key: expected that of tenant {name!r} in {directory.path}, got another"
            )
        else:
            directory.identity.check_same(identity, directory.path)
            if directory.identity.codec != identity.codec:
                raise ValueError(
                    f"codec: expected that of {directory.path}, {directory.identity.codec}, got "
                    f"{identity.codec} of the store"
                )
    except BaseException:
        directory.close()
        raise
    return directory


def check_of(key: bytes, store: str) -> str:
    """By what a key is known again: digests of segments are keyed otherwise, and tell nothing of
    it."""
    check = hashlib.blake2b(store.encode(), key=key, person=b"tokendance key")
    return check.hexdigest()
