"""Re-estimation of BatchNorm statistics, which lag behind the weights of adder networks."""

import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def reestimate_batchnorm(
    model: nn.Module, batches: Iterable[Tensor | tuple[Any, ...] | list[Any]], device: torch.device | str | None = None
) -> nn.Module:
    """Re-estimates the running statistics of every BatchNorm of a model from batches of images, in place.

    The weight steps of an adder layer have a fixed size, so at a constant learning rate the running averages lag
    behind the weights, and the test accuracy can be at chance while the training accuracy is 1. Call this before each
    test and before saving, with a few hundred training images.

    Unlike `torch.optim.swa_utils.update_bn` this keeps the mode of every module, runs all modules but the BatchNorms in
    evaluation mode (no dropout), and changes nothing if it fails. The new statistics are means over the batches. In a
    model in training mode a BatchNorm in evaluation mode counts as frozen and is left alone.

    Args:
        model: with or without BatchNorm; `batches` is not read without.
        batches: inputs of the model, or tuples whose first element is the input, as a DataLoader of (images, labels)
            returns them. Use batches of equal size: each batch has the same weight.
        device: the device to move the batches to; None leaves them where they are.

    Returns:
        The model.

    Raises:
        ValueError: no batch, or one that leads to statistics that are not finite.
        Also what the model raises for a batch. The statistics are then unchanged.

    Source: arXiv 2212.10200 does this after quantized layers.

    >>> model = nn.Sequential(nn.BatchNorm2d(1)).eval()
    >>> model = reestimate_batchnorm(model, [torch.tensor([[[[1.0, 3.0]]]])])
    >>> model[0].running_mean, model[0].running_var
    (tensor([2.]), tensor([2.]))
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        and module.running_mean is not None
        and (module.training or not model.training)
    ]
    if not norms:
        return model
    modes = [(module, module.training) for module in model.modules()]
    kept = [(norm, norm.momentum, {name: value.clone() for name, value in norm.named_buffers()}) for norm in norms]
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
            norm.momentum = None  # the mean over all batches
        count = 0
        for batch in batches:
            images = batch[0] if isinstance(batch, (tuple, list)) else batch
            with _eager():
                model(images if device is None else images.to(device))
            count += 1
            for norm in norms:
                if not all(norm.get_buffer(name).isfinite().all() for name in ("running_mean", "running_var")):
                    raise ValueError(f"batches: expected inputs with finite statistics, got others in batch {count}")
        if count == 0:
            raise ValueError("batches: expected at least one, got none")
    except BaseException:
        for norm, _, buffers in kept:
            for name, value in buffers.items():
                norm.get_buffer(name).copy_(value)
        raise
    finally:
        for norm, momentum, _ in kept:
            norm.momentum = momentum
        for module, mode in modes:
            module.training = mode
    return model


def _eager() -> AbstractContextManager[Any]:
    """Turns torch.compile off, if it is loaded: it refuses a BatchNorm without momentum."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
