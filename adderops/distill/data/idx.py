"""idx files, the format of MNIST and of sets like it."""

import gzip
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 32  # the input of LeNet-5 and of the CIFAR networks, to which smaller images are brought
IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def read_idx_images(folders: Sequence[Path], train: bool, remedy: str) -> tuple[Tensor, Tensor]:
    """Reads the training or the test images of a set, centred on 32x32 with zeros around them, and their labels.

    Args:
        folders: where to look, in this order, for each file: plain or with gzip.
        train: the training images, else the test images.
        remedy: end of the message where a file is missing.

    Returns:
        Images (N, 1, 32, 32) uint8 and labels (N) int64.

    Raises:
        FileNotFoundError: a file is in none of the folders.
        ValueError: a file is not a right idx file, or the two do not fit together.
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
    """Reads an idx file of bytes, plain or with gzip, as a uint8 tensor.

    The format: two zero bytes, the type (8 for unsigned bytes), the number of dimensions, each size as a big-endian
    32-bit number, then the data in row-major order.

    Raises:
        ValueError: damaged, or another type than unsigned bytes.
    """
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path}: expected a whole gzip file, got a damaged one ({error})") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path}: expected an idx file of unsigned bytes (00 00 08 ..), got {content[:4].hex(' ')!r}")
    begin = 4 + 4 * content[3]
    if len(content) < begin:
        raise ValueError(f"{path}: expected {content[3]} sizes behind the magic number, got the end of the file")
    shape = struct.unpack(f">{content[3]}I", content[4:begin])
    if len(content) - begin != math.prod(shape):
        raise ValueError(f"{path}: expected {math.prod(shape)} bytes for shape {shape}, got {len(content) - begin}")
    return torch.frombuffer(bytearray(content[begin:]), dtype=torch.uint8).reshape(shape)
