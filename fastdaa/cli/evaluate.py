"""``fastdaa evaluate``: a finished model on preference pairs, by the trainer's own evaluation."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast, get_type_hints

from fastdaa.cli import building, paths
from fastdaa.cli.arguments import ModelArguments, config_kind
from fastdaa.cli.options import option_parser, read_options
from fastdaa.cli.runs import check_whole_models, command_run
from fastdaa.counted import counted
from fastdaa.train.config import PreferenceConfig
from fastdaa.train.evaluation_file import check_output, write_facts
from fastdaa.train.options import check_count
from fastdaa.train.processes import be_quiet, meet, run_together
from fastdaa.train.quantization import QuantizationOptions
from fastdaa.train.shown import shown_as

if TYPE_CHECKING:
    from fastdaa.train.evaluation import EvaluationTrainer

_WHAT = (
    "Measures a model on preference pairs or unpaired data against a reference: accuracy, margins, "
    "log-probs, exact KL, and what else the evaluations of `fastdaa train` tell."
)
_TAKEN = (
    *("loss_type", "loss_weights", "beta", "label_smoothing", "ld_alpha", "use_weighting"),
    "loss_kwargs",
    *("max_length", "truncation_mode", "on_bad_row", "dataset_num_proc", "layout", "attention"),
    *("tokens_per_pack", "impl", "head_engine", "head_max_bytes"),
    *("log_exact_kl", "log_token_stats", "router_aux_loss_coef"),
    *("per_device_eval_batch_size", "dataloader_num_workers", "bf16", "use_cpu", "disable_tqdm"),
)
_LEFT_OUT = ("epoch", "model_preparation_time", "samples_per_second", "steps_per_second")
"""What belongs to training, and rates that ``throughput/`` has of the batches alone."""
_FIRST = ("loss", "rewards/accuracies", "rewards/margins", "kl/sequence", "kl/token")


@dataclass
class EvaluateArguments(QuantizationOptions, ModelArguments):
    """What ``fastdaa evaluate`` builds before it measures."""

    continues_adapters: ClassVar[bool] = True

    model: str = field(metadata={"help": "Model to measure: a local folder or a hub id."})
    dataset: list[str] = field(
        metadata={"help": "Preferences to measure it on; several are put together."}
    )
    ref_model: str | None = field(
        default=None,
        metadata={
            "help": "Reference: the model that training began with. Default: of an adapter, its "
            "base."
        },
    )
    model_revision: str | None = field(
        default=None,
        metadata={"help": "Branch, tag or commit of MODEL on the hub. Default: its main one."},
    )
    ref_model_revision: str | None = field(
        default=None,
        metadata={"help": "Branch, tag or commit of REF_MODEL on the hub. Default: its main one."},
    )
    output: str | None = field(
        default=None,
        metadata={"help": "JSON file for the numbers. Default: none.", "metavar": "FILE"},
    )
    seed: int = field(default=42, metadata={"help": "Seed of mixtures of datasets."})
    max_samples: int | None = field(
        default=None,
        metadata={"help": "Measure on the first N pairs only; of a mixture, on N random ones."},
    )
    max_train_samples: int | None = field(init=False, default=None)
    # All pairs are to be evaluated on.
    eval_dataset: list[str] | None = field(init=False, default=None)
    eval_split: str | None = field(init=False, default=None)
    test_size: float | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("max_samples", self.max_samples, optional=True)
        if self.ref_model_revision is not None and self.ref_model is None:
            raise ValueError(
                "ref_model_revision: expected ref_model beside it, got none; an adapter notes the "
                "revision of its base"
            )
        self.max_train_samples = self.max_samples
        self.check_quantization()


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
    """Measures as ``argv`` says, prints a table, and writes ``--output``; 0.

    Of several processes that a launcher has started, each measures its share of the pairs; the
    first one prints and writes.
    """
    return run_together(functools.partial(_run, argv))


def _run(argv: Sequence[str]) -> int:
    kinds = (EvaluateArguments, _options_of(PreferenceConfig, _TAKEN))
    parser = option_parser(
        "evaluate", kinds, _WHAT, title="pairs and their loss",
        shown="[--ref_model R] [--output FILE] ",
    )  # fmt: skip
    (arguments,), values = read_options(parser, kinds, argv)
    with tempfile.TemporaryDirectory(prefix="fastdaa-evaluate-") as scratch:
        config = config_kind(arguments, values)(
            output_dir=scratch, seed=arguments.seed, report_to="none",
            **{name: values[name] for name in _TAKEN},
        )  # fmt: skip
        main_process = config.process_index == 0
        with command_run(main_process=main_process):
            if not main_process:
                be_quiet()
            return _evaluate(arguments, config)


def _evaluate(arguments: Any, config: PreferenceConfig) -> int:
    from fastdaa.cli.load_data import load_splits
    from fastdaa.data.pairs import PAIRS
    from fastdaa.data.unpaired import UNPAIRED
    from fastdaa.train.evaluation import EvaluationTrainer, UnpairedEvaluationTrainer
    from fastdaa.train.unpaired_config import UnpairedConfig

    unpaired = isinstance(config, UnpairedConfig)
    if config.world_size > 1:
        check_whole_models()
    if unpaired:
        _check_loss(config)
    main_process = config.process_index == 0
    output = check_output(arguments.output) if main_process else None
    reference = _check_models(arguments, config)
    tokenizer = building.load_tokenizer(arguments)
    kind = UNPAIRED if unpaired else PAIRS
    data, _ = load_splits(arguments, kind, on_bad_row=config.on_bad_row, seed=arguments.seed)
    building.check_template(tokenizer, data)
    model, given = _load_models(arguments, reference, config)
    building.check_vocabulary(model, tokenizer)
    meet()
    ref_tokenizer = None if reference is None else _tokenizer_of(reference, arguments)
    trainer_class = UnpairedEvaluationTrainer if unpaired else EvaluationTrainer
    trainer = trainer_class(model, given, config, data, tokenizer, ref_tokenizer)
    meet()
    metrics, rows = _measure(trainer), cast("Sized", trainer.eval_dataset)
    if main_process:
        facts = {
            "model": arguments.model, "model_revision": arguments.model_revision,
            "ref_model": reference, "ref_model_revision": arguments.ref_model_revision,
            "dataset": arguments.dataset,
            trainer.unit: len(rows), f"{trainer.unit}_left_out": len(data) - len(rows),
            "objective": str(config.objective()), "max_length": config.max_length,
            "dtype": arguments.dtype, "bf16": config.bf16,
            "quantization": trainer.frozen_facts.get("quantization"), "layout": trainer.layout,
            "processes": config.world_size, "metrics": metrics,
        }  # fmt: skip
        _print(facts, counted(len(rows), trainer.unit.removesuffix("s")))
        if output is not None:
            write_facts(output, facts)
    return 0


def _check_models(arguments: Any, config: PreferenceConfig) -> str | None:
    """Look at what is to be loaded before it is; what the model is measured against, or None."""
    from fastdaa.cli.quantization import check_quantized
    from fastdaa.train.evaluation_models import check_head, check_stored

    reference = _reference(arguments, config)
    for name, source in (("model", arguments.model), ("ref_model", reference)):
        if source is None:
            continue
        paths.check_model(name, source, getattr(arguments, f"{name}_revision"))
        adapter = paths.adapter_of(name, source)
        folder = Path(source).expanduser()
        whole = str(folder) if folder.is_dir() else source
        revision = _revision(arguments, name)
        check_head(name, whole if adapter is None else adapter.base, **revision)
        if name == "model" and adapter is None:
            check_stored(name, whole, arguments.quantizes, **revision)
    check_quantized(arguments)
    return reference


def _load_models(arguments: Any, reference: str | None, config: PreferenceConfig) -> list[Any]:
    """The model and its reference, each as it was stored; None where there is no reference."""
    from fastdaa.train.evaluation_models import check_finite, warn_of_quantization

    loaded: list[Any] = []
    adapter: Any = paths.adapter_of("model", arguments.model)
    for name, source in (("model", arguments.model), ("ref_model", reference)):
        if source is None:
            loaded.append(None)
            continue
        model = building.load_model(
            source, arguments, name, device=config.device, revision=_revision(arguments, name)
        )
        loaded.append(model)
        check_finite(name, loaded[-1])
    if adapter is not None:
        warn_of_quantization(loaded[0], adapter.source)
    return loaded


def _revision(arguments: Any, name: str) -> dict[str, str]:
    """What ``from_pretrained`` of the model or the reference needs; of an adapter, of its base."""
    # The reference of an adapter is its base, as the adapter knows it.
    adapter = paths.adapter_of(name, getattr(arguments, name) or arguments.model)
    return building.model_revision(arguments, name) if adapter is None else adapter.base_options


def _tokenizer_of(source: str, arguments: Any) -> Any:
    """The tokenizer of a reference; None where there is none."""
    from fastdaa.train.tokenizers import load_tokenizer

    # Many references are weights alone.
    with contextlib.suppress(OSError):
        return load_tokenizer(
            source, "ref_model", trust_remote_code=arguments.trust_remote_code,
            **_revision(arguments, "ref_model"),
        )  # fmt: skip
    return None


def _check_loss(config: PreferenceConfig) -> None:
    """Raise ``ValueError`` for a loss on unpaired data that a model alone does not determine."""
    loss = config.objective().loss
    if loss.baseline == "rewards":
        raise ValueError(
            f"loss_type: expected kto or apo_zero with unpaired data, got {loss.name}, whose loss "
            "depends on the mean reward of its training; with apo_zero rewards, log-probs and KL "
            "are the same"
        )


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


def _measure(trainer: EvaluationTrainer) -> dict[str, float]:
    import torch

    try:
        found = trainer.evaluate()
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OSError(
            "the memory of the device is full: expected a --tokens_per_pack or "
            f"--per_device_eval_batch_size that fits; {error}"
        ) from error
    named = {name.removeprefix("eval_"): float(value) for name, value in found.items()}
    return {name: value for name, value in named.items() if name not in _LEFT_OUT}


def _print(facts: Mapping[str, Any], heading: str) -> None:
    from rich.console import Console
    from rich.table import Table

    metrics: dict[str, float] = facts["metrics"]
    names = [name for name in _FIRST if name in metrics]
    names += [name for name in metrics if name not in names]
    table = Table("", heading)
    table.columns[1].justify = "right"
    for name in names:
        table.add_row(name, shown_as(name, metrics[name], ",.6g"))
    console = Console(markup=False)
    against = f" against {facts['ref_model']}" if facts["ref_model"] else ""
    console.print(f"{facts['model']}{against}", highlight=False, soft_wrap=True)
    console.print(facts["objective"], highlight=False, soft_wrap=True)
    console.print(table)
