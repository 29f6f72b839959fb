"""Writes idx files, the format of MNIST, for the tests of the trainer."""

import gzip
import struct
from pathlib import Path

import torch

IDX_NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def idx_bytes(array: torch.Tensor) -> bytes:
    """The format as written down at yann.lecun.com/exdb/mnist: magic 0x0000080n, n big-endian sizes, bytes."""
    return struct.pack(f">I{array.dim()}I", 0x800 + array.dim(), *array.shape) + bytes(array.flatten().tolist())


def write_idx_set(folder: Path, side: int = 28, compress: bool = False, train: int = 12) -> list[torch.Tensor]:
    """Writes random images of three classes, 5 of them for testing; returns the arrays in the order of IDX_NAMES."""
    generator = torch.Generator().manual_seed(1)
    arrays = []
    for count in (train, 5):
        arrays += [torch.randint(0, 256, (count, side, side), generator=generator), torch.arange(count) % 3]
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in zip(IDX_NAMES, arrays, strict=True):
        content = idx_bytes(array)
        (folder / (name + ".gz" * compress)).write_bytes(gzip.compress(content) if compress else content)
    return arrays
