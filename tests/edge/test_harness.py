"""The emulator's results, counts and modelled cycles are those of small programs counted by hand."""

import numpy as np
import pytest
from slow import slow_except

from .emulation import compiled, cortex_m, toolchain

SUM = """
#include <stdint.h>
int32_t offset = 5;
static const int32_t table[4] = {1, 2, 3, 4};
int64_t sum(const int16_t *x, int32_t n, int32_t *y, int a, int b, int c) {
  int32_t s = a * 100 + b * 10 + c + offset;
  for (int32_t i = 0; i < n; i++) y[i] = s += x[i] * table[i & 3];
  return s;
}
float scaled(float x);
void floats(const int32_t *x, float *y, int n) { for (int i = 0; i < n; i++) y[i] = (float)x[i] * 0.1f + 3.0f; }
struct block { uint8_t bytes[64]; };
void copy(struct block *to, const struct block *from) { *to = *from; }
void writes(uint8_t *at, int value) { *at = (uint8_t)value; }
void hangs(void) { for (volatile int i = 0;; i++) {} }
void deep(int n) {
  volatile uint8_t a[256];
  for (int i = 0; i < 256; i++) a[i] = (uint8_t)n;
  if (n) deep(n - 1);
  a[0]++;
}
"""
ENTRIES = ["sum", "floats", "copy", "writes", "hangs", "deep"]


@pytest.fixture(scope="module", params=("gcc", "zig"))
def compiler(request):
    return request.param


@pytest.mark.parametrize("core", slow_except(("cortex-m4",), cortex_m.CORES))
def test_every_core_computes(core, compiler, tmp_path):
    machine = compiled(SUM, tmp_path, ENTRIES, core, compiler)
    x = np.arange(-20, 20, dtype=np.int16)
    y = machine.reserve(4 * len(x))
    run = machine.call("sum", machine.place(x), len(x), y, 1, 2, 3)
    want = 128 + np.cumsum(x * np.resize(np.array([1, 2, 3, 4], np.int32), len(x)))
    assert (machine.array(y, len(x), np.int32) == want).all()
    assert run.result & 0xFFFFFFFF == int(want[-1]) & 0xFFFFFFFF
    assert run.instructions > 3 * len(x) and run.instructions == sum(f.instructions for f in run.functions.values())
    assert (run.cycles is not None) == (core in cortex_m.cortex_m_cycles.MODELLED)

    numbers, z = np.array([-(2**31), -7, 0, 1, 16777217], np.int32), machine.reserve(20)
    run = machine.call("floats", machine.place(numbers), z, len(numbers))
    want = numbers.astype(np.float32) * np.float32(0.1) + np.float32(3)
    # contraction is the compiler's business here: the error of one rounding at most
    assert np.allclose(machine.array(z, 5, np.float32), want, rtol=2e-7)
    soft = any("mul" in name for name in run.functions)
    assert soft == (not cortex_m.CORES[core].fpu)

    block = bytes(range(64))
    to = machine.reserve(64)
    machine.call("copy", to, machine.place(block))
    assert machine.read(to, 64) == block


def test_damage_and_endless_loops_are_found(tmp_path):
    machine = compiled(SUM, tmp_path, ENTRIES)
    at = machine.reserve(3, align=4, name="three bytes")
    for offset, side in ((-1, "before"), (3, "after")):
        machine.call("writes", at, 1)
        with pytest.raises(cortex_m.Fault, match=f"writes: wrote {side} three bytes"):
            machine.call("writes", at + offset, 1)
        machine.write(at - 64, cortex_m._GUARD), machine.write(at + 3, cortex_m._GUARD)
    with pytest.raises(cortex_m.Fault, match="UC_ERR_WRITE_UNMAPPED.* in writes"):
        machine.call("writes", 0x10)
    with pytest.raises(cortex_m.Fault, match="still in hangs"):
        machine.call("hangs", count=False, seconds=0.2)
    assert 32 * 256 <= machine.call("deep", 31).stack_bytes < 64 * 320  # compilers inline some of the recursion
    with pytest.raises(KeyError, match="no symbol 'sun'; there are .*sum"):
        machine.call("sun")


