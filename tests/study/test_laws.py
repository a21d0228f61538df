"""The laws: values worked out by hand, peaks against a search, where there is no peak."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastdaa.study.laws import LAWS

E = math.e
# law, alpha, beta -> peak d, gain there, zero crossing
BY_HAND = {
    "log, peak at 1": ("log", 1.0, 1.0, 1.0, 1.0, E),
    "log, peak at e": ("log", 2.0, 1.0, E, E, E**2),
    "log, alpha 0": ("log", 0.0, 2.0, 1 / E, 2 / E, 1.0),
    "d": ("d", 2.0, 0.5, 2.0, 2.0, 4.0),
    "kl": ("kl", 2.0, 0.5, math.sqrt(2), 2.0, 2.0),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_peak_and_zero_crossing_by_hand(case):
    name, alpha, beta, d, gain, zero = BY_HAND[case]
    law = LAWS[name]
    assert law.peak(alpha, beta) == pytest.approx(d, rel=1e-14)
    assert law.value(d, alpha, beta) == pytest.approx(gain, rel=1e-14)
    assert law.zero_crossing(alpha, beta) == pytest.approx(zero, rel=1e-14)


@pytest.mark.parametrize("name", LAWS)
def test_peak_is_where_a_search_finds_it(name):
    law = LAWS[name]
    d = np.linspace(0.001, 5, 500_000)
    values = law.value(d, 1.3, 0.7, 0.2)
    assert law.peak(1.3, 0.7) == pytest.approx(d[values.argmax()], abs=1e-5)


@pytest.mark.parametrize(
    ("name", "d", "value"),
    [("log", E, 2 * E - 3 * E), ("d", 2.0, 2 * 2 - 3 * 4), ("kl", 2.0, 2 * 4 - 3 * 16)],
)
def test_values_by_hand(name, d, value):
    assert LAWS[name].value(d, 2.0, 3.0, 10.0) == pytest.approx(10 + value, rel=1e-14)


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("intercept", [False, True], ids=["origin", "intercept"])
def test_design_times_coefficients_is_the_value(name, intercept):
    d = np.array([0.1, 1.0, 2.5])
    coefficients = np.array([1.2, 0.8, 0.3])[: 2 + intercept]
    np.testing.assert_allclose(
        LAWS[name].design(d, intercept) @ coefficients,
        LAWS[name].value(d, *coefficients),
        rtol=1e-14,
    )


def test_intercept_moves_the_zero_crossing_only():
    law = LAWS["d"]
    # 3 + 2 d - d^2 = (3 - d) (1 + d)
    assert law.zero_crossing(2.0, 1.0, 3.0) == pytest.approx(3.0, rel=1e-14)
    assert law.zero_crossing(2.0, 1.0, -2.0) is None


@pytest.mark.parametrize(
    ("name", "alpha", "beta", "peak"),
    [
        ("log", 1.0, 0.0, None),
        ("log", 1.0, -1.0, None),
        ("log", 1.0, 1e-4, math.inf),
        ("d", 1.0, -0.1, None),
        ("d", -1.0, 1.0, None),
        ("kl", 0.0, 1.0, None),
        ("kl", 1.0, math.nan, None),
    ],
)
def test_laws_without_a_peak(name, alpha, beta, peak):
    assert LAWS[name].peak(alpha, beta) == peak
    assert LAWS[name].zero_crossing(alpha, beta) is None
