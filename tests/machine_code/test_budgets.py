"""The machine code of the CUDA kernels stays within its budgets and does not spill; sass.py reads it correctly.

Needs no GPU, only a compiler (NVRTC of a CUDA build of torch, or nvcc) and nvdisasm (pip install nvidia-cuda-nvdisasm).
"""

import cuda_budgets as budgets
import nvrtc
import pytest
import sass

ARCHITECTURES = (80, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (90, 100, 120)))
# (arch, scope of cuda_budgets.units): sm_80 launches every kernel, and is compiled with all tiles and layouts.
SCOPES = [
    (80, "budgets"),
    *(
        pytest.param(arch, scope, marks=pytest.mark.slow)
        for arch, scope in ((80, "bfloat16"), (90, "budgets"), (100, "budgets"), (120, "budgets"))
    ),
]

# 16 additions per iteration of the inner loop, 3 in the outer.
LOOPS = """
__global__ void __launch_bounds__(96) loops(float* p, int rows, int n, float a, float b) {
  __shared__ float s_first[96];
  s_first[threadIdx.x] = p[threadIdx.x];
  __syncthreads();
  float s[8];
  for (int j = 0; j < 8; ++j) s[j] = s_first[(threadIdx.x + j) % 96];
#pragma unroll 1
  for (int i = 0; i < rows; ++i) {
    const float c = fabsf(s[0] - a) + b + s[1];
#pragma unroll 1
    for (int k = 0; k < n; ++k)
      for (int j = 0; j < 8; ++j) s[j] = fabsf(s[j] - c) + b;
  }
  for (int j = 0; j < 8; ++j) p[96 * j + threadIdx.x] = s[j];
}
"""
# More live values than registers.
SPILLING = """
__global__ void spilling(float* p, int n) {
  float s[64];
  for (int j = 0; j < 64; ++j) s[j] = p[64 * threadIdx.x + j];
#pragma unroll 1
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < 64; ++j) s[j] = s[j] * s[(j + 7) % 64] + p[i];
  for (int j = 0; j < 64; ++j) p[64 * threadIdx.x + j] = s[j];
}
"""


@pytest.fixture
def has_nvdisasm():
    try:
        sass.nvdisasm()
    except sass.Unavailable as reason:
        pytest.skip(str(reason))


def compiled(arch, source, options=()):
    """The one kernel of `source`."""
    try:
        if arch not in nvrtc.architectures():
            pytest.skip(f"this NVRTC has no sm_{arch}")
    except nvrtc.Unavailable as reason:
        pytest.skip(str(reason))
    (kernel,) = sass.read(nvrtc.compile(source, "synthetic.cu", arch, options=options).cubin).values()
    return kernel


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "scope"), SCOPES)
def test_budgets(has_nvdisasm, arch, scope):
    try:
        rows = budgets.measure(arch, scope)
    except (nvrtc.Unavailable, sass.Unavailable) as reason:
        pytest.skip(str(reason))
    print(budgets.table(rows))
    assert rows
    assert not [violation for row in rows for violation in row.violations()]


@pytest.mark.parametrize("arch", (*ARCHITECTURES, pytest.param(75, marks=pytest.mark.slow)))
def test_loops_of_a_known_kernel(has_nvdisasm, arch):
    kernel = compiled(arch, 'extern "C" ' + LOOPS.lstrip())
    assert kernel.symbol.startswith("loops")
    assert (kernel.threads, kernel.shared, kernel.local, kernel.spills) == (96, 96 * 4, 0, 0)
    assert 16 <= kernel.registers <= 40
    inner, outer = sorted(kernel.loops(), key=lambda loop: -loop.depth)
    assert (inner.depth, outer.depth) == (2, 1)
    assert kernel.hottest() == inner
    assert inner.count("FADD") == 16 == inner.pipes()["fp32"]
    assert outer.count("FADD") == 16 + 3
    assert sum(i.base == "FADD" for i in outer.own) == 3
    assert sum(inner.mix().values()) == len(inner.instructions) < 32


LISTING = """
	.section	.text.kernel,"ax",@progbits
kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   FADD R2, |R2|, R3 ;
        /*0020*/              @!P0 BRA `(.L_x_2) ;
        /*0030*/                   IMAD R4, R4, R5, RZ ;
        /*0040*/                   IADD3 R4, R4, 0x1, RZ ;
.L_x_2:
        /*0050*/              @P2  BRA `(.L_x_3) ;
        /*0060*/              @!P3 FFMA.FTZ R2, R2, R3, R4 ;
        /*0070*/               @P1 BRA `(.L_x_1) ;
.L_x_3:
        /*0080*/                   EXIT ;
.L_x_4:
        /*0090*/                   BRA `(.L_x_4);
"""


def test_listing():
    (instructions,) = sass._listing(LISTING).values()
    assert [i.opcode for i in instructions] == "MOV FADD BRA IMAD IADD3 BRA FFMA.FTZ BRA EXIT BRA".split()
    assert [i.target for i in instructions if i.base == "BRA"] == [0x50, 0x80, 0x10, 0x90]
    (loop,) = sass.Kernel("kernel", 8, 0, 0, None, instructions).loops()
    assert (loop.instructions[0].address, loop.instructions[-1].address) == (0x10, 0x70)
    assert len(loop.instructions) == 7
    assert loop.always() == 5  # not IMAD and IADD3
    assert (loop.count("FFMA"), loop.count("FFMA.FTZ"), loop.count("FFM"), loop.count("FADD", "IMAD")) == (1, 1, 0, 2)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_spills_are_seen(has_nvdisasm, arch):
    kernel = compiled(arch, SPILLING, ["-maxrregcount=32"])
    assert kernel.registers <= 32
    assert kernel.local >= 4 * 32
    assert kernel.spills > 32
    instance = budgets.Instance("none.cuh", "spilling", "spilling")
    (violation,) = budgets.row_of(arch, instance, kernel).violations()
    assert violation.startswith(f"sm_{arch}, spilling, tile -: spills, {kernel.local} bytes")
    assert not budgets.row_of(arch, instance, compiled(arch, SPILLING)).violations()


