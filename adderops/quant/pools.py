"""Average pools as sums of integers: rounded to a finer grid first, they do not depend on the order of additions.

A pool that leads to an 8-bit grid of step s, and nowhere else, becomes

    u = clamp(round(z * (2^f / s)), -B, B),   X = round(sum u * (1 / (n 2^f))),   f = 4 bits,   n B < 2^24

where n is the number of values that the pool averages: each value is rounded to 1/16 of a step, and the whole mean is
one product. Above 1028 values f is smaller, so that B still reaches over 1020 steps.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Graph, Node

from adderops import _ops
from adderops.quant.tracing import node_argument

aten = torch.ops.aten
EXACT = 2**24  # float32 holds every integer up to here
FINER_BITS = 4  # of the grid in a pool, beyond those of the grid that reads it
_REACH = 4 * 255  # the least B, in steps of the grid that reads it: four times what it can hold
_RESHAPES = (
    *(aten.reshape.default, aten.contiguous.default, aten.clone.default),
    *(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default),
)


def average_pools(graph: Graph) -> dict[Node, int]:
    """Returns the average pools of a traced graph that `sum_integers` can express, each with its number of values.

    These are `adaptive_avg_pool2d` to 1x1, `mean` over H and W, and `avg_pool2d` with one divisor for all windows.
    """
    pools = {}
    for node in graph.nodes:
        count = _count(node) if node.op == "call_function" else None
        if count is not None:
            pools[node] = count
    return pools


def sum_integers(graph: Graph, pools: Mapping[Node, int], readers: Mapping[Node, float]) -> None:
    """Rewrites the pools that lead, through changes of shape only, to one reader: sums of integers, then one product.

    Args:
        graph: changed in place.
        pools: what `average_pools` found before the conversion.
        readers: the multiplications by 1/s, with which layers that multiply round to their grid of step s. The other
            readers are the calls of `quantize`.
    """
    for pool, count in pools.items():
        reader = _reader(pool)
        if reader is None or (reader.target != _ops.quantize and reader not in readers):
            continue
        most = (EXACT - 1) // count
        finer = next((f for f in range(FINER_BITS, -1, -1) if _REACH * 2**f <= most), None)
        if finer is None:
            continue  # not even the steps of the reader can be summed in float32
        step = reader.args[1] if reader.target == _ops.quantize else readers[reader]
        assert isinstance(step, float)
        with graph.inserting_before(pool):
            u = graph.call_function(aten.mul.Tensor, (node_argument(pool, 0), 2**finer / step))
            u = graph.call_function(aten.round.default, (u,))
            u = graph.call_function(aten.clamp.default, (u, -most, most))
            if pool.target == aten.avg_pool2d.default:
                total = graph.call_function(pool.target, (u, *_windows(pool)[:-1], 1))
            else:
                keepdim = pool.target == aten.adaptive_avg_pool2d.default or pool.args[2:3] == (True,)
                total = graph.call_function(aten.sum.dim_IntList, (u, [2, 3], keepdim))
        pool.replace_all_uses_with(total)
        graph.erase_node(pool)
        if reader.target == _ops.quantize:  # which divides by its second argument
            reader.update_arg(1, float(count * 2**finer))
        else:
            reader.update_arg(1, 1 / (count * 2**finer))


def _count(pool: Node) -> int | None:
    """Returns how many values a pool averages; None if it is none, or averages different numbers of them."""
    if pool.target not in (aten.adaptive_avg_pool2d.default, aten.mean.dim, aten.avg_pool2d.default) or pool.kwargs:
        return None
    shape = node_argument(pool, 0).meta["val"].shape
    if len(shape) != 4 or not all(isinstance(size, int) for size in shape[1:]):
        return None
    if pool.target == aten.avg_pool2d.default:
        kernel, _, padding, ceil_mode, counts_padding, divisor = _windows(pool)
        partial = ceil_mode or (any(padding) and not counts_padding)
        return None if partial or divisor is not None else math.prod(kernel if len(kernel) == 2 else kernel * 2)
    if pool.target == aten.mean.dim:
        over = pool.args[1]
        whole = isinstance(over, (list, tuple)) and {dim % 4 for dim in over if isinstance(dim, int)} == {2, 3}
    else:
        sizes = pool.args[1]
        whole = isinstance(sizes, (list, tuple)) and tuple(sizes) == (1, 1)
    return math.prod(shape[2:]) if whole else None


def _windows(pool: Node) -> list[Any]:
    """Returns kernel, stride, padding, ceil_mode, count_include_pad and divisor of an `avg_pool2d`."""
    defaults: list[Any] = [None, [], [0, 0], False, True, None]
    given: list[Any] = list(pool.args[1:])
    return given + defaults[len(given) :]


def _reader(pool: Node) -> Node | None:
    """Returns the only node that reads a pool, through changes of shape; None if there are several."""
    node = pool
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.target not in _RESHAPES:
            return node
    return None
