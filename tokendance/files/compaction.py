"""Files written anew without the rows that are not valid any more."""

from __future__ import annotations

from functools import partial

from tokendance.files.catalogue import Changes
from tokendance.files.directory import Directory, FreshRows, Progress

SLACK = 64 << 20
"""Bytes that are not valid any more, beyond those that are, before files are written anew."""
MANY = 256
"""Files, beyond which small ones are put together."""
_BATCH = 1 << 30
"""Bytes of rows that are put into one file."""


def compact(
    directory: Directory, slack: int | None = None, progress: Progress | None = None
) -> int:
    """Removes rows that are not valid any more from the files.

    A file with damaged rows stays as it is.

    Args:
        directory: open for writing.
        slack: bytes of such rows that are left alone, beyond the bytes of the valid ones; None: all
            go.
        progress: is told.

    Returns:
        Bytes that the files have become smaller.

    Raises:
        OSError: it cannot be written. What is valid is as it was.
    """
    directory.check_writable()
    before, members = directory.file_bytes, directory.by_file()
    live = {file: directory.bytes_of(keys) for file, keys in members.items()}
    valid, crowded = sum(live.values()), len(directory.files) > MANY
    if slack is not None and before - valid <= valid + slack and not crowded:
        return 0
    small = [file for file, size in directory.files.items() if crowded and size < _BATCH // 4]
    holed = [file for file, size in directory.files.items() if size > live[file]]
    batch, done = sorted({*small, *holed}), 0
    total = sum(live[file] for file in batch)
    while batch:
        part = [batch.pop(0)]
        while batch and sum(live[file] for file in (*part, batch[0])) <= _BATCH:
            part.append(batch.pop(0))
        whole = [file for file in part if not directory.wrong_in(file, members[file])]
        _write_anew(directory, [key for file in whole for key in members[file]])
        done += sum(live[file] for file in part)
        if progress is not None:
            progress(done, total)
    return before - directory.file_bytes


def _write_anew(directory: Directory, groups: list[int]) -> None:
    found = {key: directory.groups[key] for key in groups}
    fresh = {
        key: FreshRows(one.rows, bool(one.is_master), partial(directory.stream, key))
        for key, one in found.items()
    }
    directory.write(Changes(), fresh)
