"""The machine code of the CUDA kernels, without a GPU: registers, spills, occupancy, instructions per term.

    python tests/machine_code/cuda_budgets.py [--arch 80 90] [--scope budgets] [--kernel forward] [--mix]

prints one table per architecture.  Compiles with NVRTC (part of a CUDA build of torch), else with nvcc; disassembles
with nvdisasm (see sass.py).  A term is one |x - w| in forward and int8, one product in grad_x and grad_w.

`issued/term` counts every instruction of the hottest loop; `always` excludes those that a branch may skip: the step to
the next tap, work of a single warp per block, and copies, which the last iteration skips.  `terms/clk/SM` is a model,
not a timing: each unit of a multiprocessor (UNITS) accepts a number of lanes per clock, and the busiest unit, or the
issue of 4 warps per clock, bounds the loop; there are no stalls and no bank conflicts.  `of FFMA` is the share of the
rate of a convolution that issues only FFMAs.
"""

import argparse
import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import nvrtc
import sass

ROOT = Path(__file__).resolve().parents[2]

ARCHITECTURES = (80, 90, 100, 120)
FLAGS = ("-fmad=false",)  # as in setup.py

# Maximum instructions per term of the hottest loop, by Instance.budget.  No kernel may spill.
BUDGETS = {
    "forward float32": 2.20,
    "forward float16": 1.50,
    "forward bfloat16": 1.70,
    "grad_x float32": 2.30,
    "grad_w float32": 1.25,
    "int8 16-byte": 0.35,
    "int8 4-byte": 0.42,
    "int8 1-byte": 0.63,
    "int8 16-byte sm_120": 1.10,
    "int8 4-byte sm_120": 1.18,
    "int8 1-byte sm_120": 1.37,
    "moments 128": 1.35,
    "moments gradient": 1.40,
    "neurons float32": 14.6,
    "neurons float16": 12.7,
    "neurons bfloat16": 12.7,
}

_NAMESPACE = "adderops::cuda::"
LAYOUTS = ("planes", "channels")
FORMS = ("direct", "minimum")


@dataclass(frozen=True)
class Tile:
    """csrc/cuda/tile.cuh: the tile of a block, the tile of a thread, and blocks per multiprocessor."""

    lanes: int
    columns: int
    thread_lanes: int
    thread_columns: int
    blocks: int

    def __str__(self) -> str:
        return f"{self.lanes}x{self.columns}"

    @property
    def text(self) -> str:
        values = (self.lanes, self.columns, self.thread_lanes, self.thread_columns, self.blocks)
        return f"{_NAMESPACE}Tile<{', '.join(map(str, values))}>"


@dataclass(frozen=True)
class Instance:
    """A kernel that the operators launch.

    `expression` is spelled as a demangler prints it.  If the kernel has a loop over terms, `marker` is an opcode with
    its count per term, and `terms` counts terms per thread and slab.  A compiler may unroll the loop over slabs.
    """

    header: str  # in csrc/cuda
    expression: str
    label: str
    tile: str = "-"
    marker: tuple[str, float] = ("", 0)
    terms: int = 0
    budget: str = ""
    architectures: tuple[int, ...] = ()  # where it is launched, if not everywhere; its body is empty elsewhere


