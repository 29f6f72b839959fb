"""The weights of a network by kind of layer, and the densities that fit them."""

import math
from dataclasses import dataclass

from torch import Tensor, nn

from adderops import AdderConv2d
from adderops.models import classifier, matched_layers


@dataclass(frozen=True)
class Fit:
    """A density fitted to weights by maximum likelihood.

    Attributes:
        center: mean of the Gaussian, median of the Laplace density.
        scale: standard deviation of the Gaussian, mean distance from the median of the Laplace density.
        log_likelihood: of the weights under the fit, in nats per weight.
    """

    center: float
    scale: float
    log_likelihood: float


def fit_gaussian(weights: Tensor) -> Fit:
    r"""Returns the Gaussian fit: :math:`-\log(\sigma \sqrt{2\pi e})` nats per weight.

    >>> fit_gaussian(torch.tensor([-1.0, 1.0]))
    Fit(center=0.0, scale=1.0, log_likelihood=-1.4189385332046727)
    """
    center, scale = weights.double().mean().item(), weights.double().std(correction=0).item()
    return Fit(center, scale, -0.5 * math.log(2 * math.pi * math.e * scale**2))


def fit_laplace(weights: Tensor) -> Fit:
    r"""Returns the Laplace fit: :math:`-\log(2 e b)` nats per weight.

    >>> fit_laplace(torch.tensor([-1.0, 0.0, 1.0]))
    Fit(center=0.0, scale=0.6666666666666666, log_likelihood=-1.2876820724517808)
    """
    center = weights.double().median().item()
    scale = (weights.double() - center).abs().mean().item()
    return Fit(center, scale, -math.log(2 * math.e * scale))


def layer_weights(network: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Returns the weights of the layers by kind and name, without layers whose weights are all equal: no density fits.

    The kinds are 'first convolution', 'convolutions' and 'adder layers' after it, and 'classifier'.
    """
    inner = matched_layers(network).items()
    convolutions = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d)]
    kinds = [
        *(("first convolution", *first) for first in convolutions[:1]),  # a multilayer perceptron has none
        *(("adder layers" if isinstance(layer, AdderConv2d) else "convolutions", name, layer) for name, layer in inner),
        ("classifier", *classifier(network)),
    ]
    found: dict[str, dict[str, Tensor]] = {}
    for kind, name, layer in kinds:
        weights = layer.get_parameter("weight").detach().flatten()
        if weights.min() < weights.max():
            found.setdefault(kind, {})[name] = weights
    return found
