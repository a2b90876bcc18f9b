"""Module / launch / SIMT scheduler."""

import struct
import time

import numpy as np

from . import gen, ops
from .memory import POISON, SHIFT, UT, Arena, Race, RaceError, bank_count, sector_count
from .parse import ParsedModule, PtxError, Unsupported, _flat_init, _num

u8, u16, u32, u64, i64, f32 = np.uint8, np.uint16, np.uint32, np.uint64, np.int64, np.float32
DT = {
    "u8": np.uint8,
    "i8": np.int8,
    "u16": np.uint16,
    "i16": np.int16,
    "u32": np.uint32,
    "i32": np.int32,
    "u64": np.uint64,
    "i64": np.int64,
    "f16": np.float16,
    "f32": np.float32,
    "f64": np.float64,
    "pb": np.bool_,
}
LOCAL_W, SHARED_W = 1 << 56, 2 << 56
_LB = u32(1) << np.arange(32, dtype=u32)


class Stats:
    """Counters of one launch."""

    def __init__(self):
        self.warp_instructions = 0
        self.thread_instructions = 0
        self.by_class = {}  # opcode class -> warp-level instructions
        self.global_load_bytes = self.global_store_bytes = 0
        self.shared_load_bytes = self.shared_store_bytes = 0
        self.global_instr = {}  # pc -> dict(line, text, warps, sectors, ideal, bytes)
        self.shared_instr = {}  # pc -> dict(line, text, phases, wavefronts)
        self.barriers = 0
        self.races = []
        self.warnings = []
        self.seconds = 0.0

    @property
    def sectors(self):
        return sum(x["sectors"] for x in self.global_instr.values())

    @property
    def ideal_sectors(self):
        return sum(x["ideal"] for x in self.global_instr.values())

    @property
    def bank_conflicts(self):
        """extra shared-memory wavefronts over the conflict-free number"""
        return sum(x["wavefronts"] - x["phases"] for x in self.shared_instr.values())

    def __str__(self):
        s = [
            f"warp instructions {self.warp_instructions}, thread instructions {self.thread_instructions}, "
            f"{self.seconds:.3f} s",
            "  "
            + ", ".join(f"{k} {v}" for k, v in sorted(self.by_class.items(), key=lambda t: -t[1])),
            f"  global: load {self.global_load_bytes} B, store {self.global_store_bytes} B, sectors {self.sectors} "
            f"(ideal {self.ideal_sectors}); shared bank-conflict wavefronts {self.bank_conflicts}",
        ]
        for d in self.global_instr.values():
            if d["sectors"] > d["ideal"]:
                s.append(
                    f"  line {d['line']}: {d['sectors']} sectors, ideal {d['ideal']}: {d['text']}"
                )
        for d in self.shared_instr.values():
            if d["wavefronts"] > d["phases"]:
                s.append(
                    f"  line {d['line']}: {d['wavefronts']} wavefronts, ideal {d['phases']}: {d['text']}"
                )
        s += [f"  RACE {r}" for r in self.races] + [f"  warning: {w}" for w in self.warnings]
        return "\n".join(s)