def test_a_budget_is_enforced(has_nvdisasm, monkeypatch):
    kernel = compiled(90, LOOPS)
    instance = budgets.Instance("none.cuh", "loops", "loops", "-", ("FADD", 2), 8, "loops")
    issued = len(kernel.hottest().instructions) / 8
    monkeypatch.setitem(budgets.BUDGETS, "loops", issued)
    row = budgets.row_of(90, instance, kernel)
    assert row.issued_per_term == issued
    assert not row.violations()
    monkeypatch.setitem(budgets.BUDGETS, "loops", issued - 0.01)
    (violation,) = budgets.row_of(90, instance, kernel).violations()
    assert f"{issued:.3f} instructions per term" in violation
    assert "16 FADD" in violation
    # A kernel without the expected loop violates its budget.
    other = budgets.Instance("none.cuh", "loops", "loops", "-", ("HMMA", 2), 8, "loops")
    assert budgets.row_of(90, other, kernel).violations() == ["sm_90, loops, tile -: no loop over terms found"]


# (arch, threads, registers, shared bytes, blocks per multiprocessor), by hand from the tables of the guide.
OCCUPANCY = [
    (75, 256, 128, 16384, 2),  # registers: 64 K / (256 * 128)
    (90, 256, 128, 16384, 2),
    (90, 256, 129, 0, 1),  # 136 per thread
    (80, 1024, 32, 0, 2),  # threads: 2048
    (86, 1024, 32, 0, 1),
    (90, 32, 16, 0, 32),  # blocks
    (86, 32, 16, 0, 16),
    (80, 128, 32, 48 * 1024, 3),  # shared: 164 / (48 + 1)
    (120, 128, 32, 48 * 1024, 2),  # 100 / 49
    (75, 128, 32, 32 * 1024, 2),  # nothing reserved
]


@pytest.mark.parametrize(("arch", "threads", "registers", "shared", "blocks"), OCCUPANCY)
def test_occupancy(arch, threads, registers, shared, blocks):
    assert sass.blocks_per_multiprocessor(arch, registers, shared, threads) == blocks
    expected = blocks * threads / sass.LIMITS[arch].threads
    assert sass.occupancy(arch, registers, shared, threads) == pytest.approx(expected)


# Instructions per term by unit: terms per clock and multiprocessor.
MODEL = [
    ({"fp32": 1}, {75: 64, 80: 64, 86: 128, 89: 128, 90: 128, 100: 128, 120: 128}),  # FFMA
    ({"fp32": 2}, {75: 32, 80: 32, 86: 64, 89: 64, 90: 64, 100: 64, 120: 64}),  # FADD, FADD |x|
    ({"fp32": 1, "alu": 1}, {75: 64, 80: 64, 86: 64, 89: 64, 90: 64, 100: 64, 120: 64}),  # FMNMX, FADD
    ({"fp16x2": 1}, {75: 64, 80: 128, 86: 64, 89: 64, 90: 128, 100: 128, 120: 64}),  # HADD2.SAT, HFMA2
    (
        {"fp16x2": 0.5, "tensor": 0.125},
        {75: 64, 80: 128, 86: 64, 89: 64, 90: 159, 100: 128, 120: 64},
    ),  # HADD2.RELU, HMMA
]


@pytest.mark.parametrize(("pipes", "expected"), MODEL)
def test_model(pipes, expected):
    assert set(budgets.UNITS) == set(expected)
    for arch, terms in expected.items():
        assert round(budgets.model(arch, pipes, 1)[0]) == terms


def test_units_of_opcodes():
    opcodes = {
        "FADD.FTZ": "fp32",
        "FADD2": "fp32x2",
        "FMNMX": "alu",
        "HMNMX2.BF16_V2": "alu",
        "HADD2.BF16_V2": "bf16x2",
        "HADD2.F32": "fp16x2",
        "HFMA2.MMA": "fp16x2",
        "HMMA.16816.F32": "tensor",
        "IMAD.WIDE": "imad",
        "IADD3": "alu",
        "UIADD3": "uniform",
        "LDGSTS.E.BYPASS.LTC128B.128": "memory",
        "LDGDEPBAR": "control",
        "BAR.SYNC.DEFER_BLOCKING": "control",
        "MUFU.RCP": "xu",
    }
    assert {opcode: sass.pipe_of(opcode) for opcode in opcodes} == opcodes


def test_report(has_nvdisasm, monkeypatch, capsys):
    kernel = compiled(90, LOOPS)
    instance = budgets.Instance("none.cuh", "loops", "loops", "8x1", ("FADD", 2), 8)
    monkeypatch.setattr(budgets, "measure", lambda arch, *_: [budgets.row_of(arch, instance, kernel)])
    budgets.main(["--arch", "90", "--mix"])
    header, rule, line, _, mix = capsys.readouterr().out.splitlines()[2:7]
    assert header.startswith("| kernel | tile |")
    assert set(rule) == {"|", "-"}
    assert line.startswith("| loops  | 8x1  |")
    assert mix.startswith("  loops, 8x1: ") and "FADD 16" in mix
