"""The published training recipes, by name: `python -m adderops.distill --recipe cifar10-resnet20`.

A recipe sets the options that are not given.  Sources: AdderNet, arXiv 1912.13200, section 4, and its code,
github.com/huawei-noah/AdderNet; PKKD, arXiv 2009.13044, section 4.  What they leave open is marked as ours.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Recipe:
    """Defaults of a run.

    Attributes:
        name: for --recipe.
        source: of the numbers.
        data, arch, epochs, batch_size, lr, weight_decay, nesterov: the options of the same names.
        train_images, validation, augment, seeds, test_every: likewise; by default all images, no validation images,
            the usual augmentation of the set, one seed, one test per epoch.
    """

    name: str
    source: str
    data: str
    arch: str
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    nesterov: bool
    train_images: int | None = None
    validation: int = 0
    augment: str | None = None
    seeds: int = 1
    test_every: int = 1


DEFAULT = "few-digits-lenet5"  # where neither --recipe nor --data nor --arch is given

_FEW_DIGITS = "ours: see docs/default_job.md"
_DIGITS = "ours: small enough to finish in a minute"
_LENET = "arXiv 1912.13200, section 4.1, for MNIST (50 epochs, batch 256); Nesterov and weight decay are ours"
_FASHION = "ours: the CIFAR recipe with the 50 epochs of LeNet-5-BN"
_CIFAR = "arXiv 2009.13044, section 4.1: 400 epochs, batch 256, lr 0.1, weight decay 5e-4, cosine"
_MOBILENET = "ours: the CIFAR recipe of the papers, which have no depthwise network"
_IMAGENET = (
    "arXiv 2009.13044, section 4.2 (150 epochs, cosine); batch, lr and weight decay as PyTorch's ImageNet example"
)

_ALL = [
    Recipe("digits-lenet5", _DIGITS, "digits", "lenet5", 20, 64, 0.1, 5e-4, True),
    replace(
        Recipe(DEFAULT, _FEW_DIGITS, "digits", "lenet5", 100, 50, 0.1, 5e-4, True),
        train_images=100,
        validation=1000,
        augment="crop",
        seeds=5,
        test_every=10,
    ),
    *(
        Recipe(f"{data}-lenet5", _LENET, data, "lenet5", 50, 256, 0.1, 5e-4, True)
        for data in ("mnist", "fashion-mnist")
    ),
    Recipe("fashion-mnist-resnet20", _FASHION, "fashion-mnist", "resnet20", 50, 256, 0.1, 5e-4, False),
    *(
        Recipe(f"{data}-{arch}", _CIFAR, data, arch, 400, 256, 0.1, 5e-4, False)
        for data in ("cifar10", "cifar100")
        for arch in ("vgg_small", "resnet20", "resnet32")
    ),
    *(
        Recipe(f"{data}-mobilenet", _MOBILENET, data, "mobilenet", 400, 256, 0.1, 5e-4, False)
        for data in ("cifar10", "cifar100")
    ),
    *(
        Recipe(f"imagenet-{arch}", _IMAGENET, "imagenet", arch, 150, 256, 0.1, 1e-4, False)
        for arch in ("resnet18", "resnet50")
    ),
]

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _ALL}
