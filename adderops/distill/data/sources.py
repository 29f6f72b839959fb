"""Where image sets lie, and how they are read: as a whole into memory, or one image file at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import TensorDataset
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from adderops.distill.data.facts import numbers_of
from adderops.distill.data.idx import IDX_FILES, SIDE, read_idx_images
from adderops.distill.data.images import ImageFolder, Items

MNIST_LIKE = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST}
CIFAR = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}
SETS = ("digits", *MNIST_LIKE, *CIFAR, "imagenet")
DIGITS = tuple("0123456789")

ROOT = Path("data")
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist puts it

# mean and standard deviation of red, green and blue, from 0 to 1
CIFAR_STATISTICS = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # AdderNet's code; for CIFAR-100 the same
IMAGENET_STATISTICS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision's models


@dataclass(frozen=True)
class Part:
    """The training images or the test images of a set.

    Attributes:
        items: (image, label) by index.
        labels: (N) int64.
        classes: class names in the order of the labels; None if the set does not name them.
    """

    items: Items
    labels: Tensor
    classes: tuple[str, ...] | None


@dataclass(frozen=True)
class Source:
    """An image set as it lies on disk.

    Attributes:
        name: for tables.
        read: reads the training images (True) or the test images (False), with labels numbered by these class names.
        of_files: images are RGB images of PIL, each read when needed, instead of (C, 32, 32) uint8 in memory.
        augment: the usual augmentation.
        statistics: published mean and standard deviation; None: measured on the training images.
    """

    name: str
    read: Callable[[bool, Sequence[str] | None], Part]
    of_files: bool = False
    augment: str = "none"
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None


def find_source(data: str, root: Path | None, download: bool) -> Source:
    """Returns the set with this name or folder; nothing is read yet.  Arguments and errors: see `load_data`."""
    downloadable = (*MNIST_LIKE, *CIFAR)
    if download and data not in downloadable:
        raise ValueError(f"download: expected one of {', '.join(downloadable)}, got {data}")
    folder = Path(root or ROOT) if data in SETS else Path(data)
    if data == "digits":
        return Source(data, _read_digits)
    if data in MNIST_LIKE:
        return Source(data, partial(_read_mnist_like, data, folder, download))
    if data in CIFAR:
        read = partial(_read_cifar, CIFAR[data], folder, download)
        return Source(data, read, augment="crop-flip", statistics=CIFAR_STATISTICS)

    name = data if data in SETS else folder.resolve().name
    if data == "imagenet" or (folder / "train").is_dir() or (folder / "val").is_dir():
        read = partial(_read_image_folder, folder)
        return Source(name, read, of_files=True, augment="imagenet", statistics=IMAGENET_STATISTICS)
    expected = f"a folder of idx files ({', '.join(IDX_FILES)}) or of train/CLASS/IMAGE and val/CLASS/IMAGE"
    if not folder.is_dir():
        raise FileNotFoundError(f"data: no folder {folder}: expected {', '.join(SETS)} or {expected}")
    return Source(name, partial(_read_idx, [folder], f"expected {expected}", None))


def _in_memory(images: Tensor, labels: Tensor, classes: Sequence[str] | None, numbering: Sequence[str] | None) -> Part:
    if classes is not None and numbering is not None:
        labels, classes = numbers_of(classes, numbering)[labels], numbering
    return Part(TensorDataset(images, labels), labels, None if classes is None else tuple(classes))


def _read_digits(train: bool, numbering: Sequence[str] | None) -> Part:
    """The 1797 digits of scikit-learn, 8x8 pixels enlarged four times; a fixed random choice of 500 is the test set."""
    try:
        from sklearn.datasets import load_digits  # slow to import, and only this set needs it
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError("digits needs scikit-learn: install the extra `adderops[distill]`") from missing

    digits = load_digits()
    images = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    images = images.repeat_interleave(SIDE // 8, dim=2).repeat_interleave(SIDE // 8, dim=3)
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    part = order[500:] if train else order[:500]
    return _in_memory(images[part], labels[part], DIGITS, numbering)


def _read_idx(
    folders: list[Path], remedy: str, classes: Sequence[str] | None, train: bool, numbering: Sequence[str] | None
) -> Part:
    images, labels = read_idx_images(folders, train, remedy)
    if classes is not None and labels.max() >= len(classes):
        raise ValueError(f"{folders[0]}: expected labels up to {len(classes) - 1}, got {labels.max()}")
    return _in_memory(images, labels, classes, numbering)


def _read_mnist_like(name: str, root: Path, download: bool, train: bool, numbering: Sequence[str] | None) -> Part:
    kind = MNIST_LIKE[name]
    folders = [root, root / kind.__name__ / "raw", *([FASHION_MNIST] if name == "fashion-mnist" else [])]
    classes = DIGITS if name == "mnist" else kind.classes
    read = partial(_read_idx, folders, f"put the files of {name} there or give --download", classes, train, numbering)
    try:
        return read()
    except FileNotFoundError:
        if not download:
            raise
    _download(kind, root)
    return read()


def _read_cifar(
    kind: type[datasets.CIFAR10], root: Path, download: bool, train: bool, numbering: Sequence[str] | None
) -> Part:
    folder, archive = root / kind.base_folder, root / kind.filename
    # given an archive with the right checksum, torchvision unpacks it without the network
    if download or (not folder.is_dir() and check_integrity(archive, kind.tgz_md5)):
        _download(kind, root)
    found = [path for path in (folder, archive) if path.exists()]
    if not found:
        raise FileNotFoundError(f"data: no {folder} and no {archive}: put one of them there or give --download")
    try:
        part = kind(root, train=train)
    except RuntimeError as error:
        raise ValueError(
            f"{found[0]}: expected whole files with the checksums of torchvision.datasets.{kind.__name__}, got others: "
            f"give --download, or put {kind.base_folder} or {kind.filename} there"
        ) from error
    images = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
    return _in_memory(images, torch.tensor(part.targets), part.classes, numbering)


def _download(kind: type[datasets.VisionDataset], root: Path) -> None:
    try:
        kind(root, download=True)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())  # torchvision's has several lines
        raise OSError(f"download: expected to get {kind.__name__} into {root}, got: {reason}") from error


def _read_image_folder(folder: Path, train: bool, numbering: Sequence[str] | None) -> Part:
    part = folder / ("train" if train else "val")
    if not part.is_dir():
        raise FileNotFoundError(f"data: no folder {part}: expected train/CLASS/IMAGE and val/CLASS/IMAGE in {folder}")
    images = ImageFolder(part, numbering)
    return Part(images, torch.tensor(images.targets), tuple(numbering or images.classes))
