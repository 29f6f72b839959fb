"""Where the tests of this folder run; without a GPU or without kernels, whoever imports this is skipped as a whole."""

import pytest
import torch

from adderops import _ops

DEVICE = "cuda"
if _ops.CUDA_KERNELS_MISSING:
    pytest.skip(f"no CUDA kernels: {_ops.CUDA_KERNELS_MISSING}", allow_module_level=True)
if not torch.cuda.is_available():
    pytest.skip("no GPU: the CUDA kernels are built, but nothing here runs them", allow_module_level=True)
