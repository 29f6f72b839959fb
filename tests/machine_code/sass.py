"""Reads the machine code of CUDA kernels, without a GPU: registers, shared and local memory, loops, occupancy.

    python tests/machine_code/sass.py FILE.cubin [KERNEL]

prints the resources and the instruction mix of the hottest loop of the kernels whose symbol contains KERNEL.
Instructions come from nvdisasm (CUDA toolkit, pip install nvidia-cuda-nvdisasm, or inside the triton package of a CUDA
build of torch); resources are read directly from the cubin, which is an ELF file.
"""

import argparse
import collections
import functools
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, field
from pathlib import Path


class Unavailable(Exception):
    """Why nothing can be disassembled here."""


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str  # with modifiers: FADD.FTZ
    text: str
    target: int | None  # of a branch

    @property
    def base(self) -> str:
        return self.opcode.split(".")[0]


@dataclass(frozen=True)
class Loop:
    """The instructions from the target of a backward branch to the branch, in address order.

    Counts are an upper bound per iteration: instructions that a branch may skip count as executed, and those of an
    inner loop count once.
    """

    depth: int  # 1: an outermost loop
    instructions: tuple[Instruction, ...]
    own: tuple[Instruction, ...]  # those outside inner loops

    def count(self, *opcodes: str) -> int:
        """The number of instructions with one of these opcodes, given without modifiers or with the leading ones."""
        return sum(any(f"{i.opcode}.".startswith(f"{opcode}.") for opcode in opcodes) for i in self.instructions)

    def always(self) -> int:
        """The number of instructions that no branch of the loop skips: a lower bound per iteration."""
        end = self.instructions[-1].address
        jumps = [(i.address, i.target) for i in self.instructions if i.target and i.address < i.target <= end]
        return sum(not any(start < i.address < stop for start, stop in jumps) for i in self.instructions)

    def mix(self) -> dict[str, int]:
        """Counts of opcodes without modifiers, most frequent first."""
        return dict(collections.Counter(i.base for i in self.instructions).most_common())

    def pipes(self) -> dict[str, int]:
        return dict(collections.Counter(pipe_of(i.opcode) for i in self.instructions).most_common())


@dataclass(frozen=True)
class Kernel:
    symbol: str
    registers: int  # per thread
    shared: int  # static bytes per block, without those reserved by the driver
    local: int  # bytes of local memory per thread: spilled registers, arrays with computed indices
    threads: int | None  # from __launch_bounds__
    instructions: tuple[Instruction, ...] = field(repr=False)

    @property
    def spills(self) -> int:
        """Loads and stores of local memory."""
        return sum(i.base in ("LDL", "STL") for i in self.instructions)

    def loops(self) -> list[Loop]:
        ends: dict[int, int] = {}
        for i in self.instructions:
            if i.target is not None and i.target < i.address:  # equal: the trap after the last EXIT
                ends[i.target] = max(i.address, ends.get(i.target, 0))
        spans = list(ends.items())
        loops = []
        for start, end in spans:
            inner = [s for s in spans if s != (start, end) and start <= s[0] and s[1] <= end]
            depth = sum(s[0] <= start and end <= s[1] for s in spans)
            body = tuple(i for i in self.instructions if start <= i.address <= end)
            own = tuple(i for i in body if not any(s[0] <= i.address <= s[1] for s in inner))
            loops.append(Loop(depth, body, own))
        return loops

    def hottest(self) -> Loop | None:
        """The loop with the most arithmetic outside inner loops; the deepest of several."""
        return max(self.loops(), default=None, key=lambda loop: (sum(map(_is_math, loop.own)), loop.depth))


# The unit that executes an opcode; opcodes without a line go to the integer and comparison unit, "alu".
_PIPES = [
    ("tensor", r"[HIBDQO]\w*MMA\b|UTC\w*MMA"),
    ("fp32", r"(FADD|FMUL|FFMA|FSWZADD)(32I)?\b"),
    ("fp32x2", r"(FADD|FMUL|FFMA)2\b"),
    ("bf16x2", r"H(ADD|MUL|FMA)2\b.*\.BF16"),
    ("fp16x2", r"H(ADD|MUL|FMA)2(_32I|_MMA)?\b"),
    ("imad", r"IMAD\b"),
    ("fp64", r"D(ADD|MUL|FMA|SETP|MNMX)\b"),
    ("xu", r"(MUFU|F2F|I2F|F2I|FRND|POPC|FLO|BREV)\b"),
    ("memory", r"(LDS|STS|LDSM|STSM|LDG|STG|LDGSTS|LD|ST|LDL|STL|ATOM|ATOMG|ATOMS|RED|SHFL)\b"),
    (
        "control",
        r"(BRA|BRX|BAR|BSYNC|BSSY|EXIT|NOP|WARPSYNC|CALL|RET|YIELD|BREAK|SYNCS|DEPBAR|LDGDEPBAR|MEMBAR|ACQBULK)\b",
    ),
    ("uniform", r"(U(?!TC)\w+|R2UR|S2UR|S2R|CS2R|LDC|LDCU)\b"),
]
_PATTERNS = [(pipe, re.compile(pattern)) for pipe, pattern in _PIPES]
_MATH = {"tensor", "fp32", "fp32x2", "fp16x2", "bf16x2", "imad", "fp64", "xu", "alu"}


