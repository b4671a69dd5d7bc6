"""Count the machine instructions that the CUDA kernels spend on an element. Needs no GPU.

    python benchmarks/sass.py [--arch sm_90] [--opcodes]

The kernels are compiled as setup.py compiles them and disassembled. Of each kernel's inner loop
the shortest way round is counted that makes all the accesses and all the noise of an octet, the
eight elements that a thread holds: the way of an octet that is whole and has no NaN. Registers,
spills and stack are ptxas's own figures.

Needs nvcc, and nvdisasm from the CUDA toolkit or from an installed triton package.
"""

from __future__ import annotations

import argparse
import heapq
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

SOURCE = Path(__file__).resolve().parents[1] / "csrc" / "cuda" / "update_perturb.cu"
NVCC_FLAGS = ["-O3", "--fmad=false", "-std=c++17", "-Xptxas=-v"]
OCTET = 8
_T = TypeVar("_T")

# Philox makes four words in 18 wide products; of a key's first rounds one or two are shared.
_WORDS_PRODUCTS = 17


@dataclass(frozen=True)
class Case:
    """A kernel, and what the way of an octet through its inner loop contains."""

    name: str
    kernel: str
    """Template arguments, as demangled."""
    philox: int
    """Philox calls."""
    roots: int
    """Square roots: pairs of normals."""
    accesses: dict[str, int] = field(default_factory=dict)
    """Opcode to number."""

    def marks(self) -> dict[str, int]:
        """Regular expression for an instruction, to the number of them on the way."""
        marks = {re.escape(opcode): number for opcode, number in self.accesses.items()}
        if self.roots:
            marks[r"MUFU\.RSQ"] = self.roots
        if self.philox:
            marks[r"IMAD\.WIDE\.U32"] = self.philox * _WORDS_PRODUCTS
        return marks


@dataclass
class Kernel:
    """What the tools say of a compiled kernel."""

    registers: int = 0
    stack: int = 0
    spills: int = 0
    """Bytes stored and loaded."""
    code: list[str] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Way:
    """One way round a loop."""

    instructions: tuple[str, ...]

    @property
    def per_element(self) -> float:
        return len(self.instructions) / OCTET

    def opcodes(self) -> Counter[str]:
        return Counter(_opcode(i).split(".")[0] for i in self.instructions)

    def bytes_per_element(self) -> float:
        """Read from and written to memory."""
        bits = 0
        for instruction in self.instructions:
            if access := re.match(r"(?:LDG|STG)\.E(?:\.(\d+))?\b", _opcode(instruction)):
                bits += int(access[1] or 32)
        return bits / 8 / OCTET


