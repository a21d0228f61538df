"""The rule that quality has fallen while KL has grown."""

from __future__ import annotations

import math
import random

import pytest

from fastdaa.study.track.decline import Measured, decline

HIGH = [4.0, 5.0, 6.0, 5.0]
LOW = [1.0, 2.0, 2.0, 3.0]
NEAR, FAR = [0.1, 0.2, 0.1, 0.2], [2.0, 3.0, 2.0, 3.0]


def test_by_hand():
    found = decline([Measured(10, HIGH, NEAR)], Measured(20, LOW, FAR))
    assert found is not None and found.step == 10
    # Falls are 3, 3, 4, 2: mean 3, standard deviation sqrt(2/3), standard error half of it.
    assert found.fall == 3.0
    assert found.fall_stderr == pytest.approx(math.sqrt(2 / 3) / 2)
    # Growths are 1.9, 2.8, 1.9, 2.8.
    assert found.kl_growth == pytest.approx(2.35)
    assert found.kl_growth_stderr == pytest.approx(math.sqrt(4 * 0.45**2 / 3) / 2)
    assert "since step 10 the score has fallen by 3" in str(found)


@pytest.mark.parametrize(
    ("before", "now"),
    [
        pytest.param((LOW, NEAR), (HIGH, FAR), id="quality rises"),
        pytest.param((HIGH, FAR), (LOW, NEAR), id="KL shrinks"),
        pytest.param((HIGH, NEAR), (LOW, NEAR), id="KL stays"),
        pytest.param((HIGH, NEAR), ([4.0, 5.0, 6.0, 0.0], FAR), id="one prompt alone"),
        pytest.param((HIGH[:1], NEAR[:1]), (LOW[:1], FAR[:1]), id="a single prompt"),
    ],
)
def test_no_decline(before, now):
    assert decline([Measured(1, *before)], Measured(2, *now)) is None


def test_nothing_earlier():
    assert decline([], Measured(0, HIGH, NEAR)) is None


def test_the_threshold_is_students_and_grows_with_the_measurements():
    """Of 3 degrees of freedom 3.18 for one earlier measurement, and 6.23 for ten."""
    falls = [1.0, -1.0, 1.0, -1.0]
    spread = math.sqrt(4 / 3) / 2
    before = Measured(0, [0.0] * 4, NEAR)
    assert decline([before], Measured(50, [-(f + 3.15 * spread) for f in falls], FAR)) is None
    current = Measured(50, [-(fall + 3.25 * spread) for fall in falls], FAR)
    found = decline([before], current)
    assert found is not None and found.fall == pytest.approx(3.25 * found.fall_stderr)
    good = [Measured(step, [-9.0] * 4, NEAR) for step in range(1, 10)]
    assert decline([before, *good], current) is None


def test_the_largest_fall_is_named():
    earlier = [Measured(1, [3.0] * 4, NEAR), Measured(2, HIGH, NEAR), Measured(3, LOW, NEAR)]
    found = decline(earlier, Measured(4, [0.0] * 4, FAR))
    assert found is not None and found.step == 2


@pytest.mark.parametrize("prompts", [4, 40])
def test_noise_alone_rarely_warns(prompts):
    """Runs of 12 measurements of noise while KL grows; a naive rule would warn in most runs."""
    generator = random.Random(0)
    warned = measurements = 0
    for _ in range(100):
        earlier: list[Measured] = []
        for step in range(12):
            scores = [generator.gauss(0, 1) for _ in range(prompts)]
            now = Measured(step, scores, [step + generator.random() for _ in range(prompts)])
            warned += decline(earlier, now) is not None
            measurements += 1
            earlier.append(now)
    assert 0 < warned <= 0.03 * measurements


def test_prompts_have_to_be_the_same():
    with pytest.raises(ValueError, match="expected values of 4 prompts, got 3"):
        decline([Measured(0, HIGH, NEAR)], Measured(1, LOW[:3], FAR[:3]))
