"""From a layer to the call of its kernel: which function, its struct in C, its packed weights, its step in the plan."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from adderops.edge.fixed_point import adder_constants, product_constants
from adderops.edge.pack import (
    MOST,
    MOST_DEPTHWISE,
    ORDERS,
    Packed,
    Shape,
    best_order,
    constants_of,
    one_row,
    pack_adder,
    pack_depthwise,
    pack_multiply,
    tile_of_outputs,
    whole,
)
from adderops.edge.plan import Step, aligned
from adderops.edge.program import (
    Add,
    AdderConv,
    AdderSums,
    Bytes,
    Counts,
    Dequantize,
    Floats,
    Layer,
    MaxPool,
    MultiplyConv,
    Output,
    Program,
    Quantize,
    Relu,
    SumPool,
    Value,
)

MOST_NEAREST = 2**22 - 1  # the kernels round floats up to here

Address = Callable[[str, str], str]  # (name of a value, type of what the pointer points to) -> C


@dataclass(frozen=True, eq=False)
class Call:
    """A layer as its kernel sees it.

    Attributes:
        layer: of the program.
        kind: the kernel: 'adder_conv', 'adder_depthwise', 'multiply_conv', 'max_pool', 'sum_pool' or 'elements'.
        step: for the planner; y is written by it, `None` there if it is the result.
        packed: weights, if it has any; and of the shortcut.
        what: the operation, for comments.
        terms: |x - w| or products for one image; with those of the shortcut.
    """

    layer: Layer
    kind: str
    step: Step
    what: str
    packed: Packed | None = None
    beside: Packed | None = None
    terms: int = 0

    @property
    def weight_bytes(self) -> int:
        """Packed weights and constants."""
        return sum(packed.weights.nbytes for packed in (self.packed, self.beside) if packed is not None)


def calls_of(program: Program) -> list[Call]:
    """Returns the calls of a program, in its order.

    Raises:
        ValueError: what the kernels cannot compute, with the name of the layer.
    """
    made = []
    for layer in program.layers:
        for name in (*layer.reads, layer.y):
            value = program.values[name]
            if max(value.height, value.width, value.channels) > MOST or value.size >= 2**31:
                raise _refusal(layer, f"expected sizes up to {MOST}, got {value}")
        call = _call(layer, program)
        step = call.step
        if layer.y == program.output:
            step = replace(step, writes=None, over=(), ring=None)
        made.append(replace(call, step=step))
    return made


def _call(layer: Layer, program: Program) -> Call:
    if isinstance(layer, AdderConv):
        return _depthwise(layer, program) if _is_depthwise(layer) else _adder(layer, program)
    if isinstance(layer, MultiplyConv):
        return _multiply(layer, program)
    if isinstance(layer, MaxPool):
        x = program.values[layer.x]
        if x.dtype != "uint8":
            raise _refusal(layer, "expected a max pool of bytes: let only layers on one grid read it, not also floats")
        corner = layer.window.padding[0] == layer.window.padding[2] == 0
        step = Step(layer.reads, layer.y, over=(layer.x,) if corner else ())
        return Call(layer, "max_pool", step, f"max pool {layer.window}")
    if isinstance(layer, SumPool):
        if layer.bound > MOST_NEAREST and program.values[layer.x].dtype != "int32":
            raise _refusal(layer, f"expected an average of at least 4 values, got {layer.window}")
        return Call(layer, "sum_pool", Step(layer.reads, layer.y), f"average pool {layer.window}")
    if isinstance(layer, Quantize):
        return Call(layer, "elements", Step(layer.reads, layer.y, over=(layer.x,)), "quantize")
    if isinstance(layer, Relu):
        return Call(layer, "elements", Step(layer.reads, layer.y, over=(layer.x,)), "ReLU")
    if isinstance(layer, Add):
        return Call(layer, "elements", Step(layer.reads, layer.y, over=layer.reads), "sum")
    if isinstance(layer, Dequantize):
        return Call(layer, "elements", Step(layer.reads, layer.y), "floats")
    raise _refusal(layer, f"expected a layer of a program, got {type(layer).__name__}")


def _is_depthwise(layer: AdderConv) -> bool:
    return layer.depthwise and layer.shortcut is None and layer.sums.weight[0].numel() <= MOST_DEPTHWISE


def _check_output(layer: AdderConv | MultiplyConv, program: Program) -> None:
    output = layer.output
    if isinstance(output, Counts) and output.bound > MOST_NEAREST:
        raise _refusal(layer, "expected an average of at least 4 values after it")
    if isinstance(output, Counts) and output.total:
        sums = layer.sums if isinstance(layer, AdderConv) else layer
        x = program.values[sums.x]
        rows, columns = sums.window.output(x.height, x.width)
        pixels, filters = rows * columns, len(sums.weight)
        if pixels * max(filters, output.bound) >= 2**31:
            raise _refusal(
                layer,
                f"expected sums and places of the average below 2^31, got {pixels} pixels of {filters} filters, "
                f"each up to {output.bound}",
            )
    if program.epilogue == "integer" and isinstance(layer, AdderConv):
        if isinstance(output, Floats) and (layer.residual or layer.shortcut):
            raise _refusal(layer, "epilogue='integer': expected bytes after a residual, got floats")
        if layer.residual is not None and program.values[layer.residual].dtype != "uint8":
            raise _refusal(layer, "epilogue='integer': expected a residual of bytes, got floats")
        if not isinstance(output, Floats):
            adder_constants(layer)  # or an error with its name


def _adder(layer: AdderConv, program: Program) -> Call:
    _check_output(layer, program)
    constants, beside_constants = constants_of(layer, program.epilogue)
    x, sums = program.values[layer.sums.x], layer.sums
    packed = _packed(layer, sums, x, constants)
    scratch, beside, what = packed.tile, None, f"adder {sums.window}"
    terms = sums.weight.numel() * packed.shape.pixels
    if layer.shortcut is not None and beside_constants is not None:
        other = program.values[layer.shortcut.x]
        beside = _packed(layer, layer.shortcut, other, beside_constants, by_rows=False)
        scratch += beside.tile
        what += f" and {layer.shortcut.window}"
        terms += layer.shortcut.weight.numel() * packed.shape.pixels
    scratch += tile_of_outputs(packed.shape.filters, layer.output)
    over, ring = _over_residual(layer, program), _ring(layer, program, packed)
    if ring is not None and sums.window.pointwise and sums.groups == 1:
        # a tile's pixels are copied before it is stored
        over, ring = (sums.x, *over), None
    step = Step(layer.reads, layer.y, scratch, over, ring, sums.x)
    what += f" groups {sums.groups}" if sums.groups > 1 else ""
    return Call(layer, "adder_conv", step, what + _residual_words(layer), packed, beside, terms)


def _packed(layer: AdderConv, sums: AdderSums, x: Value, constants: object, by_rows: bool = True) -> Packed:
    shape, weight = whole(Shape.of(x, len(sums.weight), sums.window), sums.weight, sums.groups)
    order = best_order(shape, sums.groups) if by_rows else 0
    packed = pack_adder(sums, shape, weight, order, constants)  # type: ignore[arg-type]
    if packed.words > MOST:
        raise _refusal(layer, f"expected at most {4 * MOST} terms, got {4 * packed.words}")
    return packed


def _over_residual(layer: AdderConv, program: Program) -> tuple[str, ...]:
    """Returns the residual, if the output can lie over it: it has as many bytes an element."""
    size = {"uint8": Bytes, "float32": Floats}
    if layer.residual is None or layer.residual == layer.sums.x:
        return ()
    return (layer.residual,) if isinstance(layer.output, size[program.values[layer.residual].dtype]) else ()


def _ring(layer: AdderConv, program: Program, packed: Packed) -> int | None:
    """Returns the bytes of input rows to keep if the output lies over the input; None if it cannot."""
    x, window, output = program.values[layer.sums.x], layer.sums.window, layer.output
    shared = layer.shortcut is not None and layer.shortcut.x == layer.sums.x
    if isinstance(output, Counts) or shared or layer.residual == layer.sums.x or packed.shape.pixels == 1:
        return None
    rows, size = window.span[0], 1 if isinstance(output, Bytes) else 4
    out_height, out_width = window.output(x.height, x.width)
    for row in range(out_height):
        read = min(x.height, row * window.stride[0] - window.padding[0] + rows)
        if (row + 1) * out_width * packed.shape.filters * size > x.width * x.channels * read:
            return None
    return aligned(rows * x.width * x.channels)


def _depthwise(layer: AdderConv, program: Program) -> Call:
    _check_output(layer, program)
    constants, _ = constants_of(layer, program.epilogue)
    sums = layer.sums
    shape = Shape.of(program.values[sums.x], len(sums.weight), sums.window)
    packed = pack_depthwise(shape, sums.weight, constants)
    over = _over_residual(layer, program)
    if isinstance(layer.output, Bytes) and layer.residual != sums.x:
        over = (sums.x, *over)
    step = Step(layer.reads, layer.y, packed.tile, over)
    what = f"adder {sums.window} depthwise{_residual_words(layer)}"
    return Call(layer, "adder_depthwise", step, what, packed, None, sums.weight.numel() * shape.pixels)


def _multiply(layer: MultiplyConv, program: Program) -> Call:
    _check_output(layer, program)
    if layer.groups > 1:
        raise _refusal(layer, "expected a layer that multiplies to have one group")
    constants, _ = constants_of(layer, program.epilogue)
    shape, weight = whole(Shape.of(program.values[layer.x], len(layer.weight), layer.window), layer.weight, 1)
    packed = pack_multiply(layer, shape, weight, constants)
    if packed.words > MOST:
        raise _refusal(layer, f"expected at most {2 * MOST} terms, got {2 * packed.words}")
    step = Step(layer.reads, layer.y, packed.tile + tile_of_outputs(shape.filters, layer.output))
    what = "linear" if layer.window.pointwise and shape.pixels == 1 else f"convolution {layer.window}"
    return Call(layer, "multiply_conv", step, what, packed, None, layer.weight.numel() * shape.pixels)


def _residual_words(layer: AdderConv) -> str:
    return " + residual" if layer.residual is not None else ""


# --- C ---


def structs(call: Call, number: int, program: Program, ring: bool) -> list[tuple[str, str]]:
    """Returns the definitions of what a call points to, (type and name, initializer): weights are `weights_N`."""
    layer = call.layer
    if isinstance(layer, (AdderConv, MultiplyConv)) and call.packed is not None:
        made, residual, packed = [], None, call.packed
        shape = packed.shape if ring or call.beside is not None else one_row(packed.shape)
        outside = layer.zero_point if isinstance(layer, MultiplyConv) else layer.sums.padding_value
        fields = [f".weights = weights_{number}", f".window = {_window(shape, outside)}"]
        if isinstance(layer, AdderConv):
            residual = layer.residual
            if call.beside is not None and layer.shortcut is not None:
                window = _window(call.beside.shape, layer.shortcut.padding_value)
                name = f"shortcut_{number}"
                inside = [f".weights = {name}_weights", f".window = {window}", ".groups = 1"]
                inside.append(f".words = {call.beside.words}")
                made.append((f"struct adder_conv {name}", _braces(inside)))
                fields.append(f".shortcut = &{name}")
            if call.kind == "adder_conv":
                fields += [f".groups = {layer.sums.groups}", f".order = {ORDERS[packed.order]}"]
                if ring:
                    fields.append(f".ring = {layer.sums.window.span[0]}")
        if call.kind != "adder_depthwise":
            fields.append(f".words = {packed.words}")
        fields.append(f".output = {_output(layer, program, residual)}")
        return [*made, (f"struct {call.kind} layer_{number}", _braces(fields))]
    if isinstance(layer, (MaxPool, SumPool)):
        x = program.values[layer.x]
        window = _window(Shape.of(x, x.channels, layer.window), 0)
        if isinstance(layer, MaxPool):
            return [(f"struct window layer_{number}", window)]
        fields = [f".window = {window}", f".factor = {_float(layer.factor)}"]
        if x.dtype == "int32":
            fields.append(".input = POOL_INTEGERS")
        else:
            fields.append(f".bound = {layer.bound}, .inverse = {_float(layer.inverse)}")
            if layer.step is None:
                fields.append(".input = POOL_FLOATS")
            else:
                step, zero_point = layer.step
                fields.append(f".input = POOL_BYTES, .scale = {_float(step)}, .zero = {zero_point}")
        if isinstance(layer.output, Bytes):
            output = layer.output
            fields.append(f".form = FORM_BYTES, .zero_point = {output.zero_point}")
            fields.append(f".least = {output.least}, .most = {output.most}")
        else:
            fields.append(".form = FORM_FLOATS")
        return [(f"struct sum_pool layer_{number}", _braces(fields))]
    return []


def statement(call: Call, number: int, program: Program, at: Address, scratch: str) -> str:
    """Returns the call in C."""
    layer = call.layer
    if isinstance(layer, (AdderConv, MultiplyConv)):
        x, residual = layer.sums.x if isinstance(layer, AdderConv) else layer.x, "0"
        if isinstance(layer, AdderConv) and (layer.residual is not None or layer.shortcut is not None):
            residual = at(layer.shortcut.x if layer.shortcut is not None else layer.residual or "", "void")
        return f"{call.kind}(&layer_{number}, {at(x, 'uint8_t')}, {at(layer.y, 'void')}, {residual}, {scratch});"
    if isinstance(layer, MaxPool):
        return f"max_pool(&layer_{number}, {at(layer.x, 'uint8_t')}, {at(layer.y, 'uint8_t')});"
    if isinstance(layer, SumPool):
        return f"sum_pool(&layer_{number}, {at(layer.x, 'void')}, {at(layer.y, 'void')});"
    value = program.values[layer.y]
    n = value.height * value.width * value.channels
    if isinstance(layer, Quantize):
        output = layer.output
        bounds = f"{_float(output.inverse or 1.0)}, {output.zero_point}, {output.least}, {output.most}"
        return f"quantize({at(layer.x, 'float')}, {at(layer.y, 'uint8_t')}, {n}, {bounds});"
    if isinstance(layer, Dequantize):
        grid = f"{_float(layer.step)}, {layer.zero_point}"
        return f"dequantize({at(layer.x, 'uint8_t')}, {at(layer.y, 'float')}, {n}, {grid});"
    if isinstance(layer, Add):
        return f"add_floats({at(layer.a, 'float')}, {at(layer.b, 'float')}, {at(layer.y, 'float')}, {n});"
    assert isinstance(layer, Relu)
    return f"relu_floats({at(layer.x, 'float')}, {at(layer.y, 'float')}, {n});"


def _output(layer: AdderConv | MultiplyConv, program: Program, residual: str | None) -> str:
    output: Output = layer.output
    fixed = None
    if program.epilogue == "integer" and not isinstance(output, Floats):
        fixed = adder_constants(layer)[0] if isinstance(layer, AdderConv) else product_constants(layer)
    fields = [] if fixed is None or fixed.shift == 0 else [f".shift = {fixed.shift}"]
    if isinstance(output, Floats):
        fields += [".form = FORM_FLOATS", f".relu = {int(output.relu)}"]
    elif isinstance(output, Counts):
        form = "FORM_SUMS" if output.total else "FORM_INTEGERS"
        fields += [f".form = {form}", f".relu = {int(output.relu)}", f".bound = {output.bound}"]
        fields += [] if fixed is not None else [f".inverse = {_float(output.inverse)}"]
    else:
        two = output.inverse is not None and fixed is None
        fields += [f".form = {'FORM_QUANTIZED' if two else 'FORM_BYTES'}"]
        fields += [f".least = {output.least}", f".most = {output.most}"]
        if two:
            fields += [f".zero_point = {output.zero_point}", f".inverse = {_float(output.inverse or 1.0)}"]
    if isinstance(layer, AdderConv) and (residual is not None or layer.shortcut is not None):
        kind = "SHORTCUT" if residual is None else "BYTES" if program.values[residual].dtype == "uint8" else "FLOATS"
        fields.append(f".residual = RESIDUAL_{kind}")
        if fixed is None:
            fields.append(f".residual_scale = {_float(layer.residual_scale)}")
        elif residual is not None:
            fields.append(f".residual_m = {fixed.r >> fixed.shift}")
    return _braces(fields)


def _window(shape: Shape, outside: int) -> str:
    window = shape.window
    fields: Mapping[str, int] = {
        "height": shape.height,
        "width": shape.width,
        "channels": shape.channels,
        "out_height": shape.out_height,
        "out_width": shape.out_width,
        "filters": shape.filters,
        "kernel_height": window.kernel[0],
        "kernel_width": window.kernel[1],
        "stride_y": window.stride[0],
        "stride_x": window.stride[1],
        "dilation_y": window.dilation[0],
        "dilation_x": window.dilation[1],
        "top": window.padding[0],
        "left": window.padding[2],
        "outside": outside,
    }
    return _braces([f".{name} = {value}" for name, value in fields.items()])


def _float(number: float) -> str:
    """Returns a float32 as C's hexadecimal literal, which every compiler reads exactly."""
    digits, exponent = float(np.float32(number)).hex().split("p")
    return f"{digits.rstrip('0').rstrip('.') if '.' in digits else digits}p{int(exponent)}f"


def _braces(fields: list[str]) -> str:
    return "{" + ", ".join(fields) + "}"


def _refusal(layer: Layer, text: str) -> ValueError:
    return ValueError(f"layer {layer.name or layer.y!r}: {text}")
