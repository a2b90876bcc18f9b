"""PTX text -> Module / Kernel objects.  `.func` calls are inlined (recursion is rejected)."""

import re
import struct


class PtxError(Exception):
    """Any problem found while parsing or running PTX."""


class Unsupported(PtxError):
    """A PTX construct this interpreter does not know."""


TYPE_SIZE = {
    "b8": 1,
    "u8": 1,
    "s8": 1,
    "b16": 2,
    "u16": 2,
    "s16": 2,
    "f16": 2,
    "bf16": 2,
    "b32": 4,
    "u32": 4,
    "s32": 4,
    "f32": 4,
    "f16x2": 4,
    "bf16x2": 4,
    "tf32": 4,
    "b64": 8,
    "u64": 8,
    "s64": 8,
    "f64": 8,
    "b128": 16,
    "pred": 1,
    "e4m3x2": 2,
    "e5m2x2": 2,
    "e4m3": 1,
    "e5m2": 1,
}


class Reg:
    __slots__ = ("id", "name", "type")

    def __init__(self, id, name, type):
        self.id, self.name, self.type = id, name, type

    def __repr__(self):
        return self.name


class Instr:
    __slots__ = ("labels", "line", "mods", "op", "ops", "pc", "pred", "target", "text", "where")

    def __repr__(self):
        return f"{self.text} (PTX line {self.line})"


class Var:
    """A module, function or parameter variable."""

    def __init__(self, name, space, align, size, init=None, extern=False, elem=1):
        self.name, self.space, self.align, self.size = name, space, align, size
        self.init, self.extern, self.elem = init, extern, elem
        self.addr = None


class Func:
    def __init__(self, name, entry):
        self.name, self.entry = name, entry
        self.params, self.rets = [], []
        self.body = None  # list of raw items
        self.directives = {}


class Kernel:
    """A flattened kernel: instructions with registers numbered 0..nregs-1."""

    def __init__(self, name):
        self.name = name
        self.regs = []
        self.instrs = []
        self.labels = {}
        self.tables = {}
        self.params = []
        self.param_bytes = 0
        self.shared_static = 0
        self.shared_dyn_off = None
        self.local_bytes = 0
        self.vars = {}
        self.directives = {}


_comment = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_label = re.compile(r"([A-Za-z_$%][\w$]*)\s*:(?!:)")
_vardecl = re.compile(
    r"^(?P<link>(?:\.(?:visible|extern|weak|common)\s+)*)\.(?P<space>global|const|shared|local|param)\s*"
    r"(?P<attr>(?:\.attribute\s*\([^)]*\)\s*|\.align\s+\d+\s*|\.ptr\s*|\.(?:global|const|shared|local)\s+|\.v[248]\s*)*)"
    r"\.(?P<type>\w+)\s*(?P<attr2>(?:\.ptr\s*|\.(?:global|const|shared|local)\s*|\.align\s+\d+\s*)*)\s*"
    r"(?P<name>[\w$%]+)\s*(?P<dims>(?:\[\s*\d*\s*\]\s*)*)(?:=\s*(?P<init>.*))?$",
    re.S,
)


def _strip(text):
    def keep_lines(m):
        return "\n" * m.group(0).count("\n") + " "

    text = _comment.sub(keep_lines, text)
    out = []
    for ln in text.split("\n"):
        s = ln.lstrip()
        if re.match(r"\.(loc|file)\s|@@", s):
            ln = ""
        out.append(ln)
    return "\n".join(out)


class _Scan:
    def __init__(self, text):
        self.t = text
        self.i = 0
        self.nl = [m.start() for m in re.finditer("\n", text)]

    def line(self, pos=None):
        import bisect

        return bisect.bisect_left(self.nl, self.i if pos is None else pos) + 1

    def ws(self):
        _t, n = self.t, len(self.t)
        while self.i < n and self.t[self.i].isspace():
            self.i += 1
        return self.i < n

    def until(self, stops):
        """Text up to a stop character at bracket depth 0 (stop not consumed)."""
        t, d, s, n = self.t, 0, self.i, len(self.t)
        while self.i < n:
            c = t[self.i]
            if d == 0 and c in stops:
                return t[s : self.i]
            if c in "{([":
                d += 1
            elif c in "})]":
                d -= 1
            elif c == '"':
                self.i = t.index('"', self.i + 1)
            self.i += 1
        return t[s:]