@dataclass(frozen=True)
class MmaTile:
    """csrc/cuda/forward_half.cuh: the tile of a block, the tile of a warp, and blocks per multiprocessor."""

    lanes: int
    columns: int
    warp_lanes: int
    warp_pixels: int
    blocks: int

    def __str__(self) -> str:
        return f"{self.lanes}x{self.columns}"

    @property
    def threads(self) -> int:
        return 32 * (self.lanes // self.warp_lanes) * (self.columns // self.warp_pixels)

    @property
    def text(self) -> str:
        return (
            f"{_NAMESPACE}MmaTile<{self.lanes}, {self.columns}, {self.warp_lanes}, {self.warp_pixels}, {self.blocks}>"
        )


def _constant(header: str, name: str) -> int:
    found = re.search(rf"constexpr int {name} = (\d+)", (ROOT / "csrc/cuda" / header).read_text())
    assert found, f"no {name} in {header}"
    return int(found[1])


_SLAB, _MMA_SLAB = _constant("tile.cuh", "kSlab"), _constant("forward_half.cuh", "kMmaSlab")
_INT8_SLAB = _constant("int8.cuh", "kInt8Slab")
_ELEMENTS = {"float": "float32", "adderops::Float16": "float16", "adderops::BFloat16": "bfloat16"}
_HALVES = list(_ELEMENTS)[1:]
_MMA_ARCHITECTURES = (80, 86, 89, 90, 100, 120)
_VABSDIFF4_ARCHITECTURES = (75, 80, 86, 89, 90, 100)


def _tiles(source: str, kind: type[Tile] | type[MmaTile], element: str) -> list:
    """The tiles in a file of csrc/cuda for an element type; the first one has the budget.

    Spelled "using Tile0 = Tile<128, 128, 8, 8, 2>;", where a number may be "sizeof(T) == 4 ? 2 : 1".
    """
    tiles = []
    for numbers in re.findall(rf"using \w+ = {kind.__name__}<([^;]+)>;", (ROOT / "csrc/cuda" / source).read_text()):
        choice = r"sizeof\(T\) == 4 \? (\d+) : (\d+)"
        numbers = re.sub(choice, r"\1" if element == "float" else r"\2", numbers)
        tiles.append(kind(*map(int, numbers.split(","))))
    return tiles


def _name(kernel: str, *arguments: str) -> str:
    return f"{_NAMESPACE}{kernel}<{', '.join(arguments)}>"


def _enum(kind: str, value: int) -> str:
    return f"({_NAMESPACE}{kind}){value}"


def _forward() -> Iterator[Instance]:
    for element, (layout, layout_name), (form, form_name) in product(_ELEMENTS, enumerate(LAYOUTS), enumerate(FORMS)):
        for i, tile in enumerate(_tiles("forward.cu", Tile, element)):
            yield Instance(
                "forward.cuh",
                _name("forward_kernel", element, tile.text, _enum("Layout", layout), _enum("Formula", form)),
                f"forward {_ELEMENTS[element]} {form_name} {layout_name}",
                str(tile),
                ("FADD", 2) if form == 0 else ("FMNMX", 1),
                _SLAB * tile.thread_lanes * tile.thread_columns,
                "forward float32" if i == 0 and element == "float" else "",
                (75,) if element != "float" else (75, 80) if form else (),
            )
        if element == "float" or form:
            continue
        for i, tile in enumerate(_tiles("forward.cu", MmaTile, element)):
            yield Instance(
                "forward_half.cuh",
                _name("forward_half_kernel", element, tile.text, _enum("Layout", layout)),
                f"forward {_ELEMENTS[element]} mma {layout_name}",
                str(tile),
                ("HMMA", 1 / 8),
                _MMA_SLAB * tile.lanes * tile.columns // tile.threads,
                f"forward {_ELEMENTS[element]}" if i == 0 else "",
                _MMA_ARCHITECTURES,
            )


def _gradients() -> Iterator[Instance]:
    for which, element in product(("grad_x", "grad_w"), _ELEMENTS):
        layouts = enumerate(LAYOUTS) if which == "grad_x" else [(None, "channels")]
        for (layout, layout_name), (i, tile) in product(layouts, enumerate(_tiles(f"{which}.cu", Tile, element))):
            arguments = (element, tile.text) if layout is None else (element, tile.text, _enum("Layout", layout))
            yield Instance(
                f"{which}.cuh",
                _name(f"{which}_kernel", *arguments),
                f"{which} {_ELEMENTS[element]} {layout_name}",
                str(tile),
                ("FFMA", 1),
                _SLAB * tile.thread_lanes * tile.thread_columns,
                f"{which} float32" if i == 0 and element == "float" else "",
            )


def _int8() -> Iterator[Instance]:
    """VABSDIFF4 adds four terms; sm_120 lacks it and adds them by IDP.4A after three instructions.

    Pieces smaller than 16 bytes have no kernel for the first tile.
    """
    forms = ((_VABSDIFF4_ARCHITECTURES, "VABSDIFF4", ""), ((120,), "IDP", " sm_120"))
    for (architectures, opcode, suffix), piece in product(forms, (16, 4, 1)):
        for i, tile in enumerate(_tiles("int8.cu", Tile, "")[piece < 16 :]):
            yield Instance(
                "int8.cuh",
                _name("forward_int8_kernel", tile.text, str(piece)),
                f"int8 {piece}-byte",
                str(tile),
                (opcode, 1 / 4),
                4 * _INT8_SLAB * tile.thread_lanes * tile.thread_columns,
                f"int8 {piece}-byte{suffix}" if i == 0 else "",
                architectures,
            )
    yield Instance("int8.cuh", f"{_NAMESPACE}direct_int8_kernel", "int8 direct")
    for element, name in _ELEMENTS.items():
        yield Instance("quantize.cuh", _name("quantize_kernel", element), f"int8 quantize {name}")


def _moments() -> Iterator[Instance]:
    """A slab is 2048 elements; a term is one product, in the gradient of a channel of z and one of the student."""
    (sides,) = re.findall(r"int kSides\[\] = \{(.*)\};", (ROOT / "csrc/cuda/moments.cu").read_text())
    for side in map(int, reversed(sides.split(", "))):
        yield Instance("moments.cuh", _name("moments_finish_kernel", str(side)), f"moments finish {side}")
        for several, (layout, layout_name) in product((False, True) if side == 128 else (False,), enumerate(LAYOUTS)):
            yield Instance(
                "moments.cuh",
                _name("moments_kernel", str(side), str(several).lower(), _enum("Layout", layout)),
                f"moments {'several ' if several else ''}{layout_name}",
                f"{side}x{side}",
                ("FFMA", 1),
                8 * side,
                "moments 128" if side == 128 and not several else "",
            )
    for tile, (layout, layout_name) in product(reversed(_tiles("moments_grad.cu", Tile, "")), enumerate(LAYOUTS)):
        yield Instance(
            "moments_grad.cuh",
            _name("moments_grad_kernel", tile.text, _enum("Layout", layout)),
            f"moments gradient {layout_name}",
            str(tile),
            ("FFMA", 1),
            _SLAB * tile.thread_lanes * tile.thread_columns,
            "moments gradient" if tile.lanes == 64 else "",
        )
    for header, kernel in (
        ("moments_grad", "moments_weights"),
        *(("mean_abs", f"mean_abs{stage}") for stage in ("", "_finish")),
        *(("match", f"match{stage}") for stage in ("", "_finish")),
    ):
        yield Instance(f"{header}.cuh", f"{_NAMESPACE}{kernel}_kernel", kernel.replace("_", " "))


def _neurons() -> Iterator[Instance]:
    """A term is a step of a neuron: the product of its membrane, and that of its current."""
    steps = _constant("integrate_and_fire.cuh", "kNeuronSteps")
    for element, name in _ELEMENTS.items():
        yield Instance(
            "integrate_and_fire.cuh",
            _name("integrate_and_fire_kernel", element),
            f"neurons {name}",
            marker=("FMUL", 2),
            terms=steps * (8 if element in _HALVES else 4),
            budget=f"neurons {name}",
        )
    for element, name in {**_ELEMENTS, "double": "float64"}.items():
        direct = _name("direct_integrate_and_fire_kernel", element)
        yield Instance("integrate_and_fire.cuh", direct, f"neurons {name} direct")


def _others() -> Iterator[Instance]:
    """The kernels without a loop over terms in registers."""
    for element, name in _ELEMENTS.items():
        half = element in _HALVES
        for packing, purpose in enumerate(("forward", "grad_x", "mma") if half else ("forward", "grad_x")):
            arguments = (element, _enum("Packing", packing))
            yield Instance("pack.cuh", _name("pack_kernel", *arguments), f"pack {name} for {purpose}")
        if half:
            repair = _name("forward_repair_kernel", element)
            yield Instance("forward_half.cuh", repair, f"forward repair {name}", architectures=_MMA_ARCHITECTURES)
        yield Instance("grad_x.cuh", _name("grad_x_repair_kernel", element), f"grad_x repair {name}")
        yield Instance("grad_w.cuh", _name("grad_w_finish_kernel", element), f"grad_w finish {name}")
        yield Instance("grad_w.cuh", _name("channels_kernel", element), f"grad_w dense channels {name}")
    for element, name in {**_ELEMENTS, "double": "float64"}.items():
        for purpose in ("forward", "grad_x", "grad_w"):
            yield Instance("direct.cuh", _name(f"direct_{purpose}_kernel", element), f"{purpose} {name} direct.cuh")


INSTANCES = [*_forward(), *_gradients(), *_int8(), *_moments(), *_neurons(), *_others()]


def units(arch: int, scope: str = "all", kernel: str = "") -> list[tuple[Instance, ...]]:
    """The translation units, one per header: what an architecture launches and has `kernel` in its label.

    The scope "all" takes minutes.  "bfloat16" excludes float16, which differs in conversions only; "budgets" further
    restricts that to the instances with a budget and one instance of every other kernel.
    """
    wanted = [i for i in INSTANCES if (not i.architectures or arch in i.architectures) and kernel in i.label]
    if scope != "all":
        wanted = [i for i in wanted if " float16" not in i.label]
    if scope == "budgets":
        one = {i.expression.split("<")[0]: i for i in reversed(wanted)}
        wanted = [i for i in wanted if i.budget or i in one.values()]
    return [tuple(i for i in wanted if i.header == header) for header in dict.fromkeys(i.header for i in wanted)]


# Lanes per clock and multiprocessor of each unit: 32 times its warp instructions; 128 are issued in total.
# CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions", which counts 2 results per packed half.
# alu executes integers, comparisons, FMNMX and HMNMX2; imad shares the float unit; tensor counts m16n8k16 with float32
# sums (sm_90: the share that mma.sync reaches of the unit's 1 warp per clock; 86, 89 and 120: the full rate, which
# consumer cards halve).
_COMMON = {"alu": 64, "imad": 64, "xu": 16, "memory": 32, "issue": 128}
UNITS: dict[int, dict[str, float]] = {
    75: {**_COMMON, "fp32": 64, "fp16x2": 64, "bf16x2": 64, "tensor": 32 * 0.25},
    80: {**_COMMON, "fp32": 64, "fp16x2": 128, "bf16x2": 64, "tensor": 32 * 0.5},
    86: {**_COMMON, "fp32": 128, "fp16x2": 64, "bf16x2": 64, "tensor": 32 * 0.25},
    89: {**_COMMON, "fp32": 128, "fp16x2": 64, "bf16x2": 64, "tensor": 32 * 0.25},
    90: {**_COMMON, "fp32": 128, "fp16x2": 128, "bf16x2": 128, "tensor": 32 * 0.62},
    100: {**_COMMON, "fp32": 128, "fp16x2": 128, "bf16x2": 128, "tensor": 32 * 0.5},
    120: {**_COMMON, "fp32": 128, "fp16x2": 64, "bf16x2": 64, "tensor": 32 * 0.25},
}


def model(arch: int, pipes: dict[str, int], terms: float) -> tuple[float, str]:
    """Terms per clock and multiprocessor of a loop that issues `pipes` for `terms` per thread, and its bottleneck."""
    load = {unit: float(pipes.get(unit, 0)) for unit in UNITS[arch]}
    load["fp32"] += 2 * pipes.get("fp32x2", 0) + load["imad"]
    load["issue"] = sum(pipes.values())
    clocks = {unit: load[unit] / lanes for unit, lanes in UNITS[arch].items()}
    unit = max(clocks, key=lambda name: clocks[name])
    return terms / clocks[unit], unit


@dataclass(frozen=True)
class Row:
    """One kernel on one architecture; the fields of the loop are None if the kernel has no loop over terms."""

    arch: int
    kernel: str
    tile: str
    registers: int
    shared: int
    local: int  # bytes of local memory
    spills: int  # instructions that load or store local memory
    occupancy: float
    instructions: int  # of the whole kernel
    issued_per_term: float | None = None
    always_per_term: float | None = None
    budget: float | None = None
    terms_per_clock: float | None = None
    bound: str | None = None
    of_ffma: float | None = None
    mix: dict[str, int] | None = None  # of the hottest loop

    def violations(self) -> list[str]:
        name, found = f"sm_{self.arch}, {self.kernel}, tile {self.tile}", []
        if self.local or self.spills:
            found.append(f"{name}: spills, {self.local} bytes, {self.spills} instructions")
        if self.budget and self.issued_per_term is None:
            found.append(f"{name}: no loop over terms found")
        elif self.budget and self.issued_per_term > self.budget:
            mix = ", ".join(f"{count} {opcode}" for opcode, count in (self.mix or {}).items())
            found.append(f"{name}: {self.issued_per_term:.3f} instructions per term, budget {self.budget:.2f}: {mix}")
        return found


def _source(instances: Sequence[Instance]) -> str:
    return "".join(f'#include "cuda/{name}"\n' for name in dict.fromkeys(i.header for i in instances))


@functools.cache
def compile_nvrtc(arch: int, unit: tuple[Instance, ...]) -> nvrtc.Compiled:
    """Raises nvrtc.Unavailable or nvrtc.CompileError.  Cached: two test modules use the same kernels."""
    expressions = [instance.expression for instance in unit]
    return nvrtc.compile(_source(unit), "kernels.cu", arch, expressions, [ROOT / "csrc"], FLAGS)


def compile_all(arch: int, wanted: Sequence[tuple[Instance, ...]]) -> list[nvrtc.Compiled]:
    """Compiles the units in parallel.  Raises like compile_nvrtc."""
    nvrtc.library()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(functools.partial(compile_nvrtc, arch), wanted))


