"""One call of each kernel, for Nsight Compute, and how much work it is.

    python -m harness.gpu_day_kernels --device cuda

`MEASURED` names kernels as tests/machine_code/cuda_budgets.py does.  Each is launched once with work to do, so a
counter of a launch belongs to the work of its entry.
"""

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass

N, C, SIDE, TAPS = 64, 128, 28, 9  # a layer of ResNet-18: 3x3, stride 1, padding 1, as many filters as channels
PIXELS = N * SIDE * SIDE


@dataclass(frozen=True)
class Work:
    """The sums of a launch as a matrix product, of two operands or of one with itself.

    Attributes:
        label: regular expression of the kernel's label, cuda_budgets.Instance.label.
        rows, columns, depth: rows x columns sums of `depth` terms each; 0 for a kernel without a loop over terms.
        element: bytes of an operand's element.
        read: bytes of the operands: what has to come from DRAM once.
        call: launches it on a device.
        operands: 1 for a product of an operand with itself.
    """

    label: str
    rows: int
    columns: int
    depth: int
    element: int
    read: int
    call: Callable[[str], object]
    operands: int = 2


def _operands(device: str, dtype: str, form: str) -> tuple:
    """x, w and grad_y, the same numbers in every call."""
    import torch

    generator = torch.Generator().manual_seed(0)
    side, images = (SIDE, N) if device == "cuda" else (4, 1)
    shapes = (images, C, side, side), (C, C, 3, 3), (images, C, side, side)
    tensors = (torch.randn(shape, generator=generator).to(device, getattr(torch, dtype)) for shape in shapes)
    memory_format = torch.channels_last if form == "channels" else torch.contiguous_format
    return tuple(t.contiguous(memory_format=memory_format) for t in tensors)


def _pass(name: str, dtype: str, form: str) -> Callable[[str], object]:
    def call(device: str):
        import torch

        x, w, grad_y = _operands(device, dtype, form)
        geometry = [1, 1], [1] * 4, [1, 1], 1
        if name == "forward":
            return torch.ops.adderops.adder_conv2d(x, w, None, *geometry)
        return getattr(torch.ops.adderops, f"adder_conv2d_{name}")(grad_y, x, w, *geometry)

    return call


def _int8(device: str):
    from adderops.functional import adder_conv2d_int8, quantize

    x, w, _ = _operands(device, "float32", "channels")
    return adder_conv2d_int8(quantize(x, 0.05, 128), quantize(w, 0.05, 128), padding=1)


def _moments(form: str, gradient: bool) -> Callable[[str], object]:
    """Of a student and a teacher with half of the channels each."""

    def call(device: str):
        import torch

        x, _, _ = _operands(device, "float32", form)
        memory_format = torch.channels_last if form == "channels" else torch.contiguous_format
        student, teacher = ([part.contiguous(memory_format=memory_format)] for part in x.chunk(2, 1))
        scales, options = torch.full((2, 1), 0.5, device=device), (0.4, 1.0, True)
        if not gradient:
            return torch.ops.adderops._kernel_moments(student, teacher, scales, *options)
        grad = torch.ones((C + 1) * C, device=device)
        return torch.ops.adderops._kernel_moments_grad(grad, student, teacher, scales, *options)

    return call


def _measured() -> list[Work]:
    weights = C * TAPS
    found = []
    for dtype, element in (("float32", 4), ("float16", 2), ("bfloat16", 2)):
        images, kernel = PIXELS * C * element, C * weights * element
        for form in ("planes", "channels") if element == 4 else ("channels",):
            call, label = _pass("forward", dtype, form), rf"forward {dtype} (direct|minimum|mma) {form}"
            found.append(Work(label, C, PIXELS, weights, element, images + kernel, call))
        if element == 4:
            for form in ("planes", "channels"):
                call = _pass("grad_x", dtype, form)
                found.append(Work(f"grad_x {dtype} {form}", C, PIXELS, weights, element, 2 * images + kernel, call))
            call = _pass("grad_w", dtype, "channels")
            found.append(Work(f"grad_w {dtype} channels", C, weights, PIXELS, element, 2 * images + kernel, call))
    for form in ("planes", "channels"):
        images = PIXELS * C * 4
        found.append(Work(f"moments {form}", C, C, PIXELS, 4, images, _moments(form, False), operands=1))
        found.append(Work(f"moments gradient {form}", C // 2, PIXELS, C, 4, images, _moments(form, True)))
    found.append(Work("int8 16-byte", C, PIXELS, weights, 1, PIXELS * C + C * weights, _int8))
    return found


MEASURED = _measured()


def work_of(label: str) -> Work | None:
    """The work of the kernel with this label."""
    return next((work for work in MEASURED if re.fullmatch(work.label, label)), None)


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    device = parser.parse_args().device
    for work in MEASURED:
        work.call(device)
        if device == "cuda":
            torch.cuda.synchronize()
        print(work.label, flush=True)


if __name__ == "__main__":
    main()
