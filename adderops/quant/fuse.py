"""From a calibrated network to one that computes in bytes: `convert`.

The network is traced by `torch.export`; each adder layer takes what follows it - BatchNorm, a sum, ReLU - into its
epilogue, and where another adder layer follows, its output leaves as bytes on that layer's grid:

    conv -> bn -> relu ->            adder -> bn -> (+ residual) -> relu ->            pool -> classifier
    F.conv2d (bn in its weights)     adder_conv2d_int8 (one call)                      floats
             -> quantize ->
"""

import copy
import operator
from dataclasses import asdict

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.utils.fusion import fuse_conv_bn_weights

from adderops import _ops
from adderops.export import export_program
from adderops.quant.calibration import quantized_layers
from adderops.quant.grid import Grid, excess
from adderops.quant.layers import Quantized, QuantizedEnd

aten = torch.ops.aten
_ADDER = _ops.adder_conv2d
_LAST = torch.channels_last
_NORM = aten._native_batch_norm_legit_no_training.default


def convert(model: nn.Module, example: Tensor) -> GraphModule:
    """Returns the network of bytes that a calibrated model stands for; the model is left as it is.

    Sums are exact integers; scale, BatchNorm, residual sum, ReLU and the rounding to the next layer's grid are the
    epilogue of the same call, so that activations stay bytes from adder layer to adder layer.  What is not an adder
    layer stays in floats: the first convolution and the classifier (on their 8-bit grids with `ends='int8'`), pooling,
    and whatever else the network has.

    Args:
        model: what `calibrate` returned, possibly trained further.
        example: an input (N, ...); the size of the batch may differ later.

    Returns:
        A `torch.fx.GraphModule` for inference: its `code` is readable, its buffers are the bytes of the weights with
        scale and offset, under the names of the layers.

    Raises:
        ValueError: the model is not calibrated.
        RuntimeError: a layer that has seen no input.
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
    layers = quantized_layers(model)
    if not layers:
        raise ValueError("model: expected a calibrated one (adderops.quant.calibrate), got none of its layers")
    root = nn.Sequential(copy.deepcopy(model))  # so that the model itself may be a layer
    for name, layer in quantized_layers(root).items():
        root.set_submodule(name, layer.plain())
    program = export_program(root, example).run_decompositions({})  # nothing in place
    traced = program.module(check_guards=False)
    integer = _Fusion(traced, {f"0.{name}" if name else "0": layer for name, layer in layers.items()}).run()
    integer.meta["adderops.quant"] = {
        "scheme": asdict(next(iter(layers.values())).scheme),
        "layers": {name: [asdict(grid) for _, grid in layer.grids()] for name, layer in layers.items()},
    }
    return integer


class _Fusion:
    """One conversion: the graph of floats, and beside it the bytes that its nodes become.

    Attributes:
        bytes: (node, grid) -> the node that computes its value as bytes.
        grid_of: the nodes whose value exists as bytes only.
        constants: the tensors of the new network by name.
    """

    def __init__(self, traced: GraphModule, layers: dict[str, Quantized]) -> None:
        self.traced, self.graph, self.layers = traced, traced.graph, layers
        self.graph.owning_module = None  # it will name tensors that the traced module does not have
        self.bytes: dict[tuple[Node, Grid], Node] = {}
        self.grid_of: dict[Node, Grid] = {}
        self.constants: dict[str, Tensor] = {}

    def run(self) -> GraphModule:
        for node in list(self.graph.nodes):
            if node.target == _ADDER and self._layer(node) is not None:
                self._adder(node)
            elif node.target in (aten.conv2d.default, aten.linear.default):
                self._multiplying(node)
            elif node.target == aten.view.default:  # traced on contiguous tensors; bytes come channels last
                node.target = aten.reshape.default
        self.graph.eliminate_dead_code()
        for node, grid in self.grid_of.items():
            if node.users:
                self._floats_for(node, grid)
        self.graph.eliminate_dead_code()
        names = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        values = {name: self.constants[name] if name in self.constants else self._value(name) for name in names}
        for node in self.graph.nodes:
            if node.op == "get_attr":
                node.target = str(node.target).removeprefix("0.")
        values = {name.removeprefix("0."): value for name, value in values.items()}
        return GraphModule(values, self.graph, "IntegerNetwork")

    # --- the parts of a network ---

    def _adder(self, node: Node) -> None:
        """An adder layer and what its epilogue takes in."""
        layer, name = self._layer(node), self._name(node)
        norm, residual, relu, last = self._chain(node)
        wanted = self._wanted(last)
        a, b = self._affine(norm, len(layer.weight), layer.bias)  # y = a * (- sum |x - w|) + b + r * residual
        r = 1.0
        if residual is not None:
            stored = next((grid for other, grid in self.bytes if other is residual), None)
            if stored is not None:
                r, b = stored.scale, b - stored.scale * stored.zero_point
                residual = self.bytes[residual, stored]
        bounds = (0, 255)
        if wanted is not None:
            a, b = a / wanted.scale, b / wanted.scale + wanted.zero_point
            r = r if residual is None else r / wanted.scale
            bounds = (wanted.zero_point, wanted.quant_max)
        source = self._bytes(node.args[0], layer.input_grid(), before=node)
        outputs, grids = [], layer.grids()
        with self.graph.inserting_before(last):
            for i, (filters, grid) in enumerate(grids):
                part, whole = f"{name}.group{i}" if len(grids) > 1 else name, len(grids) == 1
                w = layer.weight.detach()[filters]
                lost = -excess(w, grid).double()
                args = (
                    source if grid == layer.input_grid() else self._regrid(source, layer.input_grid(), grid, part),
                    self._constant(f"{part}.weight", grid.bytes(w).contiguous(memory_format=torch.channels_last)),
                    self._constant(f"{part}.scale", (a[filters] * grid.scale).float()),
                    self._constant(f"{part}.offset", (a[filters] * lost + b[filters]).float()),
                    residual if whole or residual is None else self._channels(residual, f"{part}.filters", filters),
                    r,
                    relu,
                    wanted is not None,
                    *bounds,
                    grid.zero_point,
                    *node.args[3:],
                )
                outputs.append(self.graph.call_function(_ops.adder_conv2d_int8, args))
            [result] = outputs if len(outputs) == 1 else [self.graph.call_function(aten.cat.default, (outputs, 1))]
            if len(outputs) > 1:
                order = torch.cat([filters for filters, _ in grids]).argsort()
                result = self._channels(result, f"{name}.order", order)
        if wanted is None:
            last.replace_all_uses_with(result)
        else:
            self.bytes[last, wanted], self.grid_of[last] = result, wanted

    def _multiplying(self, node: Node) -> None:
        """A convolution or linear layer: a BatchNorm behind it goes into its weights, which keep their 8 bits."""
        layer, name = self._layer(node), self._name(node)
        norm, output = self._norm_after(node) if node.target == aten.conv2d.default else (None, node)
        if norm is None and not isinstance(layer, QuantizedEnd):
            return
        weight = self._value(node.args[1].target)
        bias = self._value(node.args[2].target) if len(node.args) > 2 and node.args[2] is not None else None
        factor = torch.ones(len(weight))
        if norm is not None:
            _, gain, beta, mean, var, _, eps = norm.args
            mean, var, gain, beta = (None if n is None else self._value(n.target) for n in (mean, var, gain, beta))
            factor, bias = fuse_conv_bn_weights(factor[:, None, None, None], bias, mean, var, eps, gain, beta)
            factor, bias = factor.detach().flatten(), bias.detach()
        filters = (-1, *(1,) * (weight.dim() - 1))
        source = node.args[0]
        with self.graph.inserting_before(node):
            if isinstance(layer, QuantizedEnd):
                scales, grid = layer.weight_scales(), layer.input_grid()
                stored = (weight / scales.view(filters)).round().to(torch.int8)
                integers = self._constant(f"{name}.weight", stored)
                floats = self.graph.call_function(aten.to.dtype, (integers, torch.float32))
                steps = self._constant(f"{name}.scale", (scales * factor).view(filters))
                new_weight = self.graph.call_function(aten.mul.Tensor, (floats, steps))
                bounds = (-grid.zero_point, grid.quant_max - grid.zero_point)
                for target, *arguments in (
                    (aten.mul.Scalar, 1 / grid.scale),
                    (aten.round.default,),
                    (aten.clamp.default, *bounds),
                    (aten.mul.Scalar, grid.scale),
                ):
                    source = self.graph.call_function(target, (source, *arguments))
            else:
                new_weight = self._constant(f"{name}.weight", weight * factor.view(filters))
            new_bias = None if bias is None else self._constant(f"{name}.bias", bias)
            if node.target == aten.conv2d.default:  # bytes are channels last
                source = self.graph.call_function(aten.contiguous.default, (source,), {"memory_format": _LAST})
                new_weight = self.graph.call_function(aten.contiguous.default, (new_weight,), {"memory_format": _LAST})
        node.args = (source, new_weight, new_bias, *node.args[3:])
        if norm is not None:
            output.replace_all_uses_with(node)

    # --- what follows a layer ---

    def _chain(self, node: Node) -> tuple[Node | None, Node | None, bool, Node]:
        """What an adder layer's epilogue takes in: BatchNorm, residual, whether a ReLU; and the last node of it."""
        norm, last = self._norm_after(node)
        residual, relu = None, False
        user = _only_user(last)
        if user is not None and user.target == aten.add.Tensor and not user.kwargs:
            [other] = [arg for arg in user.args if arg is not last] or [None]
            if isinstance(other, Node) and _shape(other) == _shape(user):
                residual, last = other, user
                user = _only_user(last)
        if user is not None and user.target == aten.relu.default:
            relu, last = True, user
        return norm, residual, relu, last

    def _norm_after(self, node: Node) -> tuple[Node | None, Node]:
        """The BatchNorm that alone reads the node, and the node of its output; (None, node) where there is none."""
        norm = _only_user(node)
        if norm is None or norm.target != _NORM or norm.args[0] is not node:
            return None, node
        output = _only_user(norm)
        return (norm, output) if output is not None and output.target == operator.getitem else (None, node)

    def _wanted(self, node: Node) -> Grid | None:
        """The grid on which all adder layers read the node's value; None where they differ, or there is none."""
        readers = [user for user in node.users if user.target == _ADDER and user.args[0] is node]
        grids = {layer.input_grid() for user in readers if (layer := self._layer(user)) is not None}
        return grids.pop() if len(grids) == 1 else None

    def _affine(self, norm: Node | None, channels: int, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scale and shift (C_out), in float64, of what a layer's distances go through: its bias, the BatchNorm."""
        scale = torch.ones(channels, dtype=torch.float64)
        shift = torch.zeros(channels, dtype=torch.float64) if bias is None else bias.detach().double()
        if norm is not None:
            _, gain, beta, mean, var, _, eps = norm.args
            scale = (self._value(var.target).double() + eps).rsqrt()
            if gain is not None:
                scale = scale * self._value(gain.target).double()
            shift = (shift - self._value(mean.target).double()) * scale
            if beta is not None:
                shift = shift + self._value(beta.target).double()
        return scale, shift

    # --- values as bytes and as floats ---

    def _bytes(self, node: Node, grid: Grid, before: Node) -> Node:
        """The node's value as bytes of the grid."""
        if (node, grid) not in self.bytes:
            # rounding to bytes from 0 on is a ReLU
            source = node.args[0] if node.target == aten.relu.default and grid.zero_point == 0 else node
            with self.graph.inserting_before(before):
                args = (source, grid.scale, grid.zero_point, grid.quant_max)
                self.bytes[node, grid] = self.graph.call_function(_ops.quantize, args)
        return self.bytes[node, grid]

    def _floats_for(self, node: Node, grid: Grid) -> None:
        """Gives the users of a node what its bytes stand for."""
        made = self.bytes[node, grid]
        for target, argument in (
            (aten.to.dtype, torch.float32),
            (aten.sub.Scalar, grid.zero_point),
            (aten.mul.Scalar, grid.scale),
        ):
            with self.graph.inserting_after(made):
                made = self.graph.call_function(target, (made, argument))
        node.replace_all_uses_with(made)

    def _regrid(self, source: Node, stored: Grid, grid: Grid, name: str) -> Node:
        """Bytes of one grid as those of another, by a table."""
        table = self._constant(f"{name}.table", grid.bytes(stored.floats(torch.arange(stored.quant_max + 1))))
        indices = self.graph.call_function(aten.to.dtype, (source, torch.int64))
        return self.graph.call_function(aten.take.default, (table, indices))

    def _channels(self, source: Node, name: str, channels: Tensor) -> Node:
        return self.graph.call_function(aten.index_select.default, (source, 1, self._constant(name, channels)))

    # --- the traced network ---

    def _constant(self, name: str, value: Tensor) -> Node:
        self.constants[name] = value.detach().clone()
        return self.graph.create_node("get_attr", name)

    def _name(self, node: Node) -> str:
        """Of the layer whose operator this is."""
        return str(node.args[1].target).removesuffix(".weight")

    def _layer(self, node: Node) -> Quantized | None:
        """The quantized layer whose operator this is."""
        return self.layers.get(self._name(node)) if isinstance(node.args[1], Node) else None

    def _value(self, name: str) -> Tensor:
        return operator.attrgetter(name)(self.traced).detach()


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _shape(node: Node) -> torch.Size:
    return node.meta["val"].shape
