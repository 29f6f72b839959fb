"""Generated C, emulated: one adder layer, or a whole network, for a core, a compiler and a path of the kernels.

Every result is compared with the program's definition (adderops.edge.interpreter) before a count of it is believed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn

from adderops.edge import emit
from adderops.edge.calls import Call
from adderops.edge.export import program_of, source_of
from adderops.edge.interpreter import bytes_of, trace
from adderops.edge.interpreter import run as interpret
from adderops.edge.program import AdderConv, AdderSums, Bytes, Program, Value, Window
from adderops.models import create_model
from adderops.quant import Scheme, calibrate, convert, reestimate_batchnorm

from .cortex_m import Machine, Run, Toolchain
from .cortex_m import Program as Linked
from .edge_layers import EdgeLayer
from .edge_peers import WrongResult

# ADDER_TARGET of prelude.c; None: what the preprocessor chooses
PATHS = {"chosen": None, "C": 0, "ACLE": 1, "assembly": 2, "NEON": 3}
OPTIONS = ("-O2", "-std=c99")


@dataclass(frozen=True)
class Counted:
    """A run whose result was right.

    Attributes:
        run: instructions, cycles, stack.
        linked: the program, for sizes.
        terms: |x - w| and products.
        scratch: bytes beside the activations.
        weights: bytes of packed weights with their constants.
    """

    run: Run
    linked: Linked
    terms: int
    scratch: int
    weights: int

    def row(self) -> dict:
        """The columns of the CSV file."""
        return {
            "terms": self.terms,
            "instructions": self.run.instructions,
            "cycles": self.run.cycles,
            "scratch_bytes": self.scratch,
            "stack_bytes": self.run.stack_bytes,
            "weight_bytes": self.weights,
            "code_bytes": self.linked.code_bytes,
        }


def layer_program(layer: EdgeLayer, epilogue: str = "float32") -> tuple[Program, Tensor]:
    """Returns a program of one adder layer from bytes to bytes, and an image (1, C, H, W) of bytes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (1, layer.c_in, layer.height, layer.width), generator=generator).byte()
    shape = (layer.c_out, 1 if layer.depthwise else layer.c_in, layer.kernel, layer.kernel)
    weight = torch.randint(0, 256, shape, generator=generator).byte()
    k = layer.terms_of_filter
    scale = (torch.rand(layer.c_out, generator=generator) + 1) * 0.5 / k**0.5
    window = Window((layer.kernel,) * 2, (layer.stride,) * 2, (layer.padding,) * 4)
    groups = layer.c_in if layer.depthwise else 1
    sums = AdderSums("x", weight, scale, 128 + scale * 85 * k, window, groups, 117)
    values = {
        "x": Value("x", layer.height, layer.width, layer.c_in, "uint8"),
        "y": Value("y", *layer.out, layer.c_out, "uint8"),
    }
    adder = AdderConv(layer.name, "y", sums, Bytes(0, 255))
    return Program(values, (adder,), "x", Bytes(0, 255, 1.0), "y", (layer.c_out, *layer.out), epilogue), x


def layer_run(
    layer: EdgeLayer,
    tools: Toolchain,
    core: str,
    path: str = "chosen",
    epilogue: str = "float32",
    alignment: bool = False,
) -> Counted:
    """Counts one adder layer; WrongResult if a byte differs."""
    program, x = layer_program(layer, epilogue)
    source = source_of(program)
    call = source.calls[0]
    entry = "void layer(const uint8_t* x, void* y, void* scratch);\n"
    entry += f"void layer(const uint8_t* x, void* y, void* scratch) {{ {call.kind}(&layer_0, x, y, 0, scratch); }}\n"
    linked = _compile(source, entry, ["layer"], tools, core, path)
    machine = Machine(linked)
    y = machine.reserve(layer.out[0] * layer.out[1] * layer.c_out, name="y")
    scratch = call.step.scratch
    at = [machine.place(_nhwc(x), name="x"), y, machine.reserve(scratch, name="scratch")]
    # kernels of dense layers read words where they are aligned, as tests/edge/test_budgets.py checks
    run = machine.call("layer", *at, alignment=alignment or layer.depthwise)
    got = machine.array(y, (*layer.out, layer.c_out))
    if not np.array_equal(got, _nhwc(trace(program, x)["y"])):
        raise WrongResult(f"{layer.name}, {path}, {epilogue}: wrong result")
    return Counted(run, linked, call.terms, scratch, call.weight_bytes)


def network_linked(program: Program, tools: Toolchain, core: str, path: str = "chosen") -> Linked:
    """Returns a whole network, compiled and linked."""
    return _compile(source_of(program), "", ["network_run"], tools, core, path)


