"""The check of the size of images, one step in the graphs of torch.fx."""

from torch import Tensor


def require_image_size(network: str, x: Tensor, side: int) -> Tensor:
    """Returns the images.

    Raises:
        ValueError: they are not `side` pixels high and wide.

    >>> import torch
    >>> require_image_size("LeNet5BN", torch.zeros(1, 1, 28, 28), 32)
    Traceback (most recent call last):
    ValueError: LeNet5BN: input: expected images of 32x32, got shape (1, 1, 28, 28)
    """
    if x.shape[-2:] != (side, side):
        raise ValueError(f"{network}: input: expected images of {side}x{side}, got shape {tuple(x.shape)}")
    return x
