"""Folders of image files, CLASS/IMAGE, and how their pixels become 8-bit RGB."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import TensorDataset
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS

# Formats of files with the suffixes of torchvision.datasets.ImageFolder, whatever the suffix of a file says.  PIL has
# more, but some of them start programs (EPS).
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "DIB", "GIF", "TIFF", "WEBP")


class ImageFolder(datasets.ImageFolder):  # type: ignore[misc]  # torchvision has no types
    """`torchvision.datasets.ImageFolder` without hidden folders and files (.ipynb_checkpoints, ._1.jpg).

    Args:
        folder: has one folder per class.
        numbering: class names in the order of their labels; None: alphabetical.

    Raises:
        FileNotFoundError: there is no class, or a class has no image.
        ValueError: a class is not in `numbering`.
    """

    def __init__(self, folder: Path, numbering: Sequence[str] | None = None) -> None:
        self._folder, self._numbering = str(folder), numbering
        super().__init__(str(folder), loader=decode, is_valid_file=self._is_image)

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        names = sorted(e.name for e in os.scandir(directory) if e.is_dir() and not e.name.startswith("."))
        if not names:
            raise FileNotFoundError(f"{directory}: expected a folder for each class, got none")
        for name in names:
            walk = os.walk(os.path.join(directory, name), followlinks=True)
            if not any(self._is_image(os.path.join(place, file)) for place, _, files in walk for file in files):
                raise FileNotFoundError(
                    f"{directory}: expected images ({', '.join(IMG_EXTENSIONS)}) in {name}, got none"
                )
        numbering = names if self._numbering is None else list(self._numbering)
        unknown = [name for name in names if name not in numbering]
        if unknown:
            raise ValueError(
                f"{directory}: expected classes among {shown(numbering)}, got unknown ones: {shown(unknown)}"
            )
        return names, {name: numbering.index(name) for name in names}

    def _is_image(self, path: str) -> bool:
        parts = os.path.relpath(path, self._folder).split(os.sep)
        return path.lower().endswith(IMG_EXTENSIONS) and not any(part.startswith(".") for part in parts)


Items = TensorDataset | ImageFolder  # what gives (image, label) by index


def shown(names: Sequence[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def decode(path: str) -> Image.Image:
    """Reads an image file as 8-bit RGB.

    8-bit images are converted by `convert("RGB")`, as in torchvision: palettes and CMYK are converted, alpha is
    dropped, an animation gives its first frame, and a rotation in EXIF data is not applied.  16-bit grey is scaled from
    0..65535, float grey from 0..1.

    Raises:
        OSError: the file system fails.
        ValueError: not an image, a damaged one, or one whose pixels have no known range.
    """
    try:
        with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
            return _rgb(image)
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:  # from the file system; names the file
            raise
        raise ValueError(f"{path}: expected a whole image file, got a damaged one ({error})") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        pixels, largest = np.asarray(image), 1.0 if image.mode == "F" else 65535
        # PIL widens 16-bit PGM and, in older versions, PNG to 32 bits; 32-bit TIFF has no known range
        if image.mode == "I" and image.format not in ("PNG", "PPM"):
            raise ValueError("32-bit integers, whose range is not known: expected 8 or 16 bits, or floats from 0 to 1")
        if not (pixels.min() >= 0 and pixels.max() <= largest):
            raise ValueError(f"pixels from {pixels.min():g} to {pixels.max():g}: expected 0 to {largest:g}")
        image = Image.fromarray(np.rint(pixels * (255 / largest)).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
