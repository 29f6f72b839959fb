"""The text of the C files: kernels in use, constants, a straight list of calls; and the header that describes them."""

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import adderops
from adderops.edge.calls import Call, statement, structs
from adderops.edge.interpreter import bytes_of
from adderops.edge.plan import ALIGNMENT, Plan
from adderops.edge.program import Program
from adderops.edge.uses import macros

_WORDS_A_LINE = 8
_BYTES_A_LINE = 24
_KEYWORDS = frozenset(
    (
        "auto break case char const continue default do double else enum extern float for goto if inline int long "
        "register restrict return short signed sizeof static struct switch typedef union unsigned void volatile while "
        "asm typeof and alignas alignof bool catch class constexpr delete explicit export false friend main mutable "
        "namespace new not nullptr operator or private protected public static_assert template this thread_local throw "
        "true try typeid typename using virtual wchar_t xor"
    ).split()
)


@dataclass(frozen=True, eq=False)
class Source:
    """Everything that the text is made from.

    Attributes:
        name: prefix of the functions, and of the files.
        program, calls, plan: what is computed, by which kernels, and where.
        table: bytes of the first grid for each channel and byte of an image, uint8 (C, 256); or None.
    """

    name: str
    program: Program
    calls: Sequence[Call]
    plan: Plan
    table: Tensor | None

    @property
    def arena(self) -> int:
        """Bytes that the caller provides, with those to align them."""
        return self.plan.size + ALIGNMENT

    @property
    def input_size(self) -> int:
        return self.program.values[self.program.input].size

    @property
    def output_size(self) -> int:
        value = self.program.values[self.program.output]
        return value.height * value.width * value.channels

    @property
    def kinds(self) -> set[str]:
        """The kernels in use."""
        return {call.kind for call in self.calls}


def check_name(name: str) -> None:
    """Raises ValueError unless functions and files can have this name in C and C++."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,50}", name) or name in _KEYWORDS:
        raise ValueError(f"name: expected an identifier of C that begins with a letter, got {name!r}")


def image_table(program: Program, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Returns the bytes on the first grid of u = 0 ... 255 in each channel, uint8 (C, 256).

    They are those of x = (u / 255 - mean) / std, computed in float32 in this order, as torchvision does.
    """
    levels = (torch.arange(256, dtype=torch.float32) / 255).expand(len(mean), 256)
    means, stds = (torch.tensor(list(values), dtype=torch.float32)[:, None] for values in (mean, std))
    return bytes_of(program, (levels - means) / stds)


def header(source: Source) -> str:
    """Returns the text of NAME.h."""
    name, upper, program = source.name, source.name.upper(), source.program
    x, first, guard = program.values[program.input], program.first, f"{upper}_H"
    arguments = f"{upper}_INPUT_SIZE], float output[{upper}_OUTPUT_SIZE], void* arena)"
    lines = [
        f"// {name}: an adder network, written by adderops {adderops.__version__}. Do not edit.",
        "//",
        *_layers(source),
        "//",
        f"// Arena: {source.plan.size} bytes of activations and scratch (at least {source.plan.bound} live at once), "
        f"{ALIGNMENT} to align them.",
        f"// Epilogue: {program.epilogue}.",
        "",
        f"#ifndef {guard}",
        f"#define {guard}",
        "#include <stdint.h>",
        "",
        f"#define {upper}_INPUT_SIZE {source.input_size}  // bytes: {x.height} x {x.width} x {x.channels}",
        f"#define {upper}_OUTPUT_SIZE {source.output_size}  // floats" + _output_order(program),
        f"#define {upper}_ARENA_SIZE {source.arena}",
        "",
        "#ifdef __cplusplus",
        'extern "C" {',
        "#endif",
        "",
        "// Computes the network for one image. There is no other state: calls with different arenas may run at once.",
        f"// input: rows of pixels of {x.channels} channels, of any alignment; for the network's input x, the byte is",
        f"//   clamp(round(x * {_decimal(program)}) + {first.zero_point}, {first.least}, {first.most}), ties to even",
        "// output: aligned as floats are",
        f"// arena: {upper}_ARENA_SIZE bytes, any alignment, any content",
        f"void {name}_run(const uint8_t input[{arguments};",
    ]
    if source.table is not None:
        lines += [
            "",
            "// The same for the bytes of an image, 0 to 255: normalization and first grid are one table.",
            f"void {name}_run_image(const uint8_t image[{arguments};",
        ]
    lines += ["", "#ifdef __cplusplus", "}", "#endif", "", "#endif", ""]
    return "\n".join(lines)


