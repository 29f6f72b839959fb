"""Networks of random structure: lowering and merging change no bit, and neither does any compiler."""

import pytest
from slow import slow_except

from .exported import BUILDS, check_export, integer_network, some_images
from .random_networks import RandomNetworks

pytestmark = pytest.mark.filterwarnings("ignore:calibrate. only zeros reach")


def check(seed: int, folder, builds, epilogue: str = "float32") -> None:
    model, size = RandomNetworks(seed).network()
    x = some_images((6, *size), seed)
    integer = integer_network(model, x[:4], bits=4 if seed % 4 == 0 else 8)
    check_export(integer, x, folder, builds, epilogue)


@pytest.mark.parametrize("seed", slow_except(range(2), range(9)))
def test_random_networks(tmp_path, seed):
    check(seed, tmp_path, [list(BUILDS)[seed % len(BUILDS)]])


@pytest.mark.parametrize("seed", slow_except(range(100, 104), range(100, 124)))
def test_random_programs_are_the_networks(tmp_path, seed):
    check(seed, tmp_path, [])


@pytest.mark.parametrize("seed", slow_except((40,), range(40, 44)))
def test_integer_epilogue_of_random_networks(tmp_path, seed):
    check(seed, tmp_path, ["gcc-c99-sanitized" if seed % 2 else "gcc"], "integer")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200, 220))
def test_many_random_networks(tmp_path, seed):
    check(seed, tmp_path, ["gcc-sanitized", "gcc-c99-sanitized", "clang-contract"])
