"""Figures: legible in both layouts, nothing on top of each other, and sentences from the data."""

from __future__ import annotations

import itertools
import re
import runpy
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from fastdaa.study.figures import (
    beta_kl,
    correlations,
    course,
    frontier,
    hump,
    length,
    likelihood,
    online,
    paths,
    tilt,
)
from fastdaa.study.figures.fitted import fits, fitted_curves
from fastdaa.study.figures.style import DARK, WIDTHS, Layout, Picture, render, save_png, to_svg
from fastdaa.study.fit import FitSettings, fit_table
from fastdaa.study.report import FIGURES, collect_pictures, describe
from fastdaa.study.results import Results
from fastdaa.study.table import Table

synthetic = runpy.run_path(str(Path(__file__).with_name("synthetic_study.py")))
LAYOUTS: tuple[Layout, ...] = ("wide", "narrow")


@pytest.fixture(scope="module")
def results() -> Results:
    rows = Table(synthetic["study_rows"](seeds=2) + synthetic["online_rows"]())
    return Results(
        rows=rows,
        fits=fit_table(rows, FitSettings(repeats=100)),
        tree=synthetic["tree_content"](),
        tilt=tuple(synthetic["tilt_rows"]()),
        estimators=synthetic["estimators_content"](),
    )


@pytest.fixture(scope="module")
def pictures(results: Results) -> dict[str, Picture]:
    found, missing = collect_pictures(results)
    assert missing == {}
    return {picture.name: picture for picture in found}


NAMES = [
    "hump-H", "frontier-losses-H", "frontier-sizes-H", "frontier-length-H", "paths-H", "beta-kl",
    "fits-H", "correlations-H", "length-H", "likelihood", "tilt", "tree", "estimators",
    "online-H",
]  # fmt: skip


@pytest.fixture(scope="module")
def drawn(pictures: dict[str, Picture]) -> Callable[[str, Layout], Figure]:
    """Pictures by name and layout, each drawn once."""

    @cache
    def draw(name: str, layout: Layout) -> Figure:
        figure = render(pictures[name], layout)
        figure.draw_without_rendering()
        return figure

    return draw


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_overlaps(
    drawn: Callable[[str, Layout], Figure], name: str, layout: Layout
) -> None:
    figure = drawn(name, layout)
    assert figure.get_figwidth() <= WIDTHS[layout]
    boxes = [ax.get_tightbbox() for ax in figure.axes if ax.get_visible()]
    boxes += [legend.get_window_extent() for legend in figure.legends]
    width, height = figure.bbox.width, figure.bbox.height
    for place, box in enumerate(boxes):
        assert box is not None
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
        for other in boxes[place + 1 :]:
            assert other is not None
            across = min(box.x1, other.x1) - max(box.x0, other.x0)
            down = min(box.y1, other.y1) - max(box.y0, other.y0)
            assert across <= 1 or down <= 1, f"{name}: two parts share {across:.0f} x {down:.0f}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("start", "width"), [(0.5534, 0.00017), (1.0881, 0.0011), (0.7169, 0.001), (0.61, 0.06)]
)
def test_numbers_of_correlations_do_not_touch(layout: Layout, start: float, width: float) -> None:
    """Where all runs are much alike they have many digits."""
    rows = [
        {"loss": loss, "run": f"{loss}{i}", "checkpoint": 0, "score": 0.1 * i, "kl": 1.0,
         "accuracy": start + width * i / 7, "loss_value": start + width * i / 7}
        for loss in ("DPO", "IPO", "SLiC") for i in range(8)
    ]  # fmt: skip
    (picture,) = correlations.pictures(Results(Table(rows)))
    figure = render(picture, layout)
    figure.draw_without_rendering()
    assert len(figure.axes) == 6
    for ax in figure.axes:
        low, high = ax.get_xlim()
        labels = [text for text in ax.get_xticklabels() if low <= text.get_position()[0] <= high]
        boxes = [text.get_window_extent() for text in labels]
        assert len(boxes) >= 2
        for one, following in itertools.pairwise(boxes):
            points = (following.x0 - one.x1) * 72 / figure.dpi
            assert points > 3, [text.get_text() for text in labels]


