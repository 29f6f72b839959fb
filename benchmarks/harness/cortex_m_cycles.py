"""A model of cycles for Cortex-M4 and Cortex-M33: rules over each instruction and the one before it.

Cortex-M4
    data processing, DSP, USADA8, MUL, MLA, SMULL, SMLAL      1
    SDIV, UDIV                                                12 (the worst case of 2 to 12)
    LDR, LDRB, LDRH, VLDR (one word)                          2; 1 right after another load, unless that one writes the
                                                              base or has post- or pre-indexed the same base
    STR                                                       1; 2 with a register as offset
    VSTR                                                      2
    LDRD, STRD, LDM, STM, PUSH, POP, VLDM, VSTM, n words      1 + n
    base or offset written by the instruction before          1 more (not by a load, whose chain ends instead)
    branch, call, return                                      1; 1 + P if taken; TBB, TBH 2 + P
    floating point                                            1; VMLA, VFMA 3; VDIV, VSQRT 14; VMOV of two registers 2
    result of arithmetic or conversion used by the next       1 more
    word at an address that is no multiple of 4               1 more if it is even, 2 more if it is odd (halfwords: 1):
                                                              two or three accesses
Sources: Arm, Cortex-M4 Technical Reference Manual, r0p1 (100166), tables of processor and FPU instructions; its copies
in Texas Instruments SWCU185 and SWCU192; gcc, config/arm/cortex-m4.md; measurements on an STM32F407 in jnk0le/random,
3dfc2ab, pipeline cycle test/doc/cortex_m3m4.md (chains of loads, stores, addresses).  USADA8 = 1 follows the manual's
row for DSP instructions from memory: that row was not at hand.  P = 2 of the manual's 1 to 3.

Cortex-M33
    as above, but loads and stores 1; of n words n; DIV 11; TAKEN 1 more (P = 1); MULS (16 bits) 2
    result of a load used by the next                         1 more, unless stored or accumulated on
    result of MUL, MLA, USADA8, xXTAy, shifted operand        1 more if used by the next, likewise
    word or halfword across two words                         1 more
    result of other DSP and saturating instructions           1 more if used by the next
    result of floating-point arithmetic                       1 more if used by the next
    VMOV to the core 1, 1 more if used by the next; of two registers 2; of two registers from the core 1, 1 more
Source: measurements on an RP2350 in jnk0le/random, 3dfc2ab, pipeline cycle test/doc/cortex_m33.md.  Its pairs of
16-bit instructions that issue together are left out.

Neither model has wait states of the flash or contention for the bus: code and data as in memory that answers at once.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .elf import Elf

MODELLED = ("cortex-m4", "cortex-m4-soft", "cortex-m33")
TAKEN = {"cortex-m4": 2, "cortex-m33": 1}  # P

_LOAD = set("ldr ldrb ldrh ldrsb ldrsh vldr".split())
_STORE = set("str strb strh vstr".split())
_LOADS = set("ldrd ldm ldmdb pop vldmia vldmdb vpop".split())
_STORES = set("strd stm stmdb push vstmia vstmdb vpush".split())
_MAC4 = set("mla mls smlad smladx smlsd smlabb smlabt smlatb smlatt smlawb smlawt smmla usada8".split())
_MAC_LONG = set("smlal umlal umaal smlald smlaldx".split())
_MAC = _MAC4 | _MAC_LONG | set("mul smull umull smuad smuadx smulbb smulbt smultb smultt smulwb smmul usad8".split())
_EXTEND = set("sxtab sxtah sxtab16 uxtab uxtah uxtab16".split())
_DSP = set(
    """qadd qsub qdadd qdsub qadd8 qadd16 qsub8 qsub16 uqadd8 uqadd16 uqsub8 uqsub16 sadd8 sadd16 ssub8 ssub16
    uadd8 uadd16 usub8 usub16 uhadd8 uhadd16 uhsub8 shadd8 shadd16 shsub8 sel pkhbt pkhtb ssat ssat16 usat usat16
    sxtb16 uxtb16""".split()
)
_FLOAT = set("vadd vsub vmul vnmul vneg vabs vcvt vcvtr vcvta vcvtn vcvtp vcvtm vrinta vrintr vrintz".split())
_FUSED = set("vmla vmls vfma vfms vnmla vnmls vfnma vfnms".split())


@dataclass(frozen=True)
class Instruction:
    """What the rules look at; registers are names, double ones as their two halves."""

    address: int
    size: int
    name: str  # without condition, width and type
    reads: frozenset[str]
    writes: frozenset[str]
    base: frozenset[str] = frozenset()  # registers of the address
    indexed: bool = False  # the base is written as well
    offset: bool = False  # a register is the offset
    words: int = 0  # of a load or store of several words
    shifted: bool = False
    accumulators: frozenset[str] = frozenset()
    stored: frozenset[str] = frozenset()

    @property
    def end(self) -> int:
        return self.address + self.size

    @property
    def loads(self) -> bool:
        return self.name in _LOAD

    @property
    def memory(self) -> bool:
        return self.name in _LOAD or self.name in _STORE or bool(self.words)


def _registers(name: str) -> tuple[str, ...]:
    if name[0] == "d" and name[1:].isdigit():
        return f"s{2 * int(name[1:])}", f"s{2 * int(name[1:]) + 1}"
    return (name,)


def decode(code: bytes, address: int) -> list[Instruction]:
    """The instructions of Thumb code."""
    return [_describe(each) for each in _disassembler().disasm(code, address)]


def _disassembler():
    global _CAPSTONE
    if _CAPSTONE is None:
        import capstone

        _CAPSTONE = capstone.Cs(capstone.CS_ARCH_ARM, capstone.CS_MODE_THUMB | capstone.CS_MODE_MCLASS)
        _CAPSTONE.detail = True
    return _CAPSTONE


_CAPSTONE = None


def _describe(i) -> Instruction:
    name = i.insn_name()  # without condition and width
    registers, shifted, base, offset = [], False, set(), False
    for operand in i.operands:
        if operand.type == 1:
            registers.append((_registers(i.reg_name(operand.reg)), operand.access))
        elif operand.type == 3:
            base |= {i.reg_name(r) for r in (operand.mem.base, operand.mem.index) if r}
            offset = offset or bool(operand.mem.index)
        shifted = shifted or operand.type == 1 and operand.shift.type != 0
    read, written = i.regs_access()
    reads = {r for x in read for r in _registers(i.reg_name(x))}
    writes = {r for x in written for r in _registers(i.reg_name(x))}
    for names, access in registers:  # capstone leaves the access of some operands open
        if not access:
            (writes if name in _LOADS else reads).update(names)
    operands = [r for names, _ in registers for r in names]
    accumulators: set[str] = set()
    if name in _MAC_LONG:
        reads |= writes
        accumulators = set(writes)
    elif name in _MAC4:
        accumulators = {operands[3]} - set(operands[1:3])
    elif name in _EXTEND:
        accumulators = {operands[1]} - set(operands[2:3])
    words, stored = 0, set()
    if name in _LOADS or name in _STORES:
        listed = operands
        if name in ("ldrd", "strd"):
            words = 2
        else:
            if name not in ("pop", "push", "vpop", "vpush"):
                base, listed = {operands[0]}, operands[1:]
            words = len(listed)
        stored = set(listed) if name in _STORES else set()
    elif name in ("vldr", "vstr") and len(operands) == 2:
        words = 2
    if name in _STORE:
        stored = set(operands[:1])
    return Instruction(
        i.address,
        i.size,
        name,
        frozenset(reads),
        frozenset(writes),
        frozenset(base - {"pc"}),
        bool(i.writeback),
        offset,
        words,
        shifted,
        frozenset(accumulators),
        frozenset(stored - base),
    )


def cortex_m4(before: Instruction | None, i: Instruction) -> int:
    """Cycles of an instruction after the one before it; None before: unknown."""
    writes = before.writes if before else frozenset()
    if i.words:
        cycles = 1 + i.words
    elif i.loads:
        chained = before is not None and before.loads and not before.words and not i.base & (writes - before.base)
        chained = chained and not (before.indexed and i.base & before.base & writes)
        cycles = 1 if chained else 2
    elif i.name == "vstr" or i.name in _STORE and i.offset:
        cycles = 2
    else:
        cycles = _PLAIN.get(i.name, 1)
    if i.name == "vmov" and len(i.reads | i.writes) > 2:
        cycles = 2
    if before and i.memory and not before.memory and i.base & writes:
        cycles += 1
    return cycles + _float_stall(before, i)


_PLAIN = {"sdiv": 12, "udiv": 12, "vdiv": 14, "vsqrt": 14, "tbb": 2, "tbh": 2} | dict.fromkeys(_FUSED, 3)


def _float_stall(before: Instruction | None, i: Instruction) -> int:
    return int(before is not None and before.name in _FLOAT | _FUSED and bool(before.writes & i.reads))


def _floats(registers: frozenset[str]) -> bool:
    return any(r[0] == "s" and r[1:].isdigit() for r in registers)


def cortex_m33(before: Instruction | None, i: Instruction) -> int:
    """Cycles of an instruction after the one before it."""
    cycles = i.words or {"sdiv": 11, "udiv": 11}.get(i.name, _PLAIN.get(i.name, 1))
    if i.name == "mul" and i.size == 2:
        cycles = 2
    if i.name == "vmov" and len(i.writes) > 1 and not _floats(i.writes):
        cycles = 2
    if before is None:
        return cycles
    needs = before.writes & i.reads
    accumulates = needs <= i.accumulators
    stores = needs <= i.stored
    if before.name in ("ldr", "ldrb", "ldrh", "ldrsb", "ldrsh"):
        late = needs - (before.base if before.indexed else frozenset())
        stall = bool(late) and not (late <= i.stored or i.name in _MAC and late <= i.accumulators)
    elif before.name in _MAC or before.name in _EXTEND or before.shifted and before.name not in _DSP:
        stall = bool(needs) and not (accumulates or stores)
    elif before.name in _DSP or before.name == "vmov" and _floats(before.writes) == (len(before.writes) > 1):
        stall = bool(needs)
    else:
        return cycles + _float_stall(before, i)
    return cycles + stall


class Blocks:
    """Instructions and cycles of the basic blocks of a program; a block is (address, size)."""

    def __init__(self, core: str, elf: "Elf") -> None:
        self._core = core.removesuffix("-soft")
        self._thumb = not core.startswith("aarch64")
        self._elf = elf
        self._rule = {"cortex-m4": cortex_m4, "cortex-m33": cortex_m33}.get(self._core)
        self._decoded: dict[tuple[int, int], list[Instruction]] = {}
        self._inner: dict[tuple[int, int], int] = {}

    @cached_property
    def known(self) -> bool:
        """Whether there are rules for this core."""
        return self._rule is not None

    def _decode(self, block: tuple[int, int]) -> list[Instruction]:
        if block not in self._decoded:
            address, size = block
            found = decode(self._elf.bytes(address, size), address)
            if not found or found[-1].end != address + size:
                raise ValueError(f"cannot decode the instructions from {address:#x} to {address + size:#x}")
            self._decoded[block] = found
        return self._decoded[block]

    def instructions(self, address: int, size: int) -> int:
        """How many instructions a block has."""
        if self._thumb:
            code, at, count = self._elf.bytes(address, size), 0, 0
            while at < size:  # a first halfword of 0b11101 and above starts an instruction of 32 bits
                at += 4 if code[at + 1] >= 0xE8 else 2
                count += 1
            return count
        return size // 4

    def conditional(self, address: int, size: int) -> bool:
        """Whether instructions of a block may be under an IT instruction, its own or that of the block before."""
        start = max(address - 14, self._elf.start(address))  # IT and three of its four instructions
        code = self._elf.bytes(start, address + size - start)
        halves = (int.from_bytes(code[at : at + 2], "little") for at in range(0, len(code), 2))
        return any(half & 0xFF00 == 0xBF00 and half & 0xF for half in halves)

    def block(self, before: tuple[int, int] | None, block: tuple[int, int]) -> int:
        """Cycles of a block that runs after another one."""
        code = self._decode(block)
        if block not in self._inner:
            self._inner[block] = sum(self._rule(a, b) for a, b in zip(code, code[1:], strict=False))
        return self._inner[block] + self._rule(self._decode(before)[-1] if before else None, code[0])

    def branch(self, block: tuple[int, int], to: int) -> int:
        """Cycles added because the block's end branched: 0 if it fell through."""
        return 0 if to == sum(block) else TAKEN[self._core]

    def unaligned(self, offset: int, size: int = 4) -> int:
        """Cycles added by an access at an address that is no multiple of its size, `offset` modulo 4."""
        if self._core == "cortex-m4":
            return 2 if size == 4 and offset % 2 else 1
        return int(offset + size > 4)
