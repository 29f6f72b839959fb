"""Compiles C for Cortex-M and AArch64, runs it in an emulator, and counts instructions and modelled cycles.

    tools = cortex_m.toolchain()                      arm-none-eabi-gcc if it is on the PATH, else zig's clang
    program = tools.compile("cortex-m4", ["kernel.c"], entries=["kernel"])
    machine = cortex_m.Machine(program)
    x, y = machine.place(numpy_array), machine.reserve(64)
    run = machine.call("kernel", x, y, 16)
    machine.read(y, 64), run.result, run.instructions, run.cycles, run.functions["kernel"].cycles

The programs are freestanding: no C library, no start-up code; memcpy, memset and soft floats come with the compiler or
from runtime.c.  Every placed buffer lies between guard bytes, which `call` checks.  Instruction counts are exact: the
emulator reports each basic block that runs.  Cycles are a model (cortex_m_cycles.py).
Needs `pip install unicorn capstone` and, without a cross compiler, `pip install ziglang`.
"""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from . import cortex_m_cycles
from .elf import Elf

HERE = Path(__file__).resolve().parent
TOOLS = 'pip install "adderops[edge]"'


class Unavailable(RuntimeError):
    """A compiler or the emulator is missing; the message says what to install."""


@dataclass(frozen=True)
class Core:
    """How to compile for a processor and which model of the emulator runs it."""

    gcc: tuple[str, ...]
    zig: tuple[str, ...]
    model: str
    fpu: bool = False

    @property
    def a64(self) -> bool:
        return self.model.startswith("UC_CPU_ARM64")


def _m(cpu: str, fpu: str | None, zig: str, model: str) -> Core:
    abi = ("-mfloat-abi=hard", f"-mfpu={fpu}") if fpu else ("-mfloat-abi=soft",)
    model = f"UC_CPU_ARM_{model}"
    target = f"thumb-freestanding-eabi{'hf' if fpu else ''}"
    return Core((f"-mcpu={cpu}", "-mthumb", *abi), ("-target", target, f"-mcpu={zig}"), model, bool(fpu))


CORES = {
    "cortex-m4": _m("cortex-m4", "fpv4-sp-d16", "cortex_m4+vfp4d16sp", "CORTEX_M4"),
    "cortex-m4-soft": _m("cortex-m4", None, "cortex_m4-vfp2sp-vfp3d16sp-vfp4d16sp", "CORTEX_M4"),
    "cortex-m33": _m("cortex-m33", "fpv5-sp-d16", "cortex_m33+dsp+fp_armv8d16sp", "CORTEX_M33"),
    "cortex-m7": _m("cortex-m7", "fpv5-d16", "cortex_m7+fp_armv8d16", "CORTEX_M7"),
    "cortex-m3": _m("cortex-m3", None, "cortex_m3", "CORTEX_M3"),
    "cortex-m0plus": _m("cortex-m0plus", None, "cortex_m0plus", "CORTEX_M0"),
    "aarch64": Core(
        ("-mcpu=cortex-a72",), ("-target", "aarch64-freestanding", "-mcpu=cortex_a72"), "UC_CPU_ARM64_A72", True
    ),
}

# One layout for all: code where a Cortex-M has its flash, data where it has its RAM.
_SCRIPT = """
MEMORY { FLASH (rx) : ORIGIN = 0x00010000, LENGTH = 16M  RAM (rwx) : ORIGIN = 0x20000000, LENGTH = 16M }
SECTIONS {
  .text : { *(.text*) } > FLASH
  .rodata : { *(.rodata*) } > FLASH
  .data : { *(.data*) } > RAM
  .bss : { *(.bss*) *(COMMON) } > RAM
  /DISCARD/ : { *(.ARM.exidx*) *(.ARM.extab*) *(.eh_frame*) *(.comment*) *(.note*) *(.debug*) }
}
"""


