"""An image set in the form that a run trains and tests on: split, augmented and normalized."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

from adderops.distill.data.facts import checksums
from adderops.distill.data.idx import SIDE
from adderops.distill.data.images import Items
from adderops.distill.data.loading import ImageSet
from adderops.distill.data.sources import find_source

FILE_SIDE = 224  # height and width of images from files, by default


@dataclass(frozen=True)
class Data:
    """An image set in the form that a run trains and tests on.

    Attributes:
        name: for tables.
        in_channels: 1 (grey) or 3 (RGB).
        num_classes: labels are 0 to num_classes - 1.
        train: the training images, augmented.
        test: the test images, or validation images held out of the training images.
        held_out: whether `test` is a validation set.
        classes: class names in the order of the labels; None if the set does not name them.
        side: height and width of an image in a batch.
        checksums: by what they sum ("test labels"), to recognize a changed set that has as many images.
    """

    name: str
    in_channels: int
    num_classes: int
    train: ImageSet
    test: ImageSet
    held_out: bool
    classes: tuple[str, ...] | None = None
    side: int = SIDE
    checksums: dict[str, str] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """Returns what a run records about the set and an exported network needs: sizes, names, normalization.

        Mean and standard deviation are per channel, for pixels from 0 to 1: x = (pixel - mean) / std.
        """
        return {
            "name": self.name,
            "channels": self.in_channels,
            "side": self.side,
            "num_classes": self.num_classes,
            "classes": None if self.classes is None else list(self.classes),
            "mean": (self.train.mean / 255).flatten().tolist(),
            "std": (self.train.std / 255).flatten().tolist(),
            "train_images": len(self.train),
            "test_images": len(self.test),
            "held_out": self.held_out,
            "checksums": self.checksums,
        }


def load_data(
    data: str,
    *,
    root: Path | None = None,
    download: bool = False,
    augment: str | None = None,
    train_images: int | None = None,
    validation: int = 0,
    side: int | None = None,
) -> Data:
    """Loads an image set.

    Images are 32x32 (smaller ones are zero-padded), those of an image folder `side` x `side`.  They are normalized by
    published numbers (CIFAR; ImageNet's for every image folder), or by mean and standard deviation of the training
    images.

    Args:
        data: 'digits' (embedded in scikit-learn), 'mnist', 'fashion-mnist', 'cifar10', 'cifar100', 'imagenet', or the
            path of a folder with the four idx files of a set like MNIST, or with train/CLASS/IMAGE and val/CLASS/IMAGE.
        root: folder of the sets given by name, laid out as torchvision does; './data' by default.  The idx files of
            mnist and fashion-mnist may lie directly in it, those of fashion-mnist where Debian's package puts them.
        download: get missing files by torchvision; for mnist, fashion-mnist, cifar10 and cifar100.
        augment: of training images: 'none'; 'crop', a random 32x32 crop of the image padded by 4 zeros; 'crop-flip',
            that and a random horizontal flip; 'imagenet', a random 8 % to 100 % of the area, resized, and a random
            horizontal flip.  By default crop-flip for CIFAR, imagenet for image folders, none otherwise.
        train_images: number of training images to keep, balanced over the classes; the same ones every time, and a
            subset of those of any larger number.
        validation: number of training images, balanced over the classes, that are held out before `train_images` is
            applied; they replace the test images, which are not read.
        side: height and width of the images of an image folder, 224 by default.

    Raises:
        FileNotFoundError: a folder or file is missing; the message says what was expected where.
        OSError: the download failed.
        ValueError: a file is damaged, or an argument is out of range or does not fit the set.

    >>> data = load_data("digits", validation=100)
    >>> len(data.train), len(data.test), data.held_out
    (1197, 100, True)
    >>> images, labels = next(iter(data.test.batches([torch.arange(8)])))
    >>> images.shape, labels.shape
    (torch.Size([8, 1, 32, 32]), torch.Size([8]))
    """
    source = find_source(data, root, download)
    augment = source.augment if augment is None else augment
    if source.of_files:
        if side is not None and side < 1:
            raise ValueError(f"side: expected at least 1, got {side}")
        transforms = _file_transforms(FILE_SIDE if side is None else side)
        test_transform = transforms["none"]
    else:
        if side is not None:
            raise ValueError(f"side: expected none for {data}, whose images are {SIDE}x{SIDE}, got {side}")
        transforms, test_transform = _tensor_transforms(), None
    if augment not in transforms:
        raise ValueError(f"augment: expected one of {', '.join(transforms)} for {data}, got {augment!r}")

    trained = source.read(True, None)
    num_classes = int(trained.labels.max()) + 1
    kept, held_out = _split(trained.labels, train_images, validation)
    sums = checksums("training", trained.items, trained.labels)
    if validation:
        test_items, test = trained.items, held_out
    else:
        tested = source.read(False, None)
        if tested.classes != trained.classes:  # folders only: other sets have the same names for both
            other = sorted(set(tested.classes or ()) ^ set(trained.classes or ()))
            where, expected = (getattr(part.items, "root", data) for part in (tested, trained))
            raise ValueError(f"{where}: expected the classes of {expected}, got a difference: {other[:5]}")
        test_items, test = tested.items, torch.arange(len(tested.labels))
        sums |= checksums("test", tested.items, tested.labels)
        if tested.labels.max() >= num_classes:
            raise ValueError(
                f"{data}: expected test labels up to {num_classes - 1} as in training, got {tested.labels.max()}"
            )
    if source.statistics is None:
        mean, std = _measure(_pixels(trained.items)[kept])
    else:
        mean, std = (255 * torch.tensor(values) for values in source.statistics)
    return Data(
        name=source.name,
        in_channels=len(mean),
        num_classes=num_classes,
        train=ImageSet(trained.items, kept, mean, std, transforms[augment]),
        test=ImageSet(test_items, test, mean, std, test_transform),
        held_out=validation > 0,
        classes=None if trained.classes is None else trained.classes[:num_classes],
        side=(side or FILE_SIDE) if source.of_files else SIDE,
        checksums=sums,
    )


def known_facts(data: str, root: Path | None, side: int) -> dict[str, Any]:
    """Returns the part of `Data.facts` that is known without the images.

    It has mean and standard deviation only if they are published.  `classes` is None: the files have the names.

    Args:
        data, root: as `load_data` takes them.
        side: of the images, if they are files.

    Raises:
        FileNotFoundError: `data` is a folder and missing.
    """
    source = find_source(data, root, download=False)
    facts = {"name": source.name, "side": side if source.of_files else SIDE, "classes": None, "checksums": {}}
    if source.statistics is not None:
        facts |= dict(zip(("mean", "std"), map(list, source.statistics), strict=True))
    return facts


def load_test_images(
    data: str, facts: dict[str, Any], root: Path | None = None, own: bool = False
) -> tuple[ImageSet, dict[str, str]]:
    """Loads the test images of a set for a network that was trained on another set, or earlier on this one.

    They are sized and normalized as the network's training images were; classes are matched by name, whatever their
    order.  Training images are not read.

    Args:
        data, root: as `load_data` takes them.
        facts: `Data.facts` of the set that the network was trained on.
        own: `data` is that set.  Another set without class names needs as many classes.

    Returns:
        The images, and their checksums.

    Raises:
        FileNotFoundError: a folder or file is missing.
        ValueError: a file is damaged, or the classes, channels or size are not those of the network.
    """
    source = find_source(data, root, download=False)
    tested = source.read(False, facts["classes"])
    channels, side = (3, facts["side"]) if source.of_files else (_pixels(tested.items).size(1), SIDE)
    if (channels, side) != (facts["channels"], facts["side"]):
        expected = (facts["channels"], facts["side"], facts["side"])
        raise ValueError(f"data: expected images (C, H, W) {expected} for this network, got {(channels, side, side)}")
    count, named = int(tested.labels.max()) + 1, tested.classes is not None and facts["classes"] is not None
    if count > facts["num_classes"] or (count < facts["num_classes"] and not named and not own):
        raise ValueError(f"data: expected {facts['num_classes']} classes for this network, got {count}")
    mean, std = (255 * torch.tensor(facts[name]) for name in ("mean", "std"))
    transform = _file_transforms(side)["none"] if source.of_files else None
    images = ImageSet(tested.items, torch.arange(len(tested.labels)), mean, std, transform)
    return images, checksums("test", tested.items, tested.labels)


def _pixels(items: Items) -> Tensor:
    """Returns the images of a set in memory, (N, C, 32, 32) uint8."""
    if not isinstance(items, TensorDataset):
        raise TypeError(f"expected images in memory, got {type(items).__name__}")
    return items.tensors[0]


def _tensor_transforms() -> dict[str, v2.Transform | None]:
    """Transforms of a 32x32 image in memory, by the name of the augmentation."""
    crop = v2.RandomCrop(SIDE, padding=4)
    return {"none": None, "crop": crop, "crop-flip": v2.Compose([crop, v2.RandomHorizontalFlip()])}


def _file_transforms(side: int) -> dict[str, v2.Transform]:
    """Transforms of an image from a file, by the name of the augmentation; for side 224 the usual ones of ImageNet."""
    whole = [v2.Resize(round(side * 256 / 224)), v2.CenterCrop(side)]
    part = [v2.RandomResizedCrop(side), v2.RandomHorizontalFlip()]
    return {"none": v2.Compose([*whole, v2.PILToTensor()]), "imagenet": v2.Compose([*part, v2.PILToTensor()])}


def _split(labels: Tensor, train_images: int | None, validation: int) -> tuple[Tensor, Tensor]:
    """Returns the indices of the training images and of the held-out images."""
    classes = labels.unique().numel()
    most = len(labels) - classes
    if validation and not classes <= validation <= most:
        raise ValueError(f"validation: expected 0 or {classes} (one a class) to {most}, got {validation}")
    most = len(labels) - validation
    if train_images is not None and not classes <= train_images <= most:
        raise ValueError(f"train_images: expected {classes} (one a class) to {most}, got {train_images}")
    order = _balanced_order(labels)
    return order[validation:][:train_images].sort().values, order[:validation].sort().values


def _balanced_order(labels: Tensor) -> Tensor:
    """Returns a fixed random order in which the classes take turns as long as they have images."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    order = order[labels[order].argsort(stable=True)]
    counts = labels.bincount()
    of_class = labels[order]
    turn = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[of_class]
    return order[(turn * len(counts) + of_class).argsort()]


def _measure(images: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and standard deviation per channel, in grey levels."""
    # from a histogram: exact, and without a copy of the set in a wider type
    counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in images.unbind(1)]).double()
    share, level = counts / counts.sum(1, keepdim=True), torch.arange(256.0, dtype=torch.double)
    mean = share @ level
    std = (share @ level.square() - mean.square()).sqrt().clamp(min=1.0)  # 0 if all images are blank
    return mean.float(), std.float()
