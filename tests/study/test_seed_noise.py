"""Intervals of a mean over a few seeds."""

from __future__ import annotations

import pytest
from scipy import stats

from fastdaa.study.curves import Point, hump
from fastdaa.study.online_words import Setting, winners
from fastdaa.study.seed_noise import margin, student_quantile


@pytest.mark.parametrize("p", [0.5, 0.6, 0.975, 0.99, 0.99975])
@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 100, 999])
def test_quantiles_are_those_of_students_t(p, freedom):
    assert student_quantile(p, freedom) == pytest.approx(
        stats.t.ppf(p, freedom), rel=1e-9, abs=1e-12
    )


def test_margins_by_hand():
    assert margin(None, 1) == 0.0
    assert margin(0.1, 2) == pytest.approx(1.2706, abs=1e-4)
    assert margin(0.1, 3) == pytest.approx(0.43027, abs=1e-5)


def point(beta, distance, scores):
    rows = tuple({"seed": seed, "score": score} for seed, score in enumerate(scores))
    return Point(beta, distance, sum(scores) / len(scores), None, rows)


def test_three_standard_errors_of_three_seeds_are_noise():
    # Falls of 0.3, 0.5 and 1.0: mean 0.6, standard error 0.208, t = 2.9.
    noisy = [point(1, 0.5, [0, 0, 0]), point(0.1, 1, [1, 1, 1]), point(0.01, 2, [0.7, 0.5, 0.0])]
    shape = hump(noisy)
    assert shape is not None and shape.fall == pytest.approx(0.6)
    assert shape.fall > 2.8 * shape.stderr and not shape.interior
    clear = [*noisy[:2], point(0.01, 2, [0.4, 0.4, 0.3])]
    assert hump(clear).interior


def setting(strength, golds):
    def run(seed, gold):
        row = {"run": f"{strength}-{seed}", "seed": seed, "kl": 1.0, "fraction": 1.0}
        return ({**row, "gold": gold},)

    return Setting(strength, tuple(run(seed, gold) for seed, gold in enumerate(golds)))


@pytest.mark.parametrize(
    ("golds", "told"),
    [((0.6, 0.8, 1.3), "neither"), ((0.9, 0.9, 1.0), "APA")],
    ids=["within noise", "beyond it"],
)
def test_methods_are_told_apart_by_intervals_over_seeds(golds, told):
    found = {"apa": [setting(0.1, golds)], "ppo": [setting(0.1, (0.3, 0.3, 0.3))]}
    duel = winners(found)[1]
    count = {"neither": 0, "APA": 1}[told]
    assert f"of 4 distances: APA at {count}, PPO at 0" in duel