def code(source: Source) -> str:
    """Returns the text of NAME.c."""
    name, program, plan = source.name, source.program, source.plan
    parts = [
        f"// {name}: an adder network, written by adderops {adderops.__version__}. Do not edit.",
        "// Kernels first, then weights and constants, then the calls.",
        "",
        f'#include "{name}.h"',
        "",
        f"#define ADDER_EPILOGUE_INTEGER {int(program.epilogue == 'integer')}",
        f"#define ADDER_ROWS_WORDS {_rows_words(source)}",
        *macros(source.calls, program, plan.rings),
        "",
    ]
    for fragment in fragments(source):
        parts += [f"// --- {fragment} ---", "", _fragment(fragment).strip(), ""]
    parts += ["// --- the network ---", ""]
    for i, call in enumerate(source.calls):
        parts += [f"// {i}: {_describe(call)}"]
        if call.packed is not None:
            parts += [_array("uint32_t", f"weights_{i}", call.packed.weights)]
        if call.beside is not None:
            parts += [_array("uint32_t", f"shortcut_{i}_weights", call.beside.weights)]
        for declared, initializer in structs(call, i, program, i in plan.rings):
            parts += [f"static const {declared} =", *_folded(f"{initializer};")]
        parts += [""]
    if source.table is not None:
        parts += [_array("uint8_t", "image_bytes", source.table.flatten().numpy()), ""]
    parts += [*_run(source), ""]
    return "\n".join(parts)


def fragments(source: Source) -> list[str]:
    """Returns the names of the kernels' files that the network needs, in the order that they need."""
    kinds = source.kinds
    convolves = bool(kinds & {"adder_conv", "multiply_conv"})
    finishes = convolves or "adder_depthwise" in kinds
    wanted = ["layers.h", "prelude.c"]
    wanted += [f"finish_{'integer' if source.program.epilogue == 'integer' else 'float'}.c"] if finishes else []
    wanted += ["gather.c"] if convolves else []
    if finishes:  # depthwise and multiplying layers use some of the assembly for Cortex-M
        names = r"sums_\w+\.c" if "adder_conv" in kinds else r"sums_m_(assembly|tiles)\.c"
        folder = files("adderops.edge") / "c"
        wanted += sorted(file.name for file in folder.iterdir() if re.fullmatch(names, file.name))
    for kind in ("adder_conv", "adder_depthwise", "multiply_conv", "max_pool", "sum_pool", "elements"):
        wanted += [f"{kind}.c"] if kind in kinds else []
    return wanted + (["lookup.c"] if source.table is not None else [])


def _rows_words(source: Source) -> int:
    """Returns the most words of a filter in an order of rows: AArch64 spreads a tile of them on the stack."""
    return max((call.packed.words for call in source.calls if call.packed is not None and call.packed.order), default=0)


def template(file: str, name: str) -> str:
    """Returns main.c or CMakeLists.txt for a network of this name."""
    text = _fragment(file)
    return re.sub(r"\bnetwork(?=\b|_)", name, re.sub(r"\bNETWORK(?=_)", name.upper(), text))


def _fragment(name: str) -> str:
    text = (files("adderops.edge") / "c" / name).read_text(encoding="utf-8")
    return (
        re.sub(r'^#include "[^"]*"\n', "", text, flags=re.MULTILINE)
        if name not in ("main.c", "CMakeLists.txt")
        else text
    )


