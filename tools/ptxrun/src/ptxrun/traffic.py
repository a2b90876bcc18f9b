"""Memory traffic of warp instructions: 32-byte sectors and shared-memory bank conflicts."""

import numpy as np

from .dtypes import i64


def _sorted_unique(keys):
    """np.unique for int64 keys that are mostly in order already."""
    steps = keys[1:] - keys[:-1]
    if steps.size and int(steps.min()) < 0:
        keys = np.sort(keys)
        steps = keys[1:] - keys[:-1]
    if steps.all():
        return keys
    return keys[np.concatenate([[True], steps != 0])]


def sector_count(warp, address, size):
    """Lanes' accesses to global memory -> (warp instructions, sectors, ideal sectors).

    The ideal is what a warp's distinct bytes would need if they lay together.
    """
    offset = address - (int(address.min()) & ~31)
    if int(offset.max()) >= 1 << 40:  # too far apart to share one key with the warp
        parts = [sector_count(warp[warp == w], address[warp == w], size) for w in np.unique(warp)]
        if len(parts) > 1:
            return tuple(int(total) for total in np.sum(parts, 0))
        accesses = np.unique(address)
        return 1, int(np.unique(accesses >> 5).size), -(-accesses.size * size // 32)
    accesses = _sorted_unique((warp.astype(i64) << 40) | offset)
    per_warp = np.bincount(accesses >> 40)
    per_warp = per_warp[per_warp > 0]
    sectors = int(_sorted_unique(accesses >> 5).size)
    if size > 32:
        sectors *= size // 32
        return int(per_warp.size), sectors, sectors
    return int(per_warp.size), sectors, int(((per_warp * size + 31) // 32).sum())


def bank_count(warp_lane, address, size):
    """Lanes' accesses to a block's shared memory -> (phases, wavefronts).

    `warp_lane` is 32 * warp + lane. A phase is the 128 bytes that lanes can access at once (32, 16
    or 8 lanes for 4, 8 or 16 bytes each); it takes a wavefront for every distinct word that falls
    on the same bank, and one for all of its lanes without conflicts.
    """
    size = max(size, 4)
    log2_size, log2_lanes = {4: (2, 5), 8: (3, 4), 16: (4, 3)}[size]
    banks = 128 // size
    word = address >> log2_size
    slot = (warp_lane.astype(i64) >> log2_lanes) * banks + (word & (banks - 1))
    words_per_slot = np.bincount(_sorted_unique(slot << 24 | word) >> 24)
    words_per_slot.resize(-(-words_per_slot.size // banks) * banks, refcheck=False)
    wavefronts = words_per_slot.reshape(-1, banks).max(1)
    return int((wavefronts > 0).sum()), int(wavefronts.sum())