def _num(s):
    """Literal -> int, or ('f32', bits) / ('f64', bits); None when not a literal."""
    s = s.strip()
    neg = False
    if s[:1] in "+-" and len(s) > 1:
        neg = s[0] == "-"
        s = s[1:].strip()
    m = re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", s)
    if m:
        b = int(m.group(1), 16)
        return ("f32", b ^ (0x80000000 if neg else 0))
    m = re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", s)
    if m:
        b = int(m.group(1), 16)
        return ("f64", b ^ ((1 << 63) if neg else 0))
    if re.fullmatch(r"0[xX][0-9a-fA-F]+U?", s):
        v = int(s.rstrip("U"), 16)
    elif re.fullmatch(r"0[bB][01]+U?", s):
        v = int(s.rstrip("U"), 2)
    elif re.fullmatch(r"0[0-7]+U?", s):
        v = int(s.rstrip("U"), 8)
    elif re.fullmatch(r"\d+U?", s):
        v = int(s.rstrip("U"))
    elif re.fullmatch(r"\d+\.\d*(?:[eE][+-]?\d+)?", s):
        v = float(s)
        return ("f64", struct.unpack("<Q", struct.pack("<d", -v if neg else v))[0])
    else:
        return None
    return -v if neg else v


def split_commas(s):
    out, d, cur = [], 0, ""
    for c in s:
        if c in "{[(":
            d += 1
        elif c in "}])":
            d -= 1
        if c == "," and d == 0:
            out.append(cur.strip())
            cur = ""
        else:
            cur += c
    if cur.strip():
        out.append(cur.strip())
    return out


def _parse_var(decl):
    m = _vardecl.match(decl.strip())
    if not m:
        raise Unsupported(f"cannot parse declaration: {decl.strip()[:200]}")
    attr = m.group("attr") or ""
    al = re.search(r"\.align\s+(\d+)", attr)
    vec = re.search(r"\.v([248])", attr)
    es = TYPE_SIZE.get(m.group("type"))
    if es is None:
        raise Unsupported(f"unsupported variable type .{m.group('type')}: {decl.strip()[:120]}")
    n, openend = int(vec.group(1)) if vec else 1, False
    for d in re.findall(r"\[\s*(\d*)\s*\]", m.group("dims") or ""):
        if d == "":
            openend = True
            n = 0
        else:
            n *= int(d)
    if m.group("init") and n == 0:
        n = len(_flat_init(m.group("init")))
    size = n * es
    align = int(al.group(1)) if al else es * (int(vec.group(1)) if vec else 1)
    v = Var(
        m.group("name"),
        m.group("space"),
        align,
        size,
        m.group("init"),
        ".extern" in m.group("link") or openend,
        es,
    )
    v.type = m.group("type")
    return v


def _flat_init(s):
    s = s.strip()
    return list(split_commas(s.replace("{", " ").replace("}", " "))) if s.startswith("{") else [s]


