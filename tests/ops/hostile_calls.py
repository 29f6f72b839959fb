"""Hostile calls of every operator: `PYTHONPATH=tests python tests/ops/hostile_calls.py --calls 10000 --seed 7`.

A call starts from consistent arguments, some of which are then replaced: other ranks, sizes, dtypes, strides and
devices, freed storages, integers up to 2^63, scales that are not numbers.  It must either return or raise a Python
exception that names the operator.  After each hostile call, a regular call must still give the same bits.
"""

import argparse
import collections
import faulthandler
import random
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from cases import one_thread

from adderops import functional

OPS = torch.ops.adderops
SMALL, LARGE = (0, 1, 1, 1, 2, 2, 3, 5), (7, 255, 256, 2**15, 2**24, 2**30 - 1, 2**30, 2**31 - 1)
WRONG = (-(2**63), -(2**31), -1, 0, 2**31, 2**32 + 1, 2**40, 2**62, 2**63 - 1)
SCALES = (0.1, 1.0, 3e-39, 0.0, -1.0, float("inf"), float("-inf"), float("nan"), 1e308, 1e-320)
FLOATS = (torch.float32, torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
DTYPES = (*FLOATS, torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
SECONDS = 240  # a longer call counts as a hang
REFUSALS = (RuntimeError, ValueError, TypeError, MemoryError, NotImplementedError)


class Hostile:
    def __init__(self, seed: int):
        self.r = random.Random(seed)
        torch.manual_seed(seed)

    def maybe(self, share: float) -> bool:
        return self.r.random() < share

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        t = torch.randint(0, 200, shape).to(dtype)
        if self.maybe(0.1) and dtype.is_floating_point and t.numel():
            t.view(-1)[self.r.randrange(t.numel())] = self.r.choice((float("nan"), float("inf"), -float("inf")))
        how = self.r.randrange(8)
        if how == 0 and t.dim() == 4:
            return t.contiguous(memory_format=torch.channels_last)
        if how == 1 and t.dim() > 1:
            return t.transpose(-1, -2).contiguous().transpose(-1, -2)
        if how == 2 and t.dim():
            return t[:1].expand(shape) if shape[0] else t
        return t

    def spoiled(self, t: torch.Tensor | None) -> torch.Tensor | None:
        """Another tensor instead of t, or t with its memory freed."""
        r = self.r
        if t is None:
            return self.tensor(tuple(r.choice(SMALL) for _ in range(r.randrange(5))), torch.float32)
        how = r.randrange(12)
        if how == 0:
            return self.tensor(tuple(r.choice(SMALL) for _ in range(r.randrange(7))), t.dtype)
        if how == 1:
            return t.to(r.choice(DTYPES))
        if how == 2:
            return t.to("meta")
        if how in (3, 4):
            t = t.clone()
            t.untyped_storage().resize_(0 if how == 3 else t.untyped_storage().nbytes() * r.randrange(100) // 100)
            return t
        if how == 5:
            return torch.as_strided(t.clone(), t.shape, [r.choice((0, 1)) for _ in t.shape]) if t.numel() > 40 else t
        if how == 6 and t.dim():
            sizes = list(t.shape)
            sizes[r.randrange(t.dim())] = r.choice((0, *SMALL))
            return self.tensor(tuple(sizes), t.dtype)
        if how == 7:
            return t.to_sparse() if t.dim() else t
        if how == 8 and t.dim():
            sizes = [1] * t.dim()
            sizes[r.randrange(t.dim())] = r.choice((2**20, 2**40, 2**59))
            return t.new_ones([1] * t.dim()).expand(sizes)
        if how == 9:
            return t.to(torch.complex64).conj() if t.dtype.is_floating_point else t
        if how == 10 and t.dtype.is_floating_point:
            return torch._neg_view(t)
        return t.clone().requires_grad_() if t.dtype.is_floating_point else t[..., None]

    def pair(self, values: tuple[int, ...]) -> list[int]:
        return [self.r.choice(LARGE) if self.maybe(0.2) else self.r.choice(values) for _ in range(2)]

    def convolution(self, dtype: torch.dtype) -> dict:
        """x, w, the shape of y and the geometry; y is small, or larger than any memory."""
        r = self.r
        groups, N = r.choice((1, 1, 2, 5)), r.choice((1, 1, 2, 3, 0))
        channels, filters = r.choice((1, 2, 8, 17)), r.choice((1, 2, 9, 16))
        (H, W), (KH, KW) = ([r.choice((1, 1, 2, 5, 9)) for _ in range(2)] for _ in range(2))
        stride, dilation = self.pair((1, 1, 2, 3)), self.pair((1, 1, 2, 3))
        spans = [d * (k - 1) + 1 for d, k in zip(dilation, (KH, KW), strict=True)]
        padding = [p for span, size in zip(spans, (H, W), strict=True) for p in [max(0, span - size + 1) // 2] * 2]
        if self.maybe(0.3):
            padding[r.randrange(4)] += r.choice((1, 2, 7, *LARGE))
        outputs = [
            (size + sum(padding[2 * i : 2 * i + 2]) - spans[i]) // stride[i] + 1 for i, size in enumerate((H, W))
        ]
        return dict(
            x=self.tensor((N, groups * channels, H, W), dtype),
            w=self.tensor((groups * filters, channels, KH, KW), dtype),
            y_shape=(N, groups * filters, *outputs),
            geometry=dict(stride=stride, padding=padding, dilation=dilation, groups=groups),
        )

    def like_y(self, c: dict, dtype: torch.dtype) -> torch.Tensor:
        shape, cells = c["y_shape"], 1
        for size in shape:
            cells *= max(size, 0)
        return self.tensor(shape if cells < 2**16 else (1, 1, 1, 1), dtype)

    def arguments(self, name: str) -> dict:
        r, dtype = self.r, self.r.choice(FLOATS)
        if name.startswith("adder_conv2d"):
            c = self.convolution(torch.uint8 if name.endswith("int8") else dtype)
            found = dict(x=c["x"], w=c["w"], **c["geometry"])
            C_out = c["w"].size(0)
            if name == "adder_conv2d":
                found["bias"] = self.tensor((C_out,), dtype) if self.maybe(0.5) else None
            elif name.endswith("int8"):
                floats = [torch.rand(C_out) * r.choice(SCALES) for _ in range(2)]
                found["scale"], found["offset"] = floats if self.maybe(0.7) else (None, None)
                residual = self.like_y(c, r.choice((torch.uint8, torch.float32)))
                found["residual"] = residual if self.maybe(0.3) else None
                found |= dict(residual_scale=r.choice(SCALES), relu=self.maybe(0.5), quantize=self.maybe(0.5))
                found |= dict(
                    zero_point=r.choice(SMALL), quant_max=r.choice((1, 15, 255)), padding_value=r.choice(SMALL)
                )
            else:
                found["grad_y"] = self.like_y(c, dtype)
            return found
        shape = (r.choice((1, 2, 3)), r.choice((1, 2, 9, 33)), *(r.choice((1, 2, 7)) for _ in range(2)))
        if name == "quantize":
            x = self.tensor(shape, dtype)
            return dict(x=x, scale=r.choice(SCALES), zero_point=r.choice(SMALL), quant_max=r.choice((15, 255)))
        layers = r.choice((1, 1, 2, 3))
        if name == "_match_rows":
            groups = [[r.choice((1, 2, 9, 33)) for _ in range(4)] for _ in range(layers)]
            shapes = {"mixed_a": lambda a, c: a + c, "mixed_c": lambda a, c: a + c, "w_a": lambda a, _: a}
            shapes["w_c"] = lambda _, c: c
            found = {
                key: [self.tensor((count, rows, columns(a, c)), torch.float32) for count, rows, a, c in groups]
                for key, columns in shapes.items()
            }
            return found | dict(eps=r.choice(SCALES))
        readable = (torch.float32, torch.float16, torch.bfloat16)
        if name == "_mean_abs":
            return dict(x=[self.tensor(shape, r.choice(readable)) for _ in range(layers)])
        of_layers = [(shape[0], c, *shape[2:]) for c in r.choices((1, 2, 9, 33), k=2 * layers)]
        student, teacher = ([self.tensor(s, r.choice(readable)) for s in of_layers[i::2]] for i in range(2))
        scales = torch.tensor([[r.choice(SCALES) for _ in range(layers)] for _ in range(2)])
        found = dict(student=student, teacher=teacher, scales=scales, exponential=self.maybe(0.5))
        found |= {key: r.choice(SCALES) for key in ("centre_a", "centre_c")}
        if name.endswith("grad"):
            channels = [a[1] + c[1] for a, c in zip(of_layers[::2], of_layers[1::2], strict=True)]
            found["grad"] = self.tensor((sum((c + 1) * c for c in channels),), torch.float32)
        return found

    def spoil(self, arguments: dict) -> None:
        for key in self.r.sample(sorted(arguments), k=min(len(arguments), self.r.choice((0, 1, 1, 2)))):
            value = arguments[key]
            if isinstance(value, torch.Tensor) or value is None:
                arguments[key] = self.spoiled(value)
            elif isinstance(value, list) and isinstance(value[0], torch.Tensor):
                i = self.r.randrange(len(value))
                value[i] = self.spoiled(value[i])
                if self.maybe(0.2):
                    arguments[key] = self.r.choice((value[1:], value * 2, []))
            elif isinstance(value, list):
                value[self.r.randrange(len(value))] = self.r.choice((*LARGE, *WRONG))
                if self.maybe(0.2):
                    arguments[key] = value[: self.r.randrange(3)]
            elif isinstance(value, bool):
                arguments[key] = not value
            elif isinstance(value, int):
                arguments[key] = self.r.choice((*LARGE, *WRONG))

    def call(self) -> tuple[str, dict, bool]:
        """The operator, its arguments, and whether to call it through adderops.functional."""
        name = self.r.choice(NAMES)
        arguments = self.arguments(name)
        self.spoil(arguments)
        return name, arguments, hasattr(functional, name) and self.maybe(0.4)


NAMES = (
    *("adder_conv2d", "adder_conv2d", "adder_conv2d_grad_x", "adder_conv2d_grad_w", "adder_conv2d_int8", "quantize"),
    *("_kernel_moments", "_kernel_moments_grad", "_mean_abs", "_match_rows"),
)


def through_function(name: str, arguments: dict) -> torch.Tensor:
    named = {"x": "input", "w": "weight"}
    a = {named.get(key, key): value for key, value in arguments.items()}
    if "padding" in a and len(a["padding"]) == 4:
        a["padding"] = a["padding"][::2]
    if "quantize" in a:
        a["dtype"] = torch.uint8 if a.pop("quantize") else None
    return getattr(functional, name)(**a)


def shown(arguments: dict) -> str:
    def one(value):
        if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
            return f"[{', '.join(map(one, value))}]"
        if not isinstance(value, torch.Tensor):
            return repr(value)
        strides = value.stride() if value.layout == torch.strided else value.layout
        return f"<{value.dtype} {tuple(value.shape)} {strides} {value.device}>"

    return ", ".join(f"{key}={one(value)}" for key, value in arguments.items())


@contextmanager
def memory_limit(room: int) -> Iterator[None]:
    """Limits the body to `room` bytes beyond the current size of the process."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    unlimited = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room, unlimited[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, unlimited)


@one_thread()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="print each call first")
    args = parser.parse_args()
    faulthandler.enable()
    hostile, count = Hostile(args.seed), collections.Counter()
    x, w = torch.randn(2, 8, 9, 9), torch.randn(8, 8, 3, 3)
    want, slowest = functional.adder_conv2d(x, w), (0.0, "")
    for i in range(args.calls):
        name, arguments, function = hostile.call()
        what = f"call {i}, {'functional' if function else 'ops'}.{name}({shown(arguments)})"
        if args.show:
            print(what, flush=True)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        outcome, begin = "answered", time.process_time()
        try:
            with memory_limit(80 << 20):
                through_function(name, arguments) if function else getattr(OPS, name)(**arguments)
        except REFUSALS as error:
            outcome, text = type(error).__name__, str(error)
            # in a NotImplementedError torch lists where kernels of other backends were registered
            if name not in text or (outcome != "NotImplementedError" and ("/csrc/" in text or "originally" in text)):
                sys.exit(f"{what}: {outcome} without the operator's name, or with a source location: {text[:500]}")
        except Exception as error:
            sys.exit(f"{what}: {type(error).__name__}: {error}")
        faulthandler.cancel_dump_traceback_later()
        slowest = max(slowest, (time.process_time() - begin, what))
        count[outcome] += 1
        if not torch.equal(functional.adder_conv2d(x, w), want):
            sys.exit(f"{what}: the regular call after it is wrong")
    print("slowest: {:.1f} s, {}".format(*slowest))
    print(f"{args.calls} calls: " + ", ".join(f"{n} {outcome}" for outcome, n in count.most_common()))


if __name__ == "__main__":
    main()
