"""What the demo prints at its end: all runs, the best beta of each loss, the fitted law."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

from fastdaa.counted import counted
from fastdaa.study.curves import LOSS_NAMES, curve, distance, hump, series_name, split
from fastdaa.study.fit_words import contradiction, through_origin
from fastdaa.study.table import Table
from fastdaa.study.wording import join

if TYPE_CHECKING:
    from rich.table import Table as RichTable


def results_table(final: Table) -> RichTable:
    """A row for each loss and beta, with means over seeds; the most gold of a loss is marked.

    Args:
        final: the last checkpoints.
    """
    from rich.table import Table as RichTable

    seeds = len({row.get("seed") for row in final})
    means = f"Means of {counted(seeds, 'seed')}. " if seeds > 1 else ""
    table = RichTable(
        title="at the end of training",
        caption=f"{means}The reference has gold 0, win-rate 50%.",
    )
    table.add_column("loss")
    for name in ("beta", "sqrt(KL)", "gold", "win-rate"):
        table.add_column(name, justify="right")
    table.add_column("")
    for loss, rows in split(final, series_name).items():
        cells = list(_by_beta(rows))
        best = max(gold for _, _, gold, _ in cells)
        for place, (beta, d, gold, wins) in enumerate(cells):
            table.add_row(
                loss if place == 0 else "",
                f"{beta:g}",
                f"{d:.2f}",
                f"{gold:+.2f}",
                f"{wins:.1%}",
                "best" if gold == best else "",
                end_section=place == len(cells) - 1,
            )
    return table


def best_lines(final: Table) -> Iterator[str]:
    """One line a loss: its best beta, and whether the gold falls where the policy goes farther."""
    for loss, rows in split(final, series_name).items():
        points = curve(rows, "gold")
        shape = hump(points)
        best = max(points, key=lambda point: point.score) if shape is None else shape.best
        line = (
            f"{loss}: most gold at beta {best.beta:g}, {best.score:+.2f} at sqrt(KL) "
            f"{best.distance:.2f}"
        )
        if shape is not None and shape.interior:
            far = shape.farthest
            line += (
                f"; beyond it gold falls, to {far.score:+.2f} at {far.distance:.2f} "
                f"(beta {far.beta:g})"
            )
        else:
            line += "; no fall beyond it that these runs can show"
        yield line


def caution_lines(final: Table) -> Iterator[str]:
    """What training sees of the fall beyond the best beta, and what a single seed cannot say."""
    parts = []
    for loss, rows in split(final, series_name).items():
        shape = hump(curve(rows, "gold"))
        if shape is None or not shape.interior:
            continue
        ends = (shape.best, shape.farthest)
        if any(row.get("margin") is None for end in ends for row in end.rows):
            continue
        best, far = (mean(float(row["margin"]) for row in end.rows) for end in ends)
        if far > best:
            parts.append(f"from {best:.1f} to {far:.1f} ({loss})")
    if parts:
        yield (
            "That is over-optimisation: there the margin that training raises, the log-ratio of "
            f"preferred over other answers, still grows on held-out pairs, {join(parts)}, in nats."
        )
    if len({row.get("seed") for row in final}) == 1:
        yield (
            "One seed is one world, without error bars: with --seeds 0 1 2 the table has means, "
            "and a fall is told only beyond their 95 % interval."
        )


def fits_table(fits: Mapping[str, Any], ends: Mapping[str, Any]) -> RichTable:
    """The law R(d) = d (alpha - beta log d) of every curve, beside the best point measured.

    Args:
        fits: the content of ``fits.json``, of all checkpoints.
        ends: the same of the last checkpoints alone.
    """
    from rich.table import Table as RichTable

    table = RichTable(title="fitted: R(d) = d (alpha - beta log d), d = sqrt(KL)")
    table.add_column("loss")
    table.add_column("fitted to")
    for name in ("alpha", "beta", "RMSE", "peak", "best measured"):
        table.add_column(name, justify="right")
    for all_of_them, last in zip(fits["groups"], ends["groups"], strict=True):
        name = _curve_name(all_of_them)
        table.add_row(name, f"all {all_of_them['points']} checkpoints", *_law_cells(all_of_them))
        table.add_row(
            "", f"the {counted(last['points'], 'end')}", *_law_cells(last), end_section=True
        )
    return table


def fit_lines(fits: Mapping[str, Any], ends: Mapping[str, Any]) -> Iterator[str]:
    """What the table cannot show: why a fit or a peak is missing, and what does not fit.

    Args:
        fits, ends: as in :func:`fits_table`.
    """
    against: dict[str, list[str]] = {}
    for kind, content in (("all checkpoints", fits), ("the ends", ends)):
        for group in content["groups"]:
            name = _curve_name(group)
            if not group["fits"]:
                yield f"{name}, {kind}: no fit, {group['message']}"
                continue
            log = through_origin(group, "log")
            if log["peak"] is None:
                yield f"{name}, {kind}: no peak reported, {log['peak_reason']}"
            elif contradiction(log, group["observed_peak"]):
                against.setdefault(kind, []).append(name)
    if against:
        told = "; ".join(f"{join(names)} (fitted to {kind})" for kind, names in against.items())
        yield (
            "The law contradicts the best measured (its peak is apart from it by more than a third "
            f"in d, or its curve by two RMSE): {told}. It does not describe these curves."
        )


def _curve_name(group: Mapping[str, Any]) -> str:
    labels = {**group["group"]}
    loss = labels.pop("loss", None)
    others = "".join(f", {name} {value}" for name, value in labels.items())
    return str(LOSS_NAMES.get(loss, loss or "all runs")) + others


def _law_cells(group: Mapping[str, Any]) -> list[str]:
    """Coefficients, error, peak and best point of one fit."""
    if not group["fits"]:
        return ["", "", "", "no fit", _place(group["observed_peak"])]
    log = through_origin(group, "log")
    alpha, beta = (f"{log['coefficients'][name]:.2f}" for name in ("alpha", "beta"))
    return [alpha, beta, f"{log['rmse']:.3f}", _place(log["peak"]), _place(group["observed_peak"])]


def _place(point: Mapping[str, Any] | None) -> str:
    return "none in range" if point is None else f"{point['gain']:+.2f} at {point['d']:.2f}"


def _by_beta(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[float, float, float, float]]:
    """Beta, sqrt(KL), gold and win-rate; means over seeds."""
    for beta, same in split(rows, "beta").items():
        yield (
            beta,
            mean(distance(row) for row in same),
            mean(row["gold"] for row in same),
            mean(row["win_rate"] for row in same),
        )
