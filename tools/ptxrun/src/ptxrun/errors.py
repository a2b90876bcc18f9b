"""Errors of the interpreter."""


class PtxError(Exception):
    """PTX that cannot be parsed, or a kernel that did what the hardware would not allow."""


class UnsupportedError(PtxError):
    """A PTX construct this interpreter does not know."""


class RaceError(PtxError):
    """Shared memory accessed by two warps (or lanes) with nothing that orders the accesses."""
