"""Modelled cycles of a generated network, in closed form from the sizes of its layers.

A kernel's cycles are a sum of counts times the constants below. Of an adder convolution with T tiles of four pixels and
P pairs of filters, whose filters are S steps of words (ORDER_TAPS: four words; orders of rows: three):

    T P S step + T P pair + T (tile + W word + R row) + layer           W: words of x that a tile copies, R = KH

with further counts for tiles of fewer pixels, borders, residuals, shortcuts and other outputs. The counts are exact;
the constants are least squares fits to emulated layers with the cycle rules of benchmarks/harness/cortex_m_cycles.py,
compiled by arm-none-eabi-gcc 12.2 -O2: `python benchmarks/harness/edge_cost.py` prints them. Layers of more than
100,000 terms are within 5 % of the emulator, networks within 2 % (tests/edge/test_cost.py); small layers with odd
channels, and tiles of fewer than four pixels, may be 11 % off.

A model of a model: no wait states of the flash, and no board has confirmed it.
"""

from collections.abc import Mapping

from adderops.edge.calls import Call
from adderops.edge.emit import Source
from adderops.edge.pack import Packed
from adderops.edge.program import AdderConv, Bytes, Counts, Floats, MaxPool, MultiplyConv, Program, SumPool

_SPANS = {0: 4, 1: 6, 2: 9}  # words of x for a word of a filter, or for three, by order
_STEPS = {0: 4, 1: 3, 2: 3}  # words of a filter in a step

# by target and kernel: cycles for one of each count
_CYCLES: dict[str, dict[str, dict[str, float]]] = {
    "cortex-m4": {
        "adder_conv": {
            "layer": 335.6,
            "pair": 104.0,
            "pair in C": 546.4,
            "step 1": 45.91,
            "odd step 1": 8.036,
            "row 1": 166.9,
            "border 1": 82.85,
            "border word 1": 6.828,
            "residual": 61.04,
            "step 2": 48.25,
            "odd step 2": 5.851,
            "row 2": 212.8,
            "border 2": 29.3,
            "border word 2": 5.493,
            "step 0": 68.42,
            "row 0": 298.1,
            "word 0": 2.465,
            "border 0": 0.5731,
            "tap": 53.46,
            "odd word": 32.09,
            "shortcut": 151.2,
            "ring": 17.69,
            "sums": 43.54,
        },
        "adder_depthwise": {"fill": 26.7, "column 1": 84.46, "row": 193.7, "column 2": 86.09},
        "elements": {"layer": 4.633, "Dequantize": 13.0, "Add": 8.994, "Relu": 12.0, "Quantize": 21.04},
        "max_pool": {"value": 198.3},
        "multiply_conv": {"pair in C": 678.9, "word 0": 13.37, "border 0": 892.3, "tap": 31.82, "two steps": 238.7},
        "sum_pool": {"layer": 1557.0},
    },
    "cortex-m33": {
        "adder_conv": {
            "layer": 376.3,
            "pair": 95.19,
            "pair in C": 433.9,
            "step 1": 39.46,
            "odd step 1": 1.406,
            "row 1": 143.2,
            "border 1": 73.98,
            "border word 1": 5.433,
            "residual": 52.32,
            "two steps": 9.239,
            "step 2": 41.75,
            "odd step 2": 2.753,
            "row 2": 196.5,
            "border 2": 4.54,
            "border word 2": 4.747,
            "step 0": 59.56,
            "row 0": 246.0,
            "word 0": 1.822,
            "tap": 43.43,
            "odd word": 25.07,
            "shortcut": 159.5,
            "Counts": 916.3,
            "sums": 10.59,
        },
        "adder_depthwise": {"fill": 21.92, "column 1": 74.08, "row": 170.5, "column 2": 73.34},
        "elements": {"layer": 3.213, "Dequantize": 11.0, "Add": 5.997, "Relu": 8.999, "Quantize": 19.03},
        "max_pool": {"value": 183.1},
        "multiply_conv": {"pair in C": 528.8, "word 0": 13.49, "border 0": 734.2, "tap": 25.42, "two steps": 213.3},
        "sum_pool": {"layer": 1489.0},
    },
}

TARGETS = ("cortex-m4", "cortex-m33")


def network_cycles(source: Source, target: str = "cortex-m4") -> int:
    """Returns the modelled cycles of one image, without those of looking up its bytes.

    Args:
        source: what `adderops.edge.export.source_of` returned.
        target: one of `TARGETS`.

    Raises:
        ValueError: another target, or a kernel without constants.
    """
    calls, rings = source.calls, source.plan.rings
    return round(sum(call_cycles(call, source.program, target, i in rings) for i, call in enumerate(calls)))


def call_cycles(call: Call, program: Program, target: str = "cortex-m4", ring: bool = False) -> float:
    """Returns the modelled cycles of one layer; `ring`: it writes over its input. Errors as of `network_cycles`."""
    if target not in TARGETS:
        raise ValueError(f"target: expected one of {', '.join(TARGETS)}, got {target!r}")
    if call.kind not in _CYCLES[target]:
        raise ValueError(f"{call.layer.name}: expected a kernel with known cycles on {target}, got {call.kind}")
    each = _CYCLES[target][call.kind]
    return sum(n * each.get(name, 0.0) for name, n in counts(call, program, ring).items())


