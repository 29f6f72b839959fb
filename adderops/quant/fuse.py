"""`convert`: from a calibrated network to an integer network.

`torch.export` traces the network. The operations after each adder layer - BatchNorm, a sum, ReLU - become the layer's
epilogue. If all adder layers that read the result have the same grid, the epilogue also quantizes it to that grid:

    conv -> bn -> relu ->            adder -> bn -> (+ residual) -> relu ->            pool -> classifier
    F.conv2d (bn in its weights)     adder_conv2d_int8 (one call)                      floats
             -> quantize ->

With `ends='int8'`, convolution, pool and classifier are sums of integers as well (`_end`, and `pools.py`).
"""

import operator
from dataclasses import asdict

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import Argument
from torch.nn.utils.fusion import fuse_conv_bn_weights

from adderops import _ops
from adderops.quant.calibration import quantized_layers, unwrapped
from adderops.quant.fake_quantized import QuantAdderConv2d, Quantized, QuantizedEnd
from adderops.quant.grid import Grid, excess
from adderops.quant.network import IntegerNetwork, assemble, in_memory_format, tensor_name
from adderops.quant.pools import EXACT, average_pools, sum_integers
from adderops.quant.tracing import node_argument, trace

aten = torch.ops.aten
_ADDER = _ops.adder_conv2d
_CONVOLUTIONS = (aten.conv2d.default, aten.conv2d.padding)
_LAST = torch.channels_last
_NORM = aten.batch_norm.default


@torch.no_grad()
def convert(model: nn.Module, example: Tensor) -> IntegerNetwork:
    """Returns the integer network of a calibrated model, for inference; the model is left unchanged.

    The sums are exact integers. Scale, BatchNorm, residual sum, ReLU and rounding to the next layer's grid form the
    epilogue of the same call, so activations stay uint8 from adder layer to adder layer. Everything else computes in
    float32: the first convolution and the classifier, pooling, and any other layer. With `ends='int8'` the former two
    and the average pools sum integers too, so the result does not depend on the order of any additions
    (docs/int8.md).

    Args:
        model: what `calibrate` returned, possibly fine-tuned; of any floating dtype, and possibly wrapped by
            torch.compile or DataParallel.
        example: an input (N, ...), N >= 1; other batch sizes work later.

    Returns:
        The integer network; it takes inputs of the dtype of `example`. Its `code` is readable. Its buffers hold weights
        (uint8), scales and offsets under the names of the layers.

    Raises:
        TypeError: example is not a floating-point tensor.
        ValueError: the model is not calibrated, or does not take the example.
        RuntimeError: a layer that has not observed any inputs.
        Also what `torch.export.export` raises for a model that it cannot trace.

    >>> from adderops.models import lenet5
    >>> from adderops.quant import calibrate, reestimate_batchnorm
    >>> images = torch.randn(8, 1, 32, 32)
    >>> model = reestimate_batchnorm(lenet5(), [images]).eval()  # stands for training
    >>> integer = convert(calibrate(model, [images]), images)
    >>> torch.allclose(integer(images), model(images), atol=1e-3)
    True
    >>> integer.conv2.weight.dtype
    torch.uint8
    """
    model = unwrapped(model)
    calibrated = quantized_layers(model).values()
    if not calibrated:
        raise ValueError("model: expected a calibrated one (adderops.quant.calibrate), got none of its layers")
    for layer in calibrated:
        if not layer.in_floats:
            layer.input_grid()  # or an error
    if not isinstance(example, Tensor) or not example.is_floating_point():
        got = example.dtype if isinstance(example, Tensor) else type(example).__name__
        raise TypeError(f"example: expected a tensor of floats, got {got}")
    if example.dim() < 2 or len(example) == 0:
        raise ValueError(f"example: expected (N, ...) with N >= 1, got shape {tuple(example.shape)}")
    traced, layers = trace(model, example)
    return _Fusion(traced, layers).run(tuple(example.shape[1:]), example.dtype)