@pytest.mark.parametrize("name", NAMES)
def test_axes_are_labelled_and_legible(drawn: Callable[[str, Layout], Figure], name: str) -> None:
    figure = drawn(name, "narrow")
    for ax in figure.axes:
        assert ax.get_xlabel() or ax.get_xticklabels(), name
        assert ax.get_ylabel(), name
    texts: list[Any] = figure.findobj(lambda part: isinstance(part, Text) and part.get_text())
    assert min(text.get_fontsize() for text in texts if text.get_visible()) >= 8


@pytest.mark.parametrize("layout", LAYOUTS)
def test_curves_of_tilting_are_not_cut_off(layout: Layout) -> None:
    """The panels share an axis, and the last has the farthest curve."""
    rows = synthetic["tilt_rows"]()
    rows[-25:] = [row | {"kl": 2 * row["kl"]} for row in rows[-25:]]
    (picture,) = tilt.pictures(Results(tilt=tuple(rows)))
    farthest = max(row["kl"] for row in rows) ** 0.5
    assert render(picture, layout).axes[0].get_xlim()[1] >= farthest


def test_units(drawn: Callable[[str, Layout], Figure]) -> None:
    ax = drawn("hump-H", "wide").axes[0]
    assert ax.get_xlabel() == "√KL to the reference (√nats)"
    assert ax.get_ylabel() == "gold reward\n(reference std. deviations)"


def test_modules_say_what_they_need() -> None:
    for name in FIGURES:
        module = import_module(f"fastdaa.study.figures.{name}")
        assert module.pictures(Results()) == []
        assert module.TITLE and "by `fastdaa study" in module.NEEDS.of_study()


def test_svg_follows_the_reader(pictures: dict[str, Picture]) -> None:
    svg = to_svg(render(pictures["likelihood"], "narrow"))
    assert "prefers-color-scheme:dark" in svg
    body = svg.split("</style>", 1)[1]
    # Every colour is a variable: what is left in hexadecimal would not change on a dark page.
    assert set(re.findall(r"#[0-9a-fA-F]{6}\b", body)) == set()
    assert all(dark in svg for dark in DARK.values())
    assert svg == to_svg(render(pictures["likelihood"], "narrow"))


@pytest.mark.parametrize("name", NAMES)
def test_no_colour_outside_the_palette(drawn: Callable[[str, Layout], Figure], name: str) -> None:
    body = to_svg(drawn(name, "wide")).split("</style>", 1)[1]
    assert set(re.findall(r"#[0-9a-fA-F]{6}\b", body)) == set()


def test_png_has_twice_the_size(pictures: dict[str, Picture], tmp_path: Path) -> None:
    figure = render(pictures["likelihood"], "wide")
    save_png(figure, tmp_path / "a.png")
    header = (tmp_path / "a.png").read_bytes()[:24]
    assert header[:4] == b"\x89PNG"
    width = int.from_bytes(header[16:20], "big")
    assert width == round(200 * figure.get_figwidth())
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def rows_of(**columns: list[Any]) -> list[dict[str, Any]]:
    """Finished runs, one a place in the lists."""
    count = len(next(iter(columns.values())))
    return [
        {"run": str(place), "checkpoint": 1, "seed": 0, "loss": "dpo"}
        | {name: values[place] for name, values in columns.items()}
        for place in range(count)
    ]