def test_block_counts_are_instruction_counts(tmp_path):
    machine = compiled(SUM, tmp_path, ENTRIES)
    x, y = machine.place(np.arange(37, dtype=np.int16)), machine.reserve(4 * 37)
    steps = []
    hook = machine._cpu.hook_add(machine._uc.UC_HOOK_CODE, lambda _cpu, address, *_: steps.append(address))
    run = machine.call("sum", x, 37, y, 1, 2, 3)
    machine._cpu.hook_del(hook)
    assert run.instructions == sum(at != cortex_m._STOP for at in steps)


CONDITIONAL = """
.syntax unified
.thumb
.text
.p2align 2
.global conditional
.type conditional, %function
.thumb_func
conditional:
  cmp r0, #0
  itt ne
  ldrne r2, [r1]
  addne r0, r0, r2
  cmp r2, r2
  b 1f
1:
  adds r0, #1
  adds r0, #2
  bx lr
.size conditional, .-conditional
"""


@pytest.mark.parametrize("core", ("cortex-m4", "cortex-m33"))
def test_counting_changes_nothing(core, tmp_path):
    """A load under IT that a hook sees must not leave the condition behind for the next block."""
    machine = compiled(CONDITIONAL, tmp_path, ["conditional"], core, suffix="s")
    x = machine.place((7).to_bytes(4, "little"))
    for options in ({"count": False}, {"alignment": False}, {}):
        assert machine.call("conditional", 1, x, **options).result == 1 + 7 + 1 + 2, options