def compile_nvcc(arch: int, instances: Sequence[Instance]) -> dict[str, sass.Kernel]:
    """The kernels by expression, from nvcc and c++filt on the path."""
    if not shutil.which("nvcc") or not shutil.which("c++filt"):
        raise sass.Unavailable("no NVRTC, and nvcc and c++filt are not both on the path")
    # A host function that takes a kernel's address instantiates it.
    keep = "".join(f"void* keep_{i}() {{ return (void*)&{x.expression}; }}\n" for i, x in enumerate(instances))
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernels.cu", Path(folder) / "kernels.cubin"
        source.write_text(_source(instances) + keep)
        flags = ["-std=c++17", *FLAGS, f"-arch=sm_{arch}", f"-I{ROOT / 'csrc'}", "-cubin", "-o", str(cubin)]
        done = subprocess.run(["nvcc", *flags, str(source)], capture_output=True, text=True)
        if done.returncode:
            raise nvrtc.CompileError(done.stdout + done.stderr)
        kernels = sass.read(cubin.read_bytes())
    names = subprocess.run(["c++filt"], input="\n".join(kernels), capture_output=True, text=True, check=True).stdout
    # "void name<...>(arguments)": the arguments start at the last parenthesis outside <>; without a template,
    # "name(arguments)".
    by_name = {}
    for name, kernel in zip(names.splitlines(), kernels.values(), strict=True):
        template = re.sub(r"^void ", "", name).rsplit(">(", 1)
        by_name[template[0] + ">" if len(template) == 2 else name.split("(")[0]] = kernel
    return {instance.expression: by_name[instance.expression] for instance in instances}


