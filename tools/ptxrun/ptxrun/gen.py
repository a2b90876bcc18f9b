"""Kernel -> basic blocks -> generated Python functions (one per block) working on arrays of lanes."""

import numpy as np

from . import ops
from .parse import TYPE_SIZE, Instr, PtxError, Unsupported

NP = {
    "u8": "u8",
    "b8": "u8",
    "s8": "i8",
    "u16": "u16",
    "b16": "u16",
    "s16": "i16",
    "u32": "u32",
    "b32": "u32",
    "s32": "i32",
    "u64": "u64",
    "b64": "u64",
    "s64": "i64",
    "f16": "f16",
    "f32": "f32",
    "f64": "f64",
    "bf16": "u16",
    "f16x2": "u32",
    "bf16x2": "u32",
    "tf32": "u32",
    "pred": "pb",
    "e4m3x2": "u16",
    "e5m2x2": "u16",
    "e4m3": "u8",
    "e5m2": "u8",
}
SZ = {
    "u8": 1,
    "i8": 1,
    "u16": 2,
    "i16": 2,
    "u32": 4,
    "i32": 4,
    "u64": 8,
    "i64": 8,
    "f16": 2,
    "f32": 4,
    "f64": 8,
    "pb": 1,
}
CANON = {1: "u8", 2: "u16", 4: "u32", 8: "u64"}
WIDE = {"u8": "u16", "i8": "i16", "u16": "u32", "i16": "i32", "u32": "u64", "i32": "i64"}
UNS = {"i8": "u8", "i16": "u16", "i32": "u32", "i64": "u64"}
RND = {"rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi", "rs"}

CTRL = {"bra", "brx", "ret", "exit", "trap", "bar", "barrier"}
COLL = {"shfl", "vote", "match", "redux", "mma", "ldmatrix", "stmatrix", "movmatrix", "elect"}
NOPS = {
    "membar",
    "fence",
    "prefetch",
    "prefetchu",
    "nanosleep",
    "discard",
    "applypriority",
    "griddepcontrol",
    "setmaxnreg",
    "pmevent",
    "brkpt",
}


def is_coll(i):
    return i.op in COLL or (i.op in ("bar", "barrier") and "warp" in i.mods)


def is_ctrl(i):
    return i.op in CTRL and not is_coll(i)


def canon(reg):
    if reg.type == "pred":
        return "pb"
    if reg.type == "f32":
        return "f32"
    if reg.type == "f64":
        return "f64"
    return CANON[TYPE_SIZE[reg.type]]


def opclass(i):
    o, m = i.op, i.mods
    if o in ("ld", "st", "atom", "red"):
        sp = next((x for x in m if x in ("global", "shared", "local", "param", "const")), "generic")
        return f"{o}.{sp}"
    if o == "ldu":
        return "ld.global"
    if o == "cp":
        return "cp.async" if i.ops else "cp.async.ctl"
    if o in (
        "mma",
        "ldmatrix",
        "stmatrix",
        "shfl",
        "vote",
        "match",
        "redux",
        "cvt",
        "mov",
        "prmt",
        "wmma",
    ):
        return o
    if o in ("bar", "barrier"):
        return "bar"
    if o in ("bra", "brx", "ret", "exit", "trap"):
        return "branch"
    if o in ("setp", "set", "selp", "slct"):
        return "cmp/sel"
    if o in ("ex2", "lg2", "sin", "cos", "tanh", "rcp", "rsqrt", "sqrt", "div") and any(
        x[0] in "fb" for x in m
    ):
        return "sfu/div"
    if o in NOPS:
        return "fence/hint"
    t = m[-1] if m else ""
    if t in ("f32", "f64"):
        return "fp" + t[1:]
    if t in ("f16", "f16x2", "bf16", "bf16x2"):
        return "fp16x2" if t.endswith("x2") else "fp16"
    return "int/logic"


class Block:
    __slots__ = (
        "classes",
        "coll",
        "def_list",
        "defs",
        "dst",
        "emit",
        "fn",
        "id",
        "ins",
        "lines",
        "live",
        "nins",
        "spin",
        "succ",
        "table",
        "target",
        "term",
        "use_list",
        "uses",
    )


class Compiled:
    pass


def build(k):
    """-> Compiled: blocks with executable functions"""
    instrs, labels = _lower(k)
    leaders = {0}
    for n, p in labels.items():
        leaders.add(p)
    for p, i in enumerate(instrs):
        if is_ctrl(i) or (is_coll(i) and i.op in ("bar", "barrier")):
            leaders.add(p + 1)
        if is_coll(i):
            leaders.add(p)
    leaders = sorted(x for x in leaders if x < len(instrs))
    if not leaders:
        raise PtxError(f"kernel {k.name} is empty")
    pos2b = {p: b for b, p in enumerate(leaders)}
    nb = len(leaders)

    def blk(p):
        if p >= len(instrs):
            return nb  # falls off the end = exit
        return pos2b[p]

    env = {n: getattr(ops, n) for n in dir(ops) if not n.startswith("__")}
    env.update(np=np, where=np.where, full=np.full, pb=np.bool_, bmma=ops.mma)
    consts = {}
    blocks = []
    for b, p in enumerate(leaders):
        e = leaders[b + 1] if b + 1 < nb else len(instrs)
        B = Block()
        B.id, B.ins, B.coll, B.table, B.target, B.dst = b, instrs[p:e], None, None, None, None
        last = B.ins[-1]
        B.term = "fall"
        if is_ctrl(last):
            if last.op == "bra":
                B.term = "bra" if last.pred is None else "cbra"
                B.target = blk(labels[last.target])
            elif last.op == "brx":
                B.term = "brx"
                B.table = np.array([blk(labels[x]) for x in k.tables[last.target]])
            elif last.op in ("ret", "exit"):
                B.term = "exit"
            elif last.op == "trap":
                B.term = "trap"
            else:
                B.term = "bar"
        B.succ = {
            "fall": [b + 1],
            "bar": [b + 1],
            "bra": [B.target],
            "cbra": [b + 1, B.target],
            "exit": [],
            "trap": [],
            "brx": list(B.table) if B.table is not None else [],
        }[B.term]
        if is_coll(B.ins[0]):
            B.coll = B.ins[0]
        em = Emit(k, env, consts, B)
        for i in B.ins:
            em.instr(i)
        B.emit = em
        B.uses, B.defs = em.uses, em.defs
        B.nins = len(B.ins)
        B.spin = any(
            (i.op == "atom" and ("cas" in i.mods or "exch" in i.mods))
            or (i.op == "ld" and any(x in i.mods for x in ("volatile", "acquire", "relaxed")))
            for i in B.ins
        )
        cl = {}
        for i in B.ins:
            c = opclass(i)
            cl[c] = cl.get(c, 0) + 1
        B.classes = cl
        blocks.append(B)
    # liveness
    livein = [set() for _ in range(nb + 1)]
    changed = True
    while changed:
        changed = False
        for B in reversed(blocks):
            out = set()
            for s in B.succ:
                out |= livein[s]
            n = B.uses | (out - B.emit.kills)
            if n != livein[B.id]:
                livein[B.id] = n
                changed = True
            B.live = out
    src, _lineno = [], 1
    for B in blocks:
        em = B.emit
        em.flush(B.live)
        B.use_list = sorted(em.uses | em.late_uses)
        B.def_list = sorted(em.defs & B.live)
        src.append(
            f"def bb{B.id}(C,R):\n" + "".join(f" {x}\n" for x in em.lines) + f" return {em.ret}\n"
        )
    env.update(consts)
    text = "\n".join(src)
    code = compile(text, f"<ptx {k.name}>", "exec")
    exec(code, env)
    for B in blocks:
        B.fn = env[f"bb{B.id}"]
    c = Compiled()
    c.kernel, c.blocks, c.source = k, blocks, text
    c.regtypes = [canon(r) for r in k.regs]
    c.instrs = instrs
    c.livein = livein
    return c