def test_a_missing_tool_says_what_to_install(monkeypatch):
    monkeypatch.setattr(cortex_m.shutil, "which", lambda _: None)
    with pytest.raises(cortex_m.Unavailable, match=r"no arm-none-eabi-gcc.*apt install gcc-arm-none-eabi"):
        cortex_m.toolchain("gcc")
    monkeypatch.setattr(cortex_m.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(cortex_m.Unavailable, match=r'pip install "adderops\[edge\]"'):
        cortex_m.toolchain()
    with pytest.raises(ValueError, match="toolchain: expected gcc or zig, got 'clang'"):
        cortex_m.toolchain("clang")
    with pytest.raises(ValueError, match="core: expected one of cortex-m4.*, got 'cortex-m9'"):
        cortex_m.Toolchain("gcc").command("cortex-m9")


# Each snippet with its cycles on Cortex-M4 and Cortex-M33, counted by hand; `bx lr` adds 1 + P (3 and 2) to each.
SNIPPETS = {
    "usada8 r0, r1, r2, r0\n usada8 r0, r1, r2, r0": (2, 2),  # accumulating costs nothing
    "usada8 r1, r1, r2, r0\n usada8 r0, r1, r2, r0": (2, 3),  # its result as a factor does on M33
    "mov r0, r1\n ldr r1, [sp]\n ldr r2, [sp]\n ldr r3, [sp]": (5, 4),  # a chain: n + 1
    "ldr r0, [sp]\n add r0, r0, r1": (3, 3),  # load to use
    "ldr r0, [sp]\n usada8 r0, r1, r2, r0": (3, 2),  # ... but not as accumulator
    "mov r1, sp\n mov r3, r3\n ldr r0, [r1]\n str r0, [sp, #-4]": (5, 4),  # ... nor to store
    "mov r1, sp\n ldr r0, [r1]": (4, 2),  # the address comes from the instruction before
    "mov r1, sp\n nop\n ldr r2, [r1], #4\n ldr r3, [r1], #4": (6, 4),  # the same base, indexed twice
    "mov r1, sp\n mov r3, sp\n nop\n ldr r2, [r1], #4\n ldr r0, [r3], #4": (6, 5),  # two bases chain
    "mov r1, #0\n nop\n strb r0, [sp, #-1]\n str r0, [sp, r1]": (5, 4),  # a register as offset
    "mov r1, sp\n nop\n ldm r1, {r0, r2, r3}": (6, 5),
    "push {r0-r3}\n pop {r0-r3}": (10, 8),
    "ldrd r0, r1, [sp]\n strd r0, r1, [sp, #-8]": (6, 4),
    "uqsub8 r0, r1, r2\n uqsub8 r3, r2, r1\n orr r0, r0, r3\n uxtab16 r1, r1, r0": (4, 5),
    "add r0, r1, r2, lsl #2\n add r0, r0, r1": (2, 3),  # shifted operand
    "mov r0, #8\n mov r1, #3\n udiv r0, r0, r1": (14, 13),
    "movs r0, #3\n muls r0, r1, r0": (2, 3),
    "vmov s0, r0\n vcvt.f32.s32 s0, s0\n vmul.f32 s0, s0, s1\n vadd.f32 s0, s0, s2": (6, 6),
    "vcvtr.s32.f32 s0, s1\n vmov r0, s0\n usat r0, #8, r0": (4, 5),
    "vmov s0, s1, r0, r1\n vmov r0, r1, s0, s1": (4, 4),
    "vldr s0, [sp]\n vldr s1, [sp]\n vstr s0, [sp, #-4]": (5, 3),
    "cmp r0, r0\n beq 1f\n nop\n1: nop": (5, 4),  # taken
    "cmp r0, r0\n bne 1f\n nop\n1: nop": (4, 4),
    "cmp r0, r0\n it eq\n moveq r1, r2": (3, 3),
    "add r1, sp, #-15\n nop\n ldr r2, [r1]\n ldrh r3, [r1, #1]": (2 + 3 + 2, 4 + 1),  # bytes 1 to 4, 2 and 3
    "add r1, sp, #-14\n nop\n ldrh r3, [r1, #1]\n str r3, [r1]": (2 + 3 + 2, 4 + 2),  # 3 and 4; 2 to 5
    "mov r1, #3\n1: subs r1, #1\n bne 1b": (1 + 3 * 2 + 2 * 2, 1 + 3 * 2 + 2),
}


@pytest.mark.parametrize("core", ("cortex-m4", "cortex-m33"))
def test_modelled_cycles(core, compiler, tmp_path):
    text = ".syntax unified\n.thumb\n.text\n"
    for number, snippet in enumerate(SNIPPETS):
        text += f".p2align 2\n.global f{number}\n.type f{number}, %function\n.thumb_func\n"
        text += f"f{number}:\n {snippet}\n bx lr\n.size f{number}, .-f{number}\n"
    entries = [f"f{number}" for number in range(len(SNIPPETS))]
    machine = compiled(text, tmp_path, entries, core, compiler, ("-O2",), "s")
    back = {"cortex-m4": 3, "cortex-m33": 2}[core]
    got = {snippet: machine.call(f"f{number}").cycles - back for number, snippet in enumerate(SNIPPETS)}
    assert got == {snippet: want[core == "cortex-m33"] for snippet, want in SNIPPETS.items()}


def test_cycles_are_split_by_function(tmp_path):
    source = """
    __attribute__((noinline)) int inner(int n) { volatile int s = 0; for (int i = 0; i < n; i++) s += i; return s; }
    int outer(int n) { int s = 0; for (int i = 0; i < 3; i++) s += inner(n); return s; }
    """
    machine = compiled(source, tmp_path, ["outer"])
    few, many = machine.call("outer", 10), machine.call("outer", 20)
    assert few.result == 3 * 45 and set(few.functions) == {"outer", "inner"}
    assert few.functions["inner"].calls == 3 and few.functions["outer"].calls == 1
    assert few.cycles == sum(f.cycles for f in few.functions.values()) > few.instructions
    assert few.functions["outer"].cycles == many.functions["outer"].cycles
    assert few.functions["inner"].cycles < many.functions["inner"].cycles


def test_code_and_constants(tmp_path):
    source = "#include <stdint.h>\nconst uint32_t table[100] = {1};\nuint32_t first(int i) { return table[i]; }"
    program = compiled(source, tmp_path, ["first"]).program
    assert program.constant_bytes == 400 and 8 <= program.code_bytes <= 40
    assert toolchain().name in ("gcc", "zig")
