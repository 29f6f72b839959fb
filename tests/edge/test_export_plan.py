"""The planner: nothing that lives at the same time overlaps, and few bytes are lost."""

import random

import pytest

from adderops.edge.plan import Step, plan


def lives_of(steps, first):
    lives = {first: [0, 0]}
    for i, step in enumerate(steps):
        for name in step.reads:
            lives[name][1] = i
        if step.writes is not None:
            lives[step.writes] = [i, i]
    return lives


def check(sizes, steps, first):
    """Checks a plan against the definition of what may overlap."""
    found = plan(sizes, steps, first)
    lives = lives_of(steps, first)
    ends = {name: found.offsets[name] + sizes[name] for name in lives}
    assert max(ends.values()) <= found.size and all(offset % 4 == 0 for offset in found.offsets.values())
    for a in lives:
        for b in lives:
            if a >= b or lives[a][1] < lives[b][0] or lives[b][1] < lives[a][0]:
                continue
            old, new = sorted((a, b), key=lambda name: lives[name][0])
            at = lives[new][0]
            step = steps[at]
            allowed = step.writes == new and lives[old][1] == at and found.offsets[old] == found.offsets[new]
            allowed = allowed and (old in step.over or (at in found.rings and old == step.input))
            assert allowed or ends[a] <= found.offsets[b] or ends[b] <= found.offsets[a], f"{a} and {b} overlap"
    for i, step in enumerate(steps):
        need = step.scratch + (step.ring or 0 if i in found.rings else 0)
        low, high = found.scratch[i], found.scratch[i] + need
        assert high <= found.size or not need
        for name, (first_step, last_step) in lives.items():
            if need and first_step <= i <= last_step:
                assert high <= found.offsets[name] or ends[name] <= low, f"{name} overlaps the scratch of step {i}"
    return found


def random_steps(seed):
    choose = random.Random(seed)
    sizes, steps, made = {"v0": choose.randint(1, 400)}, [], ["v0"]
    for i in range(choose.randint(1, 12)):
        reads = tuple(dict.fromkeys([made[-1], *choose.sample(made, choose.randint(0, min(2, len(made))))]))
        name = f"v{i + 1}"
        sizes[name] = choose.choice([choose.randint(1, 400), sizes[made[-1]]])
        over = tuple(r for r in reads if choose.random() < 0.3)
        ring = choose.randint(0, 60) if choose.random() < 0.5 else None
        steps.append(Step(reads, name, choose.randint(0, 90), over, ring, reads[0]))
        made.append(name)
    return sizes, [*steps, Step((made[-1],), None, 8)]


@pytest.mark.parametrize("seed", range(200))
def test_random_steps(seed):
    sizes, steps = random_steps(seed)
    found = check(sizes, steps, "v0")
    assert found.size >= found.bound


def test_plans_are_near_their_bound():
    found = [plan(*random_steps(seed), "v0") for seed in range(200)]
    assert sum(p.size for p in found) <= 1.02 * sum(p.bound for p in found)


def test_a_chain_takes_two_neighbours():
    sizes = {"a": 100, "b": 60, "c": 80, "d": 20}
    steps = [Step(("a",), "b"), Step(("b",), "c"), Step(("c",), "d"), Step(("d",), None)]
    assert check(sizes, steps, "a").size == 160


def test_rings_only_where_they_shrink_the_arena():
    sizes = {"a": 1000, "b": 300, "c": 300}
    steps = [Step(("a",), "b", ring=40, input="a"), Step(("b",), "c", ring=40, input="b"), Step(("c",), None)]
    found = check(sizes, steps, "a")
    assert found.size == 1040 and found.rings == {0}


def test_several_rings_that_shrink_it_only_together():
    sizes = dict.fromkeys("abcd", 1000)
    steps = [Step((x,), y, ring=40, input=x) for x, y in ("ab", "bc", "cd")] + [Step(("d",), None)]
    found = check(sizes, steps, "a")
    assert found.size == 1040 and found.rings == {0, 1, 2}


def test_a_value_read_later_is_not_overwritten():
    sizes = {"a": 100, "b": 100, "c": 100}
    steps = [Step(("a",), "b", over=("a",)), Step(("a", "b"), "c", over=("a",)), Step(("c",), None)]
    found = check(sizes, steps, "a")
    assert found.size == 200 and found.offsets["c"] == found.offsets["a"]
