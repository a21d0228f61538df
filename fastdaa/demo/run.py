"""The demo: a small sweep in the exactly known world, the law fitted to it, a table and a page."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdaa.counted import counted
from fastdaa.demo.table import (
    best_lines,
    caution_lines,
    fit_lines,
    fits_table,
    results_table,
)
from fastdaa.study.fit import FitSettings, fit_table
from fastdaa.study.full import closing_steps, run_full, sweep_step
from fastdaa.study.kept_runs import POINTS
from fastdaa.study.language import Language
from fastdaa.study.plan import LOSSES, Run, grid
from fastdaa.study.presets import GLIMPSE, PRESETS
from fastdaa.study.table import Table, read_table

if TYPE_CHECKING:
    from rich.console import Console

FAST_BETAS = (0.02, 0.2, 2.0)
_WORDS = """\
A tiny model learns a language of which all {responses:,} responses to a prompt can be listed, and
a judge whose reward is known exactly prefers some of them. {losses} are trained on {pairs:,} of its
preferences, each at {betas} of regularisation (beta), and measured without sampling on
the way: how far from the reference (KL), and how good (gold reward; the reference has 0, its
standard deviation is 1)."""
_FAST_WORDS = "A glimpse in seconds, of a much smaller world: these numbers mean nothing."


def main(
    output_dir: str | Path,
    *,
    losses: Sequence[str] = LOSSES,
    seeds: Sequence[int] = (0,),
    fast: bool = False,
    workers: int | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Runs the demo and writes everything below ``output_dir``; see ``docs/demo.md``.

    Args:
        output_dir: gets ``index.html``, ``figures/``, ``points.jsonl``, ``fits.json`` and the rest
            of a study's folder.
        losses: any of ``dpo``, ``ipo``, ``slic`` and ``rdpo``.
        seeds: one more seed is as much work again.
        fast: a glimpse in seconds, whose numbers mean nothing.
        workers: processes of one thread each; by default one a core.

    Returns:
        What ``study.json`` holds; ``failed`` is empty if everything went well.

    Raises:
        ValueError: a loss that cannot be used, or a folder with other settings.
        KeyboardInterrupt: after Ctrl-C; finished runs are kept.
    """
    from rich.console import Console

    console = Console() if console is None else console
    runs = fast_runs(losses, seeds) if fast else grid(("H",), losses, seeds=seeds)
    output = Path(output_dir)
    _check_folder(output, runs[0].preset.name if runs else "H")
    console.print(_words(runs, fast), highlight=False)
    record = run_full(
        output,
        seeds=seeds,
        runs=runs,
        steps=[sweep_step(), *closing_steps()],
        # Starting a worker takes longer than such runs do.
        workers=1 if fast and workers is None else workers,
        console=console,
    )
    _show(output, {run.id for run in runs}, fast, console)
    console.print(f"everything took {record['seconds']:.0f} s", highlight=False)
    return record


def _check_folder(output: Path, preset: str) -> None:
    """The page is about the whole folder: a glimpse and real runs would be one page."""
    if not (output / POINTS).is_file():
        return
    found = {str(row.get("preset")) for row in read_table(output / POINTS)}
    if found - {preset}:
        raise ValueError(
            f"output_dir: expected a folder of runs in preset {preset} alone, {output} holds some "
            f"of {', '.join(sorted(found))}; choose another folder"
        )


def fast_runs(losses: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """Few and short runs in a language of 1,555 responses."""
    preset = replace(
        PRESETS["H"], name=GLIMPSE, pairs=128, held_out_pairs=64, sft_samples=1024, sft_epochs=1
    )
    language = Language(longest=4)
    return grid((preset,), losses, FAST_BETAS, seeds, checkpoints=3, language=language)


def _words(runs: Sequence[Run], fast: bool) -> str:
    losses = dict.fromkeys(run.loss.upper().replace("SLIC", "SLiC") for run in runs)
    words = " ".join(_WORDS.split()).format(
        losses=", ".join(losses),
        pairs=runs[0].preset.pairs,
        betas=counted(len({run.beta for run in runs}), "strength"),
        responses=runs[0].language.responses,
    )
    time = f"{counted(len(runs), 'run')}, a few seconds each on a free core."
    return f"{words}\n{_FAST_WORDS if fast else time}"


def _show(output: Path, asked: Set[str], fast: bool, console: Console) -> None:
    """The table, the best beta of every loss, the fits, and where everything is.

    Args:
        asked: runs of this call; others may be in the folder.
    """
    every = read_table(output / POINTS) if (output / POINTS).is_file() else Table([])
    table = every.where(lambda row: row["run"] in asked)
    if not len(table):
        console.print("No run was finished.")
        return
    final = table.final()
    console.print(results_table(final))
    for line in (*best_lines(final), *caution_lines(final)):
        console.print(line, highlight=False)
    _show_fits(table, console)
    if fast:
        console.print(_FAST_WORDS, highlight=False)
    if (output / "index.html").is_file():
        console.print(f"page: {output / 'index.html'}", highlight=False, soft_wrap=True)


def _show_fits(table: Table, console: Console) -> None:
    """The law of all checkpoints beside that of the ends of training."""
    fits = fit_table(table)
    group = tuple(fits["settings"]["group"])
    ends = fit_table(table, FitSettings(group=group, final_only=True))
    console.print(fits_table(fits, ends))
    for line in fit_lines(fits, ends):
        console.print(line, highlight=False)