@dataclass(frozen=True)
class Toolchain:
    """A cross compiler: `name` is gcc or zig."""

    name: str

    def command(self, core: str) -> list[str]:
        """The compiler with the options that select `core`; Unavailable says what to install."""
        if core not in CORES:
            raise ValueError(f"core: expected one of {', '.join(CORES)}, got {core!r}")
        if self.name == "zig":
            if importlib.util.find_spec("ziglang") is None:
                raise Unavailable(f"no clang of ziglang: {TOOLS}")
            return [sys.executable, "-m", "ziglang", "cc", *CORES[core].zig]
        gcc = "aarch64-linux-gnu-gcc" if CORES[core].a64 else "arm-none-eabi-gcc"
        if shutil.which(gcc) is None:
            raise Unavailable(f"no {gcc} on the PATH: apt install gcc-{gcc.removesuffix('-gcc')}, or {TOOLS}")
        return [gcc, *CORES[core].gcc]

    def compile(
        self,
        core: str,
        sources: Sequence[Path | str],
        entries: Sequence[str],
        options: Sequence[str] = ("-O2", "-std=c99"),
        folder: Path | str | None = None,
    ) -> "Program":
        """Compiles and links C and assembler files; of the result, `entries` and what they call is kept."""
        command = self.command(core)
        with tempfile.TemporaryDirectory() as place:
            out = Path(folder or place)
            script, file = out / "memory.ld", out / f"{core}-{self.name}.elf"
            script.write_text(_SCRIPT)
            command += ["-ffreestanding", "-ffunction-sections", "-fdata-sections", *options]
            command += [str(source) for source in sources]
            if self.name == "gcc":
                # its own loops must not be compiled into calls of themselves
                command += ["-fno-tree-loop-distribute-patterns", str(HERE / "runtime.c"), "-nostdlib", "-static"]
                command += ["-lgcc", "-Wl,--build-id=none"]
            command += ["-Wl,--gc-sections", f"-Wl,-T,{script}", f"-Wl,-e,{entries[0]}"]
            command += [f"-Wl,-u,{entry}" for entry in entries]
            done = subprocess.run([*command, "-o", str(file)], capture_output=True, text=True, timeout=300)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
            return Program(core, self.name, Elf(file.read_bytes()), done.stderr)


def toolchain(name: str | None = None, core: str = "cortex-m4") -> Toolchain:
    """The toolchain of that name, or the first one that can compile for `core`; Unavailable if there is none."""
    if name not in (None, "gcc", "zig"):
        raise ValueError(f"toolchain: expected gcc or zig, got {name!r}")
    for each in (name,) if name else ("gcc", "zig"):
        tools = Toolchain(each)
        try:
            tools.command(core)
            return tools
        except Unavailable as reason:
            missing = reason
    raise missing


@dataclass(frozen=True)
class Program:
    """A linked program."""

    core: str
    compiler: str
    elf: Elf
    warnings: str = ""

    @property
    def code_bytes(self) -> int:
        """Bytes of code, with the literals that lie within functions."""
        return self.elf.sections.get(".text", 0)

    @property
    def constant_bytes(self) -> int:
        """Bytes of constants: weights, tables, structs."""
        return self.elf.sections.get(".rodata", 0)


@dataclass
class Count:
    """What one function did, without the functions it called."""

    instructions: int = 0
    cycles: int | None = None  # None: no rules for this core
    calls: int = 0


@dataclass
class Run:
    """One call: its result, and what was counted; cycles are None where there are no rules for the core.

    unaligned: loads and stores at addresses that are no multiple of their size, counted where cycles are.
    loop_instructions: those of the basic block that executes the most of them, the innermost loop.
    """

    result: int
    stack_bytes: int
    instructions: int = 0
    cycles: int | None = None
    unaligned: int = 0
    loop_instructions: int = 0
    functions: dict[str, Count] = field(default_factory=dict)


class Fault(RuntimeError):
    """The program touched memory it must not touch, or did not come back."""


_HEAP, _HEAP_SIZE = 0x30000000, 32 << 20
_STACK, _STACK_SIZE = 0x3F000000, 1 << 20
_STOP = 0x3FF00000
_PAGE = 4096
_GUARD = bytes([0xA5, 0x5A, 0xC3, 0x3C]) * 16