class ParsedModule:
    def __init__(self, text):
        self.text = text
        self.vars = {}
        self.funcs = {}
        self.target = None
        self._parse(_strip(text))

    # ---- module level -------------------------------------------------------
    def _parse(self, text):
        sc = _Scan(text)
        while sc.ws():
            line = sc.line()
            if (
                text.startswith(".version", sc.i)
                or text.startswith(".target", sc.i)
                or text.startswith(".address_size", sc.i)
            ):
                e = text.index("\n", sc.i)
                s = text[sc.i : e]
                if s.startswith(".target"):
                    self.target = s.split()[1].strip(",")
                sc.i = e
                continue
            if text.startswith(".section", sc.i):
                sc.until("{")
                sc.i += 1
                sc.until("}")
                sc.i += 1
                continue
            head = sc.until("{;=")
            if re.search(r"\.(entry|func)\b", head):
                f = self._parse_func_head(head, line)
                if text[sc.i] == "{":
                    sc.i += 1
                    f.body = self._parse_body(sc, f)
                    self.funcs[f.name] = f
                else:
                    sc.i += 1
                    self.funcs.setdefault(f.name, f)
                continue
            rest = sc.until(";")
            sc.i += 1
            decl = head + rest
            if decl.strip().startswith((".pragma", ".alias")):
                continue
            if not decl.strip():
                continue
            v = _parse_var(decl)
            if v.name not in self.vars or self.vars[v.name].extern:
                self.vars[v.name] = v

    def _parse_func_head(self, head, line):
        m = re.search(r"\.(entry|func)\b", head)
        entry = m.group(1) == "entry"
        s = head[m.end() :].strip()
        s = re.sub(r"^\.attribute\s*\([^)]*\)\s*", "", s)
        rets = ""
        if not entry and s.startswith("("):
            d = s.index(")")
            rets = s[1:d]
            s = s[d + 1 :].strip()
        nm = re.match(r"[\w$%.]+", s)
        f = Func(nm.group(0), entry)
        f.line = line
        s = s[nm.end() :].strip()
        if s.startswith("("):
            d, depth = 0, 0
            for d, c in enumerate(s):
                if c == "(":
                    depth += 1
                elif c == ")":
                    depth -= 1
                    if depth == 0:
                        break
            f.params = [self._param(p) for p in split_commas(s[1:d])]
            s = s[d + 1 :]
        f.rets = [self._param(p) for p in split_commas(rets)] if rets else []
        for k in re.finditer(
            r"\.(maxntid|reqntid|minnctapersm|maxnreg|noreturn|reqnctapercluster|explicitcluster"
            r"|maxclusterrank)\s*([\d, ]*)",
            s,
        ):
            f.directives[k.group(1)] = [int(x) for x in re.findall(r"\d+", k.group(2))]
        return f

    def _param(self, p):
        if p.strip().startswith(".reg"):
            raise Unsupported(f".reg parameters: {p}")
        return _parse_var(p)

    def _parse_body(self, sc, f):
        """-> list of ('{',) ('}',) ('label', n, line) ('reg', type, names) ('var', Var) ('table', [..]) ('ins', text, line)"""
        t = sc.t
        items, depth = [], 1
        while sc.ws():
            c = t[sc.i]
            line = sc.line()
            if c == "{":
                items.append(("{",))
                depth += 1
                sc.i += 1
                continue
            if c == "}":
                depth -= 1
                sc.i += 1
                if depth == 0:
                    return items
                items.append(("}",))
                continue
            if c == ";":
                sc.i += 1
                continue
            m = _label.match(t, sc.i)
            if m:
                items.append(("label", m.group(1), line))
                sc.i = m.end()
                continue
            s = sc.until(";").strip()
            sc.i += 1
            if s.startswith(".reg"):
                m = re.match(r"\.reg\s*((?:\.\w+\s*)+)(.*)$", s, re.S)
                ty = m.group(1).split()[-1].strip(".")
                if ".v2" in m.group(1) or ".v4" in m.group(1):
                    raise Unsupported(f"vector registers: {s}")
                names = []
                for n in split_commas(m.group(2)):
                    k = re.fullmatch(r"([\w$%]+)<(\d+)>", n)
                    if k:
                        names += [k.group(1) + str(j) for j in range(int(k.group(2)))]
                    else:
                        names.append(n)
                items.append(("reg", ty, names))
            elif s.startswith(".pragma"):
                pass
            elif s.startswith(".branchtargets"):
                items.append(("table", list(split_commas(s[len(".branchtargets") :]))))
            elif s.startswith(".callprototype"):
                items.append(("proto", s))
            elif re.match(r"(\.(visible|extern|weak)\s+)*\.(shared|local|global|const|param)\b", s):
                items.append(("var", _parse_var(s)))
            elif s.startswith("."):
                raise Unsupported(f"unsupported directive at PTX line {line}: {s[:100]}")
            else:
                items.append(("ins", re.sub(r"\s+", " ", s), line))
        raise PtxError(f"unterminated body of {f.name}")

    # ---- flatten a kernel ---------------------------------------------------
    def kernel(self, name):
        f = self.funcs[name]
        k = Kernel(name)
        k.directives = f.directives
        off = 0
        scope = {}
        for p in f.params:
            off = (off + p.align - 1) // p.align * p.align
            p.addr = off
            off += p.size
            k.params.append(p)
            scope[p.name] = ("kparam", p)
        k.param_bytes = off
        self._k = k
        self._shared_vars = []
        self._expand(f, [scope], (name,), None)
        # layout of shared memory: statics first, then all extern arrays share one offset
        off, dyn = 0, []
        for v in k.vars.values():
            if v.space == "shared":
                if v.extern:
                    dyn.append(v)
                else:
                    off = (off + v.align - 1) // v.align * v.align
                    v.saddr = off
                    off += v.size
        k.shared_static = off
        al = max([16] + [v.align for v in dyn])
        k.shared_dyn_off = (off + al - 1) // al * al
        for v in dyn:
            v.saddr = k.shared_dyn_off
        for pc, ins in enumerate(k.instrs):
            ins.pc = pc
        return k

    def _local(self, v):
        k = self._k
        k.local_bytes = (k.local_bytes + v.align - 1) // v.align * v.align
        v2 = Var(v.name, "local", v.align, v.size)
        v2.laddr = k.local_bytes
        k.local_bytes += max(v.size, 1)
        return v2

    def _expand(self, f, scopes, stack, end_label):
        k = self._k
        scopes = [dict(scopes[0])] if len(scopes) == 1 else [dict(s) for s in scopes]
        len(k.labels) + len(k.instrs) * 1000
        k._uid = getattr(k, "_uid", 0) + 1
        fid = k._uid
        # pre-pass: label scopes
        path, nxt, labelpos = [0], [0], {}
        for it in f.body:
            if it[0] == "{":
                nxt[0] += 1
                path.append(nxt[0])
            elif it[0] == "}":
                path.pop()
            elif it[0] == "label":
                labelpos.setdefault(it[1], []).append(tuple(path))
        path, nxt = [0], [0]

        def lab(name, path):
            best = None
            for p in labelpos.get(name, []):
                if tuple(path[: len(p)]) == p and (best is None or len(p) > len(best)):
                    best = p
            if best is None:
                raise PtxError(f"{f.name}: label {name} not found")
            return f"{fid}.{'.'.join(map(str, best))}.{name}"

        lastlabel = None
        for it in f.body:
            kind = it[0]
            if kind == "{":
                nxt[0] += 1
                path.append(nxt[0])
                scopes.append({})
            elif kind == "}":
                path.pop()
                scopes.pop()
            elif kind == "label":
                k.labels[lab(it[1], path)] = len(k.instrs)
                lastlabel = lab(it[1], path)
            elif kind == "table":
                k.tables[lastlabel] = [lab(x, path) for x in it[1]]
            elif kind == "reg":
                for n in it[2]:
                    # registers are created on first use: PTX declares many that it never touches
                    scopes[-1][n] = ("regdecl", it[1], n)
            elif kind == "var":
                v = it[1]
                if v.space == "shared":
                    key = f"{f.name}::{v.name}"
                    if key not in k.vars:
                        k.vars[key] = v
                    scopes[-1][v.name] = ("var", k.vars[key])
                elif v.space in ("local", "param"):
                    scopes[-1][v.name] = ("var", self._local(v))
                else:
                    if v.name not in self.vars:
                        self.vars[v.name] = v
                    scopes[-1][v.name] = ("var", self.vars[v.name])
            elif kind == "ins":
                self._instr(f, it[1], it[2], scopes, stack, lab, list(path), end_label)

    def _lookup(self, name, scopes):
        for s in reversed(scopes):
            e = s.get(name)
            if e is not None:
                if e[0] == "regdecl":
                    r = Reg(len(self._k.regs), e[2], e[1])
                    if e[1] not in TYPE_SIZE or e[1] == "b128":
                        raise Unsupported(f"register type .{e[1]}")
                    self._k.regs.append(r)
                    s[name] = e = ("reg", r)
                return e
        v = self.vars.get(name)
        if v is not None:
            if v.space == "shared" and v.name not in self._k.vars:
                self._k.vars[v.name] = v
            return ("var", v)
        return None

    def _operand(self, s, scopes, line):
        s = s.strip()
        if s == "_":
            return ("_",)
        if s.startswith("{"):
            return (
                "v",
                [self._operand(x, scopes, line) for x in split_commas(s[1 : s.rindex("}")])],
            )
        if s.startswith("["):
            inner = s[1 : s.rindex("]")].strip()
            if "," in inner:
                raise Unsupported(f"PTX line {line}: tensor/vector address operand {s}")
            m = re.match(r"^(.*?[\w$%])\s*([+-])\s*(-?\s*(?:0[xX])?[0-9a-fA-F]+)$", inner)
            off = 0
            if m and _num(m.group(3)) is not None and _num(inner) is None:
                off = _num(m.group(3)) * (1 if m.group(2) == "+" else -1)
                inner = m.group(1).strip()
            return ("m", self._operand(inner, scopes, line), off)
        if s.startswith("!"):
            return ("not", self._operand(s[1:], scopes, line))
        if "|" in s:
            a, b = s.split("|")
            return ("|", self._operand(a, scopes, line), self._operand(b, scopes, line))
        n = _num(s)
        if n is not None:
            return ("f", n) if isinstance(n, tuple) else ("i", n)
        e = self._lookup(s, scopes)
        if e is not None:
            return ("r", e[1]) if e[0] == "reg" else e
        if s.startswith("%"):
            return ("s", s[1:])
        if s == "WARP_SZ":
            return ("i", 32)
        m = re.match(r"^([\w$%]+)\s*([+-])\s*(\d+)$", s)
        if m:
            e = self._lookup(m.group(1), scopes)
            if e is not None and e[0] != "reg":
                return ("sym+", e, int(m.group(3)) * (1 if m.group(2) == "+" else -1))
        m = re.match(r"^(.+)\.([xyzwrgba])$", s)
        if m:
            raise Unsupported(f"PTX line {line}: vector element operand {s}")
        if s in self.funcs:
            raise Unsupported(
                f"PTX line {line}: address of function {s} (indirect calls are not supported)"
            )
        raise PtxError(f"PTX line {line}: unknown operand {s!r}")

    def _instr(self, f, text, line, scopes, stack, lab, path, end_label):
        k = self._k
        s = text
        pred = None
        m = re.match(r"@(!?)\s*([\w$%]+)\s+", s)
        if m:
            e = self._lookup(m.group(2), scopes)
            if not e or e[0] != "reg":
                raise PtxError(f"PTX line {line}: bad predicate in {text}")
            pred = (e[1], m.group(1) == "!")
            s = s[m.end() :]
        m = re.match(r"([\w.:]+)\s*(.*)$", s, re.S)
        if not m:
            raise PtxError(f"PTX line {line}: cannot parse {text}")
        parts = re.split(r"(?<!:)\.(?!:)", m.group(1))
        ins = Instr()
        ins.op, ins.mods, ins.pred, ins.line, ins.text = parts[0], parts[1:], pred, line, text
        ins.where = f.name
        ins.target = None
        ins.labels = None
        rest = m.group(2).strip()
        if ins.op == "call":
            return self._call(f, ins, rest, scopes, stack)
        if ins.op == "bra":
            ins.ops = []
            ins.target = lab(rest.strip(), path)
        elif ins.op == "brx":
            a = split_commas(rest)
            ins.ops = [self._operand(a[0], scopes, line)]
            ins.target = lab(a[1], path)
        elif ins.op == "ret" and end_label is not None:
            ins.op, ins.mods, ins.ops, ins.target = "bra", ["ret"], [], end_label
        else:
            ins.ops = [self._operand(x, scopes, line) for x in split_commas(rest)]
        k.instrs.append(ins)

    def _call(self, f, ins, rest, scopes, stack):
        k = self._k
        a = split_commas(rest)
        rets, i = [], 0
        if a[0].startswith("("):
            rets = split_commas(a[0][1:-1])
            i = 1
        name = a[i]
        args = split_commas(a[i + 1][1:-1]) if len(a) > i + 1 and a[i + 1].startswith("(") else []
        if name in ("vprintf", "__assertfail", "malloc", "free", "__assert_fail"):
            if name == "vprintf":
                return
            ins.op, ins.mods, ins.ops = "trap", ["call", name], []
            k.instrs.append(ins)
            return
        g = self.funcs.get(name)
        if g is None:
            raise Unsupported(f"PTX line {ins.line}: indirect or unknown call: {ins.text}")
        if g.body is None:
            raise Unsupported(f"PTX line {ins.line}: call to external function {name}")
        if name in stack:
            raise Unsupported(f"PTX line {ins.line}: recursive call to {name}")
        sc = {}
        for p, r in zip(g.rets + g.params, rets + args, strict=False):
            e = self._lookup(r, scopes)
            if e is None or e[0] != "var":
                raise Unsupported(
                    f"PTX line {ins.line}: call argument {r} is not a .param variable"
                )
            sc[p.name] = e
        k._uid = getattr(k, "_uid", 0) + 1
        end = f"end.{k._uid}"
        if ins.pred:
            b = Instr()
            b.op, b.mods, b.ops, b.line, b.text, b.where = "bra", [], [], ins.line, ins.text, f.name
            b.pred = (ins.pred[0], not ins.pred[1])
            b.target = end
            b.labels = None
            k.instrs.append(b)
        self._expand(g, [sc], (*stack, name), end)
        k.labels[end] = len(k.instrs)