def measure(arch: int, scope: str = "all", kernel: str = "") -> list[Row]:
    """Compiles and disassembles the units.  Raises sass.Unavailable, nvrtc.Unavailable or nvrtc.CompileError."""
    sass.nvdisasm()
    wanted = units(arch, scope, kernel)
    try:
        found = []
        for compiled in compile_all(arch, wanted):
            by_symbol = sass.read(compiled.cubin)
            found.append({expression: by_symbol[symbol] for expression, symbol in compiled.names.items()})
    except nvrtc.Unavailable:
        found = [compile_nvcc(arch, unit) for unit in wanted]
    return [row_of(arch, i, kernels[i.expression]) for unit, kernels in zip(wanted, found, strict=True) for i in unit]


def row_of(arch: int, instance: Instance, kernel: sass.Kernel) -> Row:
    threads = kernel.threads or 1024
    row = {
        "arch": arch,
        "kernel": instance.label,
        "tile": instance.tile,
        "registers": kernel.registers,
        "shared": kernel.shared,
        "local": kernel.local,
        "spills": kernel.spills,
        "occupancy": sass.occupancy(arch, kernel.registers, kernel.shared, threads),
        "instructions": len(kernel.instructions),
        "budget": BUDGETS.get(instance.budget),
    }
    loop = kernel.hottest()
    opcode, per_term = instance.marker
    slabs = round(loop.count(opcode) / (per_term * instance.terms)) if loop and instance.terms else 0
    if loop and slabs:
        terms = slabs * instance.terms
        rate, bound = model(arch, loop.pipes(), terms)
        row |= {
            "issued_per_term": len(loop.instructions) / terms,
            "always_per_term": loop.always() / terms,
            "terms_per_clock": rate,
            "bound": bound,
            "of_ffma": rate / UNITS[arch]["fp32"],
            "mix": loop.mix(),
        }
    return Row(**row)