def _run(source: Source) -> list[str]:
    name, upper, program, plan = source.name, source.name.upper(), source.program, source.plan

    def at(value: str, kind: str) -> str:
        if value == program.output:
            return "output"
        place = f"arena + {plan.offsets[value]}"
        return place if kind in ("uint8_t", "void") else f"({kind}*)(void*)({place})"

    lines = ["static void run(uint8_t* arena, float* output) {"]
    for i, call in enumerate(source.calls):
        scratch = f"arena + {plan.scratch[i]}"
        lines += [f"  {statement(call, i, program, at, scratch)}  // {_comment(call.layer.name or call.what)}"]
    start = f"arena + {plan.offsets[program.input]}"
    signature = f"{upper}_INPUT_SIZE], float output[{upper}_OUTPUT_SIZE], void* arena)"
    lines += [
        "}",
        "",
        f"static uint8_t* {_ALIGN}(void* arena) {{",
        f"  return (uint8_t*)arena + ({ALIGNMENT - 1} & (0 - (uintptr_t)arena));",
        "}",
        "",
        f"void {name}_run(const uint8_t input[{signature} {{",
        f"  uint8_t* const start = {_ALIGN}(arena);",
        f"  copy_bytes({start.replace('arena', 'start')}, input, {upper}_INPUT_SIZE);",
        "  run(start, output);",
        "}",
    ]
    if source.table is not None:
        to, channels = start.replace("arena", "start"), len(source.table)
        lines += [
            "",
            f"void {name}_run_image(const uint8_t image[{signature} {{",
            f"  uint8_t* const start = {_ALIGN}(arena);",
            f"  lookup(image, {to}, {upper}_INPUT_SIZE, image_bytes, {channels});",
            "  run(start, output);",
            "}",
        ]
    return lines


_ALIGN = "aligned"


def _layers(source: Source) -> list[str]:
    """Returns the lines of comment that describe the layers, as a table."""
    rows = [["layer", "operation", "output", "terms", "weights", "arena"]]
    for i, call in enumerate(source.calls):
        layer = call.layer
        y = source.program.values[layer.y]
        numbers = [str(call.terms or ""), str(call.weight_bytes or ""), str(source.plan.live[i])]
        rows.append([_comment(layer.name) or "-", call.what, str(y), *numbers])
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [c.ljust(w) if k < 3 else c.rjust(w) for k, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append(f"//   {'  '.join(cells)}".rstrip())
    return lines


def _describe(call: Call) -> str:
    name = _comment(call.layer.name)
    return f"{name}: {call.what}" if name else call.what


def _comment(text: str) -> str:
    """Returns a name with nothing in it that could end a comment or continue it."""
    return re.sub(r"[^\w.\-+ ,]", "_", text, flags=re.ASCII)


def _output_order(program: Program) -> str:
    y = program.values[program.output]
    return "" if y.height * y.width == 1 else f": {y.height} x {y.width} x {y.channels}"


def _decimal(program: Program) -> str:
    return f"{np.float32(program.first.inverse or 1.0)!s}f"


def _folded(text: str) -> list[str]:
    """Breaks an initializer into lines, between fields only."""
    whole = text.replace(" = ", "\0=\0")
    lines = textwrap.wrap(whole, 118, initial_indent="    ", subsequent_indent="     ", break_long_words=False)
    return [line.replace("\0", " ") for line in lines]


def _array(kind: str, name: str, values: NDArray[Any]) -> str:
    step, form = (_WORDS_A_LINE, "0x{:08x}") if kind == "uint32_t" else (_BYTES_A_LINE, "{}")
    numbers = [form.format(value) for value in values.tolist()]
    lines = ["    " + ", ".join(numbers[i : i + step]) for i in range(0, len(numbers), step)]
    return f"static const {kind} {name}[{len(numbers)}] = {{\n" + ",\n".join(lines) + "};"
