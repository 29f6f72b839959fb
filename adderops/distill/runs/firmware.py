"""The C program of a run's int8 network: its files, images to try it with, and its accuracy."""

from pathlib import Path

import torch
from torch import Tensor, nn

from adderops.atomic import write_atomically
from adderops.distill.data import ImageSet
from adderops.edge import Program, bytes_of, run
from adderops.edge.emit import check_name, template

WRITTEN = ("main.c", "CMakeLists.txt")  # beside NAME.h and NAME.c, for any NAME
IMAGES, CLASSES = "images.bin", "classes.txt"
MOST_IMAGES = 100
MOST_BYTES = 2**20  # of them


class Interpreted(nn.Module):
    """A program for one image as a network for batches."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program

    def forward(self, x: Tensor) -> Tensor:
        """Returns the outputs that the C code gives, bit for bit."""
        return run(self.program, bytes_of(self.program, x))


def check_files(path: Path, main: bool) -> None:
    """Checks where C files are to be written, before any work.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: the name is no identifier, or a main.c or CMakeLists.txt is there that this package did not write.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--c: expected a path in an existing folder, got {path}")
    try:
        check_name(path.name)
    except ValueError as error:
        raise ValueError(f"--c: {error}") from None
    for file in WRITTEN if main else ():
        own, found = template(file, path.name), path.parent / file
        if found.exists() and found.read_bytes().splitlines()[:1] != own.encode().splitlines()[:1]:
            raise ValueError(f"--main: expected no {found} of your own, got one, which it would overwrite")


def pixel_values(images: ImageSet) -> Tensor:
    """Returns what a network of these images gets for each byte of a pixel: float32, (C, 256)."""
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 256)
    return ((levels - images.mean) / images.std)[0, :, 0]  # as ImageSet computes it


def write_test_images(program: Program, images: ImageSet, folder: Path) -> int:
    """Writes the first test images as bytes, for main.c, and the classes that it has to print, one per line.

    Returns:
        The number of images: 100, or as many as the set has, or as fit into a megabyte.
    """
    [(x, _)] = images.batches([torch.arange(1)])
    count = max(1, min(MOST_IMAGES, len(images), MOST_BYTES // x[0].numel()))
    [(x, _)] = images.batches([torch.arange(count)])
    pixels = (x * images.std + images.mean).round().to(torch.uint8).permute(0, 2, 3, 1)
    classes = Interpreted(program)(x).argmax(1)
    write_atomically(folder / IMAGES, pixels.contiguous().numpy().tobytes())
    write_atomically(folder / CLASSES, "".join(f"{number}\n" for number in classes.tolist()).encode())
    return count
