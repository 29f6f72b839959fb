"""Image sets as tensors in memory: scikit-learn's digits and folders of idx files (the format of MNIST).

Every set is brought to 32x32, the input of LeNet-5 and of the CIFAR networks.
"""

import gzip
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 32
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist puts it
IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@dataclass(frozen=True)
class Dataset:
    """Images and labels in memory.

    Attributes:
        name: for tables.
        train_images, test_images: (N, C, 32, 32) uint8.
        train_labels, test_labels: (N) int64, from 0 to num_classes - 1.
        num_classes: number of labels.
        mean, std: of the training images, per channel (1, C, 1, 1), in grey levels.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    mean: Tensor
    std: Tensor

    def normalize(self, images: Tensor) -> Tensor:
        """Returns (images - mean) / std as float32."""
        return (images - self.mean) / self.std


def load_dataset(data: str) -> Dataset:
    """Loads an image set.

    Args:
        data: 'digits', 'fashion-mnist', or the path of a folder with the four idx files of MNIST or a set like it, each
            plain or with gzip.

    Raises:
        FileNotFoundError: no such folder, or a file is missing in it; the message says how to get it.
        ValueError: a file is not a right idx file.

    >>> load_dataset("digits").train_images.shape
    torch.Size([1297, 1, 32, 32])
    """
    if data == "digits":
        return _digits()
    if data == "fashion-mnist":
        return _idx_folder(FASHION_MNIST, data, "install it with `apt-get install dataset-fashion-mnist`")
    return _idx_folder(Path(data), Path(data).resolve().name, "expected digits, fashion-mnist or a folder of idx files")


def epoch_batches(count: int, batch_size: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
    """Returns the indices of each batch of an epoch, a function of its arguments alone: a resumed run sees the same.

    The images are dealt out evenly, so that no small batch is left for BatchNorm at the end: all batches have
    `batch_size` images or a few fewer, and every image occurs once.

    >>> [len(batch) for batch in epoch_batches(count=10, batch_size=4, seed=0, epoch=0)]
    [4, 3, 3]
    """
    entropy = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(int(entropy >> np.uint64(1))))
    return order.tensor_split(math.ceil(count / batch_size))


def _dataset(name: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> Dataset:
    # by histogram: exact, and without a copy of the set in a wider type
    counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in train[0].unbind(1)]).double()
    share, level = counts / counts.sum(1, keepdim=True), torch.arange(256.0, dtype=torch.double)
    mean = share @ level
    std = (share @ level.square() - mean.square()).sqrt().clamp(min=1.0)  # a blank image set has 0
    return Dataset(name, *train, *test, int(train[1].max()) + 1, *(v.float().view(1, -1, 1, 1) for v in (mean, std)))


def _digits() -> Dataset:
    """The 1797 digits of scikit-learn, 8x8 pixels enlarged four times; a fixed random third of 500 is the test set."""
    try:
        from sklearn.datasets import load_digits  # takes a second to import, and only this set needs it
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError("digits needs scikit-learn: install the extra `adderops[distill]`") from missing

    digits = load_digits()
    images = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    images = images.repeat_interleave(SIDE // 8, dim=2).repeat_interleave(SIDE // 8, dim=3)
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[:500], order[500:]
    return _dataset("digits", (images[train], labels[train]), (images[test], labels[test]))


def _idx_folder(folder: Path, name: str, remedy: str) -> Dataset:
    if not folder.is_dir():
        raise FileNotFoundError(f"data: no folder {folder}: {remedy}")
    paths = [_find_idx(folder, stem, remedy) for stem in IDX_FILES]
    sets = []
    for images_path, labels_path in (paths[:2], paths[2:]):
        images, labels = read_idx(images_path), read_idx(labels_path)
        if images.dim() != 3 or images.numel() == 0 or max(images.shape[1:]) > SIDE:
            raise ValueError(
                f"{images_path}: expected images (N, H, W) of at most {SIDE}x{SIDE}, got shape {tuple(images.shape)}"
            )
        if labels.shape != images.shape[:1]:
            raise ValueError(f"{labels_path}: expected {len(images)} labels, got shape {tuple(labels.shape)}")
        height, width = SIDE - images.size(1), SIDE - images.size(2)
        border = (width // 2, width - width // 2, height // 2, height - height // 2)
        sets.append((F.pad(images, border).unsqueeze(1), labels.long()))
    if sets[1][1].max() > sets[0][1].max():
        raise ValueError(f"{paths[3]}: expected labels up to {sets[0][1].max()} as in training, got {sets[1][1].max()}")
    return _dataset(name, *sets)


def _find_idx(folder: Path, stem: str, remedy: str) -> Path:
    for path in (folder / stem, folder / f"{stem}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"data: no {stem} or {stem}.gz in {folder}: {remedy}")


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
