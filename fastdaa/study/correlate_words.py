"""What a set of correlations says, in sentences; also what it does not say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastdaa.counted import counted
from fastdaa.study.fit_words import group_name

Entry = Mapping[str, Any]
_SHOWN = 3
"""With more groups than this in a scope, only their range is told."""
_TITLES = {
    "accuracy": "implicit-reward accuracy",
    "loss_value": "held-out loss",
    "margin": "held-out margin",
}


def describe_correlations(content: Mapping[str, Any]) -> list[str]:
    """Sentences on ``correlations.json``: quality by predictor and scope, length, likelihoods."""
    sentences = []
    for predictor, title in _TITLES.items():
        entries = [entry for entry in content["quality"] if entry["x"] == predictor]
        for scope in dict.fromkeys(entry["scope"] for entry in entries):
            ours = [entry for entry in entries if entry["scope"] == scope]
            sentences.append(f"{title} and {ours[0]['y']}, {_scope(scope, ours)}")
    if any(entry["x"] == "loss_value" for entry in content["quality"]):
        sentences.append(
            "Losses at different beta have different scales, so a correlation over several of them "
            "is about beta as much as about training."
        )
    sentences += _length(content["length_trend"], content["length"])
    sentences += _likelihood(content["likelihood"])
    return sentences


def _scope(scope: str, entries: Sequence[Entry]) -> str:
    defined = [entry for entry in entries if entry["pearson_interval"] is not None]
    if len(defined) > _SHOWN and len(defined) == len(entries):
        values = [entry["pearson"] for entry in defined]
        told = sum(not _includes_zero(entry) for entry in defined)
        return (
            f"within each {scope}: r from {min(values):+.2f} to {max(values):+.2f}, and the "
            f"interval excludes 0 in {told} of {len(defined)}."
        )
    head = "all rows together" if scope == "pooled" else f"within each {scope}"
    return f"{head}: {'; '.join(_shown(entry, scope) for entry in entries)}."


def _shown(entry: Entry, scope: str) -> str:
    name = "" if scope == "pooled" else f"{group_name(entry['group'])} "
    if entry["pearson"] is None:
        return f"{name}not defined ({entry['reason']})"
    ends = entry["pearson_interval"]
    if ends is None:
        runs = counted(entry["runs"], "run")
        return f"{name}r = {entry['pearson']:+.2f}, no interval from {runs} (n = {entry['n']})"
    word = "includes" if _includes_zero(entry) else "excludes"
    return (
        f"{name}r = {entry['pearson']:+.2f}, interval {ends[0]:+.2f} to {ends[1]:+.2f} {word} 0 "
        f"(n = {entry['n']})"
    )


def _includes_zero(entry: Entry) -> bool:
    low, high = entry["pearson_interval"]
    return bool(low <= 0 <= high)


def _length(trends: Sequence[Entry], means: Sequence[Entry]) -> list[str]:
    sentences = []
    for column in dict.fromkeys(entry["column"] for entry in means):
        whole = [e for e in means if e["column"] == column and e["kl_range"] is None]
        parts = [f"{_size(e)}{e['mean']:.2f} (n = {e['n']})" for e in whole]
        sentences.append(f"R^2 of log-ratio on length ({column}), mean: {'; '.join(parts)}.")
    for entry in trends:
        if entry["spearman"] is None:
            continue
        ends = entry["spearman_interval"]
        told = ends is not None and not ends[0] <= 0 <= ends[1]
        direction = "rises" if entry["spearman"] > 0 else "falls"
        what = f"{direction} with KL" if told else "has no clear trend with KL"
        sentences.append(
            f"{_size(entry)}{entry['column']} {what} (rank correlation {entry['spearman']:+.2f}, "
            f"n = {entry['n']})."
        )
    return sentences


def _size(entry: Entry) -> str:
    return "" if entry["size"] is None else f"size {entry['size']}: "


def _likelihood(entries: Sequence[Entry]) -> list[str]:
    sentences = []
    for entry in entries:
        text = (
            f"Chosen log-ratio, {group_name(entry['group'])}: below 0 in "
            f"{entry['chosen_below_zero']:.0%} of {counted(entry['n'], 'row')}"
        )
        if entry["pearson"] is not None:
            text += (
                f", r = {entry['pearson']:+.2f} with forward KL, on average "
                f"{abs(entry['gap']):.2f} nats {'above' if entry['gap'] >= 0 else 'below'} "
                "-KL(reference || policy)"
            )
        sentences.append(text + ".")
    return sentences
