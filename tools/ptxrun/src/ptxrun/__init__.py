"""Run nvcc's PTX on the CPU, to check CUDA kernels where there is no GPU."""

from .errors import PtxError, RaceError, UnsupportedError
from .module import Module
from .stats import Stats

__all__ = ["Module", "PtxError", "RaceError", "Stats", "UnsupportedError"]