class Machine:
    """A program in the emulator's memory.  Fault if it writes outside of what it was given."""

    def __init__(self, program: Program) -> None:
        try:
            import unicorn
            from unicorn import arm64_const, arm_const
        except ImportError:
            raise Unavailable(f"no emulator: {TOOLS}") from None
        self.program = program
        core = CORES[program.core]
        self._uc, self._a64 = unicorn, core.a64
        self._const = arm64_const if core.a64 else arm_const
        if core.a64:
            self._cpu = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
        else:
            self._cpu = unicorn.Uc(unicorn.UC_ARCH_ARM, unicorn.UC_MODE_THUMB | unicorn.UC_MODE_MCLASS)
        self._cpu.ctl_set_cpu_model(getattr(self._const, core.model))
        cpu = self._cpu
        for address, data, size in program.elf.segments:
            self._map(address, size)
            cpu.mem_write(address, data)
        cpu.mem_map(_HEAP, _HEAP_SIZE)
        cpu.mem_map(_STACK, _STACK_SIZE)
        cpu.mem_map(_STOP, _PAGE)
        if core.a64:
            cpu.reg_write(arm64_const.UC_ARM64_REG_CPACR_EL1, 3 << 20)
        elif core.fpu:
            cpu.reg_write(arm_const.UC_ARM_REG_C1_C0_2, 0xF << 20)
            cpu.reg_write(arm_const.UC_ARM_REG_FPEXC, 1 << 30)
        self._top = _HEAP
        self._guards: list[tuple[int, str]] = []
        self._blocks: dict[int, int] = {}
        self._conditional: set[int] = set()  # blocks with an IT instruction
        self._counted = (False, False)
        names = sorted((f.address, name) for name, f in program.elf.functions.items())
        self._starts, self._names = [a for a, _ in names], [n for _, n in names]
        self._cycles = cortex_m_cycles.Blocks(program.core, program.elf)

    def _map(self, address: int, size: int) -> None:
        start, end = address // _PAGE * _PAGE, -(-(address + size) // _PAGE) * _PAGE
        mapped = [(a, b + 1) for a, b, _ in self._cpu.mem_regions()]
        for page in range(start, end, _PAGE):
            if not any(a <= page < b for a, b in mapped):
                self._cpu.mem_map(page, _PAGE)

    def reserve(self, size: int, align: int = 8, offset: int = 0, name: str = "buffer") -> int:
        """The address of `size` bytes between guards, `offset` bytes after a multiple of `align`."""
        start = -(-(self._top + len(_GUARD)) // align) * align + offset
        end = start + size
        self._top = end + len(_GUARD)
        if self._top > _HEAP + _HEAP_SIZE:
            raise MemoryError(f"{name}: {size} bytes do not fit into the emulated memory")
        for address, side in ((start - len(_GUARD), "before"), (end, "after")):
            self._cpu.mem_write(address, _GUARD)
            self._guards.append((address, f"{side} {name}"))
        return start

    def place(self, data: bytes | np.ndarray, align: int = 8, offset: int = 0, name: str = "buffer") -> int:
        """Copies data between guards and returns its address."""
        data = np.ascontiguousarray(data).tobytes() if isinstance(data, np.ndarray) else bytes(data)
        address = self.reserve(len(data), align, offset, name)
        self._cpu.mem_write(address, data)
        return address

    def write(self, address: int, data: bytes | np.ndarray) -> None:
        data = np.ascontiguousarray(data).tobytes() if isinstance(data, np.ndarray) else bytes(data)
        self._cpu.mem_write(address, data)

    def read(self, address: int, size: int) -> bytes:
        return bytes(self._cpu.mem_read(address, size))

    def array(self, address: int, shape: Sequence[int] | int, dtype: object = np.uint8) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.frombuffer(self.read(address, size), dtype=dtype).reshape(shape).copy()

    def address(self, name: str) -> int:
        """The address of a function or of a global variable."""
        return self.program.elf.symbol(name).address

    def call(self, name: str, *arguments: int, count: bool = True, alignment: bool = True, seconds: float = 120) -> Run:
        """Calls a function with integers and addresses.

        `count=False` only runs it, which is faster; `alignment=False` counts as if every access were aligned, five
        times as fast.
        """
        cpu, edges, previous = self._cpu, defaultdict(int), 0
        blocks, conditional = self._blocks, self._conditional

        def block(_cpu: object, address: int, size: int, _data: object) -> None:
            nonlocal previous
            edges[previous, address] += 1
            if blocks.get(address) != size:
                blocks[address] = size
                if not self._a64 and self._cycles.conditional(address, size):
                    conditional.add(address)
            previous = address

        unaligned: dict[tuple[int, int, int], int] = defaultdict(int)

        thumb_state, epsr = 1 << 24, getattr(self._const, "UC_ARM_REG_EPSR", None)

        def access(_cpu: object, _kind: int, address: int, size: int, _value: int, _data: object) -> None:
            if previous in conditional:
                # Unicorn restores the IT state for the hook and leaves it behind: the next block would run under it
                cpu.reg_write(epsr, thumb_state)
            if address % min(size, 4):
                unaligned[previous, address % 4, size] += 1

        stack = self._arguments(arguments)
        cpu.mem_write(_STACK, b"\xee" * (stack - _STACK))
        if (count, alignment) != self._counted:
            cpu.ctl_flush_tb()  # blocks translated without a hook do not call it
            self._counted = (count, alignment)
        hooks = [cpu.hook_add(self._uc.UC_HOOK_BLOCK, block)] if count else []
        if count and alignment and self._cycles.known:
            hooks.append(cpu.hook_add(self._uc.UC_HOOK_MEM_READ | self._uc.UC_HOOK_MEM_WRITE, access))
        thumb = 0 if self._a64 else 1
        pc_register = self._const.UC_ARM64_REG_PC if self._a64 else self._const.UC_ARM_REG_PC
        try:
            cpu.emu_start(self.address(name) | thumb, _STOP, timeout=int(seconds * 1e6))
        except self._uc.UcError as error:
            raise Fault(f"{name}: {error} in {self._where(cpu.reg_read(pc_register))}") from None
        finally:
            for hook in hooks:
                cpu.hook_del(hook)
        if cpu.reg_read(pc_register) & ~1 != _STOP:
            raise Fault(f"{name}: still in {self._where(cpu.reg_read(pc_register))} after {seconds} s")
        for address, side in self._guards:
            if self.read(address, len(_GUARD)) != _GUARD:
                raise Fault(f"{name}: wrote {side}")
        used = self.read(_STACK, stack - _STACK)
        run = Run(self._result(), len(used) - (len(used) - len(used.lstrip(b"\xee"))))
        if count:
            edges.pop((previous, _STOP), None)
            edges[previous, _STOP] = 1
            self._add_up(run, {edge: n for edge, n in edges.items() if edge[0] != _STOP})
            for (at, offset, size), n in unaligned.items():
                run.unaligned += n
                cycles = n * self._cycles.unaligned(offset, size)
                run.functions[self._function(at)].cycles += cycles
                run.cycles += cycles
        return run

    def _arguments(self, arguments: Sequence[int]) -> int:
        """Writes registers and stack for a call that returns to _STOP; returns the stack pointer."""
        c, cpu, top = self._const, self._cpu, _STACK + _STACK_SIZE
        if self._a64:
            registers = [c.UC_ARM64_REG_X0 + i for i in range(8)]
            sp, lr, width, back = c.UC_ARM64_REG_SP, c.UC_ARM64_REG_X30, 8, _STOP
        else:
            registers = [c.UC_ARM_REG_R0 + i for i in range(4)]
            sp, lr, width, back = c.UC_ARM_REG_SP, c.UC_ARM_REG_LR, 4, _STOP | 1
        rest = arguments[len(registers) :]
        stack = (top - 64 - width * len(rest)) // 16 * 16
        for register, value in zip(registers, arguments, strict=False):
            cpu.reg_write(register, int(value) & ((1 << 8 * width) - 1))
        for i, value in enumerate(rest):
            cpu.mem_write(stack + width * i, (int(value) & ((1 << 8 * width) - 1)).to_bytes(width, "little"))
        cpu.reg_write(sp, stack)
        cpu.reg_write(lr, back)
        return stack

    def _result(self) -> int:
        return self._cpu.reg_read(self._const.UC_ARM64_REG_X0 if self._a64 else self._const.UC_ARM_REG_R0)

    def _function(self, address: int) -> str:
        at = bisect_right(self._starts, address) - 1
        return self._names[at] if at >= 0 else "?"

    def _where(self, pc: int) -> str:
        return f"{self._function(pc & ~1)}, at {pc & ~1:#x}"

    def _add_up(self, run: Run, edges: dict[tuple[int, int], int]) -> None:
        blocks: dict[int, int] = defaultdict(int)
        start = 0 if self._cycles.known else None
        run.cycles = start
        for (a, b), n in edges.items():
            before = (a, self._blocks[a]) if a else None
            if b != _STOP:
                here = run.functions.setdefault(self._function(b), Count(cycles=start))
                count = self._cycles.instructions(b, self._blocks[b])
                here.instructions += n * count
                here.calls += n * (b in self._starts)
                run.instructions += n * count
                blocks[b] += n * count
                if self._cycles.known:
                    cycles = n * self._cycles.block(before, (b, self._blocks[b]))
                    here.cycles += cycles
                    run.cycles += cycles
            if before and self._cycles.known:  # a taken branch belongs to the function that branches
                cycles = n * self._cycles.branch(before, b)
                run.functions[self._function(a)].cycles += cycles
                run.cycles += cycles
        run.loop_instructions = max(blocks.values())