_COLUMNS = {
    "kernel": lambda r: r.kernel,
    "tile": lambda r: r.tile,
    "registers": lambda r: str(r.registers),
    "shared": lambda r: str(r.shared),
    "spills": lambda r: f"{r.spills} ({r.local} B)" if r.spills or r.local else "0",
    "occupancy": lambda r: f"{r.occupancy:.0%}",
    "code": lambda r: str(r.instructions),
    "issued/term": lambda r: "-" if r.issued_per_term is None else f"{r.issued_per_term:.3f}",
    "always": lambda r: "-" if r.always_per_term is None else f"{r.always_per_term:.3f}",
    "budget": lambda r: "-" if r.budget is None else f"{r.budget:.2f}" + (" EXCEEDED" if r.violations() else ""),
    "terms/clk/SM": lambda r: "-" if r.terms_per_clock is None else f"{r.terms_per_clock:.1f} ({r.bound})",
    "of FFMA": lambda r: "-" if r.of_ffma is None else f"{r.of_ffma:.2f}",
}


def table(rows: Sequence[Row]) -> str:
    """A Markdown table with aligned columns."""
    cells = [list(_COLUMNS), *([cell(row) for cell in _COLUMNS.values()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(_COLUMNS))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(UNITS), default=ARCHITECTURES)
    parser.add_argument("--scope", choices=("all", "bfloat16", "budgets"), default="all", help="see units()")
    parser.add_argument("--kernel", default="", help="only kernels with this text in their label")
    parser.add_argument("--mix", action="store_true", help="also print the opcodes of every hottest loop")
    arguments = parser.parse_args(argv)
    rows: list[Row] = []
    try:
        for arch in arguments.arch:
            rows += (found := measure(arch, arguments.scope, arguments.kernel))
            print(f"sm_{arch}\n\n{table(found)}\n", flush=True)
            for row in found if arguments.mix else []:
                print(f"  {row.kernel}, {row.tile}: " + " ".join(f"{o} {n}" for o, n in (row.mix or {}).items()))
    except (sass.Unavailable, nvrtc.Unavailable, nvrtc.CompileError) as reason:
        raise SystemExit(str(reason)) from None
    for row in rows:
        for violation in row.violations():
            print(violation)


if __name__ == "__main__":
    main()
