"""idx files, the format of MNIST and similar sets."""

import gzip
import math
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 32  # input of LeNet-5 and of the CIFAR networks; smaller images are padded to it
CHUNK = 2**24  # bytes per read
IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def read_idx_images(folders: Sequence[Path], train: bool, remedy: str) -> tuple[Tensor, Tensor]:
    """Reads the training or test images of a set, zero-padded on all sides to 32x32, and their labels.

    Args:
        folders: searched in this order for each file, plain or compressed by gzip.
        train: the training images, else the test images.
        remedy: end of the message if a file is missing.

    Returns:
        Images (N, 1, 32, 32) uint8 and labels (N) int64.

    Raises:
        FileNotFoundError: a file is in none of the folders.
        ValueError: a file is not a valid idx file, or the two do not fit together.
    """
    images_path, labels_path = (_find(folders, stem, remedy) for stem in (IDX_FILES[:2] if train else IDX_FILES[2:]))
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.dim() != 3 or images.numel() == 0 or max(images.shape[1:]) > SIDE:
        raise ValueError(
            f"{images_path}: expected images (N, H, W) of at most {SIDE}x{SIDE}, got shape {tuple(images.shape)}"
        )
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{labels_path}: expected {len(images)} labels, got shape {tuple(labels.shape)}")
    height, width = SIDE - images.size(1), SIDE - images.size(2)
    border = (width // 2, width - width // 2, height // 2, height - height // 2)
    return F.pad(images, border).unsqueeze(1), labels.long()


def _find(folders: Sequence[Path], stem: str, remedy: str) -> Path:
    for folder in folders:
        for path in (folder / stem, folder / f"{stem}.gz"):
            if path.is_file():
                return path
    raise FileNotFoundError(f"data: no {stem} or {stem}.gz in {' or '.join(map(str, folders))}: {remedy}")


def read_idx(path: Path) -> Tensor:
    """Reads an idx file of unsigned bytes, plain or compressed by gzip, as a uint8 tensor.

    The format: two zero bytes, the type (8 for unsigned bytes), the number of dimensions, each size as a big-endian
    32-bit number, then the data in row-major order.

    Raises:
        ValueError: a damaged file, or one of another type.
    """
    with open(path, "rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if not compressed:
            return _read(path, file)
        with gzip.GzipFile(fileobj=file) as unpacked:
            try:
                return _read(path, unpacked)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(f"{path}: expected a whole gzip file, got a damaged one ({error})") from error


def _read(path: Path, file: BinaryIO | gzip.GzipFile) -> Tensor:
    """Reads at most what the header declares: a compressed file may hold far more."""
    magic = file.read(4)
    if len(magic) < 4 or magic[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path}: expected an idx file of unsigned bytes (00 00 08 ..), got {magic.hex(' ')!r}")
    sizes = file.read(4 * magic[3])
    if len(sizes) < 4 * magic[3]:
        raise ValueError(f"{path}: expected {magic[3]} sizes behind the magic number, got the end of the file")
    shape = struct.unpack(f">{magic[3]}I", sizes)
    expected, memory = math.prod(shape), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if len(shape) > 4 or expected > memory:
        raise ValueError(f"{path}: expected at most 4 sizes and the {memory} bytes of memory, got shape {shape}")
    content = bytearray()  # grows by what was read, whatever the header says
    while len(content) < expected and (chunk := file.read(min(expected - len(content), CHUNK))):
        content += chunk
    surplus = file.read(1)
    if len(content) < expected or surplus:
        got = f"{len(content) + len(surplus)}" + " or more" * len(surplus)
        raise ValueError(f"{path}: expected {expected} bytes for shape {shape}, got {got}")
    # torch.frombuffer refuses an empty buffer
    return torch.frombuffer(content, dtype=torch.uint8).reshape(shape) if content else torch.empty(shape).byte()
