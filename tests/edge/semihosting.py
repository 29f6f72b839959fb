"""Runs a bare Cortex-M program in Unicorn, with files, command line and console through semihosting."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

STACK, STACK_SIZE = 0x3F000000, 1 << 16
PAGE = 4096
BREAKPOINT = 7  # number of the exception that BKPT raises
OPEN, WRITE, READ, GET_CMDLINE, EXIT = 0x01, 0x05, 0x06, 0x15, 0x18
CONSOLE = {4: 1, 8: 2}  # handles of standard output and error, by the mode in which ":tt" is opened


@dataclass(frozen=True)
class Ended:
    """What the program printed, and whether it ended well."""

    output: str
    succeeded: bool


def run(elf, entry: str, arguments: Sequence[str], files: Mapping[str, bytes], seconds: float = 60) -> Ended:
    """Runs `entry` of a linked program (`harness.elf.Elf`) until it asks to exit.

    Args:
        elf: the program.
        entry: the function at which the processor starts.
        arguments: the words of its command line, without the first one.
        files: what it can open.
        seconds: after which it counts as hanging.
    """
    import unicorn
    from unicorn import arm_const as arm

    cpu = unicorn.Uc(unicorn.UC_ARCH_ARM, unicorn.UC_MODE_THUMB | unicorn.UC_MODE_MCLASS)
    cpu.ctl_set_cpu_model(arm.UC_CPU_ARM_CORTEX_M4)
    pages = {p for address, _, size in elf.segments for p in range(address // PAGE, -(-(address + size) // PAGE))}
    for page in pages | {0xE000ED88 // PAGE}:  # and the register that enables the floating-point unit
        cpu.mem_map(page * PAGE, PAGE)
    for address, data, _ in elf.segments:
        cpu.mem_write(address, data)
    cpu.mem_map(STACK, STACK_SIZE)
    cpu.reg_write(arm.UC_ARM_REG_SP, STACK + STACK_SIZE)
    # memory stands in for that register, so the unit is switched on from here
    cpu.reg_write(arm.UC_ARM_REG_C1_C0_2, 0xF << 20)
    cpu.reg_write(arm.UC_ARM_REG_FPEXC, 1 << 30)

    printed, opened, endings = [], {}, []

    def words(address: int, count: int) -> list[int]:
        data = bytes(cpu.mem_read(address, 4 * count))
        return [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]

    def answer(operation: int, argument: int) -> int:
        if operation == OPEN:
            at, mode, length = words(argument, 3)
            name = bytes(cpu.mem_read(at, length + 1))
            assert name.endswith(b"\0")
            if name == b":tt\0" and mode in CONSOLE:
                return CONSOLE[mode]
            assert mode == 1  # "rb"
            content = files.get(name[:-1].decode())
            if content is None:
                return 0xFFFFFFFF
            opened[len(opened) + 3] = bytearray(content)
            return len(opened) + 2
        if operation == WRITE:
            handle, at, size = words(argument, 3)
            assert handle in CONSOLE.values()
            printed.append(bytes(cpu.mem_read(at, size)).decode())
            return 0
        if operation == READ:
            handle, to, size = words(argument, 3)
            part = bytes(opened[handle][:size])
            del opened[handle][:size]
            cpu.mem_write(to, part)
            return size - len(part)
        if operation == GET_CMDLINE:
            to, room = words(argument, 2)
            line = " ".join(["network", *arguments]).encode() + b"\0"
            assert len(line) <= room
            cpu.mem_write(to, line)
            return 0
        assert operation == EXIT
        endings.append(argument)
        cpu.emu_stop()
        return 0

    def interrupt(_cpu, number: int, _data) -> None:
        assert number == BREAKPOINT, f"exception {number} at {cpu.reg_read(arm.UC_ARM_REG_PC):#x}"
        answered = answer(cpu.reg_read(arm.UC_ARM_REG_R0), cpu.reg_read(arm.UC_ARM_REG_R1))
        cpu.reg_write(arm.UC_ARM_REG_R0, answered)
        cpu.reg_write(arm.UC_ARM_REG_PC, (cpu.reg_read(arm.UC_ARM_REG_PC) + 2) | 1)

    cpu.hook_add(unicorn.UC_HOOK_INTR, interrupt)
    cpu.emu_start(elf.functions[entry].address | 1, 0xFFFFFFFE, timeout=int(seconds * 1e6))
    assert endings, f"still running after {seconds} s, at {cpu.reg_read(arm.UC_ARM_REG_PC):#x}"
    return Ended("".join(printed), endings == [0x20026])