class _Fusion:
    """One conversion: rewrites the float graph, and keeps track of the values that exist as integers.

    Attributes:
        bytes: (node, grid) -> the node that computes the value of the former on the grid, as uint8.
        grid_of: the nodes whose value exists as uint8 only, with their grids.
        constants: the tensors of the new network by name.
        converted: the layers that the network computes in integers, by the names of their tensors.
        made: the nodes that read `constants`.
        readers: the nodes that divide by the step of an 8-bit grid, for the layers that multiply, with that step.
    """

    def __init__(self, traced: GraphModule, layers: dict[str, Quantized]) -> None:
        self.traced, self.graph, self.layers = traced, traced.graph, layers
        self.graph.owning_module = None  # the graph will name tensors that the traced module does not have
        self.bytes: dict[tuple[Node, Grid], Node] = {}
        self.grid_of: dict[Node, Grid] = {}
        self.constants: dict[str, Tensor] = {}
        self.converted: dict[str, Quantized] = {}
        self.made: set[Node] = set()
        self.readers: dict[Node, float] = {}

    def run(self, shape: tuple[int, ...], dtype: torch.dtype) -> IntegerNetwork:
        """Converts the graph for inputs (N, *shape) of a dtype."""
        scheme = next(iter(self.layers.values())).scheme
        pools = average_pools(self.graph) if scheme.ends == "int8" else {}
        for node in list(self.graph.nodes):
            layer = self._layer(node)
            if node.target == _ADDER and isinstance(layer, QuantAdderConv2d):
                self._adder(node, layer)
            elif node.target in (*_CONVOLUTIONS, aten.linear.default):
                self._multiplying(node)
        self.graph.eliminate_dead_code()
        for node, grid in self.grid_of.items():
            if node.users:
                self._floats_for(node, grid)
        self.graph.eliminate_dead_code()
        sum_integers(self.graph, pools, self.readers)
        if dtype != torch.float32:
            self._cast_input()
        for node in list(self.graph.nodes):
            if node.op == "get_attr" and node not in self.made:
                with self.graph.inserting_before(node):
                    name = _without_root(str(node.target))
                    node.replace_all_uses_with(self._constant(name, self._value(str(node.target))))
                self.graph.erase_node(node)
        for node in self.graph.nodes:
            node.meta = {"layer": node.meta.get("layer")}
        read = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        knowledge = {
            "scheme": asdict(scheme),
            "layers": {name: [asdict(grid) for _, grid in layer.grids()] for name, layer in self.converted.items()},
            "shape": shape,
            "dtype": dtype,
        }
        return assemble(self.graph, {name: self.constants[name] for name in read}, knowledge)

    def _cast_input(self) -> None:
        """Casts inputs of another dtype to float32."""
        [image] = [node for node in self.graph.nodes if node.op == "placeholder"]
        readers = list(image.users)
        with self.graph.inserting_after(image):
            floats = self.graph.call_function(aten.to.dtype, (image, torch.float32))
        for reader in readers:
            reader.replace_input_with(image, floats)

    # --- the parts of a network ---

    def _adder(self, node: Node, layer: QuantAdderConv2d) -> None:
        """Converts an adder layer together with its epilogue."""
        name = self._name(node)
        norm, residual, relu, last = self._chain(node)
        wanted = self._wanted(last)
        a, b = self._affine(norm, len(layer.weight), layer.bias)  # y = a * (- sum |x - w|) + b + r * residual
        r = 1.0
        if residual is not None:
            of_residual = next((grid for other, grid in self.bytes if other is residual), None)
            if of_residual is not None:
                r, b = of_residual.scale, b - of_residual.scale * of_residual.zero_point
                residual = self.bytes[residual, of_residual]
        bounds = (0, 255)
        if wanted is not None:
            a, b = a / wanted.scale, b / wanted.scale + wanted.zero_point
            r = r if residual is None else r / wanted.scale
            bounds = (wanted.zero_point, wanted.quant_max)
        grids, stored = layer.grids(), layer.input_grid()
        source = self._bytes(node_argument(node, 0), stored, before=node)
        outputs: list[Node] = []
        self.converted[tensor_name(name)] = layer
        with self.graph.inserting_before(last):
            for i, (filters, grid) in enumerate(grids):
                part, added, factor = name, residual, r
                if len(grids) > 1:
                    part = f"{name}.group{i}".removeprefix(".")
                    if residual is not None:
                        added = self._channels(residual, f"{part}.filters", filters)
                    beyond = grid.beyond(stored)
                    if beyond is not None:
                        outside = beyond.bytes(_outside(_values(stored), grid))
                        excess_of_x = self._regrid(source, outside, f"{part}.beyond")
                        lost = self._lost_by_inputs(excess_of_x, layer, beyond, part, a[filters], node.args[3:])
                        if added is not None:
                            added = self.graph.call_function(aten.to.dtype, (added, torch.float32))
                            added = self.graph.call_function(aten.mul.Tensor, (added, r))
                            lost = self.graph.call_function(aten.add.Tensor, (lost, added))
                        added, factor = lost, 1.0
                w = layer.weight.detach()[filters]
                lost_by_weights = -excess(w, grid).double()
                args = (
                    source if grid == stored else self._regrid(source, grid.bytes(_values(stored)), part),
                    self._constant(_join(part, "weight"), grid.bytes(w)),
                    self._constant(_join(part, "scale"), (a[filters] * grid.scale).float()),
                    self._constant(_join(part, "offset"), (a[filters] * lost_by_weights + b[filters]).float()),
                    added,
                    factor,
                    relu,
                    wanted is not None,
                    *bounds,
                    grid.zero_point,
                    *node.args[3:],
                )
                outputs.append(self.graph.call_function(_ops.adder_conv2d_int8, args))
                outputs[-1].meta["layer"] = name
            [result] = outputs if len(outputs) == 1 else [self.graph.call_function(aten.cat.default, (outputs, 1))]
            if len(outputs) > 1:
                order = torch.cat([filters for filters, _ in grids]).argsort()
                result = self._channels(result, _join(name, "order"), order)
        result.meta["val"] = last.meta["val"]
        if wanted is None:
            last.replace_all_uses_with(result)
        else:
            self.bytes[last, wanted], self.grid_of[last] = result, wanted

    def _lost_by_inputs(
        self,
        excess_of_x: Node,
        layer: QuantAdderConv2d,
        beyond: Grid,
        part: str,
        a: Tensor,
        geometry: tuple[Argument, ...],
    ) -> Node:
        """Returns what clipping the inputs to a group's grid takes off each distance, times the scale a of each filter.

        |x - w| = |clip(x) - w| + |x - clip(x)| for w on the grid, so it is the convolution of `excess_of_x`, which is
        |x - clip(x)| on the grid `beyond`, with one filter of zeros.
        """
        args = (
            excess_of_x,
            self._constant(f"{part}.beyond.weight", torch.zeros_like(layer.weight[:1], dtype=torch.uint8)),
            self._constant(f"{part}.beyond.scale", torch.tensor([beyond.scale])),
            self._constant(f"{part}.beyond.offset", torch.zeros(1)),
            *(None, 1.0, False, False, 0, 255, 0),
            *geometry,
        )
        distances = self.graph.call_function(_ops.adder_conv2d_int8, args)
        factors = self._constant(f"{part}.beyond.factors", a.float()[:, None, None])
        return self.graph.call_function(aten.mul.Tensor, (distances, factors))

    def _multiplying(self, node: Node) -> None:
        """Converts a convolution or linear layer: a BatchNorm after it is folded into its weights or its scales."""
        layer, name = self._layer(node), self._name(node)
        norm = self._norm_after(node) if node.target in _CONVOLUTIONS else None
        if isinstance(layer, QuantizedEnd):
            self._end(node, layer, norm)
        elif norm is not None:
            weight, bias = self._required(node, 1), self._optional(node, 2)
            weight, shift = fuse_conv_bn_weights(weight, bias, *self._batch_norm(norm))
            with self.graph.inserting_before(node):
                source = self._channels_last(node_argument(node, 0))
                node.args = (
                    source,
                    self._constant(_join(name, "weight"), weight),
                    self._constant(_join(name, "bias"), shift),
                    *node.args[3:],
                )
            norm.replace_all_uses_with(node)

    def _end(self, node: Node, layer: QuantizedEnd, norm: Node | None) -> None:
        """Converts a layer that multiplies integers: y = scale[co] * sum (X - Z) W, then plus bias[co], in float32.

        The sum is one of integer-valued floats, so it is the same in every order, if the floats can hold it: float32
        below 2^24, float64 otherwise.
        """
        name, grid, target = self._name(node), layer.input_grid(), node.target
        assert isinstance(target, OpOverload)
        convolution = target in _CONVOLUTIONS
        weight, bias = self._required(node, 1), self._optional(node, 2)
        a, b = self._affine(norm, len(weight), bias)  # y = a * (the layer without its bias) + b
        steps = layer.weight_scales()
        stored = (weight / steps.view(-1, *(1,) * (weight.dim() - 1))).round().to(torch.int8)
        least, most = -grid.zero_point, grid.quant_max - grid.zero_point
        largest_sum = int(stored.int().abs().flatten(1).sum(1).max()) * max(-least, most)
        dtype = torch.float32 if largest_sum < EXACT else torch.float64
        channels = (-1, 1, 1) if convolution else (-1,)
        call = self.graph.call_function
        self.converted[tensor_name(name)] = layer
        with self.graph.inserting_before(node):
            to_grid = call(aten.mul.Tensor, (node_argument(node, 0), 1 / grid.scale))
            self.readers[to_grid] = grid.scale
            integers = call(aten.clamp.default, (call(aten.round.default, (to_grid,)), least, most))
            source = self._channels_last(integers) if convolution else integers
            if dtype != torch.float32:
                source = call(aten.to.dtype, (source, dtype))
            factors = call(aten.to.dtype, (self._constant(_join(name, "weight"), stored), dtype))
            y = call(target, (source, factors, None, *node.args[3:]))
            y.meta["layer"] = name
            if dtype != torch.float32:
                y = call(aten.to.dtype, (y, torch.float32))
            scale = (a * steps.double() * grid.scale).float().view(channels)
            y = call(aten.mul.Tensor, (y, self._constant(_join(name, "scale"), scale)))
            if norm is not None or bias is not None:
                y = call(aten.add.Tensor, (y, self._constant(_join(name, "bias"), b.float().view(channels))))
        y.meta["val"] = (norm or node).meta["val"]  # a later sum compares shapes
        (norm or node).replace_all_uses_with(y)

    def _channels_last(self, source: Node) -> Node:
        """Returns the value in the memory format of uint8 activations."""
        return self.graph.call_function(aten.contiguous.default, (source,), {"memory_format": _LAST})

    # --- the operations after a layer ---

    def _chain(self, node: Node) -> tuple[Node | None, Node | None, bool, Node]:
        """Returns the epilogue of an adder layer: BatchNorm, residual, whether there is a ReLU, and its last node."""
        norm = self._norm_after(node)
        last, residual, relu = norm or node, None, False
        user = _only_user(last)
        if user is not None and user.target == aten.add.Tensor and not user.kwargs:
            [other] = [arg for arg in user.args if arg is not last] or [None]
            if isinstance(other, Node) and _shape(other) == _shape(user) and not self._takes_sum(other, node):
                residual, last = other, user
                user = _only_user(last)
        if user is not None and user.target == aten.relu.default:
            relu, last = True, user
        return norm, residual, relu, last

    def _takes_sum(self, value: Node, node: Node) -> bool:
        """Returns whether a value comes from an adder layer whose epilogue takes the sum, instead of that of `node`.

        That is the layer with more terms: the other is then the smaller part of one call, where both run in one.
        """
        layer = node_argument(value, 0) if value.target == _NORM else value
        if layer.target != _ADDER or not isinstance(self._layer(layer), QuantAdderConv2d) or _only_user(value) is None:
            return False
        terms, others = (self._required(adder, 1)[0].numel() for adder in (node, layer))
        return others > terms

    def _norm_after(self, node: Node) -> Node | None:
        """Returns the BatchNorm that is the only reader of a node."""
        norm = _only_user(node)
        return norm if norm is not None and norm.target == _NORM and norm.args[0] is node else None

    def _wanted(self, node: Node) -> Grid | None:
        """Returns the grid on which all adder layers read a node; None if they differ, or there are none."""
        readers = [user for user in node.users if user.target == _ADDER and user.args[0] is node]
        grids = {layer.input_grid() for user in readers if (layer := self._layer(user)) is not None}
        return grids.pop() if len(grids) == 1 else None

    def _affine(self, norm: Node | None, channels: int, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns scale and shift (C_out), in float64, of bias and BatchNorm together."""
        scale = torch.ones(channels, dtype=torch.float64)
        shift = torch.zeros(channels, dtype=torch.float64) if bias is None else bias.detach().double()
        if norm is not None:
            mean, var, eps, gain, beta = self._batch_norm(norm)
            scale = (var.double() + eps).rsqrt()
            if gain is not None:
                scale = scale * gain.double()
            shift = (shift - mean.double()) * scale
            if beta is not None:
                shift = shift + beta.double()
        return scale, shift

    def _batch_norm(self, norm: Node) -> tuple[Tensor, Tensor, float, Tensor | None, Tensor | None]:
        """Returns mean, variance, eps, gain and bias of a BatchNorm, whose arguments are x, gain, bias, mean, ..."""
        eps = norm.args[7]
        assert isinstance(eps, (int, float))
        return self._required(norm, 3), self._required(norm, 4), eps, self._optional(norm, 1), self._optional(norm, 2)

    # --- values as integers and as floats ---

    def _bytes(self, node: Node, grid: Grid, before: Node) -> Node:
        """Returns the node's value on the grid, as uint8."""
        if (node, grid) not in self.bytes:
            # rounding to integers from 0 on is a ReLU
            source = node_argument(node, 0) if node.target == aten.relu.default and grid.zero_point == 0 else node
            with self.graph.inserting_before(before):
                args = (source, grid.scale, grid.zero_point, grid.quant_max)
                self.bytes[node, grid] = self.graph.call_function(_ops.quantize, args)
        return self.bytes[node, grid]

    def _floats_for(self, node: Node, grid: Grid) -> None:
        """Dequantizes a value for those users of a node that need floats."""
        made = self.bytes[node, grid]
        for target, argument in (
            (aten.to.dtype, torch.float32),
            (aten.sub.Tensor, grid.zero_point),
            (aten.mul.Tensor, grid.scale),
        ):
            with self.graph.inserting_after(made):
                made = self.graph.call_function(target, (made, argument))
        node.replace_all_uses_with(made)

    def _regrid(self, source: Node, bytes_: Tensor, name: str) -> Node:
        """Maps integers to other integers, by a table of 256."""
        indices = self.graph.call_function(aten.to.dtype, (source, torch.int64))
        return self.graph.call_function(aten.take.default, (self._constant(f"{name}.table", bytes_), indices))

    def _channels(self, source: Node, name: str, channels: Tensor) -> Node:
        return self.graph.call_function(aten.index_select.default, (source, 1, self._constant(name, channels)))

    # --- the traced network ---

    def _constant(self, name: str, value: Tensor) -> Node:
        """Returns a node that reads a tensor of the new network; a layer that runs twice may need two values."""
        value = in_memory_format(value.detach())
        found, i = tensor_name(name), 1
        while not _same(self.constants.setdefault(found, value), value):
            i += 1
            found = tensor_name(f"{name}_{i}")
        node = self.graph.create_node("get_attr", found)
        self.made.add(node)
        return node

    def _name(self, node: Node) -> str:
        """Returns the name of the layer whose operator this is."""
        return _without_root(str(node_argument(node, 1).target)).removesuffix("weight").removesuffix(".")

    def _layer(self, node: Node) -> Quantized | None:
        """Returns the quantized layer whose operator this is."""
        weight = node.args[1] if len(node.args) > 1 else None
        return self.layers.get(str(weight.target).removesuffix(".weight")) if isinstance(weight, Node) else None

    def _required(self, node: Node, i: int) -> Tensor:
        """Returns the tensor that argument i of a node reads."""
        return self._value(str(node_argument(node, i).target))

    def _optional(self, node: Node, i: int) -> Tensor | None:
        """Returns the tensor that argument i of a node reads; None if there is none."""
        return None if len(node.args) <= i or node.args[i] is None else self._required(node, i)

    def _value(self, name: str) -> Tensor:
        """Returns a tensor of the traced network."""
        return operator.attrgetter(name)(self.traced).detach()


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _shape(node: Node) -> torch.Size:
    return node.meta["val"].shape


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _outside(x: Tensor, grid: Grid) -> Tensor:
    """Returns how far x lies outside the grid, 0 within."""
    return (x - x.clamp(grid.low, grid.high)).abs()


def _values(grid: Grid) -> Tensor:
    """Returns the numbers of a grid in ascending order."""
    return grid.floats(torch.arange(grid.quant_max + 1))


def _join(layer: str, tensor: str) -> str:
    return f"{layer}.{tensor}" if layer else tensor


def _without_root(name: str) -> str:
    """Returns a name in the model itself, without the Sequential that `trace` puts around it."""
    return name.removeprefix("0").removeprefix(".")
