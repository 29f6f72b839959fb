"""Adder layers, and `convert`, which replaces the convolutions of a model by them."""

import sys
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from operator import index
from typing import Any, Literal, NoReturn

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from adderops.dataflow import reasons_to_stay
from adderops.functional import adder_conv2d, adder_linear
from adderops.optim import AdaptiveRateLayer

_NAME_OF_CHECKPOINT_KEY = {"adder": "weight", "b": "bias"}  # names in AdderNet's published checkpoints
_MARK = "_extra_state"  # the key that PyTorch gives to what get_extra_state returns
_FUSERS = (nn.utils.fuse_conv_bn_eval.__code__, nn.utils.fuse_linear_bn_eval.__code__)


class _AdderLayer(AdaptiveRateLayer):
    """Base of the adder layers: initialisation, and a mark that tells their weights from those of other layers.

    The weights of an adder layer and of a convolution have the same shape but another meaning. So the state_dict of an
    adder layer has a mark next to the weight, `_extra_state`, and loading refuses weights without it. Exceptions are
    AdderNet's published checkpoints, in which adder weights have a name of their own.
    """

    bias: Tensor | None

    def reset_parameters(self) -> None:
        """Draws the weights from N(0, 1), as AdderNet does without a fan-in factor; sets the bias to 0."""
        nn.init.normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: dict[str, Any],
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        for old, new in _NAME_OF_CHECKPOINT_KEY.items():
            if prefix + old in state_dict and prefix + new not in state_dict:
                state_dict[prefix + new] = state_dict.pop(prefix + old)
                state_dict.setdefault(prefix + _MARK, self.get_extra_state())
        if state_dict.setdefault(prefix + _MARK, None) is None and prefix + "weight" in state_dict:
            errors.append(
                f"{prefix}weight: expected the weight of an {type(self).__name__}, got one without the mark of adder "
                f"weights, {prefix}{_MARK} (from before there were marks: adderops.models.mark_adder_weights)"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def get_extra_state(self) -> Tensor:
        """Returns the mark of adder weights; a tensor, because every file format for weights can hold one."""
        return torch.ones((), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        """Does nothing: the mark has no value, only its presence counts."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Registers a parameter, as `nn.Module` does.

        Raises:
            TypeError: torch's functions that fold a BatchNorm into a linear layer call it.
        """
        # they take any layer with weight and bias for a linear map, whose weights a BatchNorm can scale
        caller = sys._getframe(1).f_back
        if caller is not None and caller.f_code in _FUSERS:
            raise TypeError(
                f"{caller.f_code.co_name}: expected a linear layer, got {type(self).__name__}: a BatchNorm cannot be "
                "folded into the weights of an adder layer"
            )
        super().register_parameter(name, param)

    def __prepare_scriptable__(self) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__}: expected torch.export or torch.jit.trace, got torch.jit.script, "
            "which cannot compile the argument rules of adder_conv2d"
        )

    def extra_repr(self) -> str:
        """Returns the arguments that `repr` shows."""
        return f"{super().extra_repr()}, eta={self.eta}"


