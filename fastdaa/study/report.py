"""A study's folder, or one table, as a page and figures: ``index.html`` and ``figures/*.png``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdaa.counted import counted
from fastdaa.study.claims import Judged, judge_claims
from fastdaa.study.curves import (
    EXACT_POLICIES,
    Row,
    distinct,
    score_error,
    series_name,
    split,
)
from fastdaa.study.environment import environment
from fastdaa.study.figures.needs import Needs
from fastdaa.study.figures.style import Picture, render, save_png, to_svg
from fastdaa.study.page import Page, PageFigure, render_page
from fastdaa.study.report_tables import tables
from fastdaa.study.results import Results, is_study_folder, read_results
from fastdaa.study.wording import join, number, with_error
from fastdaa.whole_file import whole_file
from fastdaa.writable import check_writable

if TYPE_CHECKING:
    from rich.console import Console

FIGURES = (
    "hump",
    "frontier",
    "paths",
    "beta_kl",
    "fitted",
    "correlations",
    "length",
    "likelihood",
    "tilt",
    "tree",
    "estimators",
    "online",
)
"""Modules of ``fastdaa.study.figures``, in the order of the page. Each has ``TITLE``, ``NEEDS`` and
``pictures(results)``, which is empty where the study has no data for it."""
PAGE = "index.html"
_GLIMPSE_WARNING = (
    "A glimpse (--fast) of a much smaller world: these numbers mean nothing, and no claim is "
    "judged by them."
)

_PRESET_WORDS = {
    "H": "is the world whose reward punishes what the preference pairs hardly show harshly",
    "M": "is the world whose reward punishes it mildly",
}


def build_report(
    source: str | Path | Sequence[str | Path],
    output: str | Path | None = None,
    *,
    command: str | None = None,
    console: Console | None = None,
) -> Path:
    """Writes the page and its figures, and returns the page's path.

    Args:
        source: a study's folder; or one or more tables of one's own runs (``.jsonl`` or ``.csv``,
            see :mod:`fastdaa.study.columns`, or output folders, see
            :mod:`fastdaa.study.table_files`). Laws are fitted to such tables here.
        output: folder of ``index.html`` and ``figures/``; by default the study's folder,
            ``<table>_report`` beside the first table, or ``report`` in the first output folder.
        command: the command line, for the page's last table.
        console: shows progress there.

    Raises:
        FileNotFoundError: no such folder or table.
        ValueError: a file that cannot be read, named with its line where there is one.
        OSError: the folder cannot be written to.
    """
    given = [source] if isinstance(source, (str, Path)) else source
    sources = [Path(path) for path in given]
    if not sources:
        raise ValueError("report: expected a study's folder or a table, got none")
    results = read_results(sources)
    folder = _beside(sources[0]) if output is None else Path(output)
    if results.renewed and console is not None:
        console.print(f"computed for this page: what {_others(results)}", highlight=False)
    check_writable(folder, "output")
    pictures, missing = collect_pictures(results)
    figures = _draw_all(pictures, folder / "figures", console)
    judged = results.is_study and not results.is_glimpse
    claims = judge_claims(results) if judged else []
    page = Page(
        title=_title(results),
        warning=_GLIMPSE_WARNING if results.is_glimpse else "",
        lead=describe(results, claims),
        claims=[claim for claim in claims if claim.verdict != "no data"],
        figures=figures,
        tables=tables(results),
        missing=missing | _missing_claims(claims),
        missing_title="Not run" if results.is_study else "Not in this table",
        facts=facts_of(results, command),
    )
    path = folder / PAGE
    with whole_file(path) as partial:
        partial.write_text(render_page(page), encoding="utf-8")
    return path


def _beside(source: Path) -> Path:
    if source.is_file():
        return source.with_name(f"{source.stem}_report")
    return source if is_study_folder(source) else source / "report"


def collect_pictures(results: Results) -> tuple[list[Picture], dict[str, str]]:
    """All pictures that the data allow; and the titles of the others with what they need."""
    found: list[Picture] = []
    missing: dict[str, str] = {}
    for name in FIGURES:
        module = import_module(f"fastdaa.study.figures.{name}")
        pictures = module.pictures(results)
        found += pictures
        if not pictures:
            missing[module.TITLE] = _needs(name, module.NEEDS, results)
    return found, missing


def _needs(name: str, needs: Needs, results: Results) -> str:
    if results.is_study or not results.rows:
        return needs.of_study()
    reasons = [group["message"] for group in results.fits.get("groups", ()) if group["message"]]
    if name == "fitted" and reasons:
        return reasons[0].removeprefix("expected ")
    return needs.of_table()


def _draw_all(
    pictures: Sequence[Picture], folder: Path, console: Console | None
) -> list[PageFigure]:
    from rich.progress import Progress

    figures = []
    with Progress(console=console, transient=True, disable=console is None) as progress:
        for picture in progress.track(pictures, description="figures"):
            wide = render(picture, "wide")
            save_png(wide, folder / f"{picture.name}.png")
            figures.append(
                PageFigure(
                    picture.name,
                    picture.title,
                    picture.sentence,
                    to_svg(wide),
                    to_svg(render(picture, "narrow")),
                )
            )
    return figures


def _title(results: Results) -> str:
    if results.in_world or not results.rows:
        return "Over-optimisation in a world with a known reward"
    return "Quality against KL"


def describe(results: Results, claims: Sequence[Judged]) -> str:
    """What was run, and how many claims came out how."""
    # Policies in closed form stand in the table, too, but nobody trained them.
    rows = [row for row in results.rows if row.get("algorithm") not in EXACT_POLICIES]
    parts = []
    if rows:
        runs = len({row["run"] for row in rows})
        losses = join(list(split(rows, series_name)))
        text = f"{counted(runs, 'run')} with {counted(len(rows), 'checkpoint')} ({losses}"
        betas, seeds = distinct(rows, "beta"), distinct(rows, "seed")
        if len(betas) > 1:
            text += f"; beta from {betas[0]:g} to {betas[-1]:g}"
        elif betas:
            text += f"; beta {betas[0]:g}"
        if len(seeds) > 1:
            text += f"; {counted(len(seeds), 'seed')}"
        parts.append(text + ").")
        parts.append(_best_sentence(results, rows))
    judged = [claim for claim in claims if claim.verdict != "no data"]
    if judged:
        counts = [
            f"{sum(claim.verdict == verdict for claim in judged)} {verdict}"
            for verdict in ("reproduced", "partly", "not reproduced")
        ]
        parts.append(f"Of {counted(len(judged), 'claim')} that the data can judge: {join(counts)}.")
        if rows and len(distinct(rows, "seed")) < 2:
            parts.append("One seed is one world: these verdicts have no error bars.")
    if results.in_world:
        parts.append(
            "KL and gold reward are exact, by enumeration; gold is 0 for the reference policy, and "
            "its unit is the standard deviation of the reward under that policy."
        )
        known = [preset for preset in distinct(rows, "preset") if preset in _PRESET_WORDS]
        parts += [f"Preset {preset} {_PRESET_WORDS[preset]}." for preset in known]
    return " ".join(parts)


def _best_sentence(results: Results, rows: Sequence[Row]) -> str:
    """The checkpoint with the highest score, which may be the start of a run."""
    best = max(rows, key=lambda row: row["score"])
    score = (
        number(best["score"], sign=True)
        if results.in_world
        else with_error(best["score"], score_error(best), 3)
    )
    if best["checkpoint"] == 0:
        return f"No checkpoint scores more than the start of {best['run']} (step 0): {score}."
    return (
        f"The best checkpoint, {best['run']} at step {best['checkpoint']}, scores {score} at a KL "
        f"of {number(best['kl'])} nats a sequence."
    )


def _missing_claims(claims: Sequence[Judged]) -> dict[str, str]:
    """Claims without data, each under its text."""
    needs = "Not measured: needs "
    return {
        f"Claim “{claim.paper}”": claim.measured.removeprefix(needs).rstrip(".")
        for claim in claims
        if claim.verdict == "no data"
    }


def _others(results: Results) -> str:
    """``fits.json has of other rows, or of another score``, of what was computed anew."""
    has = "has" if len(results.renewed) == 1 else "have"
    return f"{join(results.renewed)} {has} of other rows, or of another score"


def facts_of(results: Results, command: str | None) -> dict[str, str]:
    """Settings, versions, commit, command, seconds and cores; those of the report where the study
    left none."""
    rows, study = results.rows, results.settings
    facts: dict[str, str] = {}
    for column in ("preset", "size", "loss", "algorithm", "beta", "length_alpha", "seed", "lr"):
        values = distinct(rows, column)
        if values:
            facts[column] = ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)
    for name, value in study.get("settings", {}).items():
        if name not in ("runs", "seeds"):
            facts[name] = str(value)
    steps: Mapping[str, Any] = study.get("steps", {})
    for name, step in steps.items():
        if step.get("result"):
            facts[f"step {name}"] = f"{step['result']}, {step['seconds']:.0f} s"
    if results.renewed:
        facts["computed for this page"] = f"what {_others(results)}"
    for name, errors in study.get("failed", {}).items():
        facts[f"failed in {name}"] = str(errors)
    trained = [max(r.get("seconds") or 0.0 for r in run) for run in split(rows, "run").values()]
    if any(trained):
        facts["training seconds"] = f"{sum(trained):.0f}, summed over runs"
    if study.get("seconds"):
        facts["seconds"] = f"{study['seconds']:.0f}, all steps"
    where = study if study.get("versions") else environment()
    facts["versions"] = ", ".join(f"{name} {value}" for name, value in where["versions"].items())
    facts["commit"] = where.get("commit") or "not from a checkout"
    facts["cores"] = str(where["cores"])
    if study.get("workers"):
        facts["cores"] += f", {counted(study['workers'], 'worker')} of one thread"
    facts["machine"] = str(where["machine"])
    if study.get("command"):
        facts["command"] = str(study["command"])
    if command:
        facts["command of this page"] = command
    return facts
