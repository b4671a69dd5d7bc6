"""Translate PTX kernels into C++ that runs them, thread by thread, on a CPU.

    python translate.py OUT FILES ARCHITECTURE=FILE.ptx ...

writes OUT/ptx_0.cpp to OUT/ptx_{FILES-1}.cpp, and OUT/mutants.cpp with the mutants of mutants.py,
to be compiled with instructions.h. A kernel that two architectures have alike is translated once.

The translation is strict: a directive, instruction, modifier or operand that is not in the tables
below is an error, and so is a register of the wrong size, or one that may be read before it is
written. In particular there is no ``mul.f32``, which ptxas may contract, and no ``.ftz``. Every
instruction becomes one statement.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import mutants

C_TYPES = {1: "bool", 8: "uint8_t", 16: "uint16_t", 32: "uint32_t", 64: "uint64_t"}
SPECIAL = {"%ctaid.x": "m.ctaid_x", "%ntid.x": "m.ntid_x", "%tid.x": "m.tid_x"}


def fail(message: str) -> NoReturn:
    """Stop with a message."""
    raise SystemExit(f"translate.py: {message}")


# -- what each instruction does


@dataclass(frozen=True)
class Operation:
    """An instruction that computes its first operand from the others.

    Attributes:
        expression: C++ expression of the sources {0}, {1}, ...
        result: PTX type of the destination.
        sources: PTX types of the sources.
    """

    expression: str
    result: str
    sources: tuple[str, ...]


def _operations() -> dict[str, Operation]:
    found: dict[str, Operation] = {}

    def add(opcode: str, expression: str, result: str, *sources: str) -> None:
        found[opcode] = Operation(expression, result, sources)

    compare = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
    for bits in (16, 32, 64):
        b = f"b{bits}"
        for name, operator in (("and", "&"), ("or", "|"), ("xor", "^")):
            add(f"{name}.{b}", f"{{0}} {operator} {{1}}", b, b, b)
        add(f"not.{b}", "~{0}", b, b)
        add(f"shl.{b}", "shift_left({0}, {1})", b, b, "u32")
        for t in (b, f"u{bits}", f"s{bits}"):
            signed = t[0] == "s"
            left, right = ("as_signed({0})", "as_signed({1})") if signed else ("{0}", "{1}")
            add(f"mov.{t}", "{0}", t, t)
            add(f"selp.{t}", "{2} ? {0} : {1}", t, t, t, "pred")
            for name, operator in compare.items():
                if t[0] != "b" or name in ("eq", "ne"):
                    add(f"setp.{name}.{t}", f"{left} {operator} {right}", "pred", t, t)
            if t[0] == "b" or bits == 16:
                continue
            add(f"add.{t}", "{0} + {1}", t, t, t)
            add(f"sub.{t}", "{0} - {1}", t, t, t)
            add(f"mul.lo.{t}", "{0} * {1}", t, t, t)
            add(f"mad.lo.{t}", "{0} * {1} + {2}", t, t, t, t)
            add(f"min.{t}", f"{left} < {right} ? {{0}} : {{1}}", t, t, t)
            add(f"max.{t}", f"{left} > {right} ? {{0}} : {{1}}", t, t, t)
            shift = "shift_right_signed" if signed else "shift_right"
            add(f"shr.{t}", f"{shift}({{0}}, {{1}})", t, t, "u32")
    wide = "static_cast<int64_t>(as_signed({0})) * as_signed({1})"
    add("mul.wide.s32", f"static_cast<uint64_t>({wide})", "s64", "s32", "s32")
    add("mul.wide.u32", "static_cast<uint64_t>({0}) * {1}", "u64", "u32", "u32")
    add("mul.hi.u32", "(static_cast<uint64_t>({0}) * {1}) >> 32", "u32", "u32", "u32")
    for t in ("u32", "u64"):
        add(f"div.{t}", "{0} / {1}", t, t, t)
    add("shf.l.wrap.b32", "funnel_left({0}, {1}, {2})", "b32", "b32", "b32", "u32")
    add("prmt.b32", "permute({0}, {1}, {2})", "b32", "b32", "b32", "b32")
    add("cvta.to.global.u64", "{0}", "u64", "u64")
    for to, source in (("u32", "u64"), ("u64", "u32"), ("u16", "u32"), ("u32", "u16")):
        add(f"cvt.{to}.{source}", f"static_cast<{C_TYPES[int(to[1:])]}>({{0}})", to, source)
    add("cvt.s32.s16", "static_cast<uint32_t>(as_signed({0}))", "s32", "s16")
    add("cvt.s64.s32", "static_cast<uint64_t>(as_signed({0}))", "s64", "s32")

    add("mov.pred", "{0}", "pred", "pred")
    add("not.pred", "!{0}", "pred", "pred")
    for name, operator in (("and", "&&"), ("or", "||"), ("xor", "!=")):
        add(f"{name}.pred", f"{{0}} {operator} {{1}}", "pred", "pred", "pred")

    f = "f32"
    add("mov.f32", "{0}", f, f)
    add("selp.f32", "{2} ? {0} : {1}", f, f, f, "pred")
    either = "(is_nan({0}) || is_nan({1}))"
    tests = {"num": f"!{either}", "nan": either}
    for name, operator in compare.items():
        ordered = f"(number({{0}}) {operator} number({{1}}))"
        tests[name] = f"(!{either} && {ordered})"
        tests[f"{name}u"] = f"({either} || {ordered})"
    for name, test in tests.items():
        add(f"setp.{name}.f32", test, "pred", f, f)
        add(f"setp.{name}.and.f32", f"{test} && {{2}}", "pred", f, f, "pred")
    for name, function in (("add", "add"), ("sub", "subtract"), ("mul", "multiply")):
        add(f"{name}.rn.f32", f"{function}(m, {{0}}, {{1}})", f, f, f)
    add("fma.rn.f32", "fused(m, {0}, {1}, {2})", f, f, f, f)
    add("sqrt.rn.f32", "made(m, __builtin_sqrtf(number({0})))", f, f)
    add("rsqrt.approx.ftz.f32", "approximate_rsqrt(m, {0})", f, f)
    add("neg.f32", "negate(m, {0})", f, f)
    add("abs.f32", "absolute(m, {0})", f, f)
    add("cvt.rn.f32.s32", "float_of_signed({0})", f, "s32")
    add("cvt.f32.f16", "float_of_half({0})", f, "b16")
    add("cvt.rn.f16.f32", "half_of_float({0})", "b16", f)
    for short, convert in (("f16", "half_of_float"), ("bf16", "bfloat_of_float")):
        both = f"static_cast<uint32_t>({convert}({{0}})) << 16 | {convert}({{1}})"
        add(f"cvt.rn.{short}x2.f32", both, "b32", f, f)
    return found


OPERATIONS = _operations()
MEMORY = re.compile(r"(ld|st)\.(global|param)(?:\.v([24]))?\.(u8|u16|u32|u64|f32)")


def kind(type_name: str) -> tuple[str, int]:
    """Return the letter and the bits of a PTX type."""
    return ("p", 1) if type_name == "pred" else (type_name[0], int(type_name[1:]))


# -- a kernel


@dataclass
class Instruction:
    """An instruction, and the C++ statement that it becomes.

    Attributes:
        target: Label that it may branch to.
        falls: Whether the next instruction may follow.
        shuffle: The six operands of shfl.sync, which has no statement.
    """

    where: str
    text: str
    guard: str = ""
    reads: list[str] = field(default_factory=list)
    writes: list[str] = field(default_factory=list)
    code: str = ""
    target: str | None = None
    falls: bool = True
    shuffle: tuple[str, str, str, str, str, str | None] | None = None

    def fail(self, message: str) -> NoReturn:
        """Stop with a message that names this instruction."""
        fail(f"{self.where}: {message}: {self.text}")


class Kernel:
    """A kernel: its registers and its body, in which a label is a string.

    Args:
        name: Mangled name.
        parameters: Names of the parameters, and where each begins among them.
        sizes: Bytes of each parameter.
        threads: Most threads in a block.
    """

    def __init__(
        self, name: str, parameters: dict[str, int], sizes: list[int], threads: int
    ) -> None:
        self.name, self.parameters, self.sizes, self.threads = name, parameters, sizes, threads
        self.bits: dict[str, int] = {}  # of each register, by its name in C++
        self.body: list[Instruction | str] = []
        self.scopes: list[dict[str, tuple[str, str]]] = [{}]

    def declare(self, type_name: str, name: str, count: str | None) -> None:
        """Add the registers of a `.reg` directive."""
        for one in [name] if count is None else [f"{name}{i}" for i in range(int(count))]:
            c_name = one.replace("%", "")
            if len(self.scopes) > 1:
                c_name = f"s{len(self.bits)}_{c_name}"
            self.scopes[-1][one] = (c_name, type_name)
            self.bits[c_name] = kind(type_name)[1]

    # Operands.

    def _register(self, ins: Instruction, name: str, wanted: str, widens: bool) -> str | None:
        found = next((scope[name] for scope in reversed(self.scopes) if name in scope), None)
        if found is None:
            return None
        (letter, bits), (want, want_bits) = kind(found[1]), kind(wanted)
        fits = bits == want_bits or (widens and bits > want_bits)
        mixed = not widens and {letter, want} in ({"f", "s"}, {"f", "u"})
        if not fits or mixed or (letter == "p") != (want == "p"):
            ins.fail(f"{name} is .{found[1]}, not .{wanted}")
        return found[0]

    def source(self, ins: Instruction, operand: str, wanted: str, widens: bool = False) -> str:
        """Return the C++ expression of an operand that is read."""
        register = self._register(ins, operand, wanted, widens)
        if register is not None:
            ins.reads.append(register)
            return register
        letter, bits = kind(wanted)
        if operand in SPECIAL and bits == 32:
            return SPECIAL[operand]
        if letter == "p" and operand in ("-1", "0", "1"):
            return "false" if operand == "0" else "true"
        if bits == 32 and letter in "fb" and re.fullmatch(r"0f[0-9A-Fa-f]{8}", operand):
            return f"0x{operand[2:]}u"
        if letter in "bsu" and re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", operand):
            value = int(operand, 0)
            if -(1 << (bits - 1)) <= value < 1 << bits:
                return f"{C_TYPES[bits]}{{{value % (1 << bits):#x}u}}"
        ins.fail(f"operand {operand!r}")

    def destination(self, ins: Instruction, operand: str, wanted: str, widens: bool = False) -> str:
        """Return the C++ name of a register that is written."""
        register = self._register(ins, operand, wanted, widens)
        if register is None:
            ins.fail(f"destination {operand!r}")
        ins.writes.append(register)
        return register

    # Instructions.

    def add(self, where: str, text: str) -> None:
        """Translate one instruction."""
        ins = Instruction(where, text)
        found = re.fullmatch(r"(@!?[%\w]+\s+)?([a-z][\w.]*)\s*(.*)", text, re.S)
        if found is None:
            ins.fail("not an instruction")
        guard, opcode, rest = found.groups()
        if guard:
            negated = guard[1] == "!"
            name = self.source(ins, guard.strip("@! \t"), "pred")
            ins.guard = f"if ({'!' if negated else ''}{name}) "
        operands = split_operands(rest)
        if opcode in ("bra", "bra.uni", "ret"):
            if len(operands) != (opcode != "ret") or (opcode == "bra.uni" and guard):
                ins.fail("operands")
            ins.falls = bool(guard)
            ins.target = operands[0] if operands else None
            ins.code = f"goto {label(operands[0])}" if operands else "return kExited"
        elif memory := MEMORY.fullmatch(opcode):
            self._memory(ins, *memory.groups(), *pair(ins, operands))
        elif opcode == "shfl.sync.idx.b32":
            self._shuffle(ins, operands)
        elif opcode in ("mov.b64", "mov.b32") and ("{" in rest or operands[-1] in self.parameters):
            self._move(ins, int(opcode[-2:]), *pair(ins, operands))
        elif opcode in OPERATIONS:
            operation = OPERATIONS[opcode]
            if len(operands) != 1 + len(operation.sources):
                ins.fail(f"{len(operands)} operands")
            values = zip(operands[1:], operation.sources, strict=True)
            expression = operation.expression.format(*(self.source(ins, o, t) for o, t in values))
            ins.code = f"{self.destination(ins, operands[0], operation.result)} = {expression}"
        else:
            ins.fail(f"unknown instruction {opcode}")
        self.body.append(ins)

    def _move(self, ins: Instruction, bits: int, to: str, source: str) -> None:
        """Translate a move from or to two halves, or of the parameters' address, which is 0."""
        whole, half = f"b{bits}", f"b{bits // 2}"
        half_type = C_TYPES[bits // 2]
        if source in self.parameters:
            ins.code = f"{self.destination(ins, to, whole)} = {self.parameters[source]}"
        elif "{" in to:
            value = self.source(ins, source, whole)
            low, high = (self.destination(ins, o, half) for o in vector(ins, to, 2))
            if value in (low, high):
                ins.fail("unpacks onto itself")
            shifted = f"static_cast<{half_type}>({value} >> {bits // 2})"
            ins.code = f"{low} = static_cast<{half_type}>({value}), {high} = {shifted}"
        else:
            low, high = (self.source(ins, o, half) for o in vector(ins, source, 2))
            joined = f"{low} | {C_TYPES[bits]}{{{high}}} << {bits // 2}"
            ins.code = f"{self.destination(ins, to, whole)} = {joined}"

    def _memory(
        self, ins: Instruction, way: str, space: str, count: str, type_name: str, *operands: str
    ) -> None:
        number = int(count or 1)
        address, value = (operands[1], operands[0]) if way == "ld" else operands
        found = re.fullmatch(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\d+)\s*)?\]", address)
        if found is None:
            ins.fail(f"address {address}")
        offset = int(found[2] or 0)
        if space == "param" and found[1] in self.parameters:
            base = str(self.parameters[found[1]])
        else:
            base = self.source(ins, found[1], "u64")
        values = vector(ins, value, number) if number > 1 else [value]
        bits = kind(type_name)[1]
        size, unit = bits // 8 * number, C_TYPES[bits]
        where = f"{base} + {offset}ull"
        # A register may be wider than what is loaded or stored.
        if way == "ld":
            to = [self.destination(ins, o, type_name, widens=True) for o in values]
            if base in to and number > 1:
                ins.fail("loads over its own address")
            call = f"ld_param<{size}>(m, {where})"
            if space == "global":
                call = f"global_load(m, {where}, {size})"
            parts = [f"{t} = get<{unit}>(at, {i});" for i, t in enumerate(to)]
            ins.code = f"{{ const uint8_t* at = {call}; {' '.join(parts)} }}"
        elif space == "global":
            stored = [self.source(ins, o, type_name, widens=True) for o in values]
            parts = [f"put<{unit}>(at, {i}, {s});" for i, s in enumerate(stored)]
            ins.code = f"{{ uint8_t* at = global_store(m, {where}, {size}); {' '.join(parts)} }}"
        else:
            ins.fail("a store to the parameters")

    def _shuffle(self, ins: Instruction, operands: list[str]) -> None:
        """Translate shfl.sync, where a thread stops until all of its warp are there."""
        if len(operands) != 5 or ins.guard:
            ins.fail("operands")
        to = [o.strip() for o in operands[0].split("|")]
        value, lane, clamp, mask = (self.source(ins, o, "b32") for o in operands[1:])
        result = self.destination(ins, to[0], "b32")
        valid = self.destination(ins, to[1], "pred") if len(to) == 2 else None
        ins.shuffle = (value, lane, clamp, mask, result, valid)

    # The whole.

    def live(self) -> list[int]:
        """Return the registers that are live before each place, as bits in order of declaration."""
        numbers = {name: i for i, name in enumerate(self.bits)}
        labels = {item: i for i, item in enumerate(self.body) if isinstance(item, str)}
        n = len(self.body)
        reads, kills = [0] * n, [0] * n
        successors: list[list[int]] = [[] for _ in range(n)]
        for i, item in enumerate(self.body):
            if isinstance(item, str):
                successors[i] = [i + 1]
                continue
            reads[i] = sum(1 << r for r in {numbers[name] for name in item.reads})
            if not item.guard:
                kills[i] = sum(1 << r for r in {numbers[name] for name in item.writes})
            successors[i] = [i + 1] * item.falls
            if item.target is not None:
                if item.target not in labels:
                    item.fail("no such label")
                successors[i].append(labels[item.target])
        if n in (s for found in successors for s in found):
            fail(f"{self.name} runs past its end")
        live = [0] * n
        changed = True
        while changed:
            changed = False
            for i in range(n - 1, -1, -1):
                after = 0
                for s in successors[i]:
                    after |= live[s]
                before = reads[i] | (after & ~kills[i])
                if before != live[i]:
                    live[i], changed = before, True
        return live

    def statements(self) -> list[str]:
        """Return the C++ statements of the body, one per instruction."""
        live, names = self.live(), list(self.bits)
        if live[0]:
            fail(f"{self.name}: registers are read before they are written")
        lines, stops = [], 0
        for i, item in enumerate(self.body):
            if isinstance(item, str):
                lines.append(f"{label(item)}:;")
            elif item.shuffle is None:
                lines.append(f"  {item.guard}{item.code};")
            else:
                value, lane, clamp, mask, result, valid = item.shuffle
                stops += 1
                after = [r for b, r in enumerate(names) if live[i + 1] >> b & 1]
                after = [r for r in after if r not in (result, valid)]
                if len(after) > 256:
                    item.fail(f"{len(after)} registers are live across it")
                saves = " ".join(f"m.saved[{k}] = {r};" for k, r in enumerate(after))
                loads = " ".join(
                    f"{r} = static_cast<{C_TYPES[self.bits[r]]}>(m.saved[{k}]);"
                    for k, r in enumerate(after)
                )
                lines.append(
                    f"  {saves} m.shuffle = {{{value}, {lane}, {clamp}, {mask}}}; "
                    f"m.stopped_at = {stops}; return kStopped; S{stops}:; {loads} "
                    f"{result} = m.shuffled;" + (f" {valid} = m.shuffled_pred;" if valid else "")
                )
        return lines

    def function(self, name: str, lines: list[str]) -> str:
        """Return a C++ function with these statements."""
        used = {r for i in self.body if isinstance(i, Instruction) for r in i.reads + i.writes}
        declared = [f"  {C_TYPES[b]} {r} = 0;" for r, b in self.bits.items() if r in used]
        stops = sum(isinstance(i, Instruction) and i.shuffle is not None for i in self.body)
        cases = [f"    case {n}: goto S{n};" for n in range(1, stops + 1)]
        head = ["  switch (m.stopped_at) {", "    case 0: break;", *cases]
        head += ["    default: __builtin_trap();", "  }"]
        return "\n".join([f"Outcome {name}(Thread& m) {{", *declared, *head, *lines, "}", ""])

    def entry(self, symbol: str, function: str, architecture: str, mutant: int = 0) -> str:
        """Return C++ that registers `function` as this kernel."""
        sizes = ", ".join(map(str, self.sizes))
        return (
            f'Entry {symbol}{{{architecture}, "{self.name}", {function}, {{{sizes}}}, '
            f"{self.threads}, {mutant}, 0, nullptr}};\n"
            f"const Registered registered_{symbol}(&{symbol});"
        )


