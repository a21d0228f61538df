"""Tables that follow a law, and their fits."""

from __future__ import annotations

import numpy as np

from fastdaa.study.fit import FitSettings, fit_table
from fastdaa.study.laws import LAWS
from fastdaa.study.table import Table

TRUTH = {"alpha": 1.2, "beta": 0.8, "intercept": 0.3}


def points(d, gain, **columns):
    return [
        {"run": f"run{n}", "checkpoint": 1, "kl": float(x) ** 2, "score": float(y), **columns}
        for n, (x, y) in enumerate(zip(d, gain, strict=True))
    ]


def law_points(name="log", low=0.1, high=3.0, n=30, noise=0.0, seed=0, offset=0.0, **columns):
    d = np.linspace(low, high, n)
    gain = LAWS[name].value(d, TRUTH["alpha"], TRUTH["beta"])
    return points(d, gain + offset + noise * np.random.default_rng(seed).normal(size=n), **columns)


def only_group(rows, **settings):
    (group,) = fit_table(Table(rows), FitSettings(**{"offset": 0.0, "group": (), **settings}))[
        "groups"
    ]
    return group


def find(group, law, intercept=False):
    return next(f for f in group["fits"] if f["law"] == law and f["intercept"] is intercept)


def summary(rows, **settings):
    return fit_table(Table(rows), FitSettings(**{"offset": 0.0, "group": (), **settings}))[
        "summary"
    ]
