"""The number of threads changes no bit of any result: threads neither split a sum nor share an accumulator."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import FORMATS, PASSES, SELECTED, case, compute, random_inputs
from slow import slow_except

# Real layers at full size, with a batch that gives each thread several tasks, and some with few tasks.
LAYERS = [
    case("resnet20-16", (8, 16, 32, 32), 16, 3, padding=1),
    case("resnet20-32-s2", (8, 16, 32, 32), 32, 3, stride=2, padding=1),
    case("resnet20-64", (16, 64, 8, 8), 64, 3, padding=1),
    case("resnet18-64", (1, 64, 56, 56), 64, 3, padding=1),
    case("resnet18-512", (2, 512, 7, 7), 512, 3, padding=1),
    case("resnet18-stem", (1, 3, 112, 112), 64, 7, stride=2, padding=3),
    case("resnet50-1x1", (2, 256, 28, 28), 64, 1),
    case("resnet50-1x1-s2", (2, 256, 28, 28), 512, 1, stride=2),
    case("depthwise", (2, 96, 28, 28), 96, 3, padding=1, groups=96),
]


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("c", slow_except([*LAYERS[:3], *SELECTED], [*LAYERS, *SELECTED]), ids=str)
def test_bitwise_equal_for_any_number_of_threads(c, name, backend, set_threads):
    inputs = random_inputs(c, torch.float32)
    for form, how in FORMATS.items():
        arranged = inputs.arranged(how).to(torch.float32, backend.device)
        results = []
        # 1 twice: a result that changes between calls is wrong too
        for threads in (1, 1, 2, 3, 5):
            set_threads(threads)
            results.append(compute(name, c, arranged).cpu())
        for threads, result in zip((1, 2, 3, 5), results[1:], strict=True):
            different = (result.view(torch.int32) != results[0].view(torch.int32)).sum().item()
            assert not different, (
                f"{name} of {c!r}, {form}: {different} of {result.numel()} differ with {threads} threads"
            )


@pytest.mark.parametrize(
    "dtype", slow_except((torch.bfloat16,), (torch.float64, torch.bfloat16, torch.float16)), ids=str
)
@pytest.mark.parametrize("name", PASSES)
def test_bitwise_equal_in_other_dtypes(name, dtype, backend, set_threads):
    for c in [*SELECTED, case("layer", (2, 32, 20, 20), 32, 3, padding=1)]:
        inputs = random_inputs(c, dtype).to(dtype, backend.device)
        results = []
        for threads in (1, 2, 3):
            set_threads(threads)
            results.append(compute(name, c, inputs).cpu())
        assert all(torch.equal(results[0], r) for r in results[1:]), f"{name} of {c!r} in {dtype}"


def test_concurrent_callers(backend, set_threads):
    """Two Python threads call at the same time: calls share no state."""
    set_threads(2)
    work = [
        (name, c, random_inputs(c, torch.float32).to(torch.float32, backend.device))
        for name in PASSES
        for c in SELECTED
    ]
    want = [compute(*w) for w in work]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            for (name, c, _), a, b in zip(work, want, pool.map(lambda w: compute(*w), work), strict=True):
                assert torch.equal(a, b), f"{name} of {c!r}"
