"""`export_c`: an integer network as C files."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from adderops.atomic import write_atomically
from adderops.edge.calls import calls_of
from adderops.edge.cost import TARGETS, call_cycles
from adderops.edge.emit import Source, check_name, code, header, image_table, template
from adderops.edge.interpreter import bytes_of
from adderops.edge.lower import Lowering
from adderops.edge.plan import plan
from adderops.edge.program import Program, Quantize
from adderops.edge.report import Report, Row
from adderops.edge.rewrite import Rewriting
from adderops.quant.calibration import unwrapped
from adderops.quant.graph import tensors_of
from adderops.quant.network import IntegerNetwork, document_of

EPILOGUES = ("float32", "integer")


def export_c(
    integer: nn.Module,
    example: Tensor,
    folder: str | os.PathLike[str],
    name: str = "network",
    *,
    epilogue: str = "float32",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    pixels: Tensor | None = None,
    main: bool = False,
    cmake: bool = False,
    target: str | None = None,
) -> Report:
    """Writes an integer network as C99: NAME.h and NAME.c, for one image, without library, allocation or global state.

    The header describes the layers and declares

        void NAME_run(const uint8_t input[NAME_INPUT_SIZE], float output[NAME_OUTPUT_SIZE], void *arena);
        void NAME_run_image(const uint8_t image[NAME_INPUT_SIZE], float output[NAME_OUTPUT_SIZE], void *arena);

    input: bytes on the grid of the first layer, (H, W, C). image: bytes from 0 to 255, (H, W, C), of which the network
    gets x = (image / 255 - mean) / std.

    Args:
        integer: what `adderops.quant.convert` or `load` returned, calibrated with `Scheme(ends="int8")`.
        example: an input (N, C, H, W), float32, of the shape that the network was converted for.
        folder: where to write; it is made if it does not exist. Each file is written whole or not at all.
        name: of the files and prefix of the functions, an identifier.
        epilogue: 'float32' computes the bits of `integer`. 'integer' needs no floating-point unit before the logits,
            but is another function: see `adderops.reference.fixed_point_epilogue`.
        mean, std: per channel, for pixels from 0 to 1; without them there is no NAME_run_image.
        pixels: instead of mean and std, what the network gets for each byte of a channel: float32, (C, 256). For bits
            that are those of another formula, such as (image - 255 mean) / (255 std).
        main: also writes main.c, which prints the classes of images; needs mean and std, or pixels.
        cmake: also writes CMakeLists.txt.
        target: one of `adderops.edge.cost.TARGETS`, for modelled cycles in the report; with epilogue='float32'.

    Returns:
        Layers and sizes; `print` shows them as a table.

    Raises:
        TypeError: example is not a tensor.
        ValueError: an operation that the kernels do not have, with the names of its node and layer; a network that
            `convert` did not return; or an argument that is not as described.
        OSError: a file cannot be written.

    >>> import tempfile
    >>> from adderops.models import lenet5
    >>> from adderops.quant import Scheme, calibrate, convert, reestimate_batchnorm
    >>> images = torch.randn(8, 1, 32, 32)
    >>> model = reestimate_batchnorm(lenet5(), [images]).eval()  # stands for training
    >>> integer = convert(calibrate(model, [images], Scheme(ends="int8")), images)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     report = export_c(integer, images, folder, "lenet", mean=[0.1], std=[0.3])
    ...     sorted(os.listdir(folder)), report.terms
    (['lenet.c', 'lenet.h'], 416520)
    """
    check_name(name)
    if (mean is None) != (std is None):
        raise ValueError("std: expected both mean and std or neither, got one")
    if pixels is not None and mean is not None:
        raise ValueError("pixels: expected it instead of mean and std, got all of them")
    if main and mean is None and pixels is None:
        raise ValueError("mean: expected numbers with main=True, whose images are bytes, got none")
    if target is not None and (target not in TARGETS or epilogue != "float32"):
        expected = f"one of {', '.join(TARGETS)} with epilogue='float32'"
        raise ValueError(f"target: expected {expected}, got {target!r} with epilogue={epilogue!r}")
    program = program_of(integer, example, epilogue)
    channels = program.values[program.input].channels
    table = None
    if mean is not None and std is not None:
        for argument, values in (("mean", mean), ("std", std)):
            if len(values) != channels or not all(abs(float(v)) < float("inf") for v in values):
                raise ValueError(f"{argument}: expected {channels} numbers, one per channel, got {list(values)}")
        if not all(float(v) > 0 for v in std):
            raise ValueError(f"std: expected positive numbers, got {list(std)}")
        table = image_table(program, mean, std)
    elif pixels is not None:
        if pixels.dtype != torch.float32 or pixels.shape != (channels, 256) or not bool(pixels.isfinite().all()):
            got = f"{pixels.dtype} {tuple(pixels.shape)}"
            raise ValueError(f"pixels: expected finite float32 ({channels}, 256), got {got}")
        table = bytes_of(program, pixels)
    source = source_of(program, name, table)
    texts = {f"{name}.h": header(source), f"{name}.c": code(source)}
    texts |= {"main.c": template("main.c", name)} if main else {}
    texts |= {"CMakeLists.txt": template("CMakeLists.txt", name)} if cmake else {}
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    for file, text in texts.items():
        write_atomically(place / file, text.encode())
    return _report(source, tuple(str(place / file) for file in texts), target)


def program_of(integer: nn.Module, example: Tensor, epilogue: str = "float32") -> Program:
    """Returns the program of an integer network; arguments and errors as in `export_c`."""
    if epilogue not in EPILOGUES:
        raise ValueError(f"epilogue: expected one of {', '.join(EPILOGUES)}, got {epilogue!r}")
    integer = unwrapped(integer)
    document = document_of(integer)
    assert isinstance(integer, IntegerNetwork)  # or it has been refused
    if not isinstance(example, Tensor):
        raise TypeError(f"example: expected a tensor, got {type(example).__name__}")
    taken = document["input"]["shape"][1:]
    if list(example.shape[1:]) != taken:
        raise ValueError(f"example: expected shape (N, {', '.join(map(str, taken))}), got {tuple(example.shape)}")
    lowering = Lowering(document, {key: tensor.cpu() for key, tensor in tensors_of(integer).items()})
    rewriting = Rewriting(lowering.values, lowering.layers, lowering.output, epilogue)
    values, layers = rewriting.run()
    first = [layer for layer in layers if lowering.input in layer.reads]
    if len(first) != 1 or not isinstance(first[0], Quantize):
        names = ", ".join(repr(layer.name or layer.y) for layer in first)
        raise ValueError(
            f"input: expected one grid, on which all layers read it, got {names}: calibrate with Scheme(ends='int8'), "
            "and let one layer read the input"
        )
    values.pop(lowering.input)
    rest = tuple(layer for layer in layers if layer is not first[0])
    return Program(values, rest, first[0].y, first[0].output, lowering.output, lowering.shape, epilogue)


def source_of(program: Program, name: str = "network", table: Tensor | None = None) -> Source:
    """Returns kernels and plan of a program; `code` and `header` of adderops.edge.emit make the texts of it."""
    calls = calls_of(program)
    sizes = {key: value.size for key, value in program.values.items()}
    return Source(name, program, calls, plan(sizes, [call.step for call in calls], program.input), table)


def _report(source: Source, files: tuple[str, ...], target: str | None) -> Report:
    rows = [
        Row(
            call.layer.name,
            call.what,
            str(source.program.values[call.layer.y]),
            call.terms,
            call.weight_bytes,
            source.plan.live[i],
            None if target is None else round(call_cycles(call, source.program, target, i in source.plan.rings)),
        )
        for i, call in enumerate(source.calls)
    ]
    constants = sum(row.weights for row in rows) + (0 if source.table is None else source.table.numel())
    return Report(
        source.name,
        files,
        source.program.epilogue,
        rows,
        constants,
        source.arena,
        source.plan.bound,
        source.input_size,
        4 * source.output_size,
        target,
    )
