"""The operators by torch's own operators, as peers: what is gained over them.

Written as one would write them for speed: results, and what comes in between, go to memory that is
there already. Arithmetic is in fp32, as ours.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def merge_states(partial_out: Tensor, partial_lse: Tensor) -> Callable[[Tensor, Tensor], None]:
    """`tokendance.ops.merge_states_out` of these, without sinks: called with ``out``, ``lse``."""
    narrow = partial_out.dtype != torch.float32
    total, part = torch.empty(2, *partial_out[0].shape) if narrow else (None, None)

    def merge(out: Tensor, lse: Tensor) -> None:
        torch.logsumexp(partial_lse, dim=0, out=lse)
        weights = (partial_lse - lse).exp_()[..., None]
        added = out if total is None else total
        torch.mul(partial_out[0], weights[0], out=added)
        for rows, weight in zip(partial_out[1:], weights[1:], strict=True):
            added.addcmul_(rows if part is None else part.copy_(rows), weight)
        if added is not out:
            out.copy_(added)

    return merge
