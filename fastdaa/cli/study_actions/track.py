"""fastdaa study track: measure quality and KL of finished checkpoints, as `fastdaa train` does
with its --track_* options (docs/tracking.md). Rows are appended to a table that fit and report
read; the same command again continues where it was interrupted."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fastdaa.cli.runs import INTERRUPTED, no_bars_in_files
from fastdaa.counted import counted

HELP = "measure quality and KL of finished checkpoints"
_COLUMNS = ("prompt", "chosen", "rejected", "completion", "messages")
_NUMBERS: tuple[tuple[str, int | float, str, str], ...] = (
    ("judge_timeout", 600.0, "S", "seconds that the judge may take for a checkpoint"),
    ("temperature", 1.0, "T", "temperature of the samples"),
    ("prompts", 64, "N", "different prompts, each answered once"),
    ("max_new_tokens", 256, "N", "tokens of an answer; longer ones are cut"),
    ("batch_size", 16, "N", "prompts answered at a time"),
    ("seed", 0, "N", "seed of the choice of prompts and of sampling"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the action."""
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--model", nargs="+", required=True, metavar="FOLDER",
        help="checkpoints of one run, or its output folder with all checkpoint-*",
    )  # fmt: skip
    what.add_argument("--ref_model", help="where training started (default: an adapter's base)")
    what.add_argument(
        "--ref_model_revision", metavar="REVISION", help="branch, tag or commit of it on the hub"
    )
    what.add_argument("--dataset", required=True, help="pairs that were not trained on")
    what.add_argument("--dataset_split", help="split of the dataset")
    for name in _COLUMNS:
        what.add_argument(f"--{name}_column", help=f"column that is read as {name}")
    what.add_argument(
        "--on_bad_row", choices=("error", "skip"), default="error",
        help="at a row that cannot be used: stop, or skip and count it (default: %(default)s)",
    )  # fmt: skip
    what.add_argument("--no_start", action="store_true", help="leave the starting point out")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--reward", help="module:function, path/to/file.py:function, or a reward model"
    )
    how.add_argument("--judge", help="command that compares answers, as JSON lines")
    for name, default, letter, words in _NUMBERS:
        how.add_argument(
            f"--{name}", type=type(default), default=default, metavar=letter,
            help=f"{words} (default: %(default)s)",
        )  # fmt: skip
    how.add_argument(
        "--dtype", default="auto", help="dtype of the weights (default: %(default)s, as stored)"
    )
    how.add_argument("--device", help="where it runs (default: an accelerator, where there is one)")
    where = parser.add_argument_group("where it goes")
    where.add_argument(
        "--table",
        default="track.jsonl",
        metavar="FILE",
        help="table that rows are appended to (default: %(default)s)",
    )
    where.add_argument("--run", help="name in the table (default: the output folder's)")
    where.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE",
        help="further columns, such as loss=dpo beta=0.1",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Measure every checkpoint that has no row yet; 130 after Ctrl-C."""
    from fastdaa.study.track.finished import Checkpoint, find_checkpoints
    from fastdaa.writable import check_writable

    checkpoints = find_checkpoints(options.model)
    if not options.no_start and all(one.step > 0 for one in checkpoints):
        checkpoints.insert(0, Checkpoint(None, 0, {"fraction": 0.0, "final": False}))
    more = dict(map(_column, options.set))
    check_writable(Path(options.table).parent, "--table")
    record = _record(options, checkpoints)
    rows = record.resume(float("inf"))
    _check_set(rows, more, options.table)
    known = {row["checkpoint"] for row in rows}
    missing = [one for one in checkpoints if one.step not in known]
    if len(missing) < len(checkpoints):
        measured = counted(len(checkpoints) - len(missing), "checkpoint")
        print(f"measured before: {measured} in {options.table}")
    if missing:
        try:
            with no_bars_in_files():
                _measure(options, record, checkpoints, missing, more)
        except KeyboardInterrupt:
            print("\ninterrupted; what is measured is kept, the same command continues")
            return INTERRUPTED
    if record.best is not None:
        print(f"best score: step {record.best}")
    print(f"quality against KL: {options.table}")
    return 0


def _record(options: argparse.Namespace, checkpoints: list[Any]) -> Any:
    import torch

    from fastdaa.study.track.journal import Journal
    from fastdaa.study.track.judge import JudgeCommand
    from fastdaa.study.track.record import RunRecord
    from fastdaa.study.track.reward_function import reward_scorer

    if options.device is None:
        options.device = torch.accelerator.current_accelerator(True) or torch.device("cpu")
    scorers: list[Any] = []
    if options.reward is not None:
        scorers.append(
            reward_scorer(options.reward, device=options.device, batch_size=options.batch_size)
        )
    if options.judge is not None:
        scorers.append(JudgeCommand(options.judge, options.judge_timeout))
    folder = checkpoints[-1].folder.resolve()
    name = options.run or (folder.parent if folder.name.startswith("checkpoint-") else folder).name
    return RunRecord(Journal(options.table), name, scorers, _settings(options))


def _settings(options: argparse.Namespace) -> Any:
    from fastdaa.study.track.settings import TrackSettings

    return TrackSettings(
        prompts=options.prompts,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        batch_size=options.batch_size,
        seed=options.seed,
    )


def _measure(
    options: argparse.Namespace,
    record: Any,
    checkpoints: list[Any],
    missing: list[Any],
    more: dict[str, Any],
) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from fastdaa.data import load_pairs
    from fastdaa.study.track.finished import FinishedRun, default_reference

    named = {name: getattr(options, f"{name}_column") for name in _COLUMNS}
    pairs = load_pairs(
        options.dataset, split=options.dataset_split, on_bad_row=options.on_bad_row,
        columns={name: column for name, column in named.items() if column is not None},
    )  # fmt: skip
    source = checkpoints[-1].folder
    reference, given = options.ref_model, options.ref_model_revision
    if reference is None and given is not None:
        raise ValueError("ref_model_revision: expected --ref_model beside it, got none")
    revision = {} if given is None else {"revision": given}
    if reference is None:
        reference, revision = default_reference(checkpoints[-1])
        print(f"reference: {reference}, the base model of the adapter")
    tokenizer = _load_tokenizer(source, reference, revision)
    finished = FinishedRun(
        record, reference, tokenizer, pairs, _settings(options), revision=revision,
        dtype=options.dtype, device=options.device, more=more,
    )  # fmt: skip
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        disable=not sys.stderr.isatty(),
    )  # fmt: skip
    with bar:
        task = bar.add_task("answers", total=len(missing) * len(finished.prompts.prompts))
        for checkpoint in missing:
            finished.measure(checkpoint, advance=lambda count: bar.advance(task, count))


def _load_tokenizer(checkpoint: Path, reference: str, revision: dict[str, str]) -> Any:
    """The checkpoint's own tokenizer, else its output folder's, else the reference's."""
    from transformers import AutoTokenizer

    from fastdaa.train.adapter_files import tokenizer_source

    for folder in (checkpoint, checkpoint.resolve().parent):
        if (folder / "tokenizer_config.json").is_file():
            return AutoTokenizer.from_pretrained(folder)
    return AutoTokenizer.from_pretrained(tokenizer_source(reference), **revision)


def _check_set(rows: list[dict[str, Any]], more: dict[str, Any], table: str) -> None:
    """Raise ``ValueError`` for columns that the rows of the run, which stay, do not have."""
    for row in rows:
        for name, value in more.items():
            if row.get(name) != value:
                raise ValueError(
                    f"--set: expected {name} = {row.get(name)!r} as in the row of checkpoint "
                    f"{row['checkpoint']} in {table}, got {value!r}; rows stay as they are, so "
                    "choose another table or --run, or add the column there"
                )


def _column(given: str) -> tuple[str, Any]:
    name, sign, text = given.partition("=")
    if not sign or not name:
        raise ValueError(f"set: expected NAME=VALUE, got {given!r}")
    try:
        return name, json.loads(text)
    except ValueError:
        return name, text
