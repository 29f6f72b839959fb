"""The table at the end of a training, by hand."""

import math

import pytest

from adderops.distill.runs.results import table

RUN = {
    "dataset": "digits",
    "network": "lenet5",
    "epochs": 20,
    "train_images": 100,
    "test_images": 500,
    "test_is_validation": False,
}


def summaries_of(teacher: list[float], student: list[float], plain: list[float]) -> list[dict]:
    """Of one seed each."""
    found = []
    for seed, (t, s, p) in enumerate(zip(teacher, student, plain, strict=True)):
        common = {**RUN, "seed": seed}
        found.append({**common, "method": "pkkd", "teacher_test_accuracy": t, "student_test_accuracy": s})
        found.append({**common, "method": "plain", "student_test_accuracy": p})
    return found


def line_of(text: str, beginning: str) -> str:
    [line] = [line for line in text.splitlines() if line.startswith(beginning)]
    return line


# --- the table ---


def test_one_seed_by_hand():
    """Shares with two hits and two misses added: 495/504, 498/504, 497/504."""
    text = table(summaries_of([0.992], [0.986], [0.990]))
    assert "20 epochs, seed 0\n100 training images, accuracy on 500 test images\n" in text
    errors = {name: math.sqrt(hits * (504 - hits) / 504**3) for name, hits in (("c", 498), ("p", 495), ("l", 497))}
    assert line_of(text, "CNN").split() == ["CNN", "99.20", "+-", f"{100 * errors['c']:.2f}"]
    assert line_of(text, "adder, by PKKD").split()[3:] == ["98.60", "+-", f"{100 * errors['p']:.2f}"]
    half = 196 * math.hypot(errors["p"], errors["l"])
    expected = f"-0.40 points ({-0.4 - half:+.2f} to {-0.4 + half:+.2f}): within the noise"
    assert line_of(text, "PKKD - the labels alone:").endswith(expected)


def test_an_accuracy_of_1_has_an_uncertainty():
    assert "100.00 +- 0.28" in table(summaries_of([1.0], [1.0], [1.0]))


def test_differences_over_seeds_by_hand():
    """50, 60, 70 and 52, 64, 71: differences 2, 4, 1 of deviation 1.5275; times 4.3027 / sqrt 3."""
    text = table(summaries_of([0.9] * 3, [0.52, 0.64, 0.71], [0.5, 0.6, 0.7]))
    assert "seeds 0 to 2" in text and "standard deviation over 3 seeds" in text
    assert line_of(text, "adder, by the labels").endswith("60.00 +- 10.00")
    line = line_of(text, "PKKD - the labels alone:")
    assert line.endswith("+2.33 points (-1.46 to +6.13): within the noise")
    assert line_of(text, "PKKD - CNN:").endswith("worse")


@pytest.mark.parametrize("step, word", [(0.02, "better"), (-0.02, "worse")])
def test_verdict_on_a_difference_beyond_the_noise(step, word):
    plain = [0.5, 0.6, 0.7]
    text = table(summaries_of([0.6] * 3, [p + step + e for p, e in zip(plain, (0, 0.001, 0), strict=True)], plain))
    assert line_of(text, "PKKD - the labels alone:").endswith(word)


def test_a_single_run_has_no_differences():
    text = table([{**RUN, "seed": 3, "method": "cnn", "teacher_test_accuracy": 0.5, "teacher_ema_test_accuracy": 0.75}])
    assert line_of(text, "CNN, averaged").split()[2] == "75.00" and " - CNN" not in text and "interval" not in text
