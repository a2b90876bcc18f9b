"""Global arena, shared-memory race detector and access statistics."""

from bisect import bisect_right, insort

import numpy as np

from .parse import PtxError

i64, u8 = np.int64, np.uint8
UT = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SHIFT = {1: 0, 2: 1, 4: 2, 8: 3, 16: 4, 32: 5}
POISON = np.array([0xFF, 0x7F], u8)  # NaN as f16, bf16, f32, f64 and e4m3


class RaceError(PtxError):
    pass


class Buf:
    def __init__(self, base, raw, name, writeable, keep):
        self.base, self.raw, self.name, self.writeable, self.keep = base, raw, name, writeable, keep
        self.end = base + raw.nbytes
        self.views = {}

    def view(self, es, vec):
        v = self.views.get((es, vec))
        if v is None:
            n = self.raw.nbytes // (es * vec)
            v = self.raw[: n * es * vec].view(UT[es])
            if vec > 1:
                v = v.reshape(-1, vec)
            self.views[(es, vec)] = v
        return v


class Arena:
    GAP = 1 << 20

    def __init__(self):
        self.bases, self.bufs = [], []
        self.next = 0x1000000000
        self.byptr = []  # (data pointer, end, serial, buf) sorted
        self.users = set()

    def add(self, raw, name, writeable=True, keep=None):
        b = Buf(self.next, raw, name, writeable, keep)
        self.bases.append(b.base)
        self.bufs.append(b)
        self.next = (b.end + self.GAP + 4095) // 4096 * 4096
        return b

    def ptr(self, arr):
        if not isinstance(arr, np.ndarray):
            raise PtxError(f"pointer argument must be a numpy array, got {type(arr).__name__}")
        if not arr.flags.c_contiguous:
            raise PtxError("pointer argument is not C-contiguous")
        p, n = arr.ctypes.data, arr.nbytes
        i = bisect_right(self.byptr, (p, 1 << 62)) - 1
        while i >= 0:
            q, e, _, b = self.byptr[i]
            if q <= p and p + n <= e:
                return b.base + (p - q)
            i -= 1
            if i < len(self.byptr) - 8:
                break
        raw = arr.reshape(-1).view(u8) if n else np.zeros(0, u8)
        b = self.add(raw, f"{arr.dtype}{list(arr.shape)}", arr.flags.writeable, arr)
        insort(self.byptr, (p, p + n, b.base, b))
        self.users.add(b.base)
        return b.base

    def reset(self):
        """forget every array registered by the user"""
        keep = [b for b in self.bufs if b.base not in self.users]
        self.bufs, self.bases = keep, [b.base for b in keep]
        self.byptr, self.users = [], set()

    def locate(self, lo, hi):
        """buffer holding [lo, hi) or None"""
        i = bisect_right(self.bases, lo) - 1
        if i >= 0:
            b = self.bufs[i]
            if hi <= b.end:
                return b
        return None

    def describe(self, a):
        i = bisect_right(self.bases, a) - 1
        if i < 0:
            return f"address {a:#x} is below every buffer" + (
                " (null pointer?)" if a < 4096 else ""
            )
        b = self.bufs[i]
        s = f"nearest buffer: {b.name} at {b.base:#x}, {b.raw.nbytes} bytes; offset {a - b.base}"
        return s


