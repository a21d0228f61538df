"""``curves.png``: what is drawn, and on which axes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from fastdaa.train import curves
from fastdaa.train.curves import draw_curves

ROW = {
    "loss": 0.6931,
    "rewards/margins": 0.01,
    "rewards/accuracies": 0.5,
    "kl/token": 1e-4,
    "throughput/tokens_per_second": 12345.6,
    "epoch": 0.5,
}


def test_curves(tmp_path: Path) -> None:
    rows = [{"step": step, **ROW, "eval_loss": 0.6} for step in (1, 2, 3)]
    path = tmp_path / "curves.png"
    assert draw_curves([*rows, {"step": 3, "loss": None}, {"train_runtime": 1.0}], path)
    assert path.read_bytes().startswith(b"\x89PNG")


def draw_panel(title: str, rows: list[dict[str, Any]]) -> Any:
    axes = Figure().subplots()
    curves._draw_panel(axes, next(p for p in curves._PANELS if p.title == title), rows)
    axes.figure.canvas.draw()
    return axes


@pytest.mark.parametrize("steps", [(3,), (1, 2), (10, 20, 30)], ids=["one row", "two", "three"])
def test_ticks_are_whole_steps(steps: tuple[int, ...]) -> None:
    axes = draw_panel("Loss", [{"step": step, "loss": 0.5 / step} for step in steps])
    low, high = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert ticks and all(tick == int(tick) for tick in ticks)


def test_shares_and_large_numbers_have_plain_axes() -> None:
    accuracy = draw_panel("Accuracy", [{"step": 1, "rewards/accuracies": 0.4}])
    assert accuracy.get_ylim() == pytest.approx((-0.03, 1.03))
    rows = [{"step": step, "throughput/tokens_per_second": 20000.0 + step} for step in (1, 2)]
    labels = [tick.get_text() for tick in draw_panel("Throughput", rows).get_yticklabels()]
    assert "20,001" in labels


def test_the_exact_kl_shares_no_axis() -> None:
    panels = [panel for panel in curves._PANELS if any("kl/" in key for key, _ in panel.lines)]
    assert [len(panel.lines) for panel in panels] == [1, 1]


def test_curves_of_nothing(tmp_path: Path) -> None:
    assert not draw_curves([{"step": 1, "epoch": 1.0}], tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()
