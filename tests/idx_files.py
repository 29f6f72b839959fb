"""Writes idx files, the format of MNIST, for the tests of the trainer."""

import struct

import torch


def idx_bytes(array: torch.Tensor) -> bytes:
    """The format as written down at yann.lecun.com/exdb/mnist: magic 0x0000080n, n big-endian sizes, bytes."""
    return struct.pack(f">I{array.dim()}I", 0x800 + array.dim(), *array.shape) + bytes(array.flatten().tolist())