@functools.cache
def pipe_of(opcode: str) -> str:
    return next((pipe for pipe, pattern in _PATTERNS if pattern.match(opcode)), "alu")


def _is_math(instruction: Instruction) -> bool:
    return pipe_of(instruction.opcode) in _MATH


@functools.cache
def nvdisasm() -> str:
    """The newest nvdisasm found: an old one rejects the files of a newer compiler.  Raises Unavailable."""
    folders = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path])
    patterns = ("nvidia/*/bin/nvdisasm", "triton/backends/nvidia/bin/nvdisasm")
    found = [path for folder in folders if folder for pattern in patterns for path in Path(folder).glob(pattern)]
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found += [Path(home) / "bin" / "nvdisasm" for home in homes if home]
    found += [Path(path) for path in [shutil.which("nvdisasm")] if path]
    best, newest = None, (0, 0)
    for path in found:
        try:
            text = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
        except OSError:
            continue
        release = re.search(r"release (\d+)\.(\d+)", text)
        if release and (int(release[1]), int(release[2])) > newest:
            best, newest = str(path), (int(release[1]), int(release[2]))
    if best is None:
        raise Unavailable("no nvdisasm: pip install nvidia-cuda-nvdisasm")
    return best


_SECTION = re.compile(r"\s*\.section\s+\.text\.([\w$.]+)")
_LABEL = re.compile(r"(\.L[\w$.]*):")
_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?((\S+).*?)\s*;")
_TARGET = re.compile(r"`\((\.L[\w$.]*)\)")


def _listing(text: str) -> dict[str, tuple[Instruction, ...]]:
    """The instructions of every kernel in the output of `nvdisasm -c`."""
    rows: dict[str, list[tuple[int, str, str]]] = {}
    labels: dict[str, int] = {}  # unique in the file; targets are resolved at the end
    kernel: list[tuple[int, str, str]] | None = None
    waiting: list[str] = []
    for line in text.splitlines():
        if match := _SECTION.match(line):
            kernel, waiting = rows.setdefault(match[1], []), []
        elif match := _LABEL.match(line):
            waiting.append(match[1])
        elif kernel is not None and (match := _INSTRUCTION.match(line)):
            address = int(match[1], 16)
            labels.update(dict.fromkeys(waiting, address))
            waiting = []
            kernel.append((address, match[3], match[2]))

    def target(opcode: str, text: str) -> int | None:
        match = _TARGET.search(text) if opcode.split(".")[0] in ("BRA", "BRX", "JMP") else None
        return labels.get(match[1]) if match else None

    return {name: tuple(Instruction(a, o, t, target(o, t)) for a, o, t in lines) for name, lines in rows.items()}


@dataclass(frozen=True)
class _Section:
    name: str
    data: bytes
    size: int
    entry: int


