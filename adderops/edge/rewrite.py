"""Merges the layers of a program so that fewer values exist, none in more bytes than it needs; no output changes.

    quantize twice to one grid    -> once
    max pool, quantize            -> quantize, max pool: on bytes (both are monotone)
    layer, relu, quantize         -> the layer's output
    layer, pool over all pixels   -> sums in the layer's output
    adder layer, read only as a residual of another -> computed beside the other

`Program.run` gives the same bits before and after each of them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from adderops.edge.program import (
    Add,
    AdderConv,
    Counts,
    Dequantize,
    Floats,
    Layer,
    MaxPool,
    MultiplyConv,
    Quantize,
    Relu,
    SumPool,
    Value,
)

_Kind = TypeVar("_Kind", bound=Layer)


class Rewriting:
    """The layers of a program while they are merged.

    Attributes:
        values, layers: as in the program.
        kept: names of values that must stay: its output.
        epilogue: 'float32' or 'integer'.
    """

    def __init__(
        self, values: Mapping[str, Value], layers: Sequence[Layer], output: str, epilogue: str = "float32"
    ) -> None:
        self.values, self.layers, self.kept, self.epilogue = dict(values), list(layers), {output}, epilogue

    def run(self) -> tuple[dict[str, Value], tuple[Layer, ...]]:
        """Applies all rules until none applies; returns values and layers that are still in use."""
        rules: tuple[Callable[[Layer], bool], ...] = (
            self._same_quantize,
            self._quantize_before_max_pool,
            self._relu_before_max_pool,
            self._relu_of_quantize,
            self._relu_of_layer,
            self._quantize_of_layer,
            self._pool_of_bytes,
            self._pool_of_layer,
            self._residual_of_add,
            self._shortcut,
        )
        while any(rule(layer) for layer in self.layers for rule in rules):
            pass
        used = {name for layer in self.layers for name in layer.reads} | {layer.y for layer in self.layers}
        return {name: value for name, value in self.values.items() if name in used}, tuple(self.layers)

    # --- rules: each returns whether it changed anything ---

    def _same_quantize(self, layer: Layer) -> bool:
        """Two equal roundings of one value are one."""
        if not isinstance(layer, Quantize):
            return False
        for other in self.layers:
            if other is layer:
                return False
            if isinstance(other, Quantize) and (other.x, other.output) == (layer.x, layer.output):
                self._drop(layer, other.y)
                return True
        return False

    def _quantize_before_max_pool(self, layer: Layer) -> bool:
        """The largest of rounded values is the rounded largest."""
        pool = self._only_source(layer, MaxPool) if isinstance(layer, Quantize) else None
        if not isinstance(pool, MaxPool) or not isinstance(layer, Quantize):
            return False
        self._swap(pool, replace(layer, x=pool.x, y=self._named(pool.x, f"{layer.y}_{pool.x}", "uint8")), layer.y)
        return True

    def _relu_before_max_pool(self, layer: Layer) -> bool:
        pool = self._only_source(layer, MaxPool) if isinstance(layer, Relu) else None
        if not isinstance(pool, MaxPool) or not isinstance(layer, Relu):
            return False
        self._swap(pool, replace(layer, x=pool.x, y=self._named(pool.x, f"{layer.y}_{pool.x}", "float32")), layer.y)
        return True

    def _relu_of_quantize(self, layer: Layer) -> bool:
        """Rounding to bytes from the zero point on includes a ReLU before it."""
        source = self._source(layer.x) if isinstance(layer, Quantize) else None
        if not isinstance(source, Relu) or not isinstance(layer, Quantize):
            return False
        least = max(layer.output.least, layer.output.zero_point)
        self._put(layer, replace(layer, x=source.x, output=replace(layer.output, least=least)))
        self._drop_unread(source)
        return True

    def _relu_of_layer(self, layer: Layer) -> bool:
        if not isinstance(layer, Relu):
            return False
        source = self._only_source(layer, AdderConv, MultiplyConv)
        if not isinstance(source, (AdderConv, MultiplyConv)) or not isinstance(source.output, Floats):
            return False
        self._merge(source, replace(source, y=layer.y, output=Floats(relu=True)), layer)
        return True

    def _quantize_of_layer(self, layer: Layer) -> bool:
        if not isinstance(layer, Quantize):
            return False
        source = self._only_source(layer, AdderConv, MultiplyConv, SumPool)
        if isinstance(source, (AdderConv, MultiplyConv)) and isinstance(source.output, Floats):
            least = max(layer.output.least, layer.output.zero_point) if source.output.relu else layer.output.least
            self._merge(source, replace(source, y=layer.y, output=replace(layer.output, least=least)), layer)
            return True
        return False

    def _pool_of_bytes(self, layer: Layer) -> bool:
        source = self._source(layer.x) if isinstance(layer, SumPool) else None
        if not isinstance(source, Dequantize) or not isinstance(layer, SumPool):
            return False
        self._put(layer, replace(layer, x=source.x, step=(source.step, source.zero_point)))
        self._drop_unread(source)
        return True

    def _pool_of_layer(self, layer: Layer) -> bool:
        """A pool over all pixels is a sum in the layer before it; with integers only, any pool reads integers."""
        if not isinstance(layer, SumPool) or layer.step is not None:
            return False
        source = self._only_source(layer, AdderConv, MultiplyConv)
        if not isinstance(source, (AdderConv, MultiplyConv)) or not isinstance(source.output, Floats):
            return False
        x = self.values[layer.x]
        total = layer.window.kernel == (x.height, x.width) and not any(layer.window.padding)
        if not total and self.epilogue != "integer":
            return False
        counts = self._named(layer.x, f"{layer.x}_counts", "int32")
        summing = replace(source, y=counts, output=Counts(layer.inverse, layer.bound, source.output.relu, total))
        self._put(source, summing)
        if total:
            self.values[counts] = replace(self.values[counts], height=1, width=1)
            layer = self._put(layer, replace(layer, window=replace(layer.window, kernel=(1, 1), stride=(1, 1))))
        self._put(layer, replace(layer, x=counts))
        return True

    def _residual_of_add(self, layer: Layer) -> bool:
        """The sum of an adder layer's floats and other floats is a residual of the layer."""
        if not isinstance(layer, Add) or layer.a == layer.b:
            return False
        for mine, other in ((layer.a, layer.b), (layer.b, layer.a)):
            source = self._source(mine)
            if not isinstance(source, AdderConv) or len(self._readers(mine)) != 1 or mine in self.kept:
                continue
            if source.output == Floats() and source.residual is None and source.shortcut is None:
                self._drop_at(source)
                self._put(layer, replace(source, y=layer.y, residual=other, residual_scale=1.0))
                return True
        return False

    def _shortcut(self, layer: Layer) -> bool:
        """Floats of an adder layer that are read only as a residual are computed beside the layer that reads them."""
        if not isinstance(layer, AdderConv) or layer.residual is None or layer.depthwise:
            return False
        source = self._source(layer.residual)
        if not isinstance(source, AdderConv) or len(self._readers(source.y)) != 1 or source.y in self.kept:
            return False
        if source.output != Floats() or source.residual or source.shortcut or source.sums.groups > 1:
            return False
        self._drop_at(source)
        self._put(layer, replace(layer, residual=None, shortcut=source.sums))
        return True

    # --- layers ---

    def _source(self, name: str) -> Layer | None:
        return next((layer for layer in self.layers if layer.y == name), None)

    def _readers(self, name: str) -> list[Layer]:
        return [layer for layer in self.layers for read in layer.reads if read == name]

    def _only_source(self, layer: Quantize | Relu | SumPool, *kinds: type[Layer]) -> Layer | None:
        """Returns the layer whose output only `layer` reads, if it is of these kinds."""
        source = self._source(layer.x)
        alone = len(self._readers(layer.x)) == 1 and layer.x not in self.kept
        return source if alone and isinstance(source, kinds) else None

    def _named(self, like: str, name: str, dtype: str) -> str:
        self.values[name] = replace(self.values[like], name=name, dtype=dtype)
        return name

    def _put(self, old: Layer, new: _Kind) -> _Kind:
        self.layers[self._place(old)] = new
        return new

    def _place(self, layer: Layer) -> int:
        return next(i for i, other in enumerate(self.layers) if other is layer)

    def _drop_at(self, layer: Layer) -> None:
        del self.layers[self._place(layer)]

    def _drop(self, layer: Layer, instead: str) -> None:
        """Removes a layer; what read its output reads another value."""
        self._drop_at(layer)
        self.layers = [other.renamed(layer.y, instead) for other in self.layers]

    def _drop_unread(self, layer: Layer) -> None:
        if not self._readers(layer.y) and layer.y not in self.kept:
            self._drop_at(layer)

    def _merge(self, source: Layer, new: Layer, layer: Layer) -> None:
        """Puts `new` in the place of a layer and of the only one that reads it."""
        self._put(source, new)
        self._drop_at(layer)

    def _swap(self, pool: MaxPool, before: Layer, y: str) -> None:
        """Puts a layer before the pool that it followed; the pool then writes y."""
        after = next(layer for layer in self.layers if layer.y == y)
        self._drop_at(after)
        place = self._place(pool)
        self.layers[place : place + 1] = [before, replace(pool, x=before.y, y=y)]