RISING = rows_of(kl=[1.0, 4.0, 9.0], score=[0.5, 1.0, 1.5], beta=[1.0, 0.5, 0.1])
FALLING = rows_of(kl=[1.0, 4.0, 9.0], score=[0.5, 1.0, 0.25], beta=[1.0, 0.5, 0.1])
SENTENCES: list[tuple[str, Callable[[], str], str]] = [
    (
        "hump", lambda: hump.sentence(FALLING),
        "Quality rises and then falls: DPO is best at √KL 2.00 (beta 0.5) with +1.00 and loses "
        "0.75 beyond it.",
    ),
    (
        "no hump", lambda: hump.sentence(RISING),
        "No fall beyond noise inside the range for DPO (best +1.50 at √KL 3.00, farthest +1.50 at "
        "3.00).",
    ),
    ("too few", lambda: hump.sentence(FALLING[:2]), "Too few runs to tell for DPO."),
    (
        "one checkpoint", lambda: hump.sentence(FALLING[:1]),
        "0 was measured once, at √KL 1.00 with 0.500.",
    ),
    (
        "frontier", lambda: frontier.sentence({"a": RISING, "b": FALLING}),
        "Best mean quality: a +1.50 at √KL 3.00 and b +1.00 at √KL 2.00.",
    ),
    (
        "beta", lambda: beta_kl.sentence({"H": FALLING}),
        "Preset H: from beta 1 down to 0.1, DPO from 1.00 to 9.00 nats.",
    ),
    (
        "paths", lambda: paths.sentence({"DPO": [paths.Path("1", [0.5, 1], [1, 2], [2.0, 1.0])]}),
        "DPO: its farthest run (√KL 2.00) is best at 50% of training.",
    ),
    (
        "correlations", lambda: correlations.sentence(correlations.clouds(
            rows_of(kl=[1.0, 2.0, 3.0], score=[1.0, 2.0, 3.0], accuracy=[0.9, 0.8, 0.7]))),
        "Correlation of quality with accuracy: DPO -1.00 (n = 3).",
    ),
    (
        "correlations with intervals", lambda: correlations.sentence(correlations.clouds(
            rows_of(kl=[1.0] * 6, score=[1.0, 2, 3, 4, 5, 6], accuracy=[1.0, 2, 3, 4, 5, 6]))),
        "Correlation of quality with accuracy: DPO +1.00 [+1.00, +1.00] (n = 6). Brackets: 95% "
        "bootstrap intervals over runs.",
    ),
    (
        "length", lambda: length.sentence(
            {"d12": rows_of(kl=[1.0, 2.0], score=[0, 0], length_r2_pairs=[0.5, 0.7])},
            ["length_r2_pairs"]),
        "Mean R² of log-ratio on length on held-out pairs: d12 0.60.",
    ),
    (
        "likelihood", lambda: likelihood.sentence(
            {None: rows_of(kl=[1.0] * 3, score=[0] * 3, kl_forward=[1.0, 2.0, 3.0],
                           chosen_logratio=[0.5, -1.0, -2.5])}),
        "Chosen answers became less likely in 2 of 3 runs; their mean log-ratio correlates with "
        "the forward KL at r = -1.00 and lies above minus that KL in 3.",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "expected"), [case[1:] for case in SENTENCES], ids=[case[0] for case in SENTENCES]
)
def test_sentences_by_hand(make: Callable[[], str], expected: str) -> None:
    assert make() == expected


def test_every_sentence_is_computed(pictures: dict[str, Picture]) -> None:
    for picture in pictures.values():
        assert re.search(r"\d", picture.sentence), picture.name
        assert picture.sentence.endswith("."), picture.name


def test_fits_of_the_plain_sweep_alone(results: Results) -> None:
    found = fits(results)
    # Two presets, three losses, two seeds, six laws; no other sizes, no R-DPO, nothing on-policy.
    assert len(found) == 2 * 3 * 2 * 6
    assert {fit.series for fit in found} == {"DPO", "IPO", "SLiC"}
    assert len(fitted_curves(results, "H", "DPO")) == 2


def test_whitened_apa_is_fitted_by_itself(results: Results) -> None:
    groups = [entry["group"] for entry in results.fits["groups"] if entry["points"] == 5]
    assert [group["whitened"] for group in groups if group["algorithm"] == "apa"] == [True, True]
    (plain, _) = [
        entry for entry in results.fits["groups"]
        if entry["group"]["algorithm"] == "apa" and entry["group"]["whitened"] is False
    ]  # fmt: skip
    assert plain["points"] == 10


def test_runs_of_two_model_sizes_are_two_on_policy_pictures() -> None:
    rows = synthetic["online_rows"](1)
    rows += [row | {"run": f"{row['run']}-d64", "size": "d64"} for row in rows]
    found = online.pictures(Results(rows=Table(rows)))
    assert [picture.name for picture in found] == ["online-H-d32", "online-H-d64"]
    assert found[1].title.endswith("preset H, d64")


def test_a_single_iteration_has_one_whole_number_on_its_axis() -> None:
    rows = [row for row in synthetic["online_rows"](1) if row.get("fraction", 1.0) == 1.0]
    rows = [row | {"iteration": 3} if "iteration" in row else row for row in rows]
    (picture,) = online.pictures(Results(rows=Table(rows)))
    axis = render(picture, "wide").axes[1].xaxis
    assert all(float(place).is_integer() for place in axis.get_majorticklocs())


