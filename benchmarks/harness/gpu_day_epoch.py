"""One epoch of PKKD with ResNet-20 on a GPU: Fashion-MNIST where it is installed, else images made here.

    python -m harness.gpu_day_epoch FOLDER --device cuda

Nothing is downloaded.  The images made here are noisy stripes whose direction and width are their class.
"""

import argparse
import json
import math
import shutil
import struct
import time
from pathlib import Path

import torch

from adderops.distill import main as distill
from adderops.distill.data.idx import IDX_FILES
from adderops.distill.data.sources import FASHION_MNIST

SIDE, CLASSES = 28, 10


def write_stripes(folder: Path, images: int, tests: int) -> None:
    """Writes training and test images as idx files."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    for count, (of_images, of_labels) in ((images, IDX_FILES[:2]), (tests, IDX_FILES[2:])):
        labels = torch.arange(count) % CLASSES
        angle = (labels * math.pi / CLASSES)[:, None, None]
        phase = 6.3 * torch.rand(count, 1, 1, generator=generator)
        waves = torch.sin((x * angle.cos() + y * angle.sin()) * (0.5 + labels[:, None, None] % 3 / 4) + phase)
        pixels = (128 + 60 * waves + 30 * torch.randn(count, SIDE, SIDE, generator=generator)).clamp(0, 255).byte()
        (folder / of_images).write_bytes(struct.pack(">IIII", 0x803, count, SIDE, SIDE) + pixels.numpy().tobytes())
        (folder / of_labels).write_bytes(struct.pack(">II", 0x801, count) + labels.byte().numpy().tobytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "output", type=Path, metavar="FOLDER", help="where the run folder goes; replaces an earlier one"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--images", type=int, default=60_000, help="training images (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--arch", default="resnet20")
    arguments = parser.parse_args()
    data = "fashion-mnist"
    if not FASHION_MNIST.is_dir() or arguments.images < 60_000:
        data = str(arguments.output / "stripes")
        write_stripes(Path(data), arguments.images, max(CLASSES, arguments.images // 6))
    options = ["--data", data, "--arch", arguments.arch, "--method", "pkkd", "--epochs", "1", "--augment", "none"]
    options += ["--batch-size", str(arguments.batch_size), "--device", arguments.device, "--channels-last"]
    start = time.perf_counter()
    run = arguments.output / "pkkd"
    shutil.rmtree(run, ignore_errors=True)
    status = distill([*options, "--output", str(run)])
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(status)
    print(json.dumps({"data": Path(data).name, "images": arguments.images, "seconds": seconds}))


if __name__ == "__main__":
    main()
