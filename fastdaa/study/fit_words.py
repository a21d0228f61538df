"""What a set of fits says, in sentences; also what it does not say."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastdaa.counted import counted
from fastdaa.study.laws import LAWS
from fastdaa.study.wording import capitalised

Fit = Mapping[str, Any]
TITLES = {
    "log": "the log law d (alpha - beta log d)",
    "d": "the quadratic in d",
    "kl": "the quadratic in KL",
}

SIMILAR = 4 / 3
"""Distances are called similar up to this ratio."""
_ROUNDING = 1e-9
_SHOWN = 4
"""Groups that a sentence names."""


def group_name(group: Mapping[str, Any]) -> str:
    """``loss dpo, seed 0``, or ``all rows``; columns that the group does not have are left out."""
    known = [f"{name} {value}" for name, value in group.items() if value is not None]
    return ", ".join(known) or "all rows"


def describe_fits(content: Mapping[str, Any]) -> list[str]:
    """Sentences on the whole of ``fits.json``: errors, comparison of the laws, peaks."""
    fitted = [group for group in content["groups"] if group["fits"]]
    sentences = [
        f"{group_name(group['group'])}: no fit, {group['message']}."
        for group in content["groups"]
        if not group["fits"]
    ]
    if content["dropped"]:
        sentences.append(
            f"{counted(content['dropped'], 'row')} at the reference itself (d below 0.001) "
            f"{'was' if content['dropped'] == 1 else 'were'} left out of the fits."
        )
    if content["unknown"]:
        sentences.append(
            f"{counted(content['unknown'], 'row')} without {content['settings']['score']} "
            f"{'was' if content['unknown'] == 1 else 'were'} left out."
        )
    if not fitted:
        return sentences
    laws = content["settings"]["laws"]
    sentences += _errors(fitted, laws)
    sentences += _far_errors(fitted, laws)
    if "log" in laws and "kl" in laws:
        sentences.append(_log_against_kl(fitted))
    sentences += _winner(fitted, laws)
    sentences += _peaks(fitted, content["settings"]["confidence"])
    sentences += _contradictions(fitted)
    sentences += _few_points(fitted)
    return sentences


def through_origin(group: Mapping[str, Any], law: str) -> Fit:
    """The group's fit of a law without intercept."""
    return next(fit for fit in group["fits"] if fit["law"] == law and not fit["intercept"])


def contradiction(fit: Fit, observed: Mapping[str, Any] | None) -> str | None:
    """The best measured point, if the peak of a fit contradicts it; else None.

    They contradict each other if their distances differ by more than a third, or if the best
    point is farther from the fitted curve than two RMSE.

    Args:
        fit: one of a group's ``fits``.
        observed: the group's ``observed_peak``.
    """
    peak = fit["peak"]
    if peak is None or observed is None:
        return None
    near, far = sorted((peak["d"], observed["d"]))
    fitted = float(LAWS[fit["law"]].value(observed["d"], **fit["coefficients"]))
    noise = 2 * fit["rmse"] + _ROUNDING
    if far <= SIMILAR * near and abs(observed["gain"] - fitted) <= noise:
        return None
    return f"{observed['gain']:+.2f} at d {observed['d']:.2f}"


