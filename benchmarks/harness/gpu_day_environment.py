"""Prints what a day with a GPU runs on, as one JSON object; ends with an error where there is no GPU."""

import argparse
import json
import os
import platform
import shutil
import subprocess
from importlib.util import find_spec
from typing import Any

from harness.gpu_day_parsers import GPU_FIELDS, nvidia_smi

TOOLS = ("nvcc", "c++", "ninja", "ncu", "compute-sanitizer", "nvdisasm")
MODULES = ("pytest", "xdist", "setuptools", "ninja", "triton", "torchvision", "safetensors", "sklearn", "matplotlib")
HOPPER = {"name": "none (dry run)", "capability": "9.0", "multiprocessors": 132, "memory_bytes": 0, "l2_bytes": 0}


def gpu() -> dict[str, Any]:
    """The current device, as torch sees it."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("no GPU: torch.cuda.is_available() is False")
    device = torch.cuda.get_device_properties()
    return {
        "name": device.name,
        "capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
        "memory_bytes": device.total_memory,
        "l2_bytes": device.L2_cache_size,
    }


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"error: {error}"


def environment(dry_run: bool) -> dict[str, Any]:
    import torch

    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "tools": {tool: shutil.which(tool) for tool in TOOLS},
        "modules": [name for name in MODULES if find_spec(name)],
        "nvcc": _output("nvcc", "--version").strip().splitlines()[-1:],
    }
    text = _output("nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits")
    try:
        facts["nvidia_smi"] = nvidia_smi(text)
    except ValueError as error:
        facts["nvidia_smi"] = {"error": str(error)}
    return facts | {"gpu": HOPPER if dry_run else gpu()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="without a GPU, as if an H100 or H200 were there")
    print(json.dumps(environment(parser.parse_args().dry_run)))