class Ctx:
    """A set of threads that execute together (all of them, or a sub-set given by positions in the root arrays)."""

    __slots__ = ("_complete", "cache", "idx", "lane", "n", "nw", "run", "slot", "warp", "wl")

    def __init__(self, run, slot, idx):
        self.run, self.slot, self.idx = run, slot, idx
        self.n = slot.size
        self.cache = {}
        self.warp, self.lane = run.t_warp[slot], run.t_lane[slot]
        self.wl = run.t_wl[slot]
        self.nw = None
        self._complete = False

    def nwarps(self):
        if self.nw is None:
            w = self.warp
            self.nw = int(np.count_nonzero(w[1:] != w[:-1])) + 1 if w.size else 0
        return self.nw

    # -- values ----------------------------------------------------------------
    def sr(self, name):
        if name.startswith("clock") or name == "globaltimer":
            self.run.clock += 32
            c = self.run.clock
            return np.full(
                self.n,
                (c >> 32) if name == "clock_hi" else c & 0xFFFFFFFF if name == "clock" else c,
                u64 if name in ("clock64", "globaltimer") else u32,
            )
        v = self.cache.get(name)
        if v is None:
            v = self.cache[name] = self.run.special(self, name)
        return v

    def par(self, off, dt):
        v = self.cache.get((off, dt))
        if v is None:
            d = np.dtype(DT[dt])
            b = self.run.params[off : off + d.itemsize]
            v = self.cache[(off, dt)] = np.full(self.n, b.view(d)[0])
        return v

    def present(self, mask=None):
        if mask is None:
            v = self.cache.get("present")
            if v is None:
                v = self.cache["present"] = self.ballot(np.ones(self.n, bool))
            return v
        return self.ballot(mask)

    def ballot(self, p):
        acc = np.zeros((self.run.nwarps, 32), bool)
        acc.reshape(-1)[self.wl] = p
        b = np.packbits(acc, axis=1, bitorder="little").view(u32)[:, 0]
        return b[self.warp]

    def complete(self):
        if not self._complete:
            self._complete = bool((self.present() == self.run.live[self.warp]).all())
        return self._complete

    def full_warps(self, pc):
        if self.n & 31 or not (self.present() == 0xFFFFFFFF).all():
            self.err(pc, "warp-wide matrix instruction executed by a partial warp", 0)
        return self.n >> 5

    # -- errors ----------------------------------------------------------------
    def err(self, pc, msg, lane, addr=None):
        r = self.run
        i = r.code.instrs[pc]
        t = r.thread_name(int(self.slot[lane]))
        a = f", address {addr:#x}" if addr is not None else ""
        raise PtxError(f'{r.name}: {msg}; PTX line {i.line}: "{i.text}"; thread {t}{a}')

    # -- memory ----------------------------------------------------------------
    def split(self, space, a):
        """generic addresses -> list of (space, selector or None, address)"""
        if space != "x":
            return [(space, None, a)]
        lo, hi = int(a.min()), int(a.max())
        if hi < LOCAL_W and lo >= 0:
            return [("g", None, a)]
        if lo >= SHARED_W:
            return [("s", None, a - SHARED_W)]
        if lo >= LOCAL_W and hi < SHARED_W:
            return [("l", None, a - LOCAL_W)]
        out = []
        k = a >> 56
        for v in np.unique(k):
            sel = np.flatnonzero(k == v)
            sp = {0: "g", 1: "l", 2: "s"}.get(int(v), "g")
            out.append((sp, sel, a[sel] - (int(v) << 56 if sp != "g" else 0)))
        return out

    def where_(self, pc, sp, a, size, sel, write):
        """bounds / alignment check -> (flat view getter, byte offsets) or None for the multi-buffer slow path"""
        r = self.run
        if int(np.bitwise_or.reduce(a)) & (size - 1):
            j = int(np.flatnonzero(a & (size - 1))[0])
            self.err(
                pc,
                f"misaligned {size}-byte {'store' if write else 'load'}",
                j if sel is None else int(sel[j]),
                int(a[j]),
            )
        lo, hi = int(a.min()), int(a.max())
        if sp == "g":
            b = r.arena.locate(lo, hi + size)
            if b is not None:
                if write and not b.writeable:
                    self.err(
                        pc,
                        f"store to read-only buffer {b.name}",
                        0 if sel is None else int(sel[0]),
                        lo,
                    )
                return b, a - b.base
            bases = np.array(r.arena.bases, i64)
            ends = np.array([x.end for x in r.arena.bufs], i64)
            k = np.searchsorted(bases, a, "right") - 1
            bad = (k < 0) | (a + size > ends[np.maximum(k, 0)])
            if bad.any():
                j = int(np.flatnonzero(bad)[0])
                self.err(
                    pc,
                    f"out-of-bounds global {'store' if write else 'load'} of {size} bytes "
                    f"({int(bad.sum())} of {a.size} threads; {r.arena.describe(int(a[j]))})",
                    j if sel is None else int(sel[j]),
                    int(a[j]),
                )
            return None, k
        if sp == "s":
            if lo < 0 or hi + size > r.shared_bytes:
                j = int(np.flatnonzero((a < 0) | (a + size > r.shared_bytes))[0])
                self.err(
                    pc,
                    f"out-of-bounds shared {'store' if write else 'load'} of {size} bytes (block has {r.shared_bytes} bytes)",
                    j if sel is None else int(sel[j]),
                    int(a[j]),
                )
            base = self.cache.get("sb")
            if base is None:
                base = self.cache["sb"] = r.t_blk[self.slot] * r.shared_stride
            return r.shared, a + (base if sel is None else base[sel])
        if lo < 0 or hi + size > r.local_bytes:
            j = int(np.flatnonzero((a < 0) | (a + size > r.local_bytes))[0])
            self.err(
                pc,
                f"out-of-bounds local access of {size} bytes (frame has {r.local_bytes} bytes)",
                j if sel is None else int(sel[j]),
                int(a[j]),
            )
        base = self.slot * r.local_stride
        return r.local, a + (base if sel is None else base[sel])

    def ld(self, pc, space, addr, es, vec, mask):
        if mask is not None:
            sel = np.flatnonzero(mask)
            out = np.zeros((vec, self.n), UT[es])
            if sel.size == 0:
                return out
            if sel.size == self.n:
                return self.ld(pc, space, addr, es, vec, None)
            out[:, sel] = self._ld(pc, space, addr[sel], es, vec, sel)
            return out
        return self._ld(pc, space, addr, es, vec, None)

    def _ld(self, pc, space, addr, es, vec, sel):
        size = es * vec
        parts = self.split(space, addr) if space == "x" else ((space, None, addr),)
        if len(parts) > 1:
            out = np.zeros((vec, addr.size), UT[es])
            for sp, s, a in parts:
                ss = s if sel is None else sel[s]
                out[:, s] = self._ld(pc, sp, a, es, vec, ss)
            return out
        sp, _, a = parts[0]
        buf, off = self.where_(pc, sp, a, size, sel, False)
        r = self.run
        if r.stats_on or r.race is not None:
            self.account(pc, sp, a, off, size, sel, False)
        if buf is None:
            out = np.zeros((vec, a.size), UT[es])
            for k in np.unique(off):
                s = np.flatnonzero(off == k)
                b = r.arena.bufs[k]
                v = b.view(es, vec)[(a[s] - b.base) >> SHIFT[size]]
                out[:, s] = v.T if vec > 1 else v
            return out
        v = buf.view(es, vec)
        if vec == 1:
            return (v.take(off >> SHIFT[size]),)
        return np.ascontiguousarray(v.take(off >> SHIFT[size], axis=0).T)

    def st(self, pc, space, addr, vals, es, mask):
        sel = None
        if mask is not None:
            sel = np.flatnonzero(mask)
            if sel.size == 0:
                return
            if sel.size == self.n:
                sel = None
            else:
                addr = addr[sel]
                vals = tuple(v[sel] for v in vals)
        self._st(pc, space, addr, vals, es, sel)

    def _st(self, pc, space, addr, vals, es, sel):
        vec = len(vals)
        size = es * vec
        parts = self.split(space, addr) if space == "x" else ((space, None, addr),)
        if len(parts) > 1:
            for sp, s, a in parts:
                self._st(pc, sp, a, tuple(v[s] for v in vals), es, s if sel is None else sel[s])
            return
        sp, _, a = parts[0]
        buf, off = self.where_(pc, sp, a, size, sel, True)
        r = self.run
        if r.stats_on or r.race is not None:
            self.account(pc, sp, a, off, size, sel, True)
        if buf is None:
            for k in np.unique(off):
                s = np.flatnonzero(off == k)
                b = r.arena.bufs[k]
                if not b.writeable:
                    self.err(
                        pc,
                        f"store to read-only buffer {b.name}",
                        int(s[0]) if sel is None else int(sel[s[0]]),
                        int(a[s[0]]),
                    )
                v = b.view(es, vec)
                o = (a[s] - b.base) >> SHIFT[size]
                if vec == 1:
                    v[o] = vals[0][s]
                else:
                    v[o] = np.stack([q[s] for q in vals], 1)
            return
        v = buf.view(es, vec)
        if vec == 1:
            v[off >> SHIFT[size]] = vals[0]
        else:
            v[off >> SHIFT[size]] = np.stack(vals, 1)

    def account(self, pc, sp, a, off, size, sel, write, atomic=False):
        r = self.run
        if sp == "l":
            return
        st = r.stats
        n = a.size
        if sp == "g":
            if not r.stats_on:
                return
            if write:
                st.global_store_bytes += n * size
            if not write or atomic:
                st.global_load_bytes += n * size
            w, s, i = sector_count(self.warp if sel is None else self.warp[sel], a, size)
            d = st.global_instr.get(pc)
            if d is None:
                ins = r.code.instrs[pc]
                d = st.global_instr[pc] = {
                    "line": ins.line,
                    "text": ins.text,
                    "warps": 0,
                    "sectors": 0,
                    "ideal": 0,
                    "bytes": 0,
                }
            d["warps"] += w
            d["sectors"] += s
            d["ideal"] += i
            d["bytes"] += n * size
            return
        if r.stats_on:
            if write:
                st.shared_store_bytes += n * size
            if not write or atomic:
                st.shared_load_bytes += n * size
            self.bank(pc, self.wl if sel is None else self.wl[sel], a, size)
        if r.race is not None:
            r.race.access(
                pc,
                self.warp if sel is None else self.warp[sel],
                off,
                size,
                write,
                atomic,
                self.lane if sel is None else self.lane[sel],
            )

    def bank(self, pc, wl, a, size):
        st = self.run.stats
        p, w = bank_count(wl, a, size)
        d = st.shared_instr.get(pc)
        if d is None:
            ins = self.run.code.instrs[pc]
            d = st.shared_instr[pc] = {
                "line": ins.line,
                "text": ins.text,
                "phases": 0,
                "wavefronts": 0,
            }
        d["phases"] += p
        d["wavefronts"] += w

    # -- atomics ---------------------------------------------------------------
    def atom(self, pc, space, op, ty, dt, addr, b, c, mask, need):
        sel = None
        if mask is not None:
            sel = np.flatnonzero(mask)
            if sel.size == 0:
                return np.zeros(self.n, dt)
            addr, b = addr[sel], b[sel]
            c = c[sel] if c is not None else None
        r = self._atom(pc, space, op, ty, dt, addr, b, c, sel, need)
        if sel is None or r is None:
            return r
        out = np.zeros(self.n, dt)
        out[sel] = r
        return out

    def _atom(self, pc, space, op, ty, dt, addr, b, c, sel, need):
        parts = self.split(space, addr)
        if len(parts) > 1:
            out = np.zeros(addr.size, dt)
            for sp, s, a in parts:
                q = self._atom(
                    pc,
                    sp,
                    op,
                    ty,
                    dt,
                    a,
                    b[s],
                    c[s] if c is not None else None,
                    s if sel is None else sel[s],
                    True,
                )
                out[s] = q
            return out
        sp, _, a = parts[0]
        size = np.dtype(dt).itemsize
        buf, off = self.where_(pc, sp, a, size, sel, True)
        self.account(
            pc, sp, a, off, size, sel, True, True
        ) if self.run.stats_on or self.run.race is not None else None
        if buf is None:
            out = np.zeros(a.size, dt)
            for k in np.unique(off):
                s = np.flatnonzero(off == k)
                bb = self.run.arena.bufs[k]
                out[s] = self._rmw(
                    bb.view(size, 1).view(dt),
                    (a[s] - bb.base) >> SHIFT[size],
                    op,
                    ty,
                    dt,
                    b[s],
                    c[s] if c is not None else None,
                    True,
                )
            return out
        return self._rmw(buf.view(size, 1).view(dt), off >> SHIFT[size], op, ty, dt, b, c, need)

    def _rmw(self, v, o, op, ty, dt, b, c, need):
        simple = ty not in ("f16", "bf16", "f16x2", "bf16x2")
        if simple and not need:
            f = {
                "add": np.add,
                "min": np.minimum,
                "max": np.maximum,
                "and": np.bitwise_and,
                "or": np.bitwise_or,
                "xor": np.bitwise_xor,
            }.get(op)
            if f is not None:
                f.at(v, o, b)
                return None
        srt = np.sort(o)
        uniq = srt.size < 2 or not (srt[1:] == srt[:-1]).any()
        if uniq:
            old = v[o]
            v[o] = self._apply(op, ty, dt, old, b, c)
            return old
        if simple and op == "add" and np.dtype(dt).kind in "iu":
            k = np.argsort(o, kind="stable")
            os_, bs = o[k], b[k]
            cs = np.cumsum(bs, dtype=dt)
            start = np.flatnonzero(np.concatenate([[True], os_[1:] != os_[:-1]]))
            grp = np.cumsum(np.concatenate([[True], os_[1:] != os_[:-1]])) - 1
            ex = cs - bs
            ex = ex - ex[start][grp]
            old = np.empty_like(bs)
            old[k] = v[os_] + ex
            np.add.at(v, o, b)
            return old
        old = np.empty(o.size, dt)
        # rounds: each round handles at most one lane per address, in lane order
        k = np.argsort(o, kind="stable")
        os_ = o[k]
        first = np.concatenate([[True], os_[1:] != os_[:-1]])
        st = np.flatnonzero(first)
        rank = np.arange(o.size) - st[np.cumsum(first) - 1]
        for q in range(int(rank.max()) + 1):
            s = k[rank == q]
            ov = v[o[s]]
            old[s] = ov
            v[o[s]] = self._apply(op, ty, dt, ov, b[s], c[s] if c is not None else None)
        return old

    @staticmethod
    def _apply(op, ty, dt, a, b, c):
        if op == "exch":
            return b
        if op == "cas":
            return np.where(a == b, c, a)
        if op == "inc":
            return np.where(a >= b, dt(0), a + dt(1))
        if op == "dec":
            return np.where((a == 0) | (a > b), b, a - dt(1))
        if ty in ("f16", "f16x2", "bf16", "bf16x2"):
            a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
            x, y = (
                (a.view(np.float16), b.view(np.float16))
                if ty[0] == "f"
                else (ops.bf2f(a.view(u16)), ops.bf2f(b.view(u16)))
            )
            r = {"add": np.add, "min": np.fmin, "max": np.fmax}[op](x, y)
            return (r if ty[0] == "f" else ops.f2bf(r)).view(dt)
        return {
            "add": np.add,
            "min": np.minimum,
            "max": np.maximum,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
            "xor": np.bitwise_xor,
        }[op](a, b)

    def wsync(self):
        if self.run.race is not None:
            self.run.race.wsync(self.warp)

    # -- cp.async --------------------------------------------------------------
    def cp_async(self, pc, dst, src, n, ss, mask):
        sel = None
        if mask is not None:
            sel = np.flatnonzero(mask)
            if sel.size == 0:
                return
            dst, src = dst[sel], src[sel]
            ss = ss[sel] if ss is not None else None
        m = dst.size
        r = self.run
        _, off = self.where_(pc, "s", dst, n, sel, True)
        data = np.zeros((m, n), u8)
        if ss is None:
            groups = [(n, None)]
        else:
            ss = np.minimum(ss, u32(n))
            groups = [(int(v), np.flatnonzero(ss == v)) for v in np.unique(ss)]
        for v, s in groups:
            if v == 0:
                continue
            a = src if s is None else src[s]
            q = sel if s is None else (s if sel is None else sel[s])
            if int(np.bitwise_or.reduce(a)) & (n - 1):
                j = int(np.flatnonzero(a & (n - 1))[0])
                self.err(
                    pc,
                    f"misaligned cp.async source ({n} bytes)",
                    j if q is None else int(q[j]),
                    int(a[j]),
                )
            step = v if v in (4, 8, 16) else 1
            for o in range(0, v, step):
                es = min(step, 4)
                x = self._ld(pc, "g", a + i64(o), es, step // es, q)
                x = np.ascontiguousarray(np.stack(list(x), 1)).view(u8).reshape(-1, step)
                if s is None:
                    data[:, o : o + step] = x
                else:
                    data[s, o : o + step] = x
        if r.stats_on:
            r.stats.shared_store_bytes += m * n
            self.bank(pc, self.wl if sel is None else self.wl[sel], dst, n)
        if r.race is not None:
            r.race.access(pc, self.warp if sel is None else self.warp[sel], off, n, True)
        slot = self.slot if sel is None else self.slot[sel]
        r.pending.append([pc, slot, off, data, n, r.grp[slot].copy()])

    def cp_commit(self, mask):
        s = self.slot if mask is None else self.slot[mask]
        self.run.grp[s] += 1

    def cp_wait(self, n, mask):
        r = self.run
        if not r.pending:
            return
        s = self.slot if mask is None else self.slot[mask]
        lim = np.full(r.N, -1, i64)
        lim[s] = r.grp[s] - n if n >= 0 else 1 << 40  # groups < lim land
        keep = []
        for e in r.pending:
            pc, slot, off, data, sz, g = e
            ok = g < lim[slot]
            if ok.all():
                r.land(e, None)
            elif ok.any():
                r.land(e, ok)
                no = ~ok
                keep.append([pc, slot[no], off[no], data[no], sz, g[no]])
            else:
                keep.append(e)
        r.pending = keep

    # -- warp collectives --------------------------------------------------------
    def shfl(self, pc, mode, a, b, c, key):
        t = self.cache.get(("shfl", key)) if key is not None else None
        if t is None:
            lane = self.lane.astype(np.int64)
            bv = np.asarray(b).astype(i64) & 31
            cv = np.asarray(c).astype(i64)
            seg = (cv >> 8) & 31
            cl = cv & 31
            maxl = (lane & seg) | (cl & ~seg & 31)
            minl = lane & seg
            if mode == "up":
                j = lane - bv
                p = j >= maxl
            elif mode == "down":
                j = lane + bv
                p = j <= maxl
            elif mode == "bfly":
                j = lane ^ bv
                p = j <= maxl
            else:
                j = minl | (bv & ~seg & 31)
                p = j <= maxl
            j = np.where(p, j, lane)
            src = self.warp * 32 + j
            pres = (self.present() >> j.astype(u32)) & u32(1)
            t = (src, p, bool(pres.all()))
            if key is not None:
                self.cache[("shfl", key)] = t
        src, p, _ok = t
        buf = np.full(self.run.nwarps * 32, u32(0x7FFF7FFF))
        buf[self.wl] = a
        return buf[src], p

    def match(self, a, mk):
        n = self.n
        acc = np.zeros((self.run.nwarps, 32), a.dtype)
        has = np.zeros((self.run.nwarps, 32), bool)
        acc.reshape(-1)[self.wl] = a
        has.reshape(-1)[self.wl] = True
        eq = (acc[self.warp] == a[:, None]) & has[self.warp]
        m = np.packbits(eq, axis=1, bitorder="little").view(u32)[:, 0]
        return m & np.broadcast_to(mk, (n,))

    def redux(self, op, a, mk, absx, nan):
        mk = np.broadcast_to(np.asarray(mk), (self.n,))
        acc = np.zeros((self.run.nwarps, 32), a.dtype)
        acc.reshape(-1)[self.wl] = np.abs(a) if absx else a
        vals = acc[self.warp]
        inm = ((mk & self.present())[:, None] >> np.arange(32, dtype=u32)) & u32(1) != 0
        dt = a.dtype
        if op == "add":
            return np.where(inm, vals, dt.type(0)).sum(1, dtype=dt)
        if op in ("min", "max"):
            if dt.kind == "f":
                f = (
                    (np.minimum if op == "min" else np.maximum)
                    if nan
                    else (np.fmin if op == "min" else np.fmax)
                )
                return f.reduce(
                    np.where(inm, vals, dt.type(np.inf if op == "min" else -np.inf)), axis=1
                )
            ii = np.iinfo(dt)
            return np.where(inm, vals, dt.type(ii.max if op == "min" else ii.min)).__getattribute__(
                op
            )(1)
        f, e = {
            "and": (np.bitwise_and, ~dt.type(0)),
            "or": (np.bitwise_or, dt.type(0)),
            "xor": (np.bitwise_xor, dt.type(0)),
        }[op]
        return f.reduce(np.where(inm, vals, e), axis=1)

    def elect(self, mk):
        m = np.broadcast_to(np.asarray(mk), (self.n,)) & self.present()
        low = m & (~m + u32(1))
        lead = u32(31) - ops.clz(low)
        return lead, lead == self.lane

    def _rows(self, pc, a, num):
        nw = self.full_warps(pc)
        a = a.reshape(nw, 32)[:, : 8 * num]
        sel = np.arange(self.n).reshape(nw, 32)[:, : 8 * num].reshape(-1)
        return nw, np.ascontiguousarray(a).reshape(-1), sel

    def ldmatrix(self, pc, sp, addr, num, trans):
        r = self.run
        nw, a, sel = self._rows(pc, addr, num)
        if sp == "x":
            a = a - SHARED_W
        buf, off = self.where_(pc, "s", a, 16, sel, False)
        if r.stats_on or r.race is not None:
            self.account(pc, "s", a, off, 16, sel, False)
        m = buf.view(4, 4).take(off >> 4, axis=0).view(u16).reshape(nw, num, 8, 8)
        if trans:
            m = m.transpose(0, 1, 3, 2)
        m = np.ascontiguousarray(m).view(u32).reshape(nw, num, 32)
        return [np.ascontiguousarray(m[:, j]).reshape(-1) for j in range(num)]

    def stmatrix(self, pc, sp, addr, vals, trans):
        r = self.run
        num = len(vals)
        nw, a, sel = self._rows(pc, addr, num)
        if sp == "x":
            a = a - SHARED_W
        buf, off = self.where_(pc, "s", a, 16, sel, True)
        if r.stats_on or r.race is not None:
            self.account(pc, "s", a, off, 16, sel, True)
        m = np.stack([v.reshape(nw, 32) for v in vals], 1)  # nw, num, 32
        m = np.ascontiguousarray(m).view(u16).reshape(nw, num, 8, 8)
        if trans:
            m = np.ascontiguousarray(m.transpose(0, 1, 3, 2))
        buf.view(4, 4)[off >> 4] = m.reshape(-1, 8).view(u32)

    def movmatrix(self, pc, v):
        nw = self.full_warps(pc)
        m = np.ascontiguousarray(v).view(u16).reshape(nw, 8, 8).transpose(0, 2, 1)
        return np.ascontiguousarray(m).reshape(-1).view(u32)


class _Flat:
    """shared or local storage with typed views"""

    def __init__(self, nbytes):
        self.raw = np.empty(nbytes, u8)
        self.raw.reshape(-1, 2)[:] = POISON
        self.views = {}

    def view(self, es, vec):
        v = self.views.get((es, vec))
        if v is None:
            v = self.raw.view(UT[es])
            if vec > 1:
                v = v.reshape(-1, vec)
            self.views[(es, vec)] = v
        return v


def _poison(dt, n):
    if dt == "pb":
        return np.zeros(n, bool)
    d = np.dtype(DT[dt])
    return np.resize(POISON, n * d.itemsize).view(d)


class Run:
    """One chunk of blocks executed together."""

    FAIR = (
        3000  # block steps after which a waiting group is scheduled although others have a lower PC
    )
    SPIN = 16  # the same after this many executions of a block that looks like a spin loop
    BOOST = 100  # steps such a group may then run without interruption

    def __init__(
        self, mod, code, grid, block, blocks, params, shared_bytes, stats, stats_on, race, max_steps
    ):
        self.mod, self.code, self.arena = mod, code, mod.arena
        self.name = code.kernel.name
        self.grid, self.block, self.blocks = grid, block, blocks
        self.params, self.stats, self.stats_on = params, stats, stats_on
        self.max_steps = max_steps
        B = block[0] * block[1] * block[2]
        nb = len(blocks)
        self.B, self.N = B, nb * B
        self.wpb = (B + 31) // 32
        self.nwarps = nb * self.wpb
        t = np.tile(np.arange(B), nb)
        self.t_thr = t
        self.t_blk = np.repeat(np.arange(nb), B)
        self.t_warp = self.t_blk * self.wpb + (t >> 5)
        self.t_lane = (t & 31).astype(u32)
        self.t_wl = self.t_warp * 32 + (t & 31)
        self.shared_bytes = shared_bytes
        self.shared_stride = max(128, (shared_bytes + 127) // 128 * 128)
        self.shared = _Flat(nb * self.shared_stride)
        self.local_bytes = code.kernel.local_bytes
        self.local_stride = (self.local_bytes + 31) // 32 * 32
        self.local = _Flat(max(32, self.N * self.local_stride))
        self.live = np.zeros(self.nwarps, u32)
        np.bitwise_or.at(self.live, self.t_warp, u32(1) << self.t_lane)
        self.nlive = self.N
        self.live_blk = np.full(nb, B, i64)
        self.race = Race(nb, self.wpb, self.shared_stride, race == "warp") if race else None
        self.pending = []
        self.grp = np.zeros(self.N, i64)
        self.clock = 0
        # barrier state
        self.bid = np.full(self.N, -1, np.int16)
        self.bpc = np.zeros(self.N, np.int32)
        self.bwait = 0
        self.bexp = np.zeros(nb * 16, i64)
        self.barr = np.zeros(nb * 16, i64)
        self.bred = np.zeros(self.N, bool)
        self.root = Ctx(self, np.arange(self.N), None)
        self.pos = np.arange(self.N)
        self.fill(self.N)

    def fill(self, n):
        p = {}
        self.R = []
        for dt in self.code.regtypes:
            if dt not in p:
                p[dt] = _poison(dt, n)
            self.R.append(p[dt])

    def thread_name(self, slot):
        t, b = int(self.t_thr[slot]), int(self.blocks[self.t_blk[slot]])
        bx, by, _ = self.block
        gx, gy, _ = self.grid
        return f"block ({b % gx},{b // gx % gy},{b // gx // gy}) thread ({t % bx},{t // bx % by},{t // bx // by})"

    def special(self, c, n):
        bx, by, _bz = self.block
        gx, gy, _gz = self.grid
        k, _, ax = n.partition(".")
        d = {"x": 0, "y": 1, "z": 2}.get(ax)
        if k == "tid":
            t = self.t_thr[c.slot]
            return (t % bx if d == 0 else t // bx % by if d == 1 else t // (bx * by)).astype(u32)
        if k in ("ctaid", "clusterid"):
            b = np.asarray(self.blocks)[self.t_blk[c.slot]]
            return (b % gx if d == 0 else b // gx % gy if d == 1 else b // (gx * gy)).astype(u32)
        const = {
            "ntid": self.block,
            "nctaid": self.grid,
            "nclusterid": self.grid,
            "cluster_ctaid": (0, 0, 0),
            "cluster_nctaid": (1, 1, 1),
        }.get(k)
        if const is not None:
            return np.full(c.n, u32(const[d]))
        if n == "laneid":
            return c.lane
        if n == "warpid":
            return (self.t_thr[c.slot] >> 5).astype(u32)
        if n.startswith("lanemask"):
            one = u32(1) << c.lane
            return {
                "eq": one,
                "lt": one - u32(1),
                "le": (one - u32(1)) | one,
                "ge": ~(one - u32(1)),
                "gt": ~((one - u32(1)) | one),
            }[n[-2:]]
        if n == "smid":
            return (np.asarray(self.blocks)[self.t_blk[c.slot]] % 132).astype(u32)
        v = {
            "nwarpid": 64,
            "nsmid": 132,
            "gridid": 1,
            "dynamic_smem_size": self.shared_bytes - self.code.kernel.shared_dyn_off,
            "total_smem_size": self.shared_bytes,
            "cluster_ctarank": 0,
            "cluster_nctarank": 1,
            "is_explicit_cluster": 0,
        }[n]
        return np.full(c.n, u32(max(v, 0)))

    def land(self, e, ok):
        pc, slot, off, data, n, _g = e
        if ok is not None:
            slot, off, data = slot[ok], off[ok], data[ok]
        if self.race is not None:
            self.race.access(pc, self.t_warp[slot], off, n, True)
        if n == 16:
            self.shared.view(4, 4)[off >> 4] = np.ascontiguousarray(data).view(u32)
        else:
            self.shared.view(n, 1)[off >> SHIFT[n]] = np.ascontiguousarray(data).view(UT[n])[:, 0]

    # -- scheduling --------------------------------------------------------------
    def sub(self, ctx, sel):
        idx = sel if ctx.idx is None else ctx.idx[sel]
        return Ctx(self, ctx.slot[sel], idx)

    def merge(self, lst):
        if len(lst) == 1:
            return lst[0]
        n = sum(c.n for c in lst)
        if n == self.root.n:
            return self.root
        idx = np.sort(np.concatenate([c.idx for c in lst]))
        return Ctx(self, self.root.slot[idx], idx)

    def push(self, pc, ctx):
        g = self.groups.get(pc)
        if g is None:
            self.groups[pc] = [ctx]
            self.stamp[pc] = self.step
        else:
            g.append(ctx)

    def go(self):
        blocks, nb = self.code.blocks, len(self.code.blocks)
        self.groups, self.stamp, self.wait = {}, {}, {}
        self.step = 0
        groups = self.groups
        count = self.count = np.zeros(nb, i64)
        tcount = self.tcount = np.zeros(nb, i64)
        self.push(0, self.root)
        spin = 0
        while True:
            boost = 0
            if not groups:
                if self.bwait or self.wait:
                    self.deadlock()
                break
            if len(groups) == 1:
                pc = next(iter(groups))
            else:
                pc = min(groups)
                if self.step & 63 == 0 or spin > self.SPIN:
                    old = min(self.stamp, key=self.stamp.get)
                    if self.step - self.stamp[old] > self.FAIR or spin > self.SPIN:
                        pc = old
                        boost = self.BOOST
                        spin = 0
            lst = groups.pop(pc)
            self.stamp.pop(pc)
            if pc in self.wait:
                lst = lst + self.wait.pop(pc)
            ctx = self.merge(lst)
            # run straight on while nothing else could join at a lower or equal position
            while True:
                self.step += 1
                if self.step > self.max_steps:
                    raise PtxError(
                        f"{self.name}: more than {self.max_steps} block steps; endless loop? last at PTX line "
                        f"{blocks[pc].ins[0].line} thread {self.thread_name(int(ctx.slot[0]))}"
                    )
                if pc >= nb:
                    self.exit(ctx)
                    break
                if ctx.idx is not None and ctx.n == self.nlive and not self.bwait and not self.wait:
                    ctx = self.reroot(ctx, pc)
                B = blocks[pc]
                if B.spin and groups:
                    spin += 1
                if B.coll is not None and not ctx._complete:
                    ctx = self.collective(ctx, B)
                    if ctx is None:
                        break
                count[pc] += ctx.nwarps()
                tcount[pc] += ctx.n
                try:
                    if ctx.idx is None:
                        ret = B.fn(ctx, self.R)
                    else:
                        R, idx = self.R, ctx.idx
                        loc = {r: R[r].take(idx) for r in B.use_list}
                        ret = B.fn(ctx, loc)
                        for r in B.def_list:
                            if B.dst is not None and r == B.dst[1].id:
                                continue
                            a = R[r].copy()
                            a[idx] = loc[r]
                            R[r] = a
                except PtxError:
                    raise
                except Exception as e:
                    raise PtxError(
                        f"{self.name}: internal error in the block at PTX lines {B.ins[0].line}-{B.ins[-1].line} "
                        f"({type(e).__name__}: {e})"
                    ) from e
                t = B.term
                if t == "fall":
                    nxt = pc + 1
                elif t == "cbra":
                    k = int(np.count_nonzero(ret))
                    if k == ctx.n:
                        nxt = B.target
                    elif k == 0:
                        nxt = pc + 1
                    else:
                        if B.target == pc + 1:
                            nxt = pc + 1
                        else:
                            self.push(B.target, self.sub(ctx, np.flatnonzero(ret)))
                            self.push(pc + 1, self.sub(ctx, np.flatnonzero(~ret)))
                            break
                elif t == "bra":
                    nxt = B.target
                elif t == "exit":
                    self.exit(ctx)
                    break
                elif t == "bar":
                    nxt = pc + 1
                    if not self.barrier(ctx, B, ret):
                        break
                elif t == "brx":
                    if (ret >= B.table.size).any():
                        ctx.err(
                            B.ins[-1].pc,
                            "brx.idx index out of range",
                            int(np.flatnonzero(ret >= B.table.size)[0]),
                        )
                    tg = B.table[ret]
                    u = np.unique(tg)
                    if u.size == 1:
                        nxt = int(u[0])
                    else:
                        for x in u:
                            self.push(int(x), self.sub(ctx, np.flatnonzero(tg == x)))
                        break
                else:
                    ctx.err(B.ins[-1].pc, "trap / assertion reached", 0)
                if groups and (boost <= 0 or nxt in groups):
                    self.push(nxt, ctx)
                    break
                boost -= 1
                if self.wait and nxt in self.wait:
                    self.push(nxt, ctx)
                    break
                pc = nxt
        if self.pending:
            w = "cp.async copies still outstanding at kernel end"
            if w not in self.stats.warnings:
                self.stats.warnings.append(w)

    def reroot(self, ctx, pc):
        idx, old = ctx.idx, self.R
        live = self.code.livein[pc]
        self.fill(ctx.n)
        for r in live:
            self.R[r] = old[r].take(idx)
        self.root = Ctx(self, ctx.slot, None)
        self.pos[ctx.slot] = np.arange(ctx.n)
        return self.root

    def exit(self, ctx):
        w = ctx.warp
        self.live[w] = self.live[w] & ~ctx.present()
        np.subtract.at(self.live_blk, self.t_blk[ctx.slot], 1)
        self.nlive -= ctx.n
        if self.wait:
            for pc, l in list(self.wait.items()):
                for c in l:
                    self.push(pc, c)
            self.wait.clear()
        if self.bwait:
            self.bar_check()

    def collective(self, ctx, B):
        """-> the sub-set of ctx that may execute the collective now (or None); the rest waits"""
        i = B.coll
        warp_bar = i.op in ("bar", "barrier")
        if i.op in ("mma", "ldmatrix", "stmatrix", "movmatrix"):
            mask = np.full(ctx.n, u32(0xFFFFFFFF))
        else:
            o = i.ops[-1] if not warp_bar else i.ops[0]
            if o[0] == "i":
                mask = np.full(ctx.n, u32(o[1] & 0xFFFFFFFF))
            else:
                mask = self.R[o[1].id]
                mask = mask if ctx.idx is None else mask[ctx.idx]
                mask = mask.view(u32)
        inm = (mask >> ctx.lane) & u32(1)
        if not inm.all():
            ctx.err(
                i.pc, "executing lane is not in its membermask", int(np.flatnonzero(inm == 0)[0])
            )
        if ctx.complete():
            return ctx
        need = mask & self.live[ctx.warp]
        have = ctx.present()
        ok = (need & ~have) == 0
        if ok.all():
            return ctx
        if warp_bar:
            return self.warp_barrier(ctx, B, ok)
        if not ok.any():
            self.wait.setdefault(B.id, []).append(ctx)
            return None
        self.wait.setdefault(B.id, []).append(self.sub(ctx, np.flatnonzero(~ok)))
        return self.sub(ctx, np.flatnonzero(ok))

    def warp_barrier(self, ctx, B, ok):
        """bar.warp.sync reached from different places: lanes of a mask are released once all of them wait somewhere"""
        ents = [(B.id, ctx)]
        for pc, l in self.wait.items():
            c = self.code.blocks[pc].coll
            if c.op in ("bar", "barrier"):
                ents += [(pc, x) for x in l]
        pres = np.zeros(self.nwarps, u32)
        for pc, c in ents:
            np.bitwise_or.at(pres, c.warp, u32(1) << c.lane)
        for pc, c in ents:
            self.wait.pop(pc, None)
        for pc, c in ents:
            o = self.code.blocks[pc].coll.ops[0]
            m = (
                np.full(c.n, u32(o[1] & 0xFFFFFFFF))
                if o[0] == "i"
                else self.R[o[1].id].take(c.idx if c.idx is not None else np.arange(c.n)).view(u32)
            )
            ok = (m & self.live[c.warp] & ~pres[c.warp]) == 0
            if ok.any():
                s = c if ok.all() else self.sub(c, np.flatnonzero(ok))
                self.count[pc] += s.nwarps()
                self.tcount[pc] += s.n
                s.wsync()
                self.push(pc + 1, s)
            if not ok.all():
                self.wait.setdefault(pc, []).append(
                    c if not ok.any() else self.sub(c, np.flatnonzero(~ok))
                )
        return None

    def barrier(self, ctx, B, ret):
        """-> True when ctx may simply go on"""
        kind, ident, cnt, pred = ret
        self.stats.barriers += ctx.nwarps()
        ids = np.broadcast_to(np.asarray(ident), (ctx.n,)).astype(i64)
        blk = self.t_blk[ctx.slot]
        key = blk * 16 + ids
        if self.race is not None:
            self.race.arrive(ctx.warp, key)
        if (
            kind != "arrive"
            and cnt is None
            and not self.bwait
            and ctx.n == self.nlive
            and not self.barr.any()
            and np.asarray(ident).ndim == 0
        ):
            if self.race is not None:
                self.race.release(ctx.warp, key)
                self.race.pend[np.unique(key)] = 0
            if kind == "red":
                self.set_red(B, ctx.idx, ctx.slot, np.broadcast_to(pred, (ctx.n,)), key)
            return True
        if cnt is not None:
            cn = np.broadcast_to(np.asarray(cnt), (ctx.n,)).astype(i64)
            if (cn & 31).any():
                ctx.err(B.ins[-1].pc, "barrier thread count is not a multiple of the warp size", 0)
            self.bexp[key] = cn
        elif kind != "arrive":
            self.bexp[key] = 0
        if kind == "arrive":
            _w, ix = np.unique(ctx.warp, return_index=True)
            np.add.at(self.barr, key[ix], 32)
            self.bar_check()
            return True
        self.bid[ctx.slot] = ids
        self.bpc[ctx.slot] = B.id
        if pred is not None:
            self.bred[ctx.slot] = pred
        self.bwait += ctx.n
        self.bar_check()
        return False

    def set_red(self, B, idx, slot, pred, key):
        op, reg = B.dst
        n = np.bincount(key, weights=pred, minlength=self.bexp.size).astype(i64)
        tot = np.bincount(key, minlength=self.bexp.size)
        if op == "popc":
            v = n[key].astype(u32)
        elif op == "or":
            v = n[key] > 0
        else:
            v = n[key] == tot[key]
        a = self.R[reg.id].copy()
        if idx is None:
            a[:] = v
        else:
            a[idx] = v
        self.R[reg.id] = a

    def bar_check(self):
        s = np.flatnonzero(self.bid >= 0)
        if not s.size:
            return
        key = self.t_blk[s] * 16 + self.bid[s]
        cnt = np.bincount(key, minlength=self.bexp.size)
        act = cnt > 0
        full = np.repeat(self.live_blk, 16)
        done = act & (self.bexp == 0) & (cnt + self.barr >= full)
        ex = act & (self.bexp > 0)
        if ex.any():
            # threads are counted per warp; exited lanes of an arriving warp count as arrived
            w, ix = np.unique(self.t_warp[s], return_index=True)
            dead = 32 - np.bitwise_count(self.live[w]).astype(i64)
            c2 = cnt + self.barr
            np.add.at(c2, key[ix], dead)
            done |= ex & (c2 >= self.bexp)
            if (ex & (c2 > self.bexp)).any():
                raise PtxError(
                    f"{self.name}: more threads than the declared count arrived at a barrier"
                )
        if not done.any():
            return
        r = done[key]
        s, key = s[r], key[r]
        bpc = self.bpc[s]
        u = np.unique(bpc)
        if u.size > 1:
            aligned = True
            w = self.t_warp[s]
            first = np.full(self.nwarps, -1)
            first[w[::-1]] = bpc[::-1]
            bad = first[w] != bpc
            if bad.any():
                B1 = self.code.blocks[int(bpc[bad][0])]
                i = B1.ins[-1]
                aligned = i.op == "bar" or "aligned" in i.mods
                if aligned:
                    raise PtxError(
                        f"{self.name}: threads of one warp arrived at an aligned barrier from different places; PTX line "
                        f'{i.line} "{i.text}" and line {self.code.blocks[int(first[w[bad][0]])].ins[-1].line}; thread '
                        f"{self.thread_name(int(s[bad][0]))}"
                    )
        if self.race is not None:
            self.race.release(self.t_warp[s], key)
            self.race.pend[np.flatnonzero(done)] = 0
        self.barr[done] = 0
        self.bid[s] = -1
        self.bwait -= s.size
        p = self.pos[s]
        o = np.argsort(p)
        p, s, bpc, key = p[o], s[o], bpc[o], key[o]
        for x in u:
            B = self.code.blocks[int(x)]
            m = bpc == x
            idx = p[m]
            if B.dst is not None:
                # all participants count, whatever their position
                self.set_red(
                    B, idx, s[m], self.bred[s[m]], key[m]
                ) if u.size == 1 else self.bad_red()
            c = self.root if idx.size == self.root.n else Ctx(self, s[m], idx)
            self.push(int(x) + 1, c)

    def bad_red(self):
        raise Unsupported("bar.red reached from several places")

    def deadlock(self):
        msg = []
        for pc, l in self.wait.items():
            i = self.code.blocks[pc].coll
            for c in l[:2]:
                msg.append(
                    f'{c.n} threads wait at PTX line {i.line} "{i.text}" for lanes that never arrive '
                    f"(e.g. {self.thread_name(int(c.slot[0]))}, lanes present {int(c.present()[0]):#010x}, live "
                    f"{int(self.live[c.warp[0]]):#010x})"
                )
        s = np.flatnonzero(self.bid >= 0)
        if s.size:
            for x in np.unique(self.bpc[s]):
                i = self.code.blocks[int(x)].ins[-1]
                q = s[self.bpc[s] == x]
                b = int(self.t_blk[q[0]])
                nbl = int((self.t_blk[q] == b).sum())
                msg.append(
                    f'{q.size} threads wait at barrier PTX line {i.line} "{i.text}" (e.g. '
                    f"{self.thread_name(int(q[0]))}; {nbl} of {int(self.live_blk[b])} live threads of that block are there)"
                )
        raise PtxError(f"{self.name}: deadlock: " + "; ".join(msg[:6]))


class Module:
    """PTX text -> launchable kernels.

    launch(name, grid, block, args, shared_bytes=0, race=False|True|'report'|'warp', stats=True, max_lanes=8192)
    """

    def __init__(self, text):
        self.parsed = ParsedModule(text)
        self.arena = Arena()
        self.symbols = {}
        self._codes = {}
        for v in self.parsed.vars.values():
            self._alloc(v)
        self._patch()

    def _alloc(self, v):
        if v.space in ("global", "const") and v.addr is None and not (v.extern and v.size == 0):
            raw = np.zeros(max(v.size, 1), u8)
            b = self.arena.add(raw, f"{v.space} variable {v.name}", v.space == "global", raw)
            v.addr = b.base
            self.symbols[v.name] = raw[: v.size]

    def _patch(self):
        for v in self.parsed.vars.values():
            if not v.init or v.addr is None:
                continue
            raw, o = self.symbols[v.name], 0
            for x in _flat_init(v.init):
                x = x.strip()
                if not x:
                    continue
                n = _num(x)
                if n is None:
                    q = x
                    if q.startswith("generic("):
                        q = q[8:-1]
                    nm, _, add = q.partition("+")
                    w = self.parsed.vars.get(nm.strip())
                    if w is None or w.addr is None:
                        raise Unsupported(f"initialiser {x} of {v.name}")
                    n = w.addr + int(add or 0)
                if isinstance(n, tuple):
                    if n[0] == "f64" and v.elem == 4:
                        n = struct.unpack(
                            "<I", struct.pack("<f", struct.unpack("<d", struct.pack("<Q", n[1]))[0])
                        )[0]
                    else:
                        n = n[1]
                raw[o : o + v.elem] = np.frombuffer(
                    (n & ((1 << 8 * v.elem) - 1)).to_bytes(v.elem, "little"), u8
                )
                o += v.elem

    def kernels(self):
        return [n for n, f in self.parsed.funcs.items() if f.entry]

    def symbol(self, name):
        """writable byte view of a __device__ / __constant__ variable"""
        return self.symbols[name]

    def ptr(self, arr):
        """register a numpy array and return its device address (for by-value structs)"""
        return self.arena.ptr(arr)

    def reset(self):
        """drop all registered arrays (addresses given out before become invalid)"""
        self.arena.reset()

    def find(self, name):
        ks = self.kernels()
        if name in ks:
            return name
        m = [k for k in ks if name in k]
        if len(m) == 1:
            return m[0]
        raise PtxError(
            f"kernel {name!r}: {'ambiguous: ' + str(m) if m else 'not found in ' + str(ks)}"
        )

    def compiled(self, name):
        c = self._codes.get(name)
        if c is None:
            k = self.parsed.kernel(name)
            for v in list(self.parsed.vars.values()):
                self._alloc(v)
            pb = np.zeros(max(k.param_bytes, 16) + 16, u8)
            k.param_buf = pb
            k.param_base = self.arena.add(pb, f"parameters of {name}", False, pb).base
            c = self._codes[name] = gen.build(k)
        return c

    def pack(self, k, args):
        if len(args) != len(k.params):
            raise PtxError(
                f"{k.name}: {len(args)} arguments given, kernel has {len(k.params)}: "
                f"{[(p.name, p.type, p.size) for p in k.params]}"
            )
        buf = np.zeros(k.param_bytes + 16, u8)
        for p, a in zip(k.params, args, strict=False):
            if isinstance(a, np.void) or (isinstance(a, np.ndarray) and a.ndim == 0):
                a = a.tobytes()
            if isinstance(a, np.ndarray):
                if p.size != 8:
                    raise PtxError(
                        f"{k.name}: array passed for parameter {p.name} of {p.size} bytes"
                    )
                b = struct.pack("<Q", self.arena.ptr(a))
            elif isinstance(a, (bytes, bytearray, memoryview)):
                b = bytes(a)
            elif a is None:
                b = bytes(p.size)
            else:
                t = p.type
                if p.size != {
                    "b8": 1,
                    "u8": 1,
                    "s8": 1,
                    "b16": 2,
                    "u16": 2,
                    "s16": 2,
                    "f16": 2,
                }.get(t, 4 if t.endswith("32") else 8):
                    raise PtxError(
                        f"{k.name}: parameter {p.name} is a {p.size}-byte struct; pass bytes"
                    )
                if t in ("f32", "f64"):
                    b = struct.pack("<f" if t == "f32" else "<d", float(a))
                elif isinstance(a, (float, np.floating)):
                    if t in ("b32", "b64"):
                        b = struct.pack("<f" if t == "b32" else "<d", float(a))
                    else:
                        raise PtxError(
                            f"{k.name}: float passed for integer parameter {p.name} (.{t})"
                        )
                else:
                    b = (int(a) & ((1 << 8 * p.size) - 1)).to_bytes(p.size, "little")
            if len(b) != p.size:
                raise PtxError(f"{k.name}: parameter {p.name} has {p.size} bytes, {len(b)} given")
            buf[p.addr : p.addr + p.size] = np.frombuffer(b, u8)
        return buf

    def launch(
        self,
        name,
        grid,
        block,
        args=(),
        shared_bytes=0,
        race=False,
        stats=True,
        max_lanes=8192,
        max_steps=20_000_000,
        smem_limit=227 * 1024,
    ):
        name = self.find(name)
        code = self.compiled(name)
        k = code.kernel
        grid = (*tuple(int(x) for x in ((grid,) if np.isscalar(grid) else grid)), 1, 1, 1)
        block = (*tuple(int(x) for x in ((block,) if np.isscalar(block) else block)), 1, 1, 1)
        grid, block = grid[:3], block[:3]
        B = block[0] * block[1] * block[2]
        if not 1 <= B <= 1024 or min(grid) < 1:
            raise PtxError(f"{name}: invalid launch configuration grid {grid} block {block}")
        mt = k.directives.get("maxntid")
        if mt and int(np.prod(mt)) < B:
            raise PtxError(f"{name}: block of {B} threads exceeds .maxntid {mt}")
        rq = k.directives.get("reqntid")
        if rq and tuple(([*rq, 1, 1])[:3]) != block:
            raise PtxError(f"{name}: block {block} differs from .reqntid {rq}")
        if k.shared_static > 48 * 1024:
            raise PtxError(f"{name}: {k.shared_static} bytes of static shared memory")
        total = (k.shared_dyn_off + shared_bytes) if shared_bytes else k.shared_static
        if total > smem_limit:
            raise PtxError(f"{name}: {total} bytes of shared memory exceed {smem_limit}")
        params = self.pack(k, args)
        k.param_buf[: k.param_bytes] = params[: k.param_bytes]
        st = Stats()
        nblocks = grid[0] * grid[1] * grid[2]
        per = max(1, max_lanes // B)
        t0 = time.perf_counter()
        nb = len(code.blocks)
        count, tcount = np.zeros(nb, i64), np.zeros(nb, i64)
        with np.errstate(all="ignore"):
            for s in range(0, nblocks, per):
                run = Run(
                    self,
                    code,
                    grid,
                    block,
                    list(range(s, min(s + per, nblocks))),
                    params,
                    total,
                    st,
                    stats,
                    race,
                    max_steps,
                )
                run.go()
                count += run.count
                tcount += run.tcount
                if run.race is not None and run.race.found:
                    self._races(run, st)
        st.seconds = time.perf_counter() - t0
        for b in code.blocks:
            n = int(count[b.id])
            if n:
                st.warp_instructions += n * b.nins
                st.thread_instructions += int(tcount[b.id]) * b.nins
                for c, q in b.classes.items():
                    st.by_class[c] = st.by_class.get(c, 0) + q * n
        if st.races and race != "report":
            raise RaceError(f"{name}: shared-memory race(s):\n" + "\n".join(st.races))
        return st

    def _races(self, run, st):
        ins = run.code.instrs
        for kind, pc, w, b, okind, opc, ow, off, n in run.race.found.values():
            bl = run.blocks[b]
            if len(st.races) < 20:
                st.races.append(
                    f'{kind} by warp {w} at PTX line {ins[pc].line} "{ins[pc].text}" conflicts with {okind} by warp {ow} at '
                    f'line {ins[opc].line} "{ins[opc].text}"; block {bl}, shared byte {off} ({n} bytes in that step)'
                )
