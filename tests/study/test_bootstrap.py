"""The bootstrap against plain resampling, and how often its intervals hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from fastdaa.study.bootstrap import (
    correlation,
    interval,
    least_squares,
    rank_correlation,
    ranks,
    resample_counts,
)
from fastdaa.study.laws import LAWS


def drawn(values, counts):
    """What a row of counts stands for."""
    return np.repeat(values, counts.astype(int))


@pytest.fixture
def points():
    generator = np.random.default_rng(5)
    x = generator.normal(size=20).round(1)  # rounded, so that there are ties
    return x, (x + generator.normal(size=20)).round(1), resample_counts(20, 50, 0)


def test_counts_draw_as_many_as_there_are():
    counts = resample_counts(7, 200, 0)
    assert counts.shape == (200, 7)
    assert (counts.sum(axis=1) == 7).all()
    assert counts.mean() == pytest.approx(1)
    np.testing.assert_array_equal(counts, resample_counts(7, 200, 0))


def test_clusters_are_drawn_whole():
    counts = resample_counts(5, 100, 0, ["a", "b", "a", "c", "b"])
    np.testing.assert_array_equal(counts[:, 0], counts[:, 2])
    np.testing.assert_array_equal(counts[:, 1], counts[:, 4])
    assert (counts[:, [0, 1, 3]].sum(axis=1) == 3).all()


def test_least_squares_is_that_of_the_drawn_points(points):
    x, y, counts = points
    design = np.stack([x, x**2, np.ones_like(x)], axis=1)
    found = least_squares(design, y, counts)
    for row, weights in zip(found, counts, strict=True):
        rows = np.repeat(np.arange(20), weights.astype(int))
        expected = np.linalg.lstsq(design[rows], y[rows], rcond=None)[0]
        np.testing.assert_allclose(row, expected, rtol=1e-9)


def test_resamples_that_determine_nothing_are_nan():
    design = LAWS["d"].design(np.array([1.0, 2.0, 3.0]))
    counts = np.array([[3.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    found = least_squares(design, np.ones(3), counts)
    assert np.isnan(found[0]).all() and np.isfinite(found[1]).all()


def test_correlations_are_those_of_the_drawn_points(points):
    x, y, counts = points
    pearson, spearman = correlation(x, y, counts), rank_correlation(x, y, counts)
    for place, weights in enumerate(counts):
        a, b = drawn(x, weights), drawn(y, weights)
        assert pearson[place] == pytest.approx(stats.pearsonr(a, b).statistic, abs=1e-12)
        assert spearman[place] == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


def test_ranks_of_ties_are_their_mean():
    counts = np.array([[1.0, 1, 1, 1], [0, 2, 1, 1]])
    found = ranks(np.array([5.0, 1.0, 5.0, 7.0]), counts)
    np.testing.assert_array_equal(found[0], [2.5, 1, 2.5, 4])
    np.testing.assert_array_equal(found[1, 1:], [1.5, 3, 4])


def test_correlation_with_a_constant_is_not_defined():
    constant, x = np.full(6, 0.1), np.arange(6.0)
    assert np.isnan(correlation(constant, x, np.ones((1, 6))))[0]
    assert np.isnan(rank_correlation(x, constant, np.ones((1, 6))))[0]


def test_intervals_are_order_statistics():
    assert interval(np.arange(101.0), 0.5) == (25.0, 75.0)
    assert interval(np.array([1.0, np.nan, np.nan]), 0.9) is None
    assert interval(np.array([1.0, 2.0, math.inf]), 0.9) == (1.0, math.inf)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    generator, held, trials = np.random.default_rng(1), np.zeros(2), 300
    d = np.linspace(0.1, 2.5, 40)
    design, truth = LAWS["log"].design(d), np.array([1.2, 0.8])
    for trial in range(trials):
        gain = design @ truth + 0.2 * generator.normal(size=40)
        samples = least_squares(design, gain, resample_counts(40, 300, trial))
        for place in range(2):
            low, high = interval(samples[:, place], 0.9)
            held[place] += low <= truth[place] <= high
    # Percentile intervals of 40 points are a little too short; 300 trials add 1.7 % of noise.
    assert (held / trials > 0.82).all() and (held / trials < 0.95).all(), held / trials
