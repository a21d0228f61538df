"""What the demo prints at its end: all runs, the best beta of each loss, the fitted law."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

from fastdaa.study.curves import LOSS_NAMES, curve, distance, hump, series_name, split
from fastdaa.study.table import Table

if TYPE_CHECKING:
    from rich.table import Table as RichTable


def results_table(final: Table) -> RichTable:
    """A row for each loss and beta, with means over seeds; the most gold of a loss is marked.

    Args:
        final: the last checkpoints.
    """
    from rich.table import Table as RichTable

    seeds = len({row.get("seed") for row in final})
    means = f"Means of {seeds} seeds. " if seeds > 1 else ""
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


def fit_lines(fits: Mapping[str, Any]) -> Iterator[str]:
    """The law R(d) = d (alpha - beta log d) of every curve, beside a quadratic in KL.

    Args:
        fits: the content of ``fits.json``.
    """
    for group in fits["groups"]:
        labels = {**group["group"]}
        loss = labels.pop("loss", None)
        others = "".join(f", {name} {value}" for name, value in labels.items())
        name = LOSS_NAMES.get(loss, loss or "all runs") + others
        if not group["fits"]:
            yield f"{name}: no fit, {group['message']}"
            continue
        log, kl = (_through_origin(group, law) for law in ("log", "kl"))
        alpha, beta = (log["coefficients"][name] for name in ("alpha", "beta"))
        if log["peak"] is None:
            peak = f"no peak reported: {log['peak_reason']}"
        else:
            peak = f"peak {log['peak']['gain']:+.2f} at d {log['peak']['d']:.2f}"
        sign = "-" if beta >= 0 else "+"
        yield (
            f"{name}: R(d) = d ({alpha:.2f} {sign} {abs(beta):.2f} log d), RMSE {log['rmse']:.3f} "
            f"(quadratic in KL {kl['rmse']:.3f}); {peak}"
        )


def _by_beta(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[float, float, float, float]]:
    """Beta, sqrt(KL), gold and win-rate; means over seeds."""
    for beta, same in split(rows, "beta").items():
        yield (
            beta,
            mean(distance(row) for row in same),
            mean(row["gold"] for row in same),
            mean(row["win_rate"] for row in same),
        )


def _through_origin(group: Mapping[str, Any], law: str) -> Mapping[str, Any]:
    return next(fit for fit in group["fits"] if fit["law"] == law and not fit["intercept"])