def _contradictions(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Groups whose log law has its peak somewhere else than the best checkpoint."""
    found = []
    for group in groups:
        for fit in group["fits"]:
            if fit["law"] != "log" or fit["intercept"]:
                continue
            best = contradiction(fit, group["observed_peak"])
            if best is not None:
                peak = f"{fit['peak']['gain']:+.2f} at d {fit['peak']['d']:.2f}"
                found.append(f"{group_name(group['group'])} (law {peak}, measured {best})")
    if not found:
        return []
    return [
        f"The log law's peak contradicts the best checkpoint in {len(found)} of "
        f"{counted(len(groups), 'group')}: {_listed(found)}."
    ]


def _errors(groups: Sequence[Mapping[str, Any]], laws: Iterable[str]) -> list[str]:
    parts = []
    for law in laws:
        mean = sum(through_origin(group, law)["rmse"] for group in groups) / len(groups)
        parts.append(f"{TITLES[law]} {mean:.3g}")
    where = "" if len(groups) == 1 else f", mean of {counted(len(groups), 'group')}"
    return [f"RMSE without intercept (two coefficients each){where}: {'; '.join(parts)}."]


def _far_errors(groups: Sequence[Mapping[str, Any]], laws: Iterable[str]) -> list[str]:
    """How far the laws are off where they were not fitted."""
    known = [
        group
        for group in groups
        if all(through_origin(group, law).get("far_rmse") is not None for law in laws)
    ]
    if not known:
        return []
    parts = []
    for law in laws:
        # One group whose near points say nothing would decide a mean.
        middle = statistics.median(through_origin(group, law)["far_rmse"] for group in known)
        parts.append(f"{TITLES[law]} {middle:.3g}")
    where = "" if len(known) == 1 else f", median of {counted(len(known), 'group')}"
    return [
        "Fitted to the nearest two thirds of the points, without intercept, the laws miss the "
        f"farthest third by (RMSE{where}): {'; '.join(parts)}."
    ]


def _log_against_kl(groups: Sequence[Mapping[str, Any]]) -> str:
    ratios = []
    for group in groups:
        ours, theirs = (through_origin(group, law)["rmse"] for law in ("log", "kl"))
        # Two exact fits are as good as each other.
        ratios.append(ours / theirs if theirs > 0 else 1.0 if ours == 0 else float("inf"))
    better = sum(ratio < 1 for ratio in ratios)
    if len(ratios) == 1:
        word = "smaller" if better else "not smaller"
        return (
            f"The log law's RMSE is {word} than the quadratic in KL's: ratio {ratios[0]:.2f} "
            "(0.5 would be half)."
        )
    return (
        f"The log law's RMSE is smaller than the quadratic in KL's in {better} of "
        f"{counted(len(ratios), 'group')}: ratio {min(ratios):.2f} to {max(ratios):.2f} "
        "(0.5 would be half)."
    )


def _winner(groups: Sequence[Mapping[str, Any]], laws: Sequence[str]) -> list[str]:
    wins = dict.fromkeys(laws, 0)
    alone = 0
    for group in groups:
        best = group["fits"][group["best"]]
        wins[best["law"]] += 1
        alone += not any(f["tied_with_best"] for f in group["fits"] if f["law"] != best["law"])
    name = max(wins, key=lambda law: wins[law])
    if len(groups) == 1:
        best = groups[0]["fits"][groups[0]["best"]]
        extra = " with an intercept" if best["intercept"] else ""
        told = (
            "the other laws are worse by more than resampling explains"
            if alone
            else "resampling does not tell it from every other law"
        )
        return [f"{capitalised(TITLES[name])}{extra} has the least leave-one-out error; {told}."]
    counts = ", ".join(f"{TITLES[law]} in {won}" for law, won in wins.items())
    return [
        f"Least leave-one-out error, with or without intercept: {counts} of "
        f"{counted(len(groups), 'group')}. In {alone} of them the other laws are worse by "
        "more than resampling explains."
    ]


def _peaks(groups: Sequence[Mapping[str, Any]], confidence: float) -> list[str]:
    """Which of the best fits have a peak that the data support."""
    supported, shaky, absent = [], [], []
    for group in groups:
        best = group["fits"][group["best"]]
        peak = best["peak"]
        if peak is None:
            absent.append(f"{group_name(group['group'])} ({best['peak_reason']})")
        elif peak["share"] < confidence:
            shaky.append(
                f"{group_name(group['group'])} (peak in the data in {peak['share']:.0%} of the "
                "resamples)"
            )
        else:
            supported.append(peak["d"])
    sentences = []
    if supported:
        where = f"at d = {min(supported):.3g}"
        if len(supported) > 1:
            where += f" to {max(supported):.3g}"
        in_groups = ""
        if len(groups) > 1:
            in_groups = f" in {len(supported)} of {counted(len(groups), 'group')}"
        sentences.append(f"A peak inside the data is supported{in_groups}, {where}.")
    if shaky:
        sentences.append(f"Not sure of a peak: {_listed(shaky)}.")
    if absent:
        sentences.append(f"No peak supported: {_listed(absent)}.")
    return sentences


def _few_points(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    few = [group_name(group["group"]) for group in groups if group["points"] < 10]
    if not few:
        return []
    return [f"Fewer than 10 points, so read the intervals with care: {_listed(few)}."]


def _listed(items: Sequence[str]) -> str:
    rest = len(items) - _SHOWN
    return "; ".join(items[:_SHOWN]) + (f"; and {rest} more" if rest > 0 else "")