def counts(call: Call, program: Program, ring: bool = False) -> Mapping[str, float]:
    """Returns what a kernel does how often, by the names of its constants."""
    layer = call.layer
    if isinstance(layer, AdderConv) and call.kind == "adder_depthwise":
        return _depthwise(call, layer)
    if isinstance(layer, (AdderConv, MultiplyConv)):
        result = _tiles(call, layer, program)
        if ring:
            x = program.values[layer.reads[0]]
            result["ring"] = x.height * x.width * x.channels / 4
        return result
    value = program.values[layer.y]
    n = value.height * value.width * value.channels
    if isinstance(layer, (MaxPool, SumPool)):
        taps = layer.window.kernel[0] * layer.window.kernel[1]
        return {"layer": 1, "value": n, "tap": n * taps}
    return {"layer": 1, type(layer).__name__: n}


def _tiles(call: Call, layer: AdderConv | MultiplyConv, program: Program) -> dict[str, float]:
    packed = call.packed
    assert packed is not None
    shape, order = packed.shape, packed.order
    rows = shape.out_height if order else 1
    length = shape.out_width if order else shape.pixels
    tiles, partial = rows * -(-length // 4), rows * (length % 4 > 0)
    groups = layer.sums.groups if isinstance(layer, AdderConv) else layer.groups
    pairs = groups * -(-(shape.filters // groups) // 2)
    fast = tiles - partial if _in_assembly(layer, shape.filters // groups, program) else 0
    result: dict[str, float] = {"layer": 1, "tile": tiles * groups, "pair": fast * pairs}
    result["pair in C"] = (tiles - fast) * pairs
    steps = packed.words // _STEPS[order]
    result[f"step {order}"] = tiles * pairs * steps
    if order:
        result[f"odd step {order}"] = tiles * pairs * (steps % 2)  # two steps a turn
    result |= _gathering(packed, tiles * groups, groups)
    if isinstance(layer, AdderConv):
        result["residual"] = tiles * pairs * (layer.residual is not None)
        if call.beside is not None:
            result["shortcut"] = tiles * pairs
            result["step 0"] = result.get("step 0", 0) + tiles * pairs * call.beside.words // 4
            for name, n in _gathering(call.beside, tiles, 1).items():
                result[name] = result.get(name, 0) + n
    output = layer.output
    if not isinstance(output, Bytes):
        result[type(output).__name__] = (tiles - fast) * pairs
        result["sums"] = fast * pairs
    else:
        result["clamped"] = fast * pairs * _clamped(output)
        result["two steps"] = tiles * pairs * (output.inverse is not None)
    return result


def _in_assembly(layer: AdderConv | MultiplyConv, filters: int, program: Program) -> bool:
    """Whether dots and epilogue of full tiles are one loop in assembly (has_pairs in c/sums_m_tiles.c)."""
    output = layer.output
    residual = layer.residual if isinstance(layer, AdderConv) else None
    if filters % 2 or isinstance(output, Floats):
        return False
    if isinstance(output, Counts):
        return output.total and output.relu and residual is None
    if _clamped(output) and filters % 4:
        return False
    if output.inverse is not None:
        return output.zero_point == 0 and residual is None
    return residual is None or program.values[residual].dtype == "uint8"


def _clamped(output: Bytes) -> bool:
    return output.least > 0 or output.most < 255


def _gathering(packed: Packed, tiles: int, groups: int) -> dict[str, float]:
    """What copying the inputs of tiles does: words, in rows of the kernel, at the borders of the image."""
    shape, order, window = packed.shape, packed.order, packed.shape.window
    words = _SPANS[order] * packed.words // (3 if order else 1)
    height, width = window.kernel
    top, bottom, left, right = window.padding
    around = (top + bottom) / window.stride[0] / shape.out_height  # share of the output rows that reach outside
    beside = (left + right) / window.stride[1] / shape.out_width * (1 if not order else 4)
    border = min(1.0, around + beside)
    odd = (shape.channels // groups) % 4 > 0
    result = {
        f"row {order}": tiles * height,
        f"word {order}": tiles * words,
        f"border {order}": tiles * height * border,
        f"border word {order}": tiles * words * border,
    }
    if not order and width > 1:
        result["tap"] = tiles * 4 * height * width
    if odd:
        result["odd word"] = tiles * words
    return result


def _depthwise(call: Call, layer: AdderConv) -> dict[str, float]:
    assert call.packed is not None
    shape, window = call.packed.shape, layer.sums.window
    words = -(-shape.channels // 4)
    plane = call.packed.tile // 4
    fast = window.kernel == (3, 3) and isinstance(layer.output, Bytes) and shape.out_height >= 4
    name = f"column {window.stride[0]}" if fast else "tap"
    columns = words * 4 * -(-shape.out_height // 4) * shape.out_width
    result: dict[str, float] = {"layer": 1, "word": words, "plane": words * plane, "fill": plane}
    result[name] = columns if fast else words * shape.pixels * window.kernel[0] * window.kernel[1]
    result["row"] = words * shape.height
    if not fast:
        result["output"] = words * shape.pixels
    output = layer.output
    if isinstance(output, Bytes):
        result["clamped"] = shape.pixels * words * _clamped(output)
        result["two steps"] = shape.pixels * words * (output.inverse is not None)
    if isinstance(output, (Floats, Counts)):
        result["wide"] = shape.pixels * words
    return result
