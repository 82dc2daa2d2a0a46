"""The one-pass decoder as LLVM assembly: unpack, look up, scale and round 16 words at a time, in vector registers.

Byte i of every plane and weight i of every segment belong together, for both widths of `packing`. So a vector of 16
words (codes, or pairs of codes) starts `position` bytes into its plane and gives the weights from `position` on. This
module only generates text; it does not need LLVM.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from left_bench.fivebit.packing import PLANES, SEGMENTS

LANES = 16
ARGUMENTS = ("out", "planes", "scale", "second", "mean", "blocks")
"""The 8-byte fields of the argument of `decode`: addresses, and the number of blocks in a segment. `second` holds the
zero points (`int5`) or the scales of the scales (double quantization)."""
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# Weights of a segment decoded before the next segment: the planes' bytes, 160 KiB, stay in the L2 cache, and the result
# is written in long runs, not in eight places at once. With runs of 2048, large weights take 1.5 times as long.
_RUN = 2**15
_INTS, _FLOATS = f"<{LANES} x i32>", f"<{LANES} x float>"


class _Code:
    """The lines of a function; a call adds an operation and returns the name of its result."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.label = "entry"
        self._names = 0

    def __call__(self, operation: str) -> str:
        self._names += 1
        self.lines.append(f"  %v{self._names} = {operation}")
        return f"%v{self._names}"

    def at(self, address: str, offset: str | int) -> str:
        """An address `offset` bytes further."""
        return self(f"getelementptr i8, ptr {address}, i64 {offset}")

    def ints(self, operation: str, left: str, right: str | int) -> str:
        """An operation on 16 integers; a number is broadcast to 16."""
        return self(f"{operation} {_INTS} {left}, {f'splat (i32 {right})' if isinstance(right, int) else right}")

    def spread(self, kind: str, value: str) -> str:
        """A scalar broadcast to 16 lanes."""
        item = self(f"insertelement <{LANES} x {kind}> poison, {kind} {value}, i64 0")
        nowhere = f"<{LANES} x {kind}> poison, <{LANES} x i32> zeroinitializer"
        return self(f"shufflevector <{LANES} x {kind}> {item}, {nowhere}")

    @contextmanager
    def loop(self, start: str, stop: str, step: int) -> Iterator[str]:
        """A loop: the context adds the body's lines, for an index from `start` to below `stop`."""
        self._names += 1
        own, before = self._names, self.label
        head, body, after = (f"l{own}.{part}" for part in ("head", "body", "after"))
        self.lines += [f"  br label %{head}", f"{head}:", "", f"  %l{own}.go = icmp slt i64 %l{own}.i, {stop}"]
        phi = len(self.lines) - 2
        self.lines += [f"  br i1 %l{own}.go, label %{body}, label %{after}", f"{body}:"]
        self.label = body
        yield f"%l{own}.i"
        self.lines.append(f"  %l{own}.next = add i64 %l{own}.i, {step}")
        self.lines[phi] = f"  %l{own}.i = phi i64 [ {start}, %{before} ], [ %l{own}.next, %{self.label} ]"
        self.lines += [f"  br label %{head}", f"{after}:"]
        self.label = after


