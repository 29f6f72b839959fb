"""What the layers of a network have, as the macros ADDER_USES and ADDER_FINISHES: kernels drop the rest of the code."""

from collections.abc import Iterable

from adderops.edge.calls import Call
from adderops.edge.pack import ORDERS, Packed, Shape, one_row
from adderops.edge.program import AdderConv, Bytes, Counts, Floats, MultiplyConv, Program, Window

_MOST_STEPS = 256  # of a dot of the assembly
_COLUMNS = frozenset(("BYTES", "CLAMPS"))  # what the assembly of depthwise layers has


def macros(calls: Iterable[Call], program: Program, rings: Iterable[int]) -> list[str]:
    """Returns the definitions, in C; `c/layers.h` says what each name means.

    Args:
        calls, program: of the network.
        rings: indices of the calls that write over their input with a ring.
    """
    uses: set[str] = set()
    finishes: set[str] = set()
    ringed = set(rings)
    for i, call in enumerate(calls):
        if isinstance(call.layer, (AdderConv, MultiplyConv)):
            rule = _rule(call.layer, program)
            ring = i in ringed
            uses |= rule | _geometry(call, ring)
            if _leaves(call, rule, ring):
                finishes |= rule
                uses |= {"adder_conv": {"LEFT_TILES"}, "adder_depthwise": {"LEFT_DEPTHWISE"}}.get(call.kind, set())
    return [f"#define ADDER_USES {_sum(uses)}", f"#define ADDER_FINISHES {_sum(finishes)}"]


def _sum(names: set[str]) -> str:
    return f"({' | '.join(f'USES_{name}' for name in sorted(names))})" if names else "0"


def _rule(layer: AdderConv | MultiplyConv, program: Program) -> set[str]:
    """Returns the form of the output, the kind of residual, and whether bytes are clamped."""
    output, names = layer.output, set[str]()
    if isinstance(output, Floats):
        names.add("FLOATS")
    elif isinstance(output, Counts):
        names.add("SUMS" if output.total else "INTEGERS")
    else:
        names.add("QUANTIZED" if output.inverse is not None and program.epilogue != "integer" else "BYTES")
        names |= {"CLAMPS"} if output.least > 0 or output.most < 255 else set()
    if isinstance(layer, AdderConv):
        names |= {"SHORTCUTS"} if layer.shortcut is not None else set()
        if layer.residual is not None:
            names.add("RESIDUALS" if program.values[layer.residual].dtype == "uint8" else "FLOAT_RESIDUALS")
    return names


def _geometry(call: Call, ring: bool) -> set[str]:
    """Returns what gathering the tiles of a convolution takes."""
    layer, packed = call.layer, call.packed
    assert packed is not None
    if isinstance(layer, MultiplyConv):
        window = layer.window
        plain = window.kernel == (3, 3) and window.dilation == (1, 1) and packed.shape.channels == 3
        return {"WINDOWS_27"} if plain else set()
    if call.kind != "adder_conv" or not isinstance(layer, AdderConv):
        return set()
    groups = layer.sums.groups
    names = {name for name, has in (("GROUPS", groups > 1), ("RINGS", ring)) if has}
    if call.beside is not None:
        return names | _tiles(packed.shape, packed, groups) | _tiles(call.beside.shape, call.beside, 1)
    return names | _tiles(packed.shape if ring else one_row(packed.shape), packed, groups)


def _tiles(shape: Shape, packed: Packed, groups: int) -> set[str]:
    window, n = shape.window, shape.channels // groups
    has = {
        ORDERS[packed.order].removeprefix("ORDER_"): True,
        "WIDE_TAPS": not packed.order and window.kernel[1] > 1,
        "ZERO_WORDS": window.kernel[0] * window.kernel[1] * -(-n // 4) < packed.words,
        "ODD_CHANNELS": n % 4 > 0,
        "WRAPPED_TILES": not packed.order and shape.out_height > 1 and shape.out_width % 4 > 0,
        "BORDERS": packed.order > 0 or _reaches_outside(shape.width, shape.out_width, window),
    }
    return {name for name, true in has.items() if true}


def _reaches_outside(width: int, out_width: int, window: Window) -> bool:
    """Whether the columns of a window, or of the missing pixels of a tile, may lie outside of x."""
    last = (-(-out_width // 4) * 4 - 1) * window.stride[1] - window.padding[2]
    return window.padding[2] > 0 or last + (window.kernel[1] - 1) * window.dilation[1] >= width


def _leaves(call: Call, rule: set[str], ring: bool) -> bool:
    """Whether the assembly of a Cortex-M leaves tiles of a layer to finish(), or may do so."""
    packed = call.packed
    assert packed is not None
    shape = packed.shape
    if call.kind == "adder_depthwise":  # depthwise_tiles in c/adder_depthwise.c
        window = shape.window
        plain = window.kernel == (3, 3) and window.dilation == (1, 1) and max(window.stride) <= 2
        height, width = (  # of x, as far as windows reach
            min(size, (out - 1) * stride + 3 - before)
            for size, out, stride, before in zip(
                (shape.height, shape.width),
                (shape.out_height, shape.out_width),
                window.stride,
                window.padding[::2],
                strict=True,
            )
        )
        plain = plain and height >= 1 and width >= 4 and shape.out_height >= 4
        return not (plain and shape.channels % 4 == 0 and rule <= _COLUMNS)
    groups = call.layer.sums.groups if isinstance(call.layer, AdderConv) else 1
    by_row = packed.order > 0 or (ring and groups > 1)
    if (shape.out_width if by_row else shape.pixels) % 4 > 0:
        return True
    steps = packed.words // (3 if packed.order else 4)
    many = call.beside is not None and call.beside.words > 4 * _MOST_STEPS
    if call.kind == "adder_conv" and (steps > _MOST_STEPS or many):
        return True
    return not _has_pairs(call.layer, rule, shape.filters // groups, groups)


def _has_pairs(layer: object, rule: set[str], filters: int, groups: int) -> bool:
    """Whether the assembly has an output rule: has_pairs in c/sums_m_tiles.c."""
    assert isinstance(layer, (AdderConv, MultiplyConv))
    output = layer.output
    if filters % 2 > 0 or rule & {"FLOATS", "FLOAT_RESIDUALS", "INTEGERS"}:
        return False
    if isinstance(output, Counts):
        return output.relu and "RESIDUALS" not in rule
    assert isinstance(output, Bytes)
    if "CLAMPS" in rule and (filters % 4 > 0 or groups > 1):
        return False
    return "QUANTIZED" not in rule or (output.zero_point == 0 and not rule & {"RESIDUALS", "SHORTCUTS"})