def _sections(elf: bytes) -> list[_Section]:
    if elf[:5] != b"\x7fELF\x02":
        raise ValueError("not a cubin")
    (start,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names_at = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", elf, start + i * size) for i in range(count)]
    no_bits = 8
    names = headers[names_at][4]
    return [
        _Section(
            elf[names + h[0] : elf.index(b"\0", names + h[0])].decode(),
            b"" if h[1] == no_bits else elf[h[4] : h[4] + h[5]],
            h[5],
            h[9],
        )
        for h in headers
    ]


def _attributes(info: bytes) -> list[tuple[int, bytes]]:
    """The entries of a .nv.info section: format, attribute, 16 bits; in format 4 these are the length of the data."""
    result, at = [], 0
    while at + 4 <= len(info):
        form, attribute, value = struct.unpack_from("<BBH", info, at)
        at += 4
        length = value if form == 4 else 0
        result.append((attribute, info[at : at + length]))
        at += length
    return result


# Attributes of .nv.info, with nvdisasm's names.
_EIATTR_MAX_THREADS, _EIATTR_FRAME_SIZE, _EIATTR_REGCOUNT = 0x05, 0x11, 0x2F
# From sm_90 on, the linker puts the driver's 1 KiB at the start of a kernel's shared section.
_RESERVED_SHARED = 1024


def read(cubin: bytes) -> dict[str, Kernel]:
    """The kernels of a cubin by symbol.  Raises Unavailable without nvdisasm."""
    sections = {section.name: section for section in _sections(cubin)}
    table, strings = sections[".symtab"], sections[".strtab"].data
    symbols = []
    for at in range(0, table.size, table.entry):
        (name,) = struct.unpack_from("<I", table.data, at)
        symbols.append(strings[name : strings.index(b"\0", name)].decode())
    sizes: dict[tuple[int, str], int] = {}
    for attribute, data in _attributes(sections[".nv.info"].data):
        if attribute in (_EIATTR_FRAME_SIZE, _EIATTR_REGCOUNT):
            symbol, value = struct.unpack("<II", data)
            sizes[attribute, symbols[symbol]] = value

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernels.cubin"
        file.write_bytes(cubin)
        done = subprocess.run([nvdisasm(), "-c", str(file)], capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"{nvdisasm()}: {done.stderr.strip()[:300]}")
    architecture = re.search(r"\.target\s+sm_(\d+)", done.stdout)
    reserved = _RESERVED_SHARED if architecture and int(architecture[1]) >= 90 else 0

    kernels = {}
    for symbol, instructions in _listing(done.stdout).items():
        own = sections.get(f".nv.info.{symbol}")
        if own is None:  # a device function
            continue
        shared = sections.get(f".nv.shared.{symbol}")
        bounds = [
            struct.unpack("<III", d) for attribute, d in _attributes(own.data) if attribute == _EIATTR_MAX_THREADS
        ]
        kernels[symbol] = Kernel(
            symbol,
            sizes[_EIATTR_REGCOUNT, symbol],
            max(0, shared.size - reserved) if shared else 0,
            sizes.get((_EIATTR_FRAME_SIZE, symbol), 0),
            bounds[0][0] * bounds[0][1] * bounds[0][2] if bounds else None,
            instructions,
        )
    return kernels


@dataclass(frozen=True)
class Limits:
    """The resources of a multiprocessor."""

    threads: int
    blocks: int
    shared: int  # bytes; each block takes `reserved` in addition to its own
    reserved: int
    shared_unit: int  # granularity of a block's bytes
    registers: int = 65536
    register_unit: int = 256  # granularity of a warp's registers
    schedulers: int = 4  # each has a quarter of the registers


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; the units are those of the toolkit's
# cuda_occupancy.h.
LIMITS = {
    75: Limits(1024, 16, 64 * 1024, 0, 256),
    80: Limits(2048, 32, 164 * 1024, 1024, 128),
    86: Limits(1536, 16, 100 * 1024, 1024, 128),
    89: Limits(1536, 24, 100 * 1024, 1024, 128),
    90: Limits(2048, 32, 228 * 1024, 1024, 128),
    100: Limits(2048, 32, 228 * 1024, 1024, 128),
    120: Limits(1536, 24, 100 * 1024, 1024, 128),
}


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def blocks_per_multiprocessor(arch: int, registers: int, shared: int, threads: int) -> int:
    """The number of resident blocks, given registers per thread, shared bytes per block and threads per block."""
    limits, warps = LIMITS[arch], -(-threads // 32)
    quarter = limits.registers // limits.schedulers
    warps_by_registers = limits.schedulers * (quarter // max(1, _up(32 * registers, limits.register_unit)))
    bytes_of_block = _up(shared + limits.reserved, limits.shared_unit)
    return min(
        limits.blocks,
        limits.threads // (32 * warps),
        warps_by_registers // warps,
        limits.shared // bytes_of_block if bytes_of_block else limits.blocks,
    )


def occupancy(arch: int, registers: int, shared: int, threads: int) -> float:
    """Resident warps divided by the maximum of a multiprocessor of sm_`arch`."""
    blocks = blocks_per_multiprocessor(arch, registers, shared, threads)
    return blocks * _up(threads, 32) / LIMITS[arch].threads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cubin", type=Path)
    parser.add_argument("kernel", nargs="?", default="", help="part of the symbol")
    arguments = parser.parse_args()
    try:
        kernels = read(arguments.cubin.read_bytes())
    except Unavailable as reason:
        raise SystemExit(str(reason)) from None
    for kernel in kernels.values():
        if arguments.kernel not in kernel.symbol:
            continue
        print(
            f"{kernel.symbol}\n  {kernel.registers} registers, {kernel.shared} B shared, {kernel.local} B local,",
            end="",
        )
        print(f" {kernel.spills} local loads and stores, {len(kernel.instructions)} instructions")
        if loop := kernel.hottest():
            print(
                f"  hottest of {len(kernel.loops())} loops, depth {loop.depth}: {len(loop.instructions)} instructions"
            )
            for title, counts in (("opcodes", loop.mix()), ("units", loop.pipes())):
                print(f"  {title:8}" + "  ".join(f"{name} {count}" for name, count in counts.items()))


if __name__ == "__main__":
    main()
