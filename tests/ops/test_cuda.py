"""The CUDA kernels: on a GPU the bits of a CPU; without one, what the compiler makes of them.

That each thread does what it should to the elements that it should is shown without a GPU by
csrc/tests/cuda_emulation_check.cpp; other tests run on a GPU through the fixture `device`.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from numeric import assert_same_bits
from torch import Tensor

from zo2ext import ops
from zo2ext.ops import Direction, Distribution, Rounding, Segment, Update

ROOT = Path(__file__).resolve().parents[2]
KEY, ROUNDING_KEY = 0x0123456789ABCDEF, 0xFEDCBA9876543210
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UPDATE = Update(key=KEY + 1, coefficient=1e-3, decay=0.999)


def _load_sass() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sass", ROOT / "benchmarks" / "sass.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sass"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


sass = _load_sass()


@pytest.fixture
def gpu() -> torch.device:
    return torch.device("cuda")


def one_pass(
    stored: Tensor,
    segments: list[Segment],
    *,
    compute: torch.dtype,
    distribution: Distribution = Distribution.GAUSSIAN,
    rounding: Rounding = Rounding.STOCHASTIC,
) -> list[Tensor]:
    """Update, write back and perturb both ways; `stored`, and then what else was written."""
    plus, minus = (torch.full_like(stored, 7, dtype=compute) for _ in range(2))
    ops.update_perturb(
        stored,
        segments=ops.segment_table(segments, stored.device),
        updates=ops.update_table([UPDATE], stored.device),
        directions=[Direction(KEY, 1e-3, plus, minus)],
        write_back=rounding,
        rounding_key=ROUNDING_KEY,
        distribution=distribution,
    )
    return [stored, plus, minus]


# --------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("rounding", Rounding, ids=lambda r: r.value)
@pytest.mark.parametrize("distribution", Distribution, ids=lambda d: d.value)
def test_pass_agrees_with_the_host_on_2_to_the_28(
    gpu: torch.device, distribution: Distribution, rounding: Rounding
) -> None:
    n = 1 << 24
    for offset in range(0, 1 << 28, n):
        segments = [Segment(0, n, 7, offset=offset)]
        weights = ops.normal(n, key=offset, tensor_id=0, dtype=torch.bfloat16)
        both = [
            one_pass(
                weights.to(where, copy=True),
                segments,
                compute=torch.bfloat16,
                distribution=distribution,
                rounding=rounding,
            )
            for where in (gpu, torch.device("cpu"))
        ]
        for actual, expected in zip(*both, strict=True):
            same = torch.equal(actual.view(torch.int16).cpu(), expected.view(torch.int16))
            assert same, f"from element {offset} on"


@pytest.mark.gpu
@pytest.mark.parametrize("storage", DTYPES, ids=str)
@pytest.mark.parametrize("compute", DTYPES, ids=str)
@pytest.mark.parametrize("distribution", Distribution, ids=lambda d: d.value)
@pytest.mark.parametrize("begin", [0, 1], ids=["aligned", "unaligned"])
def test_views_that_are_not_aligned(
    gpu: torch.device,
    storage: torch.dtype,
    compute: torch.dtype,
    distribution: Distribution,
    begin: int,
) -> None:
    segments = [Segment(0, 1000, 3), Segment(1024, 1, 4, False), Segment(1152, 70_001, 5, True, 12)]
    slab = torch.randn(begin + 1152 + 70_001).to(storage)
    on_gpu = one_pass(slab.to(gpu)[begin:], segments, compute=compute, distribution=distribution)
    on_host = one_pass(slab.clone()[begin:], segments, compute=compute, distribution=distribution)
    for actual, expected in zip(on_gpu, on_host, strict=True):
        assert_same_bits(actual, expected)


@pytest.mark.gpu
def test_many_tiny_segments(gpu: torch.device) -> None:
    segments = [Segment(128 * i, i % 129, i, i % 2 == 0) for i in range(20_000)]
    slab = torch.randn(128 * len(segments)).bfloat16()
    on_gpu = one_pass(slab.to(gpu), segments, compute=torch.bfloat16)
    on_host = one_pass(slab.clone(), segments, compute=torch.bfloat16)
    for actual, expected in zip(on_gpu, on_host, strict=True):
        assert_same_bits(actual, expected)


@pytest.mark.gpu
def test_work_is_queued_on_the_current_stream(gpu: torch.device) -> None:
    n = 1 << 20
    values = torch.randn(n)
    expected = ops.perturb_(values.clone(), key=KEY, tensor_id=7, eps=1e-2)
    w, source = torch.zeros(n, device=gpu), values.to(gpu)
    ops.perturb_(w, key=KEY, tensor_id=7, eps=1e-2)  # a kernel's first launch may wait
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # a tenth of a second: other streams would be long past
        w.copy_(source)
        ops.perturb_(w, key=KEY, tensor_id=7, eps=1e-2)
    assert not stream.query(), "the call waited for the GPU"
    stream.synchronize()
    assert_same_bits(w, expected)


@pytest.mark.gpu
def test_launches_neither_allocate_nor_wait(gpu: torch.device) -> None:
    n = 100_003
    original = torch.randn(n).bfloat16().to(gpu)
    stored, plus, minus = original.clone(), torch.empty_like(original), torch.empty_like(original)
    segments = ops.segment_table([Segment(0, n, 7)], gpu)
    updates = ops.update_table([UPDATE], gpu)

    def launch() -> None:
        ops.update_perturb(
            stored,
            segments=segments,
            updates=updates,
            directions=[Direction(KEY, 1e-3, plus, minus)],
            write_back=Rounding.NEAREST,
        )

    launch()
    torch.cuda.synchronize()
    expected = [t.clone() for t in (stored, plus, minus)]
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    launch()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # capture fails where anything waits
        launch()
    stored.copy_(original)
    graph.replay()
    torch.cuda.synchronize()
    for actual, wanted in zip((stored, plus, minus), expected, strict=True):
        assert_same_bits(actual, wanted)


@pytest.mark.gpu
def test_every_radius_and_every_conversion(gpu: torch.device, tmp_path: Path) -> None:
    nvcc = sass.find_tool("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc to build csrc/tests/cuda_check.cu with")
    check = tmp_path / "cuda_check"
    host = "-ffp-contract=off,-fno-math-errno"
    sources = [ROOT / "csrc/tests/cuda_check.cu", sass.SOURCE]
    sources += sorted((ROOT / "csrc/cpu").glob("*.cpp"))
    flags = ["-arch=native", "-O3", "--fmad=false", "-std=c++17", f"-Xcompiler={host}"]
    subprocess.run([nvcc, *flags, *map(str, sources), "-o", str(check)], check=True)
    done = subprocess.run([str(check)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# ------------------------------------------------------------------------------- without one


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, object]]]:
    """Machine code for one architecture, and what the compiler says of it."""
    nvcc = sass.find_tool("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    cubin = tmp_path_factory.mktemp("cuda") / "kernels.cubin"
    return cubin, sass.compile_kernels(nvcc, "sm_90", cubin)


def test_nothing_is_spilled(compiled: tuple[Path, dict[str, sass.Kernel]]) -> None:
    for name, kernel in compiled[1].items():
        assert kernel.spills == 0, name
        assert kernel.stack == 0, name
        # Four blocks of 128 threads fit the registers of a multiprocessor.
        assert 0 < kernel.registers <= 128, name


def test_instructions_per_element(compiled: tuple[Path, dict[str, sass.Kernel]]) -> None:
    cubin, kernels = compiled
    nvdisasm = sass.find_tool("nvdisasm")
    if nvdisasm is None:
        pytest.skip("no nvdisasm")
    sass.disassemble(nvdisasm, cubin, kernels)
    ways = {}
    for case in sass.cases():
        kernel = sass.find_kernel(kernels, case.kernel)
        ways[case.name] = sass.shortest_way(kernel.code, kernel.labels, case.marks())
    assert all(way is not None for way in ways.values()), ways
    normal = ways["update + both perturbations, bfloat16, normal, nearest"]
    signs = ways["update + both perturbations, bfloat16, rademacher, nearest"]
    # Read, written back, plus and minus: 2 bytes each. The counts leave room for other compilers.
    assert normal.bytes_per_element() == 8
    assert normal.per_element <= 76
    assert signs.bytes_per_element() == 8
    assert signs.per_element <= 32


LISTING = """
.text.kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_1:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P0 BRA `(.L_x_2) ;
        /*0030*/                   FADD R4, R4, 1 ;
        /*0040*/                   FADD R5, R5, 1 ;
        /*0050*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0060*/                   MUFU.RSQ R4, R4 ;
.L_x_3:
        /*0070*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*0080*/               @P1 BRA `(.L_x_1) ;
        /*0090*/                   EXIT ;
"""


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ({"LDG": 1}, ["LDG", "BRA", "MUFU", "STG", "BRA"]),
        ({"FADD": 2}, ["LDG", "BRA", "FADD", "FADD", "BRA", "STG", "BRA"]),
        ({"FADD": 3}, None),
        ({"S2R": 1}, None),
    ],
    ids=str,
)
def test_shortest_way_round_a_loop(marks: dict[str, int], expected: list[str] | None) -> None:
    code, labels = sass.parse_listing(LISTING)["kernel"]
    way = sass.shortest_way(code, labels, marks)
    if expected is None:
        assert way is None
    else:
        assert way.opcodes() == Counter(expected)
        assert way.bytes_per_element() == (16 + 8) / 8