def network_run(
    program: Program, x: Tensor, tools: Toolchain, core: str, path: str = "chosen", count: bool = True
) -> Counted:
    """Counts a whole network for the bytes (1, C, H, W) of one image; WrongResult if a bit of an output differs."""
    source = source_of(program)
    linked = _compile(source, "", ["network_run"], tools, core, path)
    machine = Machine(linked)
    want = interpret(program, x).numpy()
    output = machine.reserve(source.output_size * 4, align=4, name="output")
    arena = machine.reserve(source.arena, offset=1, name="arena")
    run = machine.call("network_run", machine.place(_nhwc(x), offset=1, name="input"), output, arena, count=count)
    got = machine.array(output, source.output_size, np.float32)
    if not np.array_equal(got.view(np.uint32), _nhwc_floats(want).view(np.uint32)):
        raise WrongResult(f"{core}, {path}, {program.epilogue}: wrong result {got[:8]}, expected {want.ravel()[:8]}")
    weights = sum(call.weight_bytes for call in source.calls)
    return Counted(run, linked, sum(call.terms for call in source.calls), source.arena, weights)


_RUN = "static void run(uint8_t* arena, float* output) {\n"


def calls_run(program: Program, x: Tensor, tools: Toolchain, core: str, path: str = "chosen") -> list[tuple[Call, Run]]:
    """Counts each call of a program by itself, one after the other on one arena; WrongResult if its result differs."""
    source = source_of(program)
    lines = emit.code(source).split(_RUN)[1].split("\n}")[0].splitlines()
    more = "".join(f"void call_{i}(uint8_t* arena, float* output) {{\n{line}\n}}\n" for i, line in enumerate(lines))
    entries = [f"call_{i}" for i in range(len(lines))]
    machine = Machine(_compile(source, more, entries, tools, core, path))
    want = trace(program, x)[program.output]
    want = np.ascontiguousarray(_nhwc(want)).ravel()
    arena = machine.reserve(source.arena, name="arena")
    output = machine.reserve(want.nbytes, name="output")
    machine.write(arena + source.plan.offsets[program.input], _nhwc(x))
    runs = []
    for call, entry in zip(source.calls, entries, strict=True):
        alignment = call.kind in ("adder_depthwise", "multiply_conv")  # the others read words where they are aligned
        runs.append((call, machine.call(entry, arena, output, alignment=alignment)))
    if machine.read(output, want.nbytes) != want.tobytes():
        raise WrongResult(f"{core}, {path}, {program.epilogue}: wrong result")
    return runs


def _compile(source: emit.Source, more: str, entries: Sequence[str], tools: Toolchain, core: str, path: str) -> Linked:
    target = PATHS[path]
    options = OPTIONS if target is None else (*OPTIONS, f"-DADDER_TARGET={target}")
    with TemporaryDirectory() as folder:
        file = Path(folder) / f"{source.name}.c"
        file.with_suffix(".h").write_text(emit.header(source))
        file.write_text(emit.code(source) + more)
        return tools.compile(core, [file], entries, options)


def _nhwc(x: Tensor) -> np.ndarray:
    return x[0].permute(1, 2, 0).contiguous().numpy()


def _nhwc_floats(y: np.ndarray) -> np.ndarray:
    y = y[0]
    return np.ascontiguousarray(y.transpose(1, 2, 0) if y.ndim == 3 else y).ravel()


NETWORKS: dict[str, Sequence[int]] = {"resnet8": (3, 32, 32), "ds_cnn": (1, 49, 10)}


def network(
    name: str, epilogue: str = "float32", images: int = 1, shape: Sequence[int] | None = None
) -> tuple[Program, Tensor, Tensor]:
    """Returns a network of adderops.models with random weights, bytes of random images, and its logits for them.

    'resnet8' has the shape of MLPerf Tiny's (32x32 RGB, 10 classes), 'ds_cnn' that of its keyword spotting, unless
    `shape` (C, H, W) says otherwise. The logits are those of the integer network in PyTorch, float32 epilogue.
    """
    torch.manual_seed(0)
    shape = shape or NETWORKS[name]
    x = torch.randn(images, *shape)
    model = create_model(name, kind="adder", in_channels=shape[0], num_classes=10)
    return integer_program(model, x, epilogue)


def integer_program(model: nn.Module, x: Tensor, epilogue: str = "float32") -> tuple[Program, Tensor, Tensor]:
    """The same for an untrained model and float images (N, C, H, W)."""
    shape = x.shape[1:]
    model = reestimate_batchnorm(model, [torch.randn(16, *shape)]).eval()
    integer = convert(calibrate(model, [torch.randn(16, *shape)], Scheme(ends="int8")), x)
    program = program_of(integer, x, epilogue)
    return program, bytes_of(program, x), integer(x)