def test_only_trained_policies_are_counted() -> None:
    rows = synthetic["online_rows"](1)
    best = {"score": 9.0, "algorithm": "kl_optimum"}
    told = describe(Results(rows=Table([*rows, rows[-1] | best | {"checkpoint": 9}])), [])
    assert told.startswith("6 runs with 30 checkpoints (APA, AWR, PPO and whitened APA; beta")
    assert "scores +9.00" not in told


def test_fits_without_constant_columns() -> None:
    """`fits.json` leaves out columns with one value; they are the table's."""
    rows = Table(synthetic["study_rows"](presets=("H",), seeds=1, regularised=False))
    plain = rows.where(lambda row: row["size"] == "d32")
    results = Results(rows=plain, fits=fit_table(plain, FitSettings(repeats=100)))
    assert set(results.fits["groups"][0]["group"]) == {"loss"}
    assert len(fitted_curves(results, "H", "IPO")) == 1


def test_fitted_curve_goes_through_the_law() -> None:
    rows = Table(
        rows_of(kl=[0.25, 1.0, 2.25, 4.0, 6.25, 9.0],
                score=[d * (1.0 - 0.25 * d) for d in (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)])
    )  # fmt: skip
    results = Results(rows=rows, fits=fit_table(rows, FitSettings(repeats=100)))
    ((x, y),) = fitted_curves(results, None, "DPO", law="d")
    assert x[[0, -1]] == pytest.approx([0.5, 3.0])
    assert y == pytest.approx(x * (1.0 - 0.25 * x))


def test_run_without_a_world_has_no_zero_line() -> None:
    rows = Table(
        [{"run": "a", "checkpoint": k, "kl": float(k), "score": 50.0 - k} for k in range(1, 5)]
    )
    pictures, missing = collect_pictures(Results(rows=rows))
    assert {picture.name for picture in pictures} == {"hump", "paths"}
    assert "Mass outside the data, in the tree problem" in missing
    figure: Figure = render(pictures[0], "wide")
    assert figure.axes[0].get_ylim()[0] > 40
    assert pictures[0].sentence == (
        "a is best at √KL 1.00 with 49.000 and ends at √KL 2.00 with 46.000."
    )


def tracked(steps: int = 3, **columns: Any) -> list[dict[str, Any]]:
    """One run as tracking writes it: the starting point, and standard errors."""
    return [
        {"run": "mine", "checkpoint": 2 * k, "kl": 0.25 * k, "kl_rb": 0.25 * k, "loss": "dpo",
         "kl_rb_stderr": 0.0625 * k, "score": 0.5 - 0.05 * k, "score_stderr": 0.125, "beta": 0.1,
         "seed": 42, "declined": False, **columns}
        for k in range(steps)
    ]  # fmt: skip


def test_a_single_run_is_a_line_from_its_start_with_error_bars() -> None:
    (picture,) = hump.pictures(Results(rows=Table(tracked())))
    ax = render(picture, "wide").axes[0]
    assert ax.get_title(loc="left") == "DPO, beta 0.1"
    line = next(
        line for line in ax.lines if line.get_linestyle() == "-" and len(line.get_xdata()) == 3
    )
    assert list(line.get_xdata()) == pytest.approx([0.0, 0.5, 0.5**0.5])
    # The starting point at distance 0 lies inside the panel.
    assert ax.get_xlim()[0] < 0
    bars = [segment for bar in ax.collections if hasattr(bar, "get_segments")
            for segment in bar.get_segments()]  # fmt: skip
    upright = sorted(s[1][1] - s[0][1] for s in bars if s[0][0] == s[1][0] and s[1][1] > s[0][1])
    assert upright == pytest.approx([0.25, 0.25, 0.25])
    # KL 0.25 and one standard error: from 0.1875 to 0.3125.
    across = next(s for s in bars if s[0][1] == s[1][1] == pytest.approx(0.45))
    assert [across[0][0], across[1][0]] == pytest.approx([0.1875**0.5, 0.3125**0.5])
    labels = [text.get_text() for text in ax.figure.legends[0].get_texts()]
    assert labels == ["start of training", "during training", "end of training"]


