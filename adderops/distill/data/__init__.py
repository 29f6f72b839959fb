"""The image sets of the trainer.

`sources` knows where each set lies, `idx` and `images` read the file formats, `sets` splits, augments and normalizes,
`loading` makes batches, and `facts` is what a run records about its set.
"""

try:
    import torchvision  # noqa: F401
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError("adderops.distill needs torchvision: install the extra `adderops[distill]`") from missing

from adderops.distill.data.idx import IDX_FILES, read_idx
from adderops.distill.data.loading import ImageSet, calibration_batches, epoch_batches
from adderops.distill.data.sets import Data, known_facts, load_data, load_test_images
from adderops.distill.data.sources import SETS

__all__ = [
    "IDX_FILES",
    "SETS",
    "Data",
    "ImageSet",
    "calibration_batches",
    "epoch_batches",
    "known_facts",
    "load_data",
    "load_test_images",
    "read_idx",
]