def _lower(k):
    """predicated control/collective instructions -> branch around; pcs are renumbered"""
    out, remap, extra = [], {}, {}
    for p, i in enumerate(k.instrs):
        remap[p] = len(out)
        if i.pred and (is_coll(i) or (is_ctrl(i) and i.op != "bra")):
            b = Instr()
            b.op, b.mods, b.ops, b.line, b.text, b.where, b.labels = (
                "bra",
                [],
                [],
                i.line,
                i.text,
                i.where,
                None,
            )
            b.pred = (i.pred[0], not i.pred[1])
            b.target = f"__after{p}"
            out.append(b)
            i2 = Instr()
            for s in ("op", "mods", "ops", "line", "text", "where", "labels", "target"):
                setattr(i2, s, getattr(i, s))
            i2.pred = None
            out.append(i2)
            extra[b.target] = len(out)
        else:
            out.append(i)
    remap[len(k.instrs)] = len(out)
    labels = {n: remap[p] for n, p in k.labels.items()}
    labels.update(extra)
    for p, i in enumerate(out):
        i.pc = p
    return out, labels


class Emit:
    def __init__(self, k, env, consts, B):
        self.k, self.env, self.consts, self.B = k, env, consts, B
        self.lines, self.cache, self.dirty = [], {}, set()
        self.uses, self.defs, self.kills, self.late_uses = set(), set(), set(), set()
        self.nv = 0
        self.ret = "None"
        self.P = None
        self.arr = False

    # ---- plumbing ----
    def tmp(self, expr):
        self.nv += 1
        v = f"v{self.nv}"
        self.lines.append(f"{v}={expr}")
        return v

    def const(self, val, dt):
        """numpy scalar constant of dtype dt from raw python int bits or ('f', ...)"""
        t = getattr(ops, dt) if dt != "pb" else np.bool_
        x = np.bool_(val) if dt == "pb" else t(val)
        name = f"K_{dt}_{len(self.consts)}"
        key = (dt, x.tobytes())
        if key in self.consts:
            return self.consts[key]
        self.consts[key] = name
        self.env[name] = x
        return name

    def imm(self, op, dt):
        kind, v = op[0], op[1]
        if kind == "f":
            ty, bits = v
            fv = np.array([bits], np.uint32 if ty == "f32" else np.uint64).view(
                np.float32 if ty == "f32" else np.float64
            )[0]
            if dt == "f32":
                return (
                    self.const(fv, "f32")
                    if ty == "f64" or not np.isnan(fv)
                    else self._bits(bits, "f32")
                )
            if dt == "f64":
                return self.const(fv, "f64") if not np.isnan(fv) else self._bits(bits, "f64")
            if dt == "f16":
                return self.const(np.float16(fv), "f16")
            if SZ[dt] in (4, 8):
                return self._bits(bits, dt)
            raise Unsupported(f"float immediate as {dt}: {self.cur}")
        if dt in ("f32", "f64", "f16"):
            w = SZ[dt] * 8
            return self._bits(v & ((1 << w) - 1), dt)
        if dt == "pb":
            return self.const(v != 0, "pb")
        w = SZ[dt] * 8
        v &= (1 << w) - 1
        if dt[0] == "i" and v >> (w - 1):
            v -= 1 << w
        return self.const(v, dt)

    def _bits(self, bits, dt):
        u = {2: np.uint16, 4: np.uint32, 8: np.uint64}[SZ[dt]]
        x = np.array([bits], u).view(
            getattr(
                np,
                {
                    "f16": "float16",
                    "f32": "float32",
                    "f64": "float64",
                    "u32": "uint32",
                    "i32": "int32",
                    "u64": "uint64",
                    "i64": "int64",
                }[dt],
            )
        )[0]
        key = (dt, x.tobytes())
        if key not in self.consts:
            self.consts[key] = f"K_{dt}_{len(self.consts)}"
            self.env[self.consts[key]] = x
        return self.consts[key]

    def use(self, op, dt):
        """operand as a python expression of numpy dtype dt"""
        kind = op[0]
        if kind in ("i", "f"):
            return self.imm(op, dt)
        if kind == "not":
            self.arr = True
            return f"(~{self.use(op[1], 'pb')})"
        if kind == "s":
            self.arr = True
            e = self.special(op[1])
            if dt != e[1]:
                return self.tmp(f"{e[0]}.astype({dt})")
            return e[0]
        if kind in ("var", "kparam", "sym+"):
            return (
                self.const(self.symaddr(op), "u64" if dt in ("u64", "i64") else dt)
                if dt != "i64"
                else self.const(self.symaddr(op), "i64")
            )
        if kind != "r":
            raise Unsupported(f"operand {op} in {self.cur}")
        r = op[1]
        self.arr = True
        c = self.cache.get(r.id)
        cd = canon(r)
        if c is None:
            self.uses.add(r.id)
            c = self.cache[r.id] = {cd: self.tmp(f"R[{r.id}]")}
        if dt in c:
            return c[dt]
        if dt == "pb" or cd == "pb":
            raise PtxError(f"predicate/value mix in {self.cur}")
        rs, ds = SZ[cd], SZ[dt]
        if rs == ds:
            _n, v = next((n, v) for n, v in c.items() if n in SZ and SZ[n] == rs)
            c[dt] = self.tmp(f"{v}.view({dt})")
        elif rs > ds:
            w = self.use(op, CANON[rs])
            u = UNS.get(dt, dt)
            if u[0] == "f":
                raise Unsupported(f"register width mismatch: {self.cur}")
            if u not in c:
                c[u] = self.tmp(f"{w}.astype({u})")
            if u != dt:
                c[dt] = self.tmp(f"{c[u]}.view({dt})")
        else:
            raise Unsupported(f"operand {r.name} (.{r.type}) is narrower than {dt}: {self.cur}")
        return c[dt]

    def define(self, op, expr, dt):
        if op[0] == "_":
            return
        if op[0] != "r":
            raise Unsupported(f"destination {op} in {self.cur}")
        r = op[1]
        cd = canon(r)
        if not self.arr:
            expr = f"full(C.n,{expr})" if dt != "pb" else f"full(C.n,{expr},pb)"
        if cd == "pb" and dt != "pb":
            raise PtxError(f"predicate destination mismatch: {self.cur}")
        if dt != "pb" and SZ[dt] < SZ[cd]:
            w = ("i" if dt[0] == "i" else "u") + str(8 * SZ[cd])
            if dt[0] == "f":
                expr = f"({expr}).view({CANON[SZ[dt]]})"
            expr = f"({expr}).astype({w})"
            dt = w
        elif dt != "pb" and SZ[dt] > SZ[cd]:
            raise Unsupported(f"result wider than destination: {self.cur}")
        if self.P is not None:
            old = self.use(op, dt)
            expr = f"where({self.P},{expr},{old})"
        elif r.id not in self.uses:
            self.kills.add(r.id)
        else:
            self.kills.add(r.id)
        v = self.tmp(expr)
        self.cache[r.id] = {dt: v}
        self.defs.add(r.id)
        self.dirty.add(r.id)

    def flush(self, live):
        keep = []
        for rid in sorted(self.dirty & live):
            cd = canon(self.k.regs[rid])
            c = self.cache[rid]
            if cd in c:
                v = c[cd]
            else:
                v = next(v for n, v in c.items() if n in SZ and SZ[n] == SZ[cd]) + f".view({cd})"
            keep.append(f"R[{rid}]={v}")
        self.lines += keep

    def symaddr(self, op):
        off = 0
        if op[0] == "sym+":
            off = op[2]
            op = op[1]
        if op[0] == "kparam":
            return self.k.param_base + op[1].addr + off
        v = op[1]
        if v.space == "shared":
            return v.saddr + off
        if v.space in ("local", "param"):
            return v.laddr + off
        if v.addr is None:
            raise PtxError(f"variable {v.name} has no storage (extern?): {self.cur}")
        return v.addr + off

    def special(self, n):
        if n in (
            "tid.x",
            "tid.y",
            "tid.z",
            "ntid.x",
            "ntid.y",
            "ntid.z",
            "ctaid.x",
            "ctaid.y",
            "ctaid.z",
            "nctaid.x",
            "nctaid.y",
            "nctaid.z",
            "laneid",
            "warpid",
            "nwarpid",
            "smid",
            "nsmid",
            "gridid",
            "lanemask_eq",
            "lanemask_lt",
            "lanemask_le",
            "lanemask_gt",
            "lanemask_ge",
            "clock",
            "clock_hi",
            "dynamic_smem_size",
            "total_smem_size",
            "cluster_ctarank",
            "cluster_nctarank",
            "cluster_ctaid.x",
            "cluster_ctaid.y",
            "cluster_ctaid.z",
            "cluster_nctaid.x",
            "cluster_nctaid.y",
            "cluster_nctaid.z",
            "clusterid.x",
            "clusterid.y",
            "clusterid.z",
            "nclusterid.x",
            "nclusterid.y",
            "nclusterid.z",
            "is_explicit_cluster",
        ):
            return self.tmp(f"C.sr({n!r})"), "u32"
        if n in ("clock64", "globaltimer"):
            return self.tmp(f"C.sr({n!r})"), "u64"
        if n == "globaltimer_lo":
            return self.tmp("C.sr('globaltimer')"), "u64"
        raise Unsupported(f"special register %{n}: {self.cur}")

    def addr(self, op):
        """memory operand -> int64 array expression; returns (expr, static symbol op or None)"""
        if op[0] != "m":
            raise Unsupported(f"address operand {op} in {self.cur}")
        base, off = op[1], op[2]
        if base[0] in ("var", "kparam", "sym+"):
            return self.tmp(f"full(C.n,{self.const(self.symaddr(base) + off, 'i64')})")
        if base[0] == "i":
            return self.tmp(f"full(C.n,{self.const(base[1] + off, 'i64')})")
        if base[0] != "r":
            raise Unsupported(f"address operand in {self.cur}")
        r = base[1]
        if SZ[canon(r)] == 8:
            a = self.use(base, "i64")
        else:
            u = self.use(base, "u32")
            c = self.cache[r.id]
            key = f"@w{off}"  # 32-bit addresses wrap modulo 2^32
            if key not in c:
                c[key] = self.tmp(
                    f"({u}+{self.const(off & 0xFFFFFFFF, 'u32')}).astype(i64)"
                    if off
                    else f"{u}.astype(i64)"
                )
            return c[key]
        return self.tmp(f"{a}+{self.const(off, 'i64')}") if off else a

    # ---- one instruction ----
    def instr(self, i):
        self.cur = i
        self.arr = False
        self.P = None
        if i.pred is not None and i.op != "bra":
            p = self.use(("r", i.pred[0]), "pb")
            self.P = self.tmp(f"~{p}") if i.pred[1] else p
            self.arr = False
        m = getattr(self, "op_" + i.op, None)
        if m is None:
            if i.op in NOPS:
                return
            raise Unsupported(f"unsupported instruction: {i.text} (PTX line {i.line}, {i.where})")
        try:
            m(i, i.mods, i.ops)
        except (IndexError, KeyError, StopIteration, ValueError, AttributeError) as e:
            raise Unsupported(
                f"unsupported form: {i.text} (PTX line {i.line}, {i.where}) [{type(e).__name__}: {e}]"
            )

    def bad(self):
        raise Unsupported(
            f"unsupported form: {self.cur.text} (PTX line {self.cur.line}, {self.cur.where})"
        )

    def check(self, mods, allowed):
        for m in mods:
            if m not in allowed:
                raise Unsupported(
                    f"unsupported modifier .{m}: {self.cur.text} (PTX line {self.cur.line}, {self.cur.where})"
                )

    # control --------------------------------------------------------------
    def op_bra(self, i, m, o):
        if i.pred is not None:
            p = self.use(("r", i.pred[0]), "pb")
            self.ret = f"~{p}" if i.pred[1] else p

    def op_brx(self, i, m, o):
        self.ret = self.use(o[0], "u32")

    def op_ret(self, i, m, o):
        pass

    op_exit = op_ret

    def op_trap(self, i, m, o):
        pass

    def op_bar(self, i, m, o):
        if "warp" in m:
            self.use(o[0], "u32")
            self.lines.append("C.wsync()")
            return
        m = [x for x in m if x not in ("cta", "aligned")]
        kind = m[0]
        if kind not in ("sync", "red", "arrive"):
            self.bad()
        a = list(o)
        dst = None
        pred = "None"
        if kind == "red":
            dst = a.pop(0)
            pred = self.use(a.pop(), "pb")
            self.B.dst = (m[1], dst[1])
            self.defs.add(dst[1].id)
            self.kills.add(dst[1].id)
            self.cache.pop(dst[1].id, None)
            self.dirty.discard(dst[1].id)
        ident = self.use(a[0], "u32")
        cnt = self.use(a[1], "u32") if len(a) > 1 else "None"
        self.ret = f"({kind!r},{ident},{cnt},{pred})"

    op_barrier = op_bar

    # moves ----------------------------------------------------------------
    def op_mov(self, i, m, o):
        self.check(m, set(TYPE_SIZE))
        t = m[-1]
        d, s = o
        if t == "pred":
            return self.define(d, self.use(s, "pb"), "pb")
        dt = NP[t]
        if d[0] == "v":
            e = 8 * TYPE_SIZE[t] // len(d[1])
            w = CANON[TYPE_SIZE[t]]
            x = self.use(s, w)
            x = self.tmp(x)
            for j, q in enumerate(d[1]):
                if q[0] != "_":
                    sh = f"({x}>>{self.const(e * j, w)})" if j else x
                    self.define(q, f"{sh}.astype(u{e})", f"u{e}")
            return
        if s[0] == "v":
            w = CANON[TYPE_SIZE[t]]
            e = 8 * TYPE_SIZE[t] // len(s[1])
            xs = []
            for j, q in enumerate(s[1]):
                x = f"{self.use(q, f'u{e}')}.astype({w})"
                xs.append(f"({x}<<{self.const(e * j, w)})" if j else x)
            return self.define(d, "|".join(xs), w)
        if s[0] == "f" or (d[0] == "r" and s[0] == "r"):
            dt = {"b32": "u32", "b64": "u64", "b16": "u16"}.get(t, dt)
        self.define(d, self.use(s, dt), dt)

    def op_cvta(self, i, m, o):
        sp = next(x for x in m if x in ("global", "shared", "local", "const", "param"))
        to = "to" in m
        t = NP[m[-1]]
        x = self.use(o[1], t)
        if sp in ("global", "const", "param"):
            return self.define(o[0], x, t)
        base = self.const({"shared": 2 << 56, "local": 1 << 56}[sp], t)
        self.define(o[0], f"{x}-{base}" if to else f"{x}+{base}", t)

    def op_isspacep(self, i, m, o):
        sp = m[0]
        x = self.use(o[1], "u64")
        n = {"global": 0, "local": 1, "shared": 2}.get(sp)
        if n is None:
            self.bad()
        self.define(o[0], f"({x}>>{self.const(56, 'u64')})=={self.const(n, 'u64')}", "pb")

    def op_selp(self, i, m, o):
        dt = NP[m[-1]]
        a, b, p = self.use(o[1], dt), self.use(o[2], dt), self.use(o[3], "pb")
        self.define(o[0], f"where({p},{a},{b})", dt)

    def op_slct(self, i, m, o):
        dt, ct = NP[m[-2]], NP[m[-1]]
        a, b, c = self.use(o[1], dt), self.use(o[2], dt), self.use(o[3], ct)
        self.define(o[0], f"where({c}>=0,{a},{b})", dt)

    # compare --------------------------------------------------------------
    CMP = {
        "eq": "==",
        "ne": "!=",
        "lt": "<",
        "le": "<=",
        "gt": ">",
        "ge": ">=",
        "lo": "<",
        "ls": "<=",
        "hi": ">",
        "hs": ">=",
        "equ": "==",
        "neu": "!=",
        "ltu": "<",
        "leu": "<=",
        "gtu": ">",
        "geu": ">=",
    }

    def compare(self, c, t, a, b, flt):
        if flt and c in ("num", "nan"):
            e = f"(np.isnan({a})|np.isnan({b}))"
            return e if c == "nan" else f"~{e}"
        s = self.CMP[c]
        e = f"({a}{s}{b})"
        if flt:
            if c.endswith("u") and c != "u" and c in ("equ", "ltu", "leu", "gtu", "geu"):
                e = f"({e}|np.isnan({a})|np.isnan({b}))"
            elif c == "ne":
                e = f"({e}&~(np.isnan({a})|np.isnan({b})))"
        return e

    def fval(self, op, t):
        """float operand (scalar types) -> expression f32/f64/f16 for comparing / arithmetic"""
        if t == "bf16":
            return self.tmp(f"bf2f({self.use(op, 'u16')})")
        return self.use(op, NP[t])

    def op_setp(self, i, m, o):
        c = m[0]
        m2 = [x for x in m[1:] if x != "ftz"]
        boolop = m2[0] if m2[0] in ("and", "or", "xor") else None
        t = m2[-1]
        d = o[0]
        d1, d2 = (d[1], d[2]) if d[0] == "|" else (d, None)
        if t in ("f16x2", "bf16x2"):
            f = "h2f" if t == "f16x2" else "b2f"
            a = self.tmp(f"{f}({self.use(o[1], 'u32')})")
            b = self.tmp(f"{f}({self.use(o[2], 'u32')})")
            e = self.tmp(self.compare(c, t, a, b, True))
            r1, r2 = f"{e}[0::2]", f"{e}[1::2]"
            if boolop:
                q = self.use(o[3], "pb")
                s = {"and": "&", "or": "|", "xor": "^"}[boolop]
                r1, r2 = f"({r1}{s}{q})", f"({r2}{s}{q})"
            self.define(d1, r1, "pb")
            if d2:
                self.define(d2, r2, "pb")
            return
        flt = t[0] == "f" or t == "bf16"
        if flt:
            a, b = self.fval(o[1], t), self.fval(o[2], t)
        else:
            dt = NP[t]
            if c in ("lo", "ls", "hi", "hs"):
                dt = UNS.get(dt, dt)
            a, b = self.use(o[1], dt), self.use(o[2], dt)
        e = self.tmp(self.compare(c, t, a, b, flt))
        if boolop:
            q = self.use(o[3], "pb")
            s = {"and": "&", "or": "|", "xor": "^"}[boolop]
            e1 = f"{e}{s}{q}"
            e2 = f"(~{e}){s}{q}"
            e1 = self.tmp(e1)
        else:
            e1, e2 = e, f"~{e}"
        if d2 is not None and d2[0] != "_":
            e2 = self.tmp(e2)
        self.define(d1, e1, "pb")
        if d2 is not None:
            self.define(d2, e2, "pb")

    def op_set(self, i, m, o):
        c = m[0]
        m2 = [x for x in m[1:] if x != "ftz"]
        boolop = m2[0] if m2[0] in ("and", "or", "xor") else None
        dt, t = m2[-2], m2[-1]
        if t in ("f16x2", "bf16x2"):
            f = "h2f" if t == "f16x2" else "b2f"
            a = self.tmp(f"{f}({self.use(o[1], 'u32')})")
            b = self.tmp(f"{f}({self.use(o[2], 'u32')})")
            e = self.tmp(self.compare(c, t, a, b, True))
            if boolop:
                self.bad()
            one = {"f16x2": 0x3C00, "bf16x2": 0x3F80}.get(dt, 0xFFFF)
            return self.define(
                o[0], f"where({e},{self.const(one, 'u16')},{self.const(0, 'u16')}).view(u32)", "u32"
            )
        flt = t[0] == "f" or t == "bf16"
        a, b = (
            (self.fval(o[1], t), self.fval(o[2], t))
            if flt
            else (self.use(o[1], NP[t]), self.use(o[2], NP[t]))
        )
        e = self.compare(c, t, a, b, flt)
        if boolop:
            e = f"({e}{ {'and': '&', 'or': '|', 'xor': '^'}[boolop] }{self.use(o[3], 'pb')})"
        if dt in ("f32", "f16", "bf16"):
            one = {"f32": 0x3F800000, "f16": 0x3C00, "bf16": 0x3F80}[dt]
            w = "u32" if dt == "f32" else "u16"
            return self.define(o[0], f"where({e},{self.const(one, w)},{self.const(0, w)})", w)
        w = NP[dt]
        self.define(
            o[0],
            f"where({e},{self.const(-1 if w[0] == 'i' else (1 << 8 * SZ[w]) - 1, w)},{self.const(0, w)})",
            w,
        )

    # integer / float arithmetic --------------------------------------------
    def ftzw(self, e, on):
        return f"ftz({e})" if on else e

    def arith(self, i, m, o, f):
        """f(kind, a, b, ..)-> expr ; handles every float type via unpack / repack"""
        t = m[-1]
        fz = "ftz" in m
        st = "sat" in m
        src = o[1:]
        if t in ("f32", "f64", "f16"):
            a = [self.use(x, NP[t]) for x in src]
            if fz and t == "f32":
                a = [self.tmp(f"ftz({x})") for x in a]
            e = f(t, a)
            if fz:
                e = f"ftz({e})"
            if st:
                e = f"sat({e})"
            return self.define(o[0], e, NP[t])
        if t in ("f16x2", "bf16x2"):
            fn = "h2f" if t == "f16x2" else "b2f"
            a = [self.tmp(f"{fn}({self.bc(x, 'u32')})") for x in src]
            e = f(t[:-2], a)
            if st:
                e = f"sat({e})"
            self.arr = True
            return self.define(o[0], f"f2h({e})" if t == "f16x2" else f"f2b({e})", "u32")
        if t == "bf16":
            a = [self.tmp(f"bf2f({self.use(x, 'u16')})") for x in src]
            return self.define(o[0], f"f2bf({f('bf16', a)})", "u16")
        self.bad()

    def bc(self, op, dt):
        """operand as a real array (immediates are broadcast)"""
        x = self.use(op, dt)
        return x if op[0] in ("r", "s") else self.tmp(f"full(C.n,{x})")

    def rnd(self, m):
        return next((x for x in m if x in ("rn", "rz", "rm", "rp")), "rn")

    CCREG = None

    def cc(self):
        """pseudo register holding the carry"""
        k = self.k
        if not hasattr(k, "ccreg"):
            from .parse import Reg

            k.ccreg = Reg(len(k.regs), "%CC", "pred")
            k.regs.append(k.ccreg)
        return ("r", k.ccreg)

    def addsub(self, i, m, o, sign):
        t = m[-1]
        if t[0] == "f" or t.startswith("bf"):
            r = self.rnd(m)

            def f(ty, a):
                if ty == "f32" and r != "rn":
                    b = a[1] if sign == "+" else f"(-{a[1]})"
                    return f"add_f32({a[0]},{b},{r!r})"
                if ty == "f64" and r != "rn":
                    self.bad()
                return f"{a[0]}{sign}{a[1]}"

            return self.arith(i, m, o, f)
        self.check(m, {"sat", "cc", t})
        dt = NP[t]
        if t in ("u16x2", "s16x2"):
            self.bad()
        a, b = self.use(o[1], dt), self.use(o[2], dt)
        if "sat" in m:
            return self.define(o[0], f"i2i_sat({a}.astype(i64){sign}{b},i32)", "i32")
        if "cc" in m:
            a, b = self.use(o[1], UNS.get(dt, dt)), self.use(o[2], UNS.get(dt, dt))
            r = self.tmp(f"{a}{sign}{b}")
            c = self.tmp(f"{r}<{a}" if sign == "+" else f"{a}<{b}")
            self.define(o[0], r, UNS.get(dt, dt))
            return self.define(self.cc(), c, "pb")
        self.define(o[0], f"{a}{sign}{b}", dt)

    def op_add(self, i, m, o):
        if m[-1] in ("u16x2", "s16x2"):
            a, b = self.bc(o[1], "u32"), self.bc(o[2], "u32")
            return self.define(o[0], f"({a}.view(u16)+{b}.view(u16)).view(u32)", "u32")
        self.addsub(i, m, o, "+")

    def op_sub(self, i, m, o):
        self.addsub(i, m, o, "-")

    def op_addc(self, i, m, o):
        dt = UNS.get(NP[m[-1]], NP[m[-1]])
        a, b = self.use(o[1], dt), self.use(o[2], dt)
        c = self.use(self.cc(), "pb")
        r1 = self.tmp(f"{a}+{b}")
        r = self.tmp(f"{r1}+{c}.astype({dt})")
        co = self.tmp(f"({r1}<{a})|({r}<{r1})") if "cc" in m else None
        self.define(o[0], r, dt)
        if co:
            self.define(self.cc(), co, "pb")

    def op_subc(self, i, m, o):
        dt = UNS.get(NP[m[-1]], NP[m[-1]])
        a, b = self.use(o[1], dt), self.use(o[2], dt)
        c = self.use(self.cc(), "pb")
        r1 = self.tmp(f"{a}-{b}")
        r = self.tmp(f"{r1}-{c}.astype({dt})")
        co = self.tmp(f"({a}<{b})|({r1}<{r})") if "cc" in m else None
        self.define(o[0], r, dt)
        if co:
            self.define(self.cc(), co, "pb")

    def op_mul(self, i, m, o):
        t = m[-1]
        if t[0] == "f" or t.startswith("bf"):
            r = self.rnd(m)

            def f(ty, a):
                if ty == "f32" and r != "rn":
                    return f"mul_f32({a[0]},{a[1]},{r!r})"
                if ty == "f64" and r != "rn":
                    self.bad()
                return f"{a[0]}*{a[1]}"

            return self.arith(i, m, o, f)
        self.define(o[0], *self.imul(m, o))

    def imul(self, m, o):
        dt = NP[m[-1]]
        a, b = self.use(o[1], dt), self.use(o[2], dt)
        if "wide" in m:
            w = WIDE[dt]
            return f"{a}.astype({w})*{b}.astype({w})", w
        if "hi" in m:
            return f"mulhi({a},{b})", dt
        return f"{a}*{b}", dt

    def op_mul24(self, i, m, o):
        e, dt = self.mul24(m, o)
        self.define(o[0], e, dt)

    def mul24(self, m, o):
        dt = NP[m[-1]]
        a, b = self.use(o[1], dt), self.use(o[2], dt)
        if dt == "i32":
            x = [f"((({q}<<8)>>8).astype(i64))" for q in (a, b)]
        else:
            x = [f"(({q}&0xffffff).astype(u64))" for q in (a, b)]
        e = f"({x[0]}*{x[1]})"
        if "hi" in m:
            e = f"({e}>>16)"
        return f"{e}.astype({dt})", dt

    def op_mad24(self, i, m, o):
        e, dt = self.mul24(m, o)
        self.define(o[0], f"{e}+{self.use(o[3], dt)}", dt)

    def op_mad(self, i, m, o):
        t = m[-1]
        if t[0] == "f":
            return self.op_fma(i, m, o)
        e, dt = self.imul([x for x in m if x not in ("cc", "sat")], o)
        if "cc" in m:
            u = UNS.get(dt, dt)
            p = self.tmp(f"({e}).astype({u})")
            c = self.use(o[3], u)
            r = self.tmp(f"{p}+{c}")
            q = self.tmp(f"{r}<{p}")
            self.define(o[0], r, u)
            return self.define(self.cc(), q, "pb")
        if "sat" in m:
            self.bad()
        self.define(o[0], f"{e}+{self.use(o[3], dt)}", dt)

    def op_madc(self, i, m, o):
        e, dt = self.imul([x for x in m if x != "cc"], o)
        u = UNS.get(dt, dt)
        p = self.tmp(f"({e}).astype({u})")
        c = self.use(o[3], u)
        k = self.use(self.cc(), "pb")
        r1 = self.tmp(f"{p}+{c}")
        r = self.tmp(f"{r1}+{k}.astype({u})")
        co = self.tmp(f"({r1}<{p})|({r}<{r1})") if "cc" in m else None
        self.define(o[0], r, u)
        if co:
            self.define(self.cc(), co, "pb")

    def op_fma(self, i, m, o):
        r = self.rnd(m)
        rl = "relu" in m

        def f(ty, a):
            if ty == "f32":
                e = f"fma_f32({a[0]},{a[1]},{a[2]},{r!r})"
            elif ty == "f64":
                if r != "rn":
                    self.bad()
                e = f"fma_f64({a[0]},{a[1]},{a[2]})"
            elif ty == "f16":
                e = f"bfma({a[0]},{a[1]},{a[2]}).astype(f16)"
            else:
                e = f"bfma({a[0]},{a[1]},{a[2]})"
            return f"relu({e})" if rl else e

        if "oob" in m:
            self.bad()
        self.arith(i, [x for x in m if x != "relu"], o, f)

    def op_div(self, i, m, o):
        t = m[-1]
        if t in ("f32", "f64"):
            r = self.rnd(m)

            def f(ty, a):
                if ty == "f32" and r != "rn":
                    return f"div_f32({a[0]},{a[1]},{r!r})"
                return f"{a[0]}/{a[1]}"

            return self.arith(i, m, o, f)
        dt = NP[t]
        self.define(o[0], f"idiv({self.use(o[1], dt)},{self.use(o[2], dt)})", dt)

    def op_rem(self, i, m, o):
        dt = NP[m[-1]]
        self.define(o[0], f"irem({self.use(o[1], dt)},{self.use(o[2], dt)})", dt)

    def op_sad(self, i, m, o):
        dt = NP[m[-1]]
        a, b, c = self.use(o[1], dt), self.use(o[2], dt), self.use(o[3], dt)
        self.define(o[0], f"{c}+where({a}<{b},{b}-{a},{a}-{b})", dt)

    def op_abs(self, i, m, o):
        t = m[-1]
        if t[0] == "s":
            return self.define(o[0], f"np.abs({self.bc(o[1], NP[t])})", NP[t])
        if t in ("f16x2", "bf16x2"):
            return self.define(
                o[0], f"{self.use(o[1], 'u32')}&{self.const(0x7FFF7FFF, 'u32')}", "u32"
            )
        if t in ("f16", "bf16"):
            return self.define(o[0], f"{self.use(o[1], 'u16')}&{self.const(0x7FFF, 'u16')}", "u16")
        self.arith(i, m, o, lambda ty, a: f"np.abs({a[0]})")

    def op_neg(self, i, m, o):
        t = m[-1]
        if t[0] == "s":
            return self.define(o[0], f"-{self.bc(o[1], NP[t])}", NP[t])
        if t in ("f16x2", "bf16x2"):
            return self.define(
                o[0], f"{self.use(o[1], 'u32')}^{self.const(0x80008000, 'u32')}", "u32"
            )
        if t in ("f16", "bf16"):
            return self.define(o[0], f"{self.use(o[1], 'u16')}^{self.const(0x8000, 'u16')}", "u16")
        self.arith(i, m, o, lambda ty, a: f"-{a[0]}")

    def op_copysign(self, i, m, o):
        dt = NP[m[-1]]
        a, b = self.use(o[1], dt), self.use(o[2], dt)
        self.define(o[0], f"np.copysign({b},{a})", dt)

    def op_testp(self, i, m, o):
        dt = NP[m[-1]]
        a = self.use(o[1], dt)
        tiny = f"np.finfo({dt}).tiny"
        e = {
            "finite": f"np.isfinite({a})",
            "infinite": f"np.isinf({a})",
            "number": f"~np.isnan({a})",
            "notanumber": f"np.isnan({a})",
            "normal": f"(np.isfinite({a})&(np.abs({a})>={tiny}))",
            "subnormal": f"((np.abs({a})<{tiny})&({a}!=0))",
        }[m[0]]
        self.define(o[0], e, "pb")

    def minmax(self, i, m, o, w):
        t = m[-1]
        if t[0] in "usb" and t != "bf16" and t != "bf16x2":
            if t.endswith("x2"):
                a, b = self.bc(o[1], "u32"), self.bc(o[2], "u32")
                q = "i16" if t[0] == "s" else "u16"
                e = f"np.{w}imum({a}.view({q}),{b}.view({q}))"
                if "relu" in m:
                    e = f"np.maximum({e},i16(0))"
                return self.define(o[0], f"{e}.view(u32)", "u32")
            dt = NP[t]
            e = f"np.{w}imum({self.use(o[1], dt)},{self.use(o[2], dt)})"
            if "relu" in m:
                e = f"np.maximum({e},{dt}(0))"
            return self.define(o[0], e, dt)
        nan, xs = "NaN" in m, "xorsign" in m
        m2 = [x for x in m if x not in ("NaN", "xorsign", "abs")]

        def f(ty, a):
            e = f"fminmax({a[0]},{a[1]},{w!r},{nan},{xs})"
            if len(a) == 3:
                e = f"fminmax({e},{a[2]},{w!r},{nan},{xs})"
            return e

        self.arith(i, m2, o, f)

    def op_min(self, i, m, o):
        self.minmax(i, m, o, "min")

    def op_max(self, i, m, o):
        self.minmax(i, m, o, "max")

    def unary(self, i, m, o, f32e, f64e=None):
        t = m[-1]
        if t == "f64" and f64e is None:
            self.bad()

        def f(ty, a):
            if ty == "f64":
                return f64e.format(a[0])
            if ty == "f16":
                return "(" + f32e.format(f"{a[0]}.astype(f32)") + ").astype(f16)"
            return f32e.format(a[0])

        self.arith(i, [x for x in m if x not in ("approx", "full")], o, f)

    def op_rcp(self, i, m, o):
        self.unary(i, m, o, f"div_f32(f32(1),{{0}},{self.rnd(m)!r})", "1.0/{0}")

    def op_sqrt(self, i, m, o):
        self.unary(i, m, o, f"sqrt_f32({{0}},{self.rnd(m)!r})", "np.sqrt({0})")

    def op_rsqrt(self, i, m, o):
        self.unary(i, m, o, "rsqrt({0})", "1.0/np.sqrt({0})")

    def op_ex2(self, i, m, o):
        self.unary(i, m, o, "ex2({0})")

    def op_lg2(self, i, m, o):
        self.unary(i, m, o, "lg2({0})")

    def op_sin(self, i, m, o):
        self.unary(i, m, o, "sin_({0})")

    def op_cos(self, i, m, o):
        self.unary(i, m, o, "cos_({0})")

    def op_tanh(self, i, m, o):
        self.unary(i, m, o, "tanh_({0})")

    # logic ----------------------------------------------------------------
    def logic(self, m, o, s):
        dt = NP[m[-1]]
        self.define(o[0], f"{self.use(o[1], dt)}{s}{self.use(o[2], dt)}", dt)

    def op_and(self, i, m, o):
        self.logic(m, o, "&")

    def op_or(self, i, m, o):
        self.logic(m, o, "|")

    def op_xor(self, i, m, o):
        self.logic(m, o, "^")

    def op_not(self, i, m, o):
        dt = NP[m[-1]]
        self.define(o[0], f"~{self.use(o[1], dt)}", dt)

    def op_cnot(self, i, m, o):
        dt = NP[m[-1]]
        self.define(o[0], f"({self.use(o[1], dt)}==0).astype({dt})", dt)

    def op_lop3(self, i, m, o):
        if m[0] != "b32":
            self.bad()
        a, b, c = (self.use(x, "u32") for x in o[1:4])
        self.define(o[0], f"lop3({a},{b},{c},{o[4][1]})", "u32")

    def op_shl(self, i, m, o):
        dt = NP[m[-1]]
        a = self.use(o[1], dt)
        if o[2][0] == "i":
            n = o[2][1] & 0xFFFFFFFF
            e = f"{a}<<{self.const(n, dt)}" if n < 8 * SZ[dt] else f"{a}&{self.const(0, dt)}"
            return self.define(o[0], e, dt)
        self.define(o[0], f"shl({a},{self.use(o[2], 'u32')})", dt)

    def op_shr(self, i, m, o):
        dt = NP[m[-1]]
        a = self.use(o[1], dt)
        if o[2][0] == "i":
            w = 8 * SZ[dt]
            n = o[2][1] & 0xFFFFFFFF
            if dt[0] == "i":
                n = min(n, w - 1)
            e = f"{a}>>{self.const(n, dt)}" if n < w else f"{a}&{self.const(0, dt)}"
            return self.define(o[0], e, dt)
        self.define(o[0], f"shr({a},{self.use(o[2], 'u32')})", dt)

    def op_shf(self, i, m, o):
        a, b, c = (self.use(x, "u32") for x in o[1:4])
        self.define(o[0], f"shf({a},{b},{c},{m[0] == 'r'},{m[1] == 'clamp'})", "u32")

    def op_bfe(self, i, m, o):
        dt = NP[m[-1]]
        a, b, c = self.use(o[1], dt), self.use(o[2], "u32"), self.use(o[3], "u32")
        if (
            o[2][0] == "i"
            and o[3][0] == "i"
            and dt[0] == "u"
            and o[2][1] + o[3][1] <= 8 * SZ[dt]
            and o[3][1] > 0
        ):
            return self.define(
                o[0], f"({a}>>{self.const(o[2][1], dt)})&{self.const((1 << o[3][1]) - 1, dt)}", dt
            )
        self.define(o[0], f"bfe({a},{b},{c})", dt)

    def op_bfi(self, i, m, o):
        dt = NP[m[-1]]
        self.define(
            o[0],
            f"bfi({self.use(o[1], dt)},{self.use(o[2], dt)},{self.use(o[3], 'u32')},{self.use(o[4], 'u32')})",
            dt,
        )

    def op_bfind(self, i, m, o):
        self.define(o[0], f"bfind({self.use(o[1], NP[m[-1]])},{'shiftamt' in m})", "u32")

    def op_clz(self, i, m, o):
        self.define(o[0], f"clz({self.use(o[1], NP[m[-1]])})", "u32")

    def op_popc(self, i, m, o):
        self.define(o[0], f"popc({self.use(o[1], NP[m[-1]])})", "u32")

    def op_brev(self, i, m, o):
        dt = NP[m[-1]]
        self.define(o[0], f"brev({self.bc(o[1], dt)})", dt)

    def op_szext(self, i, m, o):
        self.define(
            o[0],
            f"szext({self.use(o[1], 'u32')},{self.use(o[2], 'u32')},{m[0] == 'wrap'},{m[-1] == 's32'})",
            "u32",
        )

    def op_bmsk(self, i, m, o):
        self.define(
            o[0], f"bmsk({self.use(o[1], 'u32')},{self.use(o[2], 'u32')},{m[0] == 'clamp'})", "u32"
        )

    def op_prmt(self, i, m, o):
        a, b, c = (self.use(x, "u32") for x in o[1:4])
        mode = m[1] if len(m) > 1 else None
        if (
            mode is None
            and o[3][0] == "i"
            and not (o[3][1] & 0x8888)
            and o[1][0] == "r"
            and o[2][0] == "r"
        ):
            return self.define(o[0], f"prmt_const({a},{b},{o[3][1] & 0xFFFF})", "u32")
        self.define(o[0], f"prmt({a},{b},{c},{mode!r})", "u32")

    def op_dp4a(self, i, m, o):
        a, b, c = (self.use(x, "u32") for x in o[1:4])
        self.define(o[0], f"dp4a({a},{b},{c},{m[0] == 's32'},{m[1] == 's32'})", "u32")

    def op_dp2a(self, i, m, o):
        a, b, c = (self.use(x, "u32") for x in o[1:4])
        self.define(
            o[0], f"dp2a({a},{b},{c},{m[1] == 's32'},{m[2] == 's32'},{m[0] == 'hi'})", "u32"
        )

    # conversions ------------------------------------------------------------
    def op_cvt(self, i, m, o):
        rnd = next((x for x in m if x in RND), None)
        st, fz, rl, _sf = "sat" in m, "ftz" in m, "relu" in m, "satfinite" in m
        t = [x for x in m if x not in RND and x not in ("sat", "ftz", "relu", "satfinite", "pack")]
        if len(t) != 2:
            self.bad()
        d, s = t
        if "pack" in m:
            self.bad()
        fl = ("f16", "f32", "f64", "bf16")
        # packed destinations
        if d in ("bf16x2", "f16x2") and s == "f32":
            a, b = self.use(o[1], "f32"), self.use(o[2], "f32")  # a -> high, b -> low
            if rl:
                a, b = f"relu({a})", f"relu({b})"
            r = rnd or "rn"
            if d == "bf16x2":
                return self.define(o[0], f"pack2(f2bf({b},{r!r}),f2bf({a},{r!r}))", "u32")
            return self.define(
                o[0], f"pack2(f2h_mode({b},{r!r}).view(u16),f2h_mode({a},{r!r}).view(u16))", "u32"
            )
        if d in ("e4m3x2", "e5m2x2"):
            k = d[:-2]
            if s == "f32":
                a, b = self.use(o[1], "f32"), self.use(o[2], "f32")
                if rl:
                    a, b = f"relu({a})", f"relu({b})"
                e = f"f32_to_fp8({b},{k!r}).astype(u16)|(f32_to_fp8({a},{k!r}).astype(u16)<<u16(8))"
            elif s == "f16x2":
                x = f"h2f({self.use(o[1], 'u32')}).astype(f32)"
                e = f"f32_to_fp8(relu({x}) if {rl} else {x},{k!r}).view(u16)"
            else:
                self.bad()
            return self.define(o[0], e, "u16")
        if d == "f16x2" and s in ("e4m3x2", "e5m2x2"):
            x = self.use(o[1], "u16")
            e = f"f2h(fp8_to_f32(np.ascontiguousarray({x}).view(u8),{s[:-2]!r}).astype(f16))"
            return self.define(o[0], e, "u32")
        if d == "tf32":
            return self.define(o[0], f"to_tf32({self.use(o[1], 'f32')},{rnd!r})", "u32")
        if d not in NP or s not in NP or d.endswith("x2") or s.endswith("x2"):
            self.bad()
        if s in fl:
            a = self.tmp(f"bf2f({self.use(o[1], 'u16')})") if s == "bf16" else self.use(o[1], NP[s])
            if fz and s == "f32":
                a = self.tmp(f"ftz({a})")
            if d not in fl:
                return self.define(o[0], f"f2i({a},{rnd!r},{NP[d]})", NP[d])
            ir = rnd if rnd in ("rni", "rzi", "rmi", "rpi") else None
            if ir:
                a = f"rint({a},{ir!r})"
                rnd = "rn"
            r = rnd or "rn"
            if rl:
                a = f"relu({a})"
            if d == s or (d == "f32" and s in ("f16", "bf16")) or d == "f64":
                e = f"{a}.astype({NP[d]})" if d != "bf16" else f"f2bf({a})"
            elif d == "f32":
                e = f"d2f({a},{r!r})"
            elif d == "f16":
                e = f"f2h_mode({a},{r!r})"
            elif d == "bf16":
                e = f"f2bf({a}.astype(f64) if {s == 'f64'} else {a}.astype(f32),{r!r})"
            if fz and d == "f32":
                e = f"ftz({e})"
            if st:
                e = f"sat({e})"
            return self.define(o[0], e, NP[d])
        # integer source
        a = self.use(o[1], NP[s])
        if d in fl:
            r = rnd or "rn"
            if d == "f64":
                return self.define(o[0], f"{a}.astype(f64)", "f64")
            if d == "f32":
                e = f"{a}.astype(f32)" if r == "rn" else f"d2f({a}.astype(f64),{r!r})"
                return self.define(o[0], e, "f32")
            if d == "f16":
                return self.define(o[0], f"f2h_mode({a}.astype(f64),{r!r})", "f16")
            return self.define(o[0], f"f2bf({a}.astype(f64),{r!r})", "u16")
        dt = NP[d]
        if st:
            return self.define(o[0], f"i2i_sat({a},{dt})", dt)
        if SZ[dt] == SZ[NP[s]] and dt != NP[s]:
            return self.define(o[0], f"{a}.view({dt})", dt)
        self.define(o[0], f"{a}.astype({dt})" if dt != NP[s] else a, dt)

    # memory -----------------------------------------------------------------
    def space(self, m):
        for x in m:
            b = x.split("::")[0]
            if b in ("global", "shared", "local", "const", "param"):
                if "::" in x and x.split("::")[1] == "cluster":
                    self.bad()
                return b
        return "generic"

    SP = {"global": "g", "const": "g", "shared": "s", "local": "l", "generic": "x"}

    def memsplit(self, m):
        vec = next((int(x[1:]) for x in m if x in ("v2", "v4", "v8")), 1)
        return self.space(m), vec, m[-1]

    def op_ld(self, i, m, o):
        sp, vec, t = self.memsplit(m)
        dt = NP[t]
        es = SZ[dt]
        dst = o[0][1] if o[0][0] == "v" else [o[0]]
        if len(dst) != vec:
            self.bad()
        ld = {"f32": "f32", "f64": "f64", "f16": "u16", "i8": "i8", "i16": "i16"}.get(dt, dt)
        if sp == "param":
            base = o[1][1]
            b0 = base[1] if base[0] == "sym+" else base
            if b0[0] == "kparam":
                off = b0[1].addr + (base[2] if base[0] == "sym+" else 0) + o[1][2]
                self.arr = True
                for j, d in enumerate(dst):
                    self.define(d, f"C.par({off + j * es},{ld!r})", ld)
                return
            sp = "local" if b0[0] == "var" else "global"
        a = self.addr(o[1])
        self.arr = True
        P = self.P or "None"
        v = self.tmp(f"C.ld({i.pc},{self.SP[sp]!r},{a},{es},{vec},{P})")
        for j, d in enumerate(dst):
            e = f"{v}[{j}]"
            if ld != f"u{8 * es}":
                e += f".view({ld})"
            self.define(d, e, ld)

    op_ldu = op_ld

    def op_st(self, i, m, o):
        sp, vec, t = self.memsplit(m)
        dt = NP[t]
        u = f"u{8 * SZ[dt]}"
        src = o[1][1] if o[1][0] == "v" else [o[1]]
        if len(src) != vec:
            self.bad()
        if sp == "param":
            sp = "local"
        a = self.addr(o[0])
        vals = ",".join(self.bc(x, u) for x in src)
        self.lines.append(f"C.st({i.pc},{self.SP[sp]!r},{a},({vals},),{SZ[dt]},{self.P or 'None'})")

    def op_atom(self, i, m, o, ret=True):
        sp = self.space(m)
        opn = next(
            x
            for x in m
            if x in ("add", "min", "max", "and", "or", "xor", "cas", "exch", "inc", "dec")
        )
        t = m[-1]
        if t not in NP or any(x in m for x in ("v2", "v4", "v8")):
            self.bad()
        dt = NP[t]
        d, rest = (o[0], o[1:]) if ret else (("_",), o)
        a = self.addr(rest[0])
        ty = t if t in ("f16", "bf16", "f16x2", "bf16x2") else dt
        raw = {"f16": "u16"}.get(dt, dt)
        b = self.bc(rest[1], raw)
        c = self.bc(rest[2], raw) if opn == "cas" else "None"
        self.arr = True
        need = d[0] != "_"
        v = self.tmp(
            f"C.atom({i.pc},{self.SP[sp]!r},{opn!r},{ty!r},{raw},{a},{b},{c},{self.P or 'None'},{need})"
        )
        if need:
            self.define(d, v, raw)

    def op_red(self, i, m, o):
        if "async" in m:
            self.bad()
        self.op_atom(i, m, o, False)

    def op_cp(self, i, m, o):
        if m[0] != "async" or "bulk" in m or "mbarrier" in m:
            self.bad()
        P = self.P or "None"
        if "commit_group" in m:
            self.lines.append(f"C.cp_commit({P})")
            return
        if "wait_group" in m:
            self.lines.append(f"C.cp_wait({o[0][1]},{P})")
            return
        if "wait_all" in m:
            self.lines.append(f"C.cp_wait(-1,{P})")
            return
        dst, src = self.addr(o[0]), self.addr(o[1])
        n = o[2][1]
        rest = o[3:]
        if "L2::cache_hint" in m:
            rest = rest[:-1]
        ss = "None"
        if rest:
            r = rest[0]
            if r[0] == "r" and r[1].type == "pred":
                p = self.use(r, "pb")
                ss = self.tmp(f"where({p},{self.const(0, 'u32')},{self.const(n, 'u32')})")
            else:
                ss = self.bc(r, "u32")
        self.lines.append(f"C.cp_async({i.pc},{dst},{src},{n},{ss},{P})")

    def op_createpolicy(self, i, m, o):
        self.define(o[0], self.const(0, "u64"), "u64")

    # warp collectives ---------------------------------------------------------
    def op_shfl(self, i, m, o):
        mode = m[1] if m[0] == "sync" else self.bad()
        d, p = (o[0][1], o[0][2]) if o[0][0] == "|" else (o[0], None)
        a = self.bc(o[1], "u32")
        b, c = self.use(o[2], "u32"), self.use(o[3], "u32")
        self.use(o[4], "u32")
        self.arr = True
        kb = o[2][1] if o[2][0] == "i" else None
        kc = o[3][1] if o[3][0] == "i" else None
        key = (mode, kb, kc) if kb is not None and kc is not None else None
        v = self.tmp(f"C.shfl({i.pc},{mode!r},{a},{b},{c},{key!r})")
        self.define(d, f"{v}[0]", "u32")
        if p is not None:
            self.define(p, f"{v}[1]", "pb")

    def op_vote(self, i, m, o):
        if m[0] != "sync":
            self.bad()
        p = self.use(o[1], "pb")
        if o[1][0] == "i":
            p = f"full(C.n,{p},pb)"
        mk = self.use(o[2], "u32")
        self.arr = True
        if m[1] == "ballot":
            return self.define(o[0], f"C.ballot({p})&{mk}", "u32")
        b = self.tmp(f"C.ballot({p})&{mk}")
        if m[1] == "any":
            e = f"{b}!=0"
        elif m[1] == "all":
            e = f"{b}==(C.present()&{mk})"
        elif m[1] == "uni":
            e = f"({b}==0)|({b}==(C.present()&{mk}))"
        else:
            self.bad()
        self.define(o[0], e, "pb")

    def op_activemask(self, i, m, o):
        self.arr = True
        self.define(o[0], f"C.present({self.P or 'None'})", "u32")

    def op_match(self, i, m, o):
        dt = NP[m[-1]]
        d, p = (o[0][1], o[0][2]) if o[0][0] == "|" else (o[0], None)
        a, mk = self.bc(o[1], dt), self.use(o[2], "u32")
        self.arr = True
        v = self.tmp(f"C.match({a},{mk})")
        if "any" in m:
            return self.define(d, v, "u32")
        al = self.tmp(f"{v}==(C.present()&{mk})")
        self.define(d, f"where({al},{v},{self.const(0, 'u32')})", "u32")
        if p is not None:
            self.define(p, al, "pb")

    def op_redux(self, i, m, o):
        t = m[-1]
        opn = m[1]
        dt = NP[t]
        a, mk = self.bc(o[1], dt), self.use(o[2], "u32")
        self.arr = True
        self.define(o[0], f"C.redux({opn!r},{a},{mk},{'abs' in m},{'NaN' in m})", dt)

    def op_elect(self, i, m, o):
        d, p = (o[0][1], o[0][2]) if o[0][0] == "|" else (o[0], None)
        mk = self.use(o[1], "u32")
        self.arr = True
        v = self.tmp(f"C.elect({mk})")
        self.define(d, f"{v}[0]", "u32")
        if p is not None:
            self.define(p, f"{v}[1]", "pb")

    def op_ldmatrix(self, i, m, o):
        num = int(next(x for x in m if x in ("x1", "x2", "x4"))[1])
        if "m8n8" not in m or m[-1] != "b16":
            self.bad()
        dst = o[0][1] if o[0][0] == "v" else [o[0]]
        sp = self.SP[self.space(m)]
        a = self.addr(o[1])
        self.arr = True
        v = self.tmp(f"C.ldmatrix({i.pc},{sp!r},{a},{num},{'trans' in m})")
        for j, d in enumerate(dst):
            self.define(d, f"{v}[{j}]", "u32")

    def op_stmatrix(self, i, m, o):
        int(next(x for x in m if x in ("x1", "x2", "x4"))[1])
        if "m8n8" not in m or m[-1] != "b16":
            self.bad()
        src = o[1][1] if o[1][0] == "v" else [o[1]]
        sp = self.SP[self.space(m)]
        a = self.addr(o[0])
        vals = ",".join(self.bc(x, "u32") for x in src)
        self.lines.append(f"C.stmatrix({i.pc},{sp!r},{a},({vals},),{'trans' in m})")

    def op_movmatrix(self, i, m, o):
        v = self.bc(o[1], "u32")
        self.arr = True
        self.define(o[0], f"C.movmatrix({i.pc},{v})", "u32")

    def op_mma(self, i, m, o):
        if m[0] != "sync" or "sp" in m:
            self.bad()
        import re

        shape = next(x for x in m if re.fullmatch(r"m\d+n\d+k\d+", x))
        mm, nn, kk = map(int, re.findall(r"\d+", shape))
        tys = m[-4:]
        dty, aty, bty, cty = tys
        eb = {"f16": 2, "bf16": 2, "tf32": 4, "e4m3": 1, "e5m2": 1, "s8": 1, "u8": 1}
        if mm != 16 or nn != 8 or aty not in eb or bty not in eb or (m[1:] and "col" not in m):
            self.bad()
        if dty not in ("f32", "f16", "s32") or cty not in ("f32", "f16", "s32") or "satfinite" in m:
            self.bad()
        A = [self.bc(x, "u32") for x in o[1][1]]
        B = [self.bc(x, "u32") for x in (o[2][1] if o[2][0] == "v" else [o[2]])]
        cdt = {"f32": "f32", "f16": "u32", "s32": "i32"}[cty]
        Cc = [self.bc(x, cdt) for x in o[3][1]]
        if len(A) * 4 // eb[aty] * 32 != mm * kk or len(B) * 4 // eb[bty] * 32 != nn * kk:
            self.bad()
        ddt = {"f32": "f32", "f16": "u32", "s32": "i32"}[dty]
        self.arr = True
        v = self.tmp(
            f"bmma(C.full_warps({i.pc}),{mm},{nn},{kk},{dty!r},{aty!r},{bty!r},{cty!r},"
            f"[{','.join(A)}],[{','.join(B)}],[{','.join(Cc)}])"
        )
        for j, d in enumerate(o[0][1]):
            self.define(d, f"{v}[{j}]", ddt)