def label(name: str) -> str:
    """Return the C++ label of a PTX label."""
    return "L" + re.sub(r"\W", "_", name)


def pair(ins: Instruction, operands: list[str]) -> tuple[str, str]:
    """Return two operands."""
    if len(operands) != 2:
        ins.fail(f"{len(operands)} operands")
    return operands[0], operands[1]


def vector(ins: Instruction, text: str, count: int) -> list[str]:
    """Return the operands between braces."""
    parts = [part.strip() for part in text.strip("{}").split(",")]
    if len(parts) != count or text[:1] + text[-1:] != "{}":
        ins.fail(f"not {count} values")
    return parts


def split_operands(text: str) -> list[str]:
    """Return what commas separate, except for those between braces."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|[^,{])+", text)]


# -- a file

_ENTRY = re.compile(
    r"\s*(?:\.visible\s+|\.weak\s+)?\.entry\s+([\w$]+)\s*\(\s*(.*?)\)\s*((?:\.\w+\s+[\d, ]+\s)*)\{",
    re.S,
)
_STATEMENT = re.compile(
    r"\s*(?:(?P<label>\$?[\w$]+):(?!:)|(?P<brace>[{}])"
    r"|(?P<text>[^;{}\s][^;{}]*(?:\{[^;{}]*\}[^;{}]*)*);)"
)


def parse(path: Path) -> Iterator[Kernel]:
    """Yield the kernels of a PTX file."""
    text = re.sub(r"//[^\n]*", "", path.read_text())
    head = re.match(r"\s*\.version\s+[\d.]+\s*\.target\s+[\w, ]+?\s*\.address_size\s+64\s", text)
    if head is None:
        fail(f"{path}: no head")
    position = head.end()
    while text[position:].strip():
        found = _ENTRY.match(text, position)
        if found is None:
            fail(f"{path}: {text[position : position + 100]!r}")
        kernel = _head(path, *found.groups())
        position = found.end()
        line = text.count("\n", 0, position) + 1
        while kernel.scopes:
            statement = _STATEMENT.match(text, position)
            if statement is None:
                fail(f"{path}:{line}: {text[position : position + 80]!r}")
            line += statement[0].count("\n")
            _add(kernel, f"{path.name}:{line}", **statement.groupdict())
            position = statement.end()
        yield kernel


def _head(path: Path, name: str, parameters: str, directives: str) -> Kernel:
    block = re.fullmatch(r"\.param\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[(\d+)\]\s*", parameters)
    words = re.findall(r"\.param\s+\.u64\s+(?:\.ptr[\w. ]*?\s+)?([\w$]+)\s*(?:,|$)", parameters)
    if block is not None:
        kernel = Kernel(name, {block[1]: 0}, [int(block[2])], 1024)
    elif len(words) == parameters.count(".param") == 2:
        kernel = Kernel(name, {words[0]: 0, words[1]: 8}, [8, 8], 1024)
    else:
        fail(f"{path}: parameters {parameters}")
    for directive, numbers in re.findall(r"\.(\w+)\s+([\d, ]+)", directives):
        if directive == "maxntid":
            kernel.threads = int(numbers.split(",")[0])
        elif directive != "minnctapersm":
            fail(f"{path}: .{directive}")
    return kernel


def _add(
    kernel: Kernel, where: str, label: str | None, brace: str | None, text: str | None
) -> None:
    if brace == "{":
        kernel.scopes.append({})
    elif brace == "}":
        kernel.scopes.pop()
    elif label is not None:
        kernel.body.append(label)
    elif text is None or re.fullmatch(r'\.pragma "(nounroll|used_bytes_mask \d+)"', text):
        pass
    elif register := re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S):
        for one in register[2].split(","):
            found = re.fullmatch(r"\s*(%?\w+)(?:<(\d+)>)?\s*", one)
            if found is None:
                fail(f"{where}: {text}")
            kernel.declare(register[1], found[1], found[2])
    elif text.startswith("."):
        fail(f"{where}: {text}")
    else:
        kernel.add(where, text)


# -- all of them

_HEAD = '#include "instructions.h"\n\nnamespace ptx {\nnamespace {\n'
_TAIL = "}  // namespace\n}  // namespace ptx\n"


def main(out: Path, files: int, sources: dict[str, list[Path]]) -> None:
    """Translate `sources`, by architecture, into so many files."""
    out.mkdir(parents=True, exist_ok=True)
    texts, sizes = [[_HEAD] for _ in range(files)], [0] * files
    functions: dict[str, tuple[str, int]] = {}  # by their statements
    mutant_lines = [_HEAD]
    total = 0
    kernels: list[tuple[str, Kernel, list[str]]] = []
    for architecture, paths in sources.items():
        for path in paths:
            kernels += [(architecture, k, k.statements()) for k in parse(path)]
    kernels.sort(key=lambda item: -len(item[2]))
    for number, (architecture, kernel, lines) in enumerate(kernels):
        key = kernel.name + "\n".join(lines)
        if key not in functions:
            smallest = sizes.index(min(sizes))
            functions[key] = f"kernel_{number}", smallest
            texts[smallest].append(kernel.function(f"kernel_{number}", lines))
            sizes[smallest] += len(lines)
            total += len(lines)
        function, place = functions[key]
        texts[place].append(kernel.entry(f"entry_{number}", function, architecture))
    for number, mutant in enumerate(mutants.MUTANTS, start=1):
        found = [item for item in kernels if mutant.belongs_to(item[1].name, int(item[0]))]
        if len(found) != 1:
            fail(f"{mutant} belongs to {len(found)} kernels")
        architecture, kernel, lines = found[0]
        function = f"mutant_{number}"
        mutant_lines.append(kernel.function(function, mutant.change(lines)))
        mutant_lines.append(kernel.entry(f"entry_{number}", function, architecture, number))
    for i, lines in enumerate(texts):
        write(out / f"ptx_{i}.cpp", lines)
    write(out / "mutants.cpp", mutant_lines)
    print(f"{len(kernels)} kernels, {len(functions)} of them different, {total} statements")


def write(path: Path, lines: list[str]) -> None:
    """Write C++ definitions, unless they are there: they take long to compile."""
    text = "\n".join([*lines, _TAIL])
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


if __name__ == "__main__":
    found: dict[str, list[Path]] = {}
    for word in sys.argv[3:]:
        architecture, _, path = word.partition("=")
        found.setdefault(architecture, []).append(Path(path))
    main(Path(sys.argv[1]), int(sys.argv[2]), found)
