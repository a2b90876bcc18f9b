from .machine import Module, PtxError, RaceError, Stats, Unsupported  # noqa: F401