def test_sentences_of_a_single_run() -> None:
    assert course.quality_sentence(tracked()).replace("\u00a0", " ") == (
        "mine is best at its start, before any training, with 0.500 ± 0.125 and ends at √KL 0.71 "
        "with 0.400 ± 0.125. Bars are standard errors over prompts. Compared prompt by prompt, no "
        "checkpoint has declined beyond noise."
    )
    assert "mine at step 4." in course.quality_sentence(
        [*tracked(2), *tracked(3, declined=True)[2:]]
    )
    assert course.time_sentence(tracked()).replace("\u00a0", " ") == (
        "mine is best at step 0 of 4, and its KL is 0.500 ± 0.125 nats at the end."
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_runs_of_one_setting_are_told_apart(layout: Layout) -> None:
    rows = [*tracked(), *tracked(4, run="other")]
    for picture in collect_pictures(Results(rows=Table(rows)))[0]:
        figure = render(picture, layout)
        figure.draw_without_rendering()
        legend = figure.legends[0].get_window_extent()
        assert legend.x0 >= 0 and legend.x1 <= figure.bbox.width
        assert {"mine", "other"} <= {text.get_text() for text in figure.legends[0].get_texts()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_long_names_of_runs_stay_on_the_figure(layout: Layout) -> None:
    """The legend is below the panel, however many lines it has."""
    folders = [f"/home/somebody/experiments/with/a/very/long/path/lambda-{n}" for n in range(12)]
    rows = Table(
        {"run": run, "checkpoint": n, "kl": 0.2 * n, "score": float(n)}
        for run in folders for n in range(3)
    )  # fmt: skip
    (picture,) = hump.pictures(Results(rows=rows, fits=fit_table(rows)))
    figure = render(picture, layout)
    figure.draw_without_rendering()
    legend = figure.legends[0]
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width
    panel = figure.axes[0].get_tightbbox()
    assert box.y0 >= 0 and box.y1 <= panel.y0 and panel.height > 0.3 * figure.bbox.width
    shown = [text.get_text() for text in legend.get_texts()]
    assert [name.rpartition("-")[2] for name in shown[:12]] == [str(n) for n in range(12)]


@pytest.mark.parametrize("count", [2, 8, 9, 12])
def test_runs_of_a_panel_do_not_look_alike(count: int) -> None:
    rows = [row | {"run": f"run{n}"} for n in range(count) for row in tracked()]
    (picture,) = hump.pictures(Results(rows=Table(rows)))
    lines = [line for line in render(picture, "wide").axes[0].lines if len(line.get_xdata()) == 3]
    lines = [line for line in lines if str(line.get_label()).startswith("run")]
    assert [line.get_label() for line in lines] == [f"run{n}" for n in range(count)]
    assert len({(line.get_color(), str(line.get_linestyle())) for line in lines}) == count


def test_many_checkpoints_leave_the_line_to_be_seen() -> None:
    (picture,) = hump.pictures(Results(rows=Table(tracked(200))))
    ax = render(picture, "wide").axes[0]
    sizes = [max(points.get_sizes()) for points in ax.collections if hasattr(points, "get_sizes")]
    assert sorted(sizes)[0] <= 2


def test_a_point_at_the_reference_is_whole() -> None:
    rows = Table([
        {"run": f"b{beta}", "loss": "dpo", "beta": beta, "checkpoint": n, "kl": 0.2 * n * beta,
         "score": float(n)}
        for beta in (1.0, 2.0) for n in range(3)
    ])  # fmt: skip
    (picture,) = hump.pictures(Results(rows=rows))
    assert render(picture, "wide").axes[0].get_xlim()[0] < 0
    (picture,) = hump.pictures(Results(rows=rows.where(lambda row: row["kl"] > 0)))
    assert render(picture, "wide").axes[0].get_xlim()[0] == 0


def test_one_seed_has_no_mean_and_the_law_says_what_it_is_fitted_to() -> None:
    rows = Table(synthetic["study_rows"](presets=("H",), seeds=1, regularised=False))
    results = Results(rows=rows, fits=fit_table(rows, FitSettings(repeats=100)))
    (picture,) = hump.pictures(results)
    labels = [text.get_text() for text in render(picture, "wide").legends[0].get_texts()]
    assert labels == [
        "during training", "at its end", "ends of all betas", "log law of all checkpoints",
    ]  # fmt: skip


def test_beta_kl_has_more_than_powers_of_ten(drawn: Callable[[str, Layout], Figure]) -> None:
    ax = drawn("beta-kl", "wide").axes[0]
    low, high = ax.get_ylim()
    shown = [tick.get_text() for tick in ax.get_yticklabels()]
    assert sum(low <= float(text) <= high for text in shown if text) >= 3