class Race:
    """Per-byte last writer / last two readers with per-warp vector clocks (joined at barriers)."""

    def __init__(self, nblk, wpb, stride, intra=False, limit=20):
        n = nblk * stride
        self.ep = None
        if intra:  # lanes of one warp between __syncwarp / barriers
            self.ep = np.ones(nblk * wpb, np.int32)
            self.wL, self.rL = np.full(n, -1, np.int8), np.full(n, -1, np.int8)
            self.wE, self.rE = np.zeros(n, np.int32), np.zeros(n, np.int32)
            self.rM = np.zeros(n, bool)
        self.wpb = wpb
        self.VC = np.zeros((nblk * wpb, wpb), np.int32)
        loc = np.arange(nblk * wpb) % wpb
        self.VC[np.arange(nblk * wpb), loc] = 1
        self.pend = np.zeros((nblk * 16, wpb), np.int32)
        self.wW = np.full(n, -1, np.int16)
        self.wC = np.zeros(n, np.int32)
        self.wP = np.zeros(n, np.int32)
        self.wA = np.zeros(n, bool)
        self.rW = [np.full(n, -1, np.int16) for _ in range(2)]
        self.rC = [np.zeros(n, np.int32) for _ in range(2)]
        self.rP = np.zeros(n, np.int32)
        self.stride = stride
        self.found = {}
        self.limit = limit

    def arrive(self, warp, key):
        self.wsync(warp)
        w, ix = np.unique(warp, return_index=True)
        k = key[ix]
        np.maximum.at(self.pend, k, self.VC[w])
        self.VC[w, w % self.wpb] += 1

    def release(self, warp, key):
        w, ix = np.unique(warp, return_index=True)
        k = key[ix]
        self.VC[w] = np.maximum(self.VC[w], self.pend[k])

    def wsync(self, warp):
        if self.ep is not None:
            self.ep[np.unique(warp)] += 1

    def lanes(self, pc, b, gw, w, lane, write, atomic):
        e = self.ep[gw]
        bad = (self.wW[b] == w) & (self.wE[b] == e) & (self.wL[b] != lane)
        if atomic:
            bad &= ~self.wA[b]
        if bad.any():
            self.report(
                "write" if write else "read",
                pc,
                b,
                gw,
                bad,
                "write (other lane)",
                self.wP[b],
                self.wW[b],
            )
        if write:
            bad = (self.rW[0][b] == w) & (self.rE[b] == e) & ((self.rL[b] != lane) | self.rM[b])
            if bad.any():
                self.report("write", pc, b, gw, bad, "read (other lane)", self.rP[b], self.rW[0][b])
            self.wL[b], self.wE[b] = lane, e
        else:
            same = (self.rE[b] == e) & (self.rW[0][b] == w)
            m = same & (self.rM[b] | (self.rL[b] != lane))
            self.rL[b], self.rE[b] = lane, e
            self.rM[b] = m
            bm = b[self.rL[b] != lane]  # several lanes read the byte in this very instruction
            self.rM[bm] = True

    def access(self, pc, warp, off, size, write, atomic=False, lane=None):
        b = (off[:, None] + np.arange(size)).ravel()
        gw = np.repeat(warp, size)
        w = (gw % self.wpb).astype(np.int16)
        if self.ep is not None and lane is not None:
            self.lanes(pc, b, gw, w, np.repeat(lane.astype(np.int8), size), write, atomic)

        def conflict(lw, lc):
            return (lw >= 0) & (lw != w) & (lc > self.VC[gw, np.maximum(lw, 0)])

        bad = conflict(self.wW[b], self.wC[b])
        if atomic:
            bad &= ~self.wA[b]
        if bad.any():
            self.report(
                "read" if not write else "write", pc, b, gw, bad, "write", self.wP[b], self.wW[b]
            )
        if write:
            for t in range(2):
                bad = conflict(self.rW[t][b], self.rC[t][b])
                if bad.any():
                    self.report("write", pc, b, gw, bad, "read", self.rP[b], self.rW[t][b])
            self.wW[b] = w
            self.wC[b] = self.VC[gw, w]
            self.wP[b] = pc
            self.wA[b] = atomic
            if not atomic:
                o = self.wW[b]
                bad = o != w
                if bad.any():
                    self.report("write", pc, b, gw, bad, "write", self.wP[b], o)
        else:
            old = self.rW[0][b] != w
            if old.any():
                bo = b[old]
                self.rW[1][bo] = self.rW[0][bo]
                self.rC[1][bo] = self.rC[0][bo]
            self.rW[0][b] = w
            c = self.VC[gw, w]
            self.rC[0][b] = c
            self.rP[b] = pc
            lost = self.rW[0][b] != w
            if lost.any():
                bl = b[lost]
                self.rW[1][bl] = w[lost]
                self.rC[1][bl] = c[lost]

    def report(self, kind, pc, b, gw, bad, okind, opc, ow):
        j = int(np.flatnonzero(bad)[0])
        key = (int(pc), int(opc[j]), kind, okind)
        if key in self.found:
            self.found[key][-1] += int(bad.sum())
        elif len(self.found) < self.limit:
            self.found[key] = [
                kind,
                int(pc),
                int(gw[j]) % self.wpb,
                int(gw[j]) // self.wpb,
                okind,
                int(opc[j]),
                int(ow[j]),
                int(b[j]) % self.stride,
                int(bad.sum()),
            ]


def _uniq(K):
    """K int64 keys -> sorted unique keys"""
    d = K[1:] - K[:-1]
    if d.size and int(d.min()) < 0:
        K = np.sort(K)
        d = K[1:] - K[:-1]
    if d.size == 0:
        return K
    keep = np.empty(K.size, bool)
    keep[0] = True
    np.not_equal(d, 0, out=keep[1:])
    return K if keep.all() else K[keep]


def sector_count(warp, addr, size):
    """-> (warp-instructions, sectors touched, ideal sectors)"""
    lo = int(addr.min()) & ~31
    rel = addr - lo
    span = int(rel.max())
    if span >= 1 << 40:
        s, i, n = 0, 0, 0
        for w in np.unique(warp):
            a = np.unique(addr[warp == w])
            n += 1
            s += np.unique(a >> 5).size
            i += -(-a.size * size // 32)
        return n, s, i
    U = _uniq((warp.astype(i64) << 40) | rel)
    sec = _uniq(U >> 5)
    cnt = np.bincount(U >> 40)
    cnt = cnt[cnt > 0]
    if size > 32:
        return cnt.size, sec.size * (size // 32), sec.size * (size // 32)
    return int(cnt.size), int(sec.size), int(((cnt * size + 31) // 32).sum())


def bank_count(wl, addr, size):
    """-> (phases with work, wavefronts); wl = warp*32+lane, addr = byte address within the block's shared memory"""
    s = max(size, 4)
    sh = {4: 2, 8: 3, 16: 4}[s]
    lanes = {4: 5, 8: 4, 16: 3}[s]
    G = 128 // s
    u = addr >> sh
    K = ((wl.astype(i64) >> lanes) * G + (u & (G - 1))) << 24 | u
    U = _uniq(K) >> 24
    c = np.bincount(U)
    pad = (-c.size) % G
    if pad:
        c = np.concatenate([c, np.zeros(pad, c.dtype)])
    m = c.reshape(-1, G).max(1)
    return int((m > 0).sum()), int(m.sum())
