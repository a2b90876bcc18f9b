"""`cvt` between integers and floats of every size."""

from ..dtypes import OF_PTX_TYPE, SIZE
from .emitter import Emitter

_ROUNDINGS = {"rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi", "rs"}
_TO_INTEGRAL = ("rni", "rzi", "rmi", "rpi")
_FLOATS = ("f16", "f32", "f64", "bf16")
_FP8 = ("e4m3x2", "e5m2x2")
_OPTIONS = {"sat", "ftz", "relu", "satfinite"}


class ConversionEmitter(Emitter):
    def emit_cvt(self, modifiers, operands):
        rounding = next((m for m in modifiers if m in _ROUNDINGS), None)
        options = _OPTIONS & set(modifiers)
        types = [m for m in modifiers if m not in _ROUNDINGS | _OPTIONS]
        if len(types) != 2:
            self.unsupported()
        to, of = types
        destination, *sources = operands
        if to in ("bf16x2", "f16x2") and of == "f32":
            self._pack_halves(destination, sources, to, rounding or "rn", options)
        elif to in _FP8 or of in _FP8:
            self._convert_fp8(destination, sources, to, of, options)
        elif to == "tf32":
            value = self.use(sources[0], "f32")
            self.define(destination, f"to_tf32({value},{rounding!r})", "u32")
        elif to.endswith("x2") or of.endswith("x2"):
            self.unsupported()
        elif of not in _FLOATS:
            self._convert_integer(destination, sources[0], to, of, rounding or "rn", options)
        else:
            self._convert_float(destination, sources[0], to, of, rounding, options)

    def _pack_halves(self, destination, sources, to, rounding, options):
        high, low = (self.use(source, "f32") for source in sources)
        if "relu" in options:
            high, low = f"relu({high})", f"relu({low})"
        if to == "bf16x2":
            low, high = f"to_bf16({low},{rounding!r})", f"to_bf16({high},{rounding!r})"
        else:
            low, high = (f"to_f16({x},{rounding!r}).view(u16)" for x in (low, high))
        self.define(destination, f"pack2({low},{high})", "u32")

    def _convert_fp8(self, destination, sources, to, of, options):
        kind = (to if to in _FP8 else of).removesuffix("x2")
        clamp = "relu" if "relu" in options else ""
        if of == "f32":
            high, low = (
                f"f32_to_fp8({clamp}({self.use(source, 'f32')}),{kind!r}).astype(u16)"
                for source in sources
            )
            self.define(destination, f"{low}|({high}<<u16(8))", "u16")
        elif of == "f16x2":
            halves = f"unpack_f16x2({self.use(sources[0], 'u32')}).astype(f32)"
            self.define(destination, f"f32_to_fp8({clamp}({halves}),{kind!r}).view(u16)", "u16")
        elif to == "f16x2":
            pair = f"np.ascontiguousarray({self.use(sources[0], 'u16')}).view(u8)"
            halves = f"fp8_to_f32({pair},{kind!r}).astype(f16)"
            self.define(destination, f"pack_f16x2({halves})", "u32")
        else:
            self.unsupported()

    def _convert_integer(self, destination, source, to, of, rounding, options):
        value, own = self.use(source, OF_PTX_TYPE[of]), OF_PTX_TYPE[of]
        dtype = OF_PTX_TYPE[to]
        if to in _FLOATS:
            result = {
                "f64": f"{value}.astype(f64)",
                "f32": f"to_f32({value}.astype(f64),{rounding!r})",
                "f16": f"to_f16({value}.astype(f64),{rounding!r})",
                "bf16": f"to_bf16({value}.astype(f64),{rounding!r})",
            }[to]
            if to == "f32" and rounding == "rn":  # a 64-bit integer must not be rounded twice
                result = f"{value}.astype(f32)"
        elif "sat" in options:
            result = f"saturate_int({value},{dtype})"
        elif dtype == own:
            result = value
        else:
            result = f"{value}.{'view' if SIZE[dtype] == SIZE[own] else 'astype'}({dtype})"
        self.define(destination, result, dtype)

    def _convert_float(self, destination, source, to, of, rounding, options):
        dtype = OF_PTX_TYPE[to]
        value = self.use_float(source, of)
        if "ftz" in options and of == "f32":
            value = self.temporary(f"flush_subnormals({value})")
        if to not in _FLOATS:
            self.define(destination, f"float_to_int({value},{rounding!r},{dtype})", dtype)
            return
        if rounding in _TO_INTEGRAL:
            value, rounding = f"round_to_integer({value},{rounding!r})", "rn"
        rounding = rounding or "rn"
        if "relu" in options:
            value = f"relu({value})"
        widens = to in (of, "f64") or (to == "f32" and of != "f64")
        if to == "bf16":
            wide = "f64" if of == "f64" else "f32"
            result = f"to_bf16({value}.astype({wide}),{'rn' if to == of else rounding!r})"
        elif widens:
            result = f"{value}.astype({dtype})"
        else:
            result = f"to_{to}({value},{rounding!r})"
        if "ftz" in options and to == "f32":
            result = f"flush_subnormals({result})"
        if "sat" in options:
            result = f"saturate({result})"
        self.define(destination, result, dtype)