def source(
    *, scheme: str, double_quant: bool, block_size: int, dtype: str, levels: Sequence[float], look_up: str
) -> str:
    """`void @decode(ptr arguments, i64 first, i64 last)`: blocks `first` to below `last` of every segment.

    Args:
        block_size: a multiple of 32.
        dtype: of the result, a name in ITEM_BYTES.
        levels: the 32 levels of `nf5`; ignored for `int5`.
        look_up: `avx512` or `avx2` (permutations of registers that hold the levels) or `plain` (one load a weight).
    """
    code = _Code()
    together = 2 if scheme == "nf5" else 1
    width = LANES * together
    fields = [code.at("%arguments", 8 * index) for index in range(len(ARGUMENTS))]
    out, planes, scale, second, mean_at = (code(f"load ptr, ptr {field}") for field in fields[:-1])
    blocks = code(f"load i64, ptr {fields[-1]}")
    plane_bytes = code(f"mul i64 {blocks}, {block_size}")
    mean = code(f"load float, ptr {mean_at}, align 1") if double_quant else ""
    plane = [code.at(planes, code(f"mul i64 {plane_bytes}, {index}")) for index in range(PLANES)]
    run = max(1, _RUN // block_size)
    with code.loop("%first", "%last", run) as start:
        stop = code(f"call i64 @llvm.smin.i64(i64 {code(f'add i64 {start}, {run}')}, i64 %last)")
        for segment in range(SEGMENTS):
            whole = code(f"mul i64 {blocks}, {segment}")
            with code.loop(start, stop, 1) as block:
                number = code(f"add i64 {whole}, {block}")
                factor = code.spread("float", _scale(code, number, scale=scale, nested=second, mean=mean))
                if scheme == "int5":
                    stored = code(f"load i8, ptr {code.at(second, number)}, align 1")
                    zero = code.spread("i32", code(f"sext i8 {stored} to i32"))
                begin, result = (code(f"mul i64 {index}, {block_size}") for index in (block, number))
                with code.loop("0", str(block_size // width), 1) as vector:
                    step = code(f"mul i64 {vector}, {width}")
                    position = code(f"add i64 {begin}, {step}")
                    codes = _codes(code, segment, plane, position, together)
                    if scheme == "int5":
                        steps = code.ints("sub", code.ints("and", codes, 31), zero)
                        results = [code(f"sitofp {_INTS} {steps} to {_FLOATS}")]
                    else:
                        second_code = code.ints("lshr", codes, 5)
                        results = [_level(code, each, levels, look_up) for each in (codes, second_code)]
                    results = [code(f"fmul {_FLOATS} {each}, {factor}") for each in results]
                    weight = code(f"add i64 {result}, {step}")
                    at = code.at(out, code(f"mul i64 {weight}, {ITEM_BYTES[dtype]}"))
                    code.lines.append(f"  store {_rounded(code, results, dtype)}, ptr {at}, align {ITEM_BYTES[dtype]}")
    table = f"@levels = private constant [32 x float] [{_literals(levels)}]\n" if scheme == "nf5" else ""
    return "\n".join(
        [
            table + "declare i64 @llvm.smin.i64(i64, i64)",
            f"declare {_FLOATS} @llvm.x86.avx512.vpermi2var.ps.512({_FLOATS}, {_INTS}, {_FLOATS})"
            if look_up == "avx512"
            else "declare <8 x float> @llvm.x86.avx2.permps(<8 x float>, <8 x i32>)"
            if look_up == "avx2"
            else "",
            # otherwise vectors are split in halves for CPUs that prefer 256 bits
            'define void @decode(ptr %arguments, i64 %first, i64 %last) "min-legal-vector-width"="512" '
            '"prefer-vector-width"="512" {',
            "entry:",
            *code.lines,
            "  ret void",
            "}",
        ]
    )


def team(*, count: int, number: int) -> str:
    """`void @share(ptr arguments)`: one thread's share of `decode`, for an OpenMP team.

    Args:
        count: address of `omp_get_num_threads`: a team may be smaller than requested.
        number: address of `omp_get_thread_num`.
    """
    return f"""
define void @share(ptr %arguments) {{
  %field = getelementptr i8, ptr %arguments, i64 {8 * ARGUMENTS.index("blocks")}
  %blocks = load i64, ptr %field
  %count.narrow = call i32 inttoptr (i64 {count} to ptr)()
  %count = sext i32 %count.narrow to i64
  %number.narrow = call i32 inttoptr (i64 {number} to ptr)()
  %number = sext i32 %number.narrow to i64
  %next = add i64 %number, 1
  %before = mul i64 %blocks, %number
  %through = mul i64 %blocks, %next
  %first = sdiv i64 %before, %count
  %last = sdiv i64 %through, %count
  call void @decode(ptr %arguments, i64 %first, i64 %last)
  ret void
}}
"""


def _scale(code: _Code, number: str, *, scale: str, nested: str, mean: str) -> str:
    """The float32 scale of a block, as in `blocks.decoded_scale`."""
    if not mean:
        stored = code(f"load i16, ptr {code(f'getelementptr i16, ptr {scale}, i64 {number}')}, align 1")
        wide = code(f"zext i16 {stored} to i32")
        return code(f"bitcast i32 {code(f'shl i32 {wide}, 16')} to float")
    stored = code(f"load i8, ptr {code.at(scale, number)}, align 1")
    group = code(f"lshr i64 {number}, 8")
    constant = code(f"load float, ptr {code(f'getelementptr float, ptr {nested}, i64 {group}')}, align 1")
    product = code(f"fmul float {code(f'sitofp i8 {stored} to float')}, {constant}")
    total = code(f"fadd float {product}, {mean}")
    below = code(f"fcmp olt float {total}, 0.0")
    return code(f"select i1 {below}, float 0.0, float {total}")


def _codes(code: _Code, segment: int, plane: Sequence[str], position: str, together: int) -> str:
    """A segment's 16 codes or pairs of codes in the lowest 5 (10) bits; the bits above are undefined."""

    def words(index: int, drop: int = 0) -> str:
        kind = f"<{LANES} x i{8 * together}>"
        wide = code(f"zext {kind} {code(f'load {kind}, ptr {code.at(plane[index], position)}, align 1')} to {_INTS}")
        return code.ints("lshr", wide, drop * together) if drop else wide

    def moved(part: str, up: int) -> str:
        return code.ints("shl", part, up * together)

    if segment < PLANES:
        return words(segment)
    low = words(segment - PLANES, drop=5)
    if segment == 6:
        ends = code.ints("or", moved(words(3, drop=7), 3), moved(words(4, drop=7), 4))
        return code.ints("or", low, ends)
    return code.ints("or", low, moved(words(3 if segment == 5 else 4, drop=5), 3))


def _level(code: _Code, codes: str, levels: Sequence[float], look_up: str) -> str:
    """The levels of the lowest 5 bits of 16 codes."""
    if look_up == "avx512":
        low, high = (f"{_FLOATS} <{_literals(half)}>" for half in (levels[:LANES], levels[LANES:]))
        return code(f"call {_FLOATS} @llvm.x86.avx512.vpermi2var.ps.512({low}, {_INTS} {codes}, {high})")
    if look_up == "avx2":
        halves = [_eight_levels(code, codes, start, levels) for start in (0, 8)]
        order = ", ".join(f"i32 {lane}" for lane in range(LANES))
        pair = ", ".join(f"<8 x float> {half}" for half in halves)
        return code(f"shufflevector {pair}, <{LANES} x i32> <{order}>")
    index = code.ints("and", codes, 31)
    result = "poison"
    for lane in range(LANES):
        at = code(f"getelementptr float, ptr @levels, i32 {code(f'extractelement {_INTS} {index}, i64 {lane}')}")
        result = code(f"insertelement {_FLOATS} {result}, float {code(f'load float, ptr {at}')}, i64 {lane}")
    return result


def _eight_levels(code: _Code, codes: str, start: int, levels: Sequence[float]) -> str:
    """Four permutations by the lowest 3 bits; the next two bits select among them."""
    order = ", ".join(f"i32 {start + lane}" for lane in range(8))
    index = code(f"shufflevector {_INTS} {codes}, {_INTS} poison, <8 x i32> <{order}>")
    results = [
        code(
            f"call <8 x float> @llvm.x86.avx2.permps(<8 x float> <{_literals(levels[at : at + 8])}>, <8 x i32> {index})"
        )
        for at in range(0, 32, 8)
    ]
    for bit in (3, 4):
        up = code(f"shl <8 x i32> {index}, splat (i32 {31 - bit})")
        upper = code(f"icmp slt <8 x i32> {up}, zeroinitializer")
        results = [
            code(f"select <8 x i1> {upper}, <8 x float> {above}, <8 x float> {below}")
            for below, above in zip(results[::2], results[1::2], strict=True)
        ]
    return results[0]


def _rounded(code: _Code, results: Sequence[str], dtype: str) -> str:
    """16 products, or 2 × 16 to be interleaved, rounded to nearest, ties to even: `type value`."""
    if dtype == "bfloat16":
        bits = [_rounded_bits(code, each) for each in results]
        low = code.ints("lshr", bits[0], 16)
        if len(bits) == 1:
            return f"<{LANES} x i16> {code(f'trunc {_INTS} {low} to <{LANES} x i16>')}"
        return f"{_INTS} {code.ints('or', low, code.ints('and', bits[1], -65536))}"
    kind = {"float16": "half", "float32": "float"}[dtype]
    if dtype == "float16":
        results = [code(f"fptrunc {_FLOATS} {each} to <{LANES} x half>") for each in results]
    if len(results) == 1:
        return f"<{LANES} x {kind}> {results[0]}"
    order = ", ".join(f"i32 {lane}, i32 {lane + LANES}" for lane in range(LANES))
    pair = ", ".join(f"<{LANES} x {kind}> {each}" for each in results)
    return f"<{2 * LANES} x {kind}> {code(f'shufflevector {pair}, <{2 * LANES} x i32> <{order}>')}"


def _rounded_bits(code: _Code, floats: str) -> str:
    """float32 bits whose upper half is the bfloat16.

    Computed with integers: AVX-512's conversion flushes subnormal numbers to zero, torch's does not.
    """
    bits = code(f"bitcast {_FLOATS} {floats} to {_INTS}")
    odd = code.ints("and", code.ints("lshr", bits, 16), 1)
    rounded = code.ints("add", code.ints("add", bits, 0x7FFF), odd)
    is_nan = code(f"fcmp uno {_FLOATS} {floats}, zeroinitializer")
    nan = f"{_INTS} splat (i32 {0x7FC00000})"
    return code(f"select <{LANES} x i1> {is_nan}, {nan}, {_INTS} {rounded}")


def _literals(values: Sequence[float]) -> str:
    """float32 numbers in LLVM's notation: the bits of the equal double."""
    return ", ".join(f"float 0x{struct.unpack('>Q', struct.pack('>d', value))[0]:016X}" for value in values)
