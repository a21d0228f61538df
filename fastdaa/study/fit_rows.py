"""Fits as a tidy table: one row a group and law, for CSV files and data frames."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from typing import Any

from fastdaa.whole_file import whole_file

_OF_GROUP = ("points", "runs", "resampled", "offset")
_OF_FIT = ("rmse", "loo_rmse", "far_rmse", "aicc", "r2", "tied_with_best", "zero_crossing")


def fit_rows(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the same columns from what :func:`fastdaa.study.fit.fit_table` returns.

    Columns are those of the groups, then ``points``, ``runs``, ``resampled``, ``offset``, ``law``,
    ``intercept`` (whether there is one), ``alpha``, ``beta``, ``constant`` (the intercept, 0
    without) and their ``_low`` and ``_high``, the errors as in ``fits.json``, ``best``, and
    ``peak_d``, ``peak_d_low``, ``peak_d_high``, ``peak_score``, ``peak_share``. None where
    unknown. Groups without a fit have no row.
    """
    return [
        {
            **group["group"],
            **{name: group[name] for name in _OF_GROUP},
            **_fit_columns(fit),
            "best": place == group["best"],
            **_peak_columns(fit["peak"]),
        }
        for group in content["groups"]
        for place, fit in enumerate(group["fits"])
    ]


def write_fits_csv(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write :func:`fit_rows` with a header, atomically; None becomes an empty cell.

    Raises:
        ValueError: there is no fit to write.
    """
    rows = fit_rows(content)
    if not rows:
        raise ValueError(f"{path}: expected at least one fit, got none")
    with whole_file(path) as partial, partial.open("w", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def _fit_columns(fit: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"law": fit["law"], "intercept": fit["intercept"]}
    for name, column in (("alpha", "alpha"), ("beta", "beta"), ("intercept", "constant")):
        low, high = fit["intervals"][name] or (None, None)
        found |= {column: fit["coefficients"][name], f"{column}_low": low, f"{column}_high": high}
    return found | {name: fit[name] for name in _OF_FIT}


def _peak_columns(peak: Mapping[str, Any] | None) -> dict[str, Any]:
    if peak is None:
        peak = {"d": None, "d_interval": (None, None), "score": None, "share": None}
    low, high = peak["d_interval"]
    return {
        "peak_d": peak["d"],
        "peak_d_low": low,
        "peak_d_high": high,
        "peak_score": peak["score"],
        "peak_share": peak["share"],
    }
