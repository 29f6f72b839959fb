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
        method, optimizer, momentum, beta2, schedule: likewise.  A recipe with a method also decides, for other data and
            networks, all options but those of the data and the number of epochs.
        steps, threshold, decay, surrogate_width: of spiking networks.
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
    method: str | None = None
    optimizer: str = "sgd"
    momentum: float = 0.9
    beta2: float = 0.999
    schedule: str = "cosine"
    steps: int = 8
    threshold: float = 1.0
    decay: float = 1.0
    surrogate_width: float = 0.1


OF_DATA = ("name", "data", "arch", "epochs", "train_images", "validation", "augment", "seeds", "test_every")
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
_DSR = "arXiv 2205.00459 and its code, which have PreAct-ResNet-18 and 400 steps of warm-up"
_PROXY = "arXiv 2109.13208 and its code, which have three convolutions of 128 channels, a hard reset, and no cosine"
_SNN2ANN = "arXiv 2206.09449 and its code, which have VGG-13 and a factor 0.1 at epochs 100, 150 and 175"
_JOINT = "arXiv 2305.02099 and its code (momentum 0), which have ResNet-18"
_SURROGATE = "arXiv 2006.04436 (ResNet-50, 10 steps, AdamW, one cycle); width, rate, batch and epochs are ours"
_DESIRE = "arXiv 2211.05412 and its code: lr 1e-5 after each image; batch ours, so 1e-3 for the mean of 100 images"

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
    Recipe(
        *("dsr-cifar10-resnet20", _DSR, "cifar10", "resnet20", 200, 128, 0.1, 5e-4, False),
        method="dsr",
        steps=20,
        threshold=6.0,
    ),
    Recipe(
        *("proxy-fashion-mnist-lenet5", _PROXY, "fashion-mnist", "lenet5", 100, 100, 1e-4, 1e-6, False),
        augment="crop",
        method="proxy",
        optimizer="adam",
        momentum=0.8,
        beta2=0.99,
        steps=15,
        threshold=2.0,
    ),
    Recipe(
        *("snn2ann-cifar100-vgg_small", _SNN2ANN, "cifar100", "vgg_small", 200, 512, 1e-3, 5e-4, False),
        method="snn2ann",
        optimizer="adam",
        steps=4,
    ),
    Recipe(
        *("joint-cifar100-resnet20", _JOINT, "cifar100", "resnet20", 300, 1024, 0.1, 5e-4, False),
        method="joint",
        momentum=0.0,
        steps=4,
        threshold=0.5,
        decay=0.25,
    ),
    Recipe(
        *("surrogate-cifar100-resnet20", _SURROGATE, "cifar100", "resnet20", 200, 128, 2e-3, 1e-2, False),
        method="surrogate",
        optimizer="adamw",
        schedule="one-cycle",
        steps=10,
    ),
    Recipe(
        *("desire-fashion-mnist-mlp", _DESIRE, "fashion-mnist", "mlp", 600, 100, 1e-3, 0.0, False),
        method="desire",
        momentum=0.0,
        schedule="exponential",
        steps=20,
        decay=0.75,
    ),
]

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _ALL}
