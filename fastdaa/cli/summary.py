"""What a training command prints at its end: the last numbers, and where everything is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ALIGNMENT = (
    ("loss", "loss"),
    ("rewards/accuracies", "accuracy"),
    ("rewards/margins", "margin"),
    ("kl/token", "KL per token (nats)"),
    ("displacement/chosen", "chosen log-ratio (nats)"),
    ("weights/mean", "mean weight of a pair"),
    ("throughput/pairs_per_second", "pairs per second"),
    ("throughput/tokens_per_second", "tokens per second"),
    ("memory/peak_gib", "peak memory (GiB)"),
)
"""What is shown of ``fastdaa train``: key and title."""
UNPAIRED_ALIGNMENT = (
    ("loss", "loss"),
    ("rewards/chosen", "reward of desirable"),
    ("rewards/rejected", "reward of undesirable"),
    ("rewards/margins", "margin"),
    ("kl", "KL baseline z0 (nats)"),
    ("delta", "reward shift delta"),
    ("kl/token", "KL per token (nats)"),
    ("throughput/examples_per_second", "examples per second"),
    ("throughput/tokens_per_second", "tokens per second"),
    ("memory/peak_gib", "peak memory (GiB)"),
)
"""The same of unpaired data."""
STAGE = (
    ("loss", "loss"),
    ("mean_token_accuracy", "token accuracy"),
    ("entropy", "entropy (nats)"),
    ("rewards/accuracies", "accuracy"),
    ("rewards/margins", "margin"),
    ("rewards/center", "centre of rewards"),
)
"""What is shown of the stages before it."""
_FILES = (
    ("metrics.jsonl", "every logged row"),
    ("curves.png", "curves"),
    ("README.md", "model card"),
)


def print_summary(
    rows: Sequence[Mapping[str, Any]],
    output_dir: str | Path,
    shown: Sequence[tuple[str, str]],
    heading: str = "",
    best: object = None,
) -> None:
    """Prints the last training and evaluation values of ``rows``, and the files of the run.

    Args:
        rows: logged, up to the step whose model is saved.
        output_dir: of the run.
        shown: keys of values and their titles.
        heading: above the table.
        best: the checkpoint that the saved model is, where that is not the last step.
    """
    from rich.console import Console
    from rich.table import Table

    from fastdaa.train.shown import shown_text

    train, evaluation = last_values(rows), last_values(rows, "eval_")
    table = Table()
    table.add_column("")
    table.add_column("training", justify="right")
    if evaluation:
        table.add_column("evaluation", justify="right")
    for key, title in shown:
        values = [train.get(key)] + ([evaluation.get(key)] if evaluation else [])
        if any(value is not None for value in values):
            table.add_row(title, *("" if v is None else shown_text(key, v) for v in values))
    console = Console(markup=False)
    if heading:
        console.print(heading, highlight=False, soft_wrap=True)
    if best is not None:
        console.print(f"saved model: that of {best}", highlight=False, soft_wrap=True)
    if table.row_count:
        console.print(table)
    runtime = next((row["train_runtime"] for row in reversed(rows) if "train_runtime" in row), None)
    if runtime is not None:
        console.print(f"{runtime:,.1f} s of training")
    folder = Path(output_dir)
    console.print(f"model and tokenizer: {folder}", highlight=False, soft_wrap=True)
    for file, what in _FILES:
        blank = file == "README.md" and shown is STAGE  # PEFT's, beside an adapter
        if (folder / file).is_file() and not blank:
            console.print(f"{what}: {folder / file}", highlight=False, soft_wrap=True)


def print_run(trainer: Any, shown: Sequence[tuple[str, str]], heading: str = "") -> None:
    """:func:`print_summary` of the model that a trainer has saved."""
    from fastdaa.train.best_model import best_model, rows_of_saved

    folder = str(trainer.args.output_dir)
    print_summary(rows_of_saved(trainer), folder, shown, heading, best_model(trainer))


def last_values(rows: Sequence[Mapping[str, Any]], prefix: str = "") -> dict[str, float]:
    """The last logged value of every metric, of training or (``"eval_"``) of evaluation."""
    values: dict[str, float] = {}
    for row in rows:
        for key, value in row.items():
            ours = key.startswith("eval_") == bool(prefix)
            if ours and isinstance(value, int | float):
                values[key.removeprefix(prefix)] = value
    return values