def cases() -> list[Case]:
    """The kernels of an ordinary step, and those of the noise itself."""
    found = []
    distributions = [("normal", "(Distribution)0", 2, 4), ("rademacher", "(Distribution)1", 1, 0)]
    for noise, distribution, philox, roots in distributions:
        for dtype, formats, rounding in [
            ("bfloat16", "BFloat16, BFloat16", "nearest"),
            ("bfloat16", "BFloat16, BFloat16", "stochastic"),
            ("float16", "Float16, Float16", "nearest"),
            ("float16", "Float16, Float16", "stochastic"),
            ("float32", "Float32, Float32", "nearest"),
            ("float32 to bfloat16", "Float32, BFloat16", "nearest"),
        ]:
            stochastic = rounding == "stochastic"
            apart = "Float32" in formats
            calls = 2 * (2 if apart else philox) + 2 * stochastic
            if formats == "Float32, Float32":
                accesses = {"LDG.E.128": 2, "STG.E.128": 6}
            elif apart:
                accesses = {"LDG.E.128": 2, "STG.E.128": 2, "STG.E.64": 4}
            else:
                accesses = {"LDG.E.128": 1, "STG.E.128": 3}
            found.append(
                Case(
                    f"update + both perturbations, {dtype}, {noise}, {rounding}",
                    f"UpdateDual<{formats}, {distribution}, (Rounding){int(stochastic)}>",
                    calls,
                    2 * roots,
                    accesses,
                )
            )
        for dtype in ("BFloat16", "Float32"):
            apart = dtype == "Float32"
            found.append(
                Case(
                    f"noise alone, {dtype.lower()}, {noise}",
                    f"MakeNoise<{dtype}, {distribution}>",
                    2 if apart else philox,
                    roots,
                    {"STG.E.128": 2 if apart else 1},
                )
            )
    return found


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, in the toolkit, or in triton's package."""
    folders = [os.environ[v] + "/bin" for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    folders.append("/usr/local/cuda/bin")
    if (nvcc := shutil.which("nvcc")) is not None:
        folders.append(str(Path(nvcc).resolve().parent))
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.submodule_search_locations:
        folders.append(str(Path(triton.submodule_search_locations[0]) / "backends/nvidia/bin"))
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def compile_kernels(nvcc: str, arch: str, cubin: Path) -> dict[str, Kernel]:
    """Kernels by demangled name, with what ptxas says of them."""
    command = [nvcc, f"-arch={arch}", *NVCC_FLAGS, "--cubin", str(SOURCE), "-o", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"nvcc failed:\n{done.stderr}")
    kernels: dict[str, Kernel] = {}
    kernel = Kernel()
    for line in (done.stdout + done.stderr).splitlines():
        if entry := re.search(r"Compiling entry function '(\S+)'", line):
            kernel = kernels.setdefault(entry[1], Kernel())
        elif spills := re.search(r"(\d+) bytes stack.* (\d+) bytes spill st.* (\d+) bytes", line):
            kernel.stack = int(spills[1])
            kernel.spills = int(spills[2]) + int(spills[3])
        elif used := re.search(r"Used (\d+) registers", line):
            kernel.registers = int(used[1])
    return _by_name(kernels)


def disassemble(nvdisasm: str, cubin: Path, kernels: dict[str, Kernel]) -> None:
    """Fill in the kernels' code."""
    listing = subprocess.run(
        [nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    for name, (code, labels) in _by_name(parse_listing(listing)).items():
        kernels[name].code, kernels[name].labels = code, labels


def parse_listing(listing: str) -> dict[str, tuple[list[str], dict[str, int]]]:
    """Instructions, and the positions that labels stand for, of each function in a listing."""
    functions: dict[str, tuple[list[str], dict[str, int]]] = {}
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if section := re.match(r"\.text\.(\S+):", line):
            code, labels = functions.setdefault(section[1], ([], {}))
        elif label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            code.append(instruction[1])
    return functions


def shortest_way(code: list[str], labels: dict[str, int], marks: dict[str, int]) -> Way | None:
    """The shortest way round a loop that passes at least so many of each marked instruction."""
    following = [_successors(code, labels, at) for at in range(len(code))]
    jumps = {to for at, others in enumerate(following) for to in others if others != [at + 1]}
    leaders = sorted({0} | jumps | {at + 1 for at, n in enumerate(following) if n != [at + 1]})
    blocks = {a: range(a, b) for a, b in itertools.pairwise(leaders)}  # by their beginnings
    worth = {
        start: [sum(bool(re.search(mark, code[at])) for at in block) for mark in marks]
        for start, block in blocks.items()
    }
    wanted = tuple(marks.values())
    heads = {to for at, others in enumerate(following) for to in others if to <= at}
    shortest, found = sys.maxsize, None
    for head in heads:
        start = (head, (0,) * len(marks))
        distances, before = {start: 0}, {start: start}
        queue = [(0, start)]
        while queue:
            distance, state = heapq.heappop(queue)
            block = blocks[state[0]]
            total = distance + len(block)
            if distance > distances[state] or total >= shortest:
                continue
            counts = zip(state[1], worth[state[0]], wanted, strict=True)
            seen = tuple(min(count + here, most) for count, here, most in counts)
            for to in following[block[-1]]:
                if to == head and seen == wanted:
                    shortest, found = total, [state]
                    while found[-1] != start:
                        found.append(before[found[-1]])
                elif to != head and total < distances.get((to, seen), sys.maxsize):
                    distances[to, seen], before[to, seen] = total, state
                    heapq.heappush(queue, (total, (to, seen)))
    if found is None:
        return None
    return Way(tuple(code[at] for start, _ in reversed(found) for at in blocks[start]))


def _successors(code: list[str], labels: dict[str, int], at: int) -> list[int]:
    opcode = _opcode(code[at])
    conditional = code[at].startswith("@")
    following = [at + 1] if at + 1 < len(code) else []
    if opcode.startswith("BRA"):
        target = re.search(r"`\((\.L_\w+)\)", code[at])
        operand = code[at].split("BRA", 1)[1]
        always = not conditional and not re.match(r"(\.\w+)*\s*!?U?P\d", operand)
        return ([labels[target[1]]] if target else []) + ([] if always else following)
    if opcode.startswith(("EXIT", "RET", "CALL", "BRX", "JMP")):
        return following if conditional else []
    return following


def _opcode(instruction: str) -> str:
    return re.sub(r"^@!?\w+\s+", "", instruction).split()[0]


def _by_name(mangled: dict[str, _T]) -> dict[str, _T]:
    names = subprocess.run(
        ["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True
    ).stdout.replace("zo2ext::", "")
    return dict(zip(names.splitlines(), mangled.values(), strict=True))


def find_kernel(kernels: dict[str, Kernel], arguments: str) -> Kernel:
    """The kernel whose demangled name has these template arguments."""
    matching = [kernel for name, kernel in kernels.items() if arguments in name]
    if len(matching) != 1:
        raise SystemExit(f"{len(matching)} kernels are {arguments}")
    return matching[0]


def print_table(kernels: dict[str, Kernel], chosen: Iterable[Case], opcodes: bool) -> None:
    print(f"{'per element':<70}{'instr.':>7}{'bytes':>7}{'regs':>6}{'spills':>8}{'stack':>7}")
    for case in chosen:
        kernel = find_kernel(kernels, case.kernel)
        way = shortest_way(kernel.code, kernel.labels, case.marks())
        counts = "      ?      ?"
        if way is not None:
            counts = f"{way.per_element:7.1f}{way.bytes_per_element():7.1f}"
        print(f"{case.name:<70}{counts}{kernel.registers:6}{kernel.spills:8}{kernel.stack:7}")
        if opcodes and way is not None:
            found = sorted(way.opcodes().items(), key=lambda item: -item[1])
            print("    " + ", ".join(f"{name} {number}" for name, number in found))


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", default="sm_90", help="GPU architecture (default: %(default)s)")
    parser.add_argument("--opcodes", action="store_true", help="count each opcode of an octet")
    arguments = parser.parse_args()
    nvcc, nvdisasm = find_tool("nvcc"), find_tool("nvdisasm")
    for name, tool in (("nvcc", nvcc), ("nvdisasm", nvdisasm)):
        if tool is None:
            raise SystemExit(f"sass.py: {name} was not found on PATH, in CUDA_HOME or in triton")
    assert nvcc is not None
    assert nvdisasm is not None
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        kernels = compile_kernels(nvcc, arguments.arch, cubin)
        disassemble(nvdisasm, cubin, kernels)
    print_table(kernels, cases(), arguments.opcodes)


if __name__ == "__main__":
    main()
