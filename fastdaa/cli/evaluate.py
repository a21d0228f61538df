"""``fastdaa evaluate``: a finished model on preference pairs, by the trainer's own evaluation."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_type_hints

from fastdaa.cli import building, paths
from fastdaa.cli.arguments import ModelArguments
from fastdaa.cli.options import option_parser, read_options
from fastdaa.cli.runs import command_run
from fastdaa.train.config import PreferenceConfig

if TYPE_CHECKING:
    from fastdaa.train.trainer import PreferenceTrainer

_WHAT = (
    "Measures a model on preference pairs against a reference: accuracy, margins, log-probs, exact "
    "KL, and what else the evaluations of `fastdaa train` tell."
)
_TAKEN = (
    *("loss_type", "loss_weights", "beta", "label_smoothing", "loss_kwargs"),
    *("max_length", "truncation_mode", "on_bad_row", "dataset_num_proc", "layout", "attention"),
    *("tokens_per_pack", "impl", "head_engine", "head_max_bytes"),
    *("log_exact_kl", "log_token_stats"),
    *("per_device_eval_batch_size", "dataloader_num_workers", "bf16", "use_cpu", "disable_tqdm"),
)
_OF_TRAINING = ("epoch", "model_preparation_time")
_FIRST = ("loss", "rewards/accuracies", "rewards/margins", "kl/sequence", "kl/token")


@dataclass
class EvaluateArguments(ModelArguments):
    """What ``fastdaa evaluate`` builds before it measures."""

    model: str = field(metadata={"help": "Model to measure: a local folder or a hub id."})
    dataset: list[str] = field(
        metadata={"help": "Preference pairs to measure it on; several are put together."}
    )
    ref_model: str | None = field(
        default=None,
        metadata={
            "help": "Reference: the model that training began with. Default: of an adapter, its "
            "base."
        },
    )
    output: str | None = field(
        default=None, metadata={"help": "JSON file for the numbers. Default: none."}
    )
    seed: int = field(default=42, metadata={"help": "Of mixtures of datasets."})
    max_train_samples: int | None = field(
        default=None,
        metadata={"help": "Measure on the first so many pairs; of a mixture, on a random choice."},
    )
    # All pairs are to be evaluated on.
    eval_dataset: list[str] | None = field(init=False, default=None)
    eval_split: str | None = field(init=False, default=None)
    test_size: float | None = field(init=False, default=None)


def _options_of(kind: type, names: Sequence[str]) -> type:
    """A dataclass of some fields of another one, with their defaults and help."""
    hints = get_type_hints(kind)
    known: Any = {entry.name: entry for entry in dataclasses.fields(kind)}
    taken: list[Any] = [
        (
            name,
            hints[name],
            field(
                default=known[name].default,
                default_factory=known[name].default_factory,
                metadata=known[name].metadata,
            )
            if known[name].default is dataclasses.MISSING
            else field(default=known[name].default, metadata=known[name].metadata),
        )
        for name in names
    ]
    return dataclasses.make_dataclass("EvaluateOptions", taken)


def run(argv: Sequence[str]) -> int:
    """Measures as ``argv`` says, prints a table, and writes ``--output``; 0."""
    kinds = (EvaluateArguments, _options_of(PreferenceConfig, _TAKEN))
    parser = option_parser(
        "evaluate", kinds, _WHAT, title="pairs and their loss",
        shown="[--ref_model R] [--output FILE] ",
    )  # fmt: skip
    (arguments,), values = read_options(parser, kinds, argv)
    with tempfile.TemporaryDirectory(prefix="fastdaa-evaluate-") as scratch:
        config = PreferenceConfig(
            output_dir=scratch, seed=arguments.seed, report_to="none",
            **{name: values[name] for name in _TAKEN},
        )  # fmt: skip
        with command_run(main_process=config.process_index == 0):
            return _evaluate(arguments, config)


def _evaluate(arguments: Any, config: PreferenceConfig) -> int:
    from fastdaa.cli.load_data import load_splits
    from fastdaa.data.pairs import PAIRS

    if config.world_size > 1:
        raise ValueError(
            f"expected one process, got {config.world_size}: of several, some would measure pairs "
            "twice to have whole batches; start it without a launcher"
        )
    output = _check_output(arguments.output)
    reference = _reference(arguments, config)
    for name, source in (("model", arguments.model), ("ref_model", reference)):
        if source is not None:
            paths.check_model(name, source)
    tokenizer = building.load_tokenizer(arguments)
    pairs, _ = load_splits(arguments, PAIRS, on_bad_row=config.on_bad_row, seed=arguments.seed)
    building.check_template(tokenizer, pairs)
    model = building.load_model(arguments.model, arguments, device=config.device)
    building.check_vocabulary(model, tokenizer)
    given = None
    if reference is not None:
        given = building.load_model(reference, arguments, "ref_model", device=config.device)
    trainer = _trainer(model, given, config, pairs, tokenizer)
    metrics, rows = _measure(trainer), cast("Sized", trainer.eval_dataset)
    if trainer.is_world_process_zero():
        facts = {
            "model": arguments.model, "ref_model": reference, "dataset": arguments.dataset,
            "pairs": len(rows), "objective": str(config.objective()),
            "max_length": config.max_length, "layout": trainer.layout, "metrics": metrics,
        }  # fmt: skip
        _print(facts)
        if output is not None:
            _write(output, facts)
    return 0


def _check_output(given: str | None) -> Path | None:
    if given is None:
        return None
    path = Path(given)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise OSError(f"output: expected a JSON file in a folder that exists, got {given}")
    return path


def _reference(arguments: Any, config: PreferenceConfig) -> str | None:
    """What is measured against; None for losses that need no reference."""
    if arguments.ref_model is not None:
        return str(arguments.ref_model)
    adapter = paths.adapter_of("model", arguments.model)
    if adapter is not None:
        return str(adapter.base)
    if config.objective().needs_ref:
        raise ValueError(
            "ref_model: expected --ref_model, the model that training began with, got none; "
            "against itself a model has no margin and no KL"
        )
    return None


def _trainer(model: Any, given: Any, config: Any, pairs: Any, tokenizer: Any) -> PreferenceTrainer:
    from fastdaa.train.callbacks import Curves, MetricsWriter
    from fastdaa.train.stages import PooledStore
    from fastdaa.train.trainer import PreferenceTrainer

    trainer = PreferenceTrainer(
        model, given, args=config, eval_dataset=pairs, processing_class=tokenizer
    )
    for kind in (Curves, MetricsWriter):
        trainer.remove_callback(kind)
    # Every pair or token counts the same here, whatever batch it is in.
    trainer.store_type = PooledStore  # type: ignore[misc]
    return trainer


def _measure(trainer: PreferenceTrainer) -> dict[str, float]:
    import torch

    try:
        found = trainer.evaluate()
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OSError(
            "the memory of the device is full: expected a --tokens_per_pack or "
            f"--per_device_eval_batch_size that fits; {error}"
        ) from error
    named = {name.removeprefix("eval_"): float(value) for name, value in found.items()}
    return {name: value for name, value in named.items() if name not in _OF_TRAINING}


def _print(facts: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    metrics: dict[str, float] = facts["metrics"]
    names = [name for name in _FIRST if name in metrics]
    names += [name for name in metrics if name not in names]
    table = Table("", f"{facts['pairs']:,} pairs")
    table.columns[1].justify = "right"
    for name in names:
        table.add_row(name, f"{metrics[name]:,.6g}")
    console = Console(markup=False)
    against = f" against {facts['ref_model']}" if facts["ref_model"] else ""
    console.print(f"{facts['model']}{against}", highlight=False, soft_wrap=True)
    console.print(facts["objective"], highlight=False, soft_wrap=True)
    console.print(table)


def _write(path: Path, facts: Mapping[str, Any]) -> None:
    """The numbers as JSON, at once; null where one is not finite."""
    finite = {n: v if math.isfinite(v) else None for n, v in facts["metrics"].items()}
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(
        json.dumps({**facts, "metrics": finite}, indent=1, allow_nan=False) + "\n",
        encoding="utf-8",
    )
    os.replace(temporary, path)
