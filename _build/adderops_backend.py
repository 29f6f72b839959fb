"""PEP 517 backend: setuptools, plus the torch to compile against, plus nvcc where it is wanted and not here.

`pip install .` builds in an isolated environment that hides an installed torch.  If the interpreter has a torch that is
new enough, the build uses it, without another download of gigabytes.  Otherwise torch becomes a build requirement;
LibTorch's stable ABI lets the result run with any torch from 2.11 on, so the two versions may differ.
"""

import os
import re
import site
import sys
from pathlib import Path

from cuda_toolkit import OLDEST_ON_PYPI, missing_packages
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that need no change)

OLDEST_TORCH = (2, 11)


def installed_torch() -> str | None:
    """Returns the site-packages folder of a torch that can compile adderops, or None."""
    for folder in [*site.getsitepackages(), site.getusersitepackages() if site.ENABLE_USER_SITE else ""]:
        version_file = Path(folder, "torch", "version.py")
        if folder and version_file.is_file():
            # read, not imported: the path is not set up yet, and importing torch takes seconds
            version = re.search(r"__version__ = '(\d+)\.(\d+)", version_file.read_text())
            return folder if version and tuple(map(int, version.groups())) >= OLDEST_TORCH else None
    return None


TORCH_FOLDER = installed_torch()
if TORCH_FOLDER and TORCH_FOLDER not in sys.path:
    sys.path.append(TORCH_FOLDER)  # last, so that the build tools stay those of the isolated environment


def torch_requirement() -> list[str]:
    return [] if TORCH_FOLDER else ["torch>={}.{}".format(*OLDEST_TORCH), "numpy"]


def torch_cuda() -> str | None:
    """Returns the CUDA version of the torch to compile against, None if it has none."""
    if not TORCH_FOLDER:
        return OLDEST_ON_PYPI  # pip chooses the torch; since 2.11 PyPI's has CUDA 13
    version = re.search(r"^cuda\b.*= '([\d.]+)'", Path(TORCH_FOLDER, "torch", "version.py").read_text(), re.M)
    return version and version[1]


def build_requirements() -> list[str]:
    try:
        return torch_requirement() + missing_packages(os.environ, torch_cuda())
    except ValueError as error:
        sys.exit(str(error))


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    return build_requirements()


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    return build_requirements()


def get_requires_for_build_sdist(config_settings=None) -> list[str]:
    return torch_requirement()


def build_sdist(sdist_directory, config_settings=None) -> str:
    os.environ["ADDEROPS_CUDA"] = "0"  # nothing is compiled: ADDEROPS_CUDA=1 must not ask for a toolkit here
    return build_meta.build_sdist(sdist_directory, config_settings)