class AdderConv2d(_AdderLayer, _ConvNd):
    r"""Adder convolution layer with the signature of `torch.nn.Conv2d`.

    .. math:: Y[n,co,p] = -\sum_k |X[n,k,p] - W[co,k]| + b[co]

    Without a bias all outputs are <= 0: put a `BatchNorm2d` after each layer, AdderNets do not train without one. The
    training gradients are AdderNet's, not the derivative; see `adderops.functional.adder_conv2d`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode, device, dtype: as in
            `torch.nn.Conv2d`. A zero-padded pixel counts: it adds |W| to the distance.
        bias: False by default, unlike `torch.nn.Conv2d`, because a BatchNorm follows.
        eta: every `torch.optim.Optimizer` steps with a weight gradient of root mean square `eta` (AdderNet's adaptive
            learning rate, `adderops.optim.normalize_gradient`); None leaves the raw gradient. The layer returns the raw
            gradient and the start of `step` normalizes it, so loss scaling, clipping, accumulation and averaging over
            replicas change only its direction. Under `torch.func` and in an exported training program the backward
            pass normalizes. Before an update of your own call `adderops.optim.normalize_gradients`; the first update
            without it gives a warning.

    Shape:
        (N, C_in, H, W) or (C_in, H, W) -> (N, C_out, OH, OW) or (C_out, OH, OW).

    A state_dict has a mark next to the weight, `_extra_state`. `load_state_dict` refuses weights without it, because
    those of a convolution have the same shape. It accepts the keys `adder` and `b` of AdderNet's published checkpoints
    for `weight` and `bias`.

    Raises:
        ValueError, TypeError: as `adderops.functional.adder_conv2d`.

    Source: AdderNet, arXiv 1912.13200.

    >>> layer = AdderConv2d(16, 32, kernel_size=3, padding=1)
    >>> layer
    AdderConv2d(16, 32, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False, eta=0.2)
    >>> y = layer(torch.randn(8, 16, 28, 28))
    >>> y.shape
    torch.Size([8, 32, 28, 28])
    >>> optimizer, before = torch.optim.SGD(layer.parameters(), lr=0.1), layer.weight.detach().clone()
    >>> y.square().sum().backward()
    >>> optimizer.step()
    >>> print(f"{(layer.weight - before).square().mean().sqrt():.4f}")  # lr * eta
    0.0200
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        eta: float | None = 0.2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            _pair("kernel_size", kernel_size),
            _pair("stride", stride),
            padding if isinstance(padding, str) else _pair("padding", padding),
            _pair("dilation", dilation),
            transposed=False,
            output_padding=(0, 0),
            groups=int(groups) if isinstance(groups, Integral) else groups,  # also NumPy's
            bias=bias,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )
        self.set_eta(eta)

    def forward(self, input: Tensor) -> Tensor:
        """Returns the adder convolution of `input`."""
        padding = self.padding
        if self.padding_mode != "zeros":
            input, padding = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), (0, 0)
        return adder_conv2d(input, self.rated_weight(), self.bias, self.stride, padding, self.dilation, self.groups)


def _pair(name: str, value: int | Iterable[int]) -> tuple[int, int]:
    """Returns (height, width) of an argument that nn.Conv2d takes as one integer or two, also NumPy's."""
    try:
        values = list(map(index, value)) if isinstance(value, Iterable) else [index(value)] * 2
    except TypeError:
        values = []
    if len(values) != 2:
        raise TypeError(f"AdderConv2d: {name}: expected an integer or a pair of integers, got {value!r}")
    return values[0], values[1]


class AdderLinear(_AdderLayer):
    r"""Adder layer on vectors with the signature of `torch.nn.Linear`: a 1x1 adder convolution.

    .. math:: y[co] = -\sum_{ci} |x[ci] - W[co,ci]| + b[co]

    Args:
        in_features, out_features, device, dtype: as in `torch.nn.Linear`.
        bias, eta: as in `AdderConv2d`.

    Shape:
        (*, in_features) -> (*, out_features), with any number of leading dimensions.

    Raises:
        ValueError, TypeError: as `adderops.functional.adder_linear`.

    Source: AdderNet, arXiv 1912.13200.

    >>> layer = AdderLinear(2, 1)
    >>> _ = nn.init.constant_(layer.weight, 3.0)
    >>> layer(torch.tensor([1.0, 5.0])).detach()
    tensor([-4.])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        eta: float | None = 0.2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight: Tensor = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()
        self.set_eta(eta)

    def forward(self, input: Tensor) -> Tensor:
        """Returns minus the L1 distances of `input` to the filters."""
        return adder_linear(input, self.rated_weight(), self.bias)

    def extra_repr(self) -> str:
        """Returns the arguments that `repr` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"eta={self.eta}"
        )


def convert(
    model: nn.Module,
    *,
    filter: Callable[[str, nn.Conv2d], bool] | None = None,
    eta: float | None = 0.2,
    verbose: bool = True,
) -> nn.Module:
    """Replaces the `nn.Conv2d` of a model by `AdderConv2d` of the same geometry with new weights, in place.

    A convolution is replaced if a normalisation follows it: directly, or after a concatenation, pooling or change of
    shape. All others stay, because the outputs of an adder layer are all <= 0 and large: gates (squeeze-and-excitation
    would stay closed), heads, and summands of a shortcut without normalisation. BatchNorm, InstanceNorm, GroupNorm and
    LayerNorm count as normalisation. A frozen BatchNorm does not: its statistics belong to other weights.

    As in AdderNet the first convolution stays, because no layer precedes it, and so does the classifier, because no
    layer follows it, even if a BatchNorm normalises its logits. `torch.fx` traces the model to find out. If it cannot,
    it traces the parts of the model, and the order of registration decides.

    A convolution also stays if its replacement would lose something: a custom `forward`, hooks, parametrizations, or
    uninitialised parameters. Device, dtype, memory format and training mode are kept. A module that occurs in several
    places is replaced by one layer.

    Args:
        model: any module; if it is itself a `Conv2d`, use the return value.
        filter: called with name and module of each candidate; its result replaces the rule above.
        eta: of the new layers.
        verbose: prints one line per convolution: replaced, or kept and why.

    Returns:
        The model.

    Raises:
        ValueError: eta is not a positive finite number or None.

    >>> model = nn.Sequential(
    ...     *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
    ...     *(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
    ...     *(nn.Conv2d(8, 8, 3), nn.Sigmoid(), nn.Flatten(), nn.LazyLinear(10)),
    ... )
    >>> model = convert(model)
    convert: kept     0: first convolution
    convert: replaced 3: AdderConv2d(8, 8, kernel_size=(3, 3), stride=(1, 1), eta=0.2)
    convert: kept     6: no normalisation after it but Sigmoid
    convert: 1 of 3 convolutions replaced
    """
    reasons = reasons_to_stay(model) if filter is None else {}
    report = print if verbose else lambda line: None
    replacements: dict[nn.Module, nn.Module] = {}
    seen = 0
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Conv2d):
            continue
        seen += 1
        kept = _cannot_replace(module)
        if kept is None and filter is not None:
            kept = None if filter(name, module) else "filter"
        elif kept is None:
            kept = reasons[module]
        if kept is None:
            replacements[module] = _adder_layer_like(module, eta)
        report(f"convert: kept     {name}: {kept}" if kept else f"convert: replaced {name}: {replacements[module]}")
    report(f"convert: {len(replacements)} of {seen} convolutions replaced")

    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in replacements and name:
            model.set_submodule(name, replacements[module])
    return replacements.get(model, model)


def _cannot_replace(conv: nn.Conv2d) -> str | None:
    """Returns why an AdderConv2d cannot replace this convolution, or None."""
    kind = type(conv)
    if kind.forward is not nn.Conv2d.forward or kind._conv_forward is not nn.Conv2d._conv_forward:
        return f"{kind.__name__} has a custom forward"
    if nn.utils.parametrize.is_parametrized(conv):
        return "parametrized"
    if any(map(nn.parameter.is_lazy, conv.parameters())):
        return "not yet initialised: run the model once first"
    if conv._forward_hooks or conv._forward_pre_hooks or conv._backward_hooks or conv._backward_pre_hooks:
        return "has hooks"
    return None


def _adder_layer_like(conv: nn.Conv2d, eta: float | None) -> AdderConv2d:
    layer = AdderConv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        conv.bias is not None,
        conv.padding_mode,
        eta,
        conv.weight.device,
        conv.weight.dtype,
    )
    if not conv.weight.is_contiguous() and conv.weight.is_contiguous(memory_format=torch.channels_last):
        layer.to(memory_format=torch.channels_last)
    return layer.train(conv.training)
