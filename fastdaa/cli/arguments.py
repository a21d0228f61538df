"""The options of the training commands beside those of their trainers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice
from typing import Any, ClassVar, Literal

from fastdaa.cli.options import OptionParser, build, option_parser, read_options
from fastdaa.cli.track_arguments import TrackArguments
from fastdaa.train.config import PreferenceConfig
from fastdaa.train.options import check_count
from fastdaa.train.quantization import QuantizationOptions
from fastdaa.validation import shown

_WHAT = (
    "Trains a policy on preference pairs, or on unpaired data: completions with labels. M and D "
    "are local paths or hub ids."
)
_MOST_ASKED = 100


@dataclass
class ModelArguments:
    """What every command builds before it trains: a model and data."""

    _argument_group_name = "model and data"

    model: str = field(metadata={"help": "Policy to train: a local folder or a hub id."})
    dataset: list[str] = field(
        metadata={
            "help": "Preferences: files, folders or hub ids. Files are .jsonl, .json, .csv or "
            ".parquet, a folder holds such files or a saved dataset, and several are mixed. "
            "Configuration and split may stand behind each: owner/name:config:split, path::split."
        }
    )
    dataset_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "One weight per dataset: how often its rows are used (0.25: a random quarter, "
            "2: twice). Default: 1 each."
        },
    )
    dataset_config: str | None = field(
        default=None,
        metadata={"help": "Configuration (subset) of hub datasets, where DATASET names none."},
    )
    dataset_split: str | None = field(
        default=None,
        metadata={
            "help": "Split to use, where DATASET names none. Default: the only one, or train."
        },
    )
    prompt_column: str | None = field(
        default=None, metadata={"help": "Column with the prompt. Default: detected."}
    )
    chosen_column: str | None = field(
        default=None, metadata={"help": "Column with the better answer. Default: detected."}
    )
    rejected_column: str | None = field(
        default=None, metadata={"help": "Column with the worse answer. Default: detected."}
    )
    completion_column: str | None = field(
        default=None,
        metadata={"help": "Column with the answer, where there is only one. Default: detected."},
    )
    messages_column: str | None = field(
        default=None, metadata={"help": "Column with the conversation. Default: detected."}
    )
    text_column: str | None = field(
        default=None,
        metadata={"help": "Column of plain text, which is learnt whole. Default: text."},
    )
    label_column: str | None = field(
        default=None,
        metadata={"help": "Column of unpaired data that says what is desirable. Default: label."},
    )
    eval_dataset: list[str] | None = field(
        default=None, metadata={"help": "Data to evaluate on. Several are mixed. Default: none."}
    )
    eval_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on, of eval_dataset or else of dataset."}
    )
    test_size: float | None = field(
        default=None,
        metadata={
            "help": "Hold out this share (below 1) or number of training rows for evaluation."
        },
    )
    max_train_samples: int | None = field(
        default=None,
        metadata={"help": "Train on the first N rows only; of a mixture, on N random ones."},
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = field(
        default="float32", metadata={"help": "dtype of the weights. With auto it is as stored."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code that comes with a model."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "The model's own attention, used by --layout padded only."}
    )
    chat_template: str | None = field(
        default=None,
        metadata={"help": "A Jinja file, or the template itself. Default: the tokenizer's."},
    )

    def __post_init__(self) -> None:
        from fastdaa.data.mixture import check_sources

        check_sources(self.dataset, self.dataset_weights)
        if self.eval_dataset is not None:
            check_sources(self.eval_dataset, None)
        if self.test_size is not None:
            if self.eval_dataset or self.eval_split:
                raise ValueError(
                    "test_size: expected none beside eval_dataset or eval_split, got "
                    f"{self.test_size}; evaluation pairs come from one place"
                )
            whole = self.test_size >= 1 and self.test_size == int(self.test_size)
            if not whole and not 0 < self.test_size < 1:
                raise ValueError(
                    "test_size: expected a share between 0 and 1 or a number of pairs, got "
                    f"{self.test_size}"
                )
        check_count("max_train_samples", self.max_train_samples, optional=True)

    @property
    def columns(self) -> dict[str, str]:
        """From fields to the columns that the options name."""
        from fastdaa.data.named_columns import COLUMN_FIELDS

        named = {name: getattr(self, f"{name}_column") for name in COLUMN_FIELDS}
        return {name: column for name, column in named.items() if column is not None}

    @property
    def evaluates(self) -> bool:
        """Whether there are pairs to evaluate on."""
        return bool(self.eval_dataset or self.eval_split or self.test_size)


@dataclass
class AdapterArguments(QuantizationOptions, ModelArguments):
    """And adapters, which not every model takes, on a base that may be quantised."""

    continues_adapters: ClassVar[bool] = True
    """Whether an adapter as the model is trained further where no new one is asked for."""

    model_revision: str | None = field(
        default=None,
        metadata={"help": "Branch, tag or commit of MODEL on the hub. Default: its main one."},
    )

    use_peft: bool = field(
        default=False, metadata={"help": "Train LoRA adapters, not the weights."}
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of adapters: alpha / r."})
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Dropout of adapters; needs --disable_dropout false."}
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of modules that get adapters. Default: all linear ones but the head."
        },
    )
    lora_modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Names of modules that are trained whole beside adapters."},
    )
    use_rslora: bool = field(
        default=False, metadata={"help": "Scale adapters by alpha / sqrt(r) (rsLoRA)."}
    )
    use_dora: bool = field(
        default=False, metadata={"help": "Train lengths of weights beside adapters (DoRA)."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("lora_r", self.lora_r)
        check_count("lora_alpha", self.lora_alpha)
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(
                f"lora_dropout: expected a probability from 0 to below 1, got {self.lora_dropout}"
            )
        self._check_lora()
        for target in self.lora_target_modules or ():
            if "," in target or target == "all":
                raise ValueError(
                    "lora_target_modules: expected names of modules with spaces between them, or "
                    f"all-linear, got {shown(target)}"
                )
        self.check_quantization()

    def _check_lora(self) -> None:
        """Raise ``ValueError`` for options of an adapter where no new one is asked for."""
        named = ("lora_", "use_rslora", "use_dora")
        own = [entry for entry in fields(AdapterArguments) if entry.name.startswith(named)]
        given = [entry for entry in own if getattr(self, entry.name) != entry.default]
        if given and not self.use_peft:
            value = getattr(self, given[0].name)
            raise ValueError(
                f"{given[0].name}: expected use_peft beside it, without which no new adapter is "
                f"made, got {shown(value)}; add --use_peft, or leave it out (an adapter that is "
                "trained further keeps its own rank and targets)"
            )


@dataclass
class TrainArguments(AdapterArguments):
    """What ``fastdaa train`` builds before it calls the trainer."""

    ref_model: str | None = field(
        default=None, metadata={"help": "Reference model. Default: the policy at the start."}
    )
    ref_model_revision: str | None = field(
        default=None,
        metadata={"help": "Branch, tag or commit of REF_MODEL on the hub. Default: its main one."},
    )
    # Options of their own, read beside these.
    track: TrackArguments = field(init=False, default_factory=TrackArguments)


_KINDS = (TrainArguments, TrackArguments, PreferenceConfig)


def parse(argv: Sequence[str]) -> tuple[TrainArguments, PreferenceConfig]:
    """Reads a command line of ``fastdaa train``.

    Raises:
        ValueError: an unknown option or key, with the nearest valid one, or a bad value.
        OSError: the YAML file cannot be read.
    """
    (arguments, track), values = read_options(build_parser(), _KINDS, argv)
    arguments.track = track
    return arguments, trainer_config(config_kind(arguments, values), values, arguments)


def config_kind(arguments: ModelArguments, values: dict[str, Any]) -> type[PreferenceConfig]:
    """The configuration for pairs or for unpaired data.

    Some losses exist for both. Where only such are asked for, the first record tells it.
    """
    from fastdaa.losses.registry import ALIASES, LOSSES
    from fastdaa.losses.unpaired import takes_unpaired
    from fastdaa.train.unpaired_config import UnpairedConfig

    given: Any = values["loss_type"]
    names = [given] if isinstance(given, str) else given
    if not takes_unpaired(names):
        return PreferenceConfig
    of_pairs = all(name in LOSSES or name in ALIASES for name in names)
    if of_pairs and not holds_unpaired(arguments):
        return PreferenceConfig
    return UnpairedConfig


def holds_unpaired(arguments: ModelArguments) -> bool:
    """Whether the first dataset is one of labelled completions, as far as it can be read."""
    from fastdaa.data.errors import DataError
    from fastdaa.data.sources import open_source
    from fastdaa.data.unpaired import is_unpaired

    options = (arguments.dataset_split, arguments.dataset_config)
    try:
        records = islice(open_source(arguments.dataset[0], *options), _MOST_ASKED)
        record = next((read for _, read in records if isinstance(read, Mapping)), {})
    except (DataError, OSError):
        return False  # said in its turn, behind mistakes in options
    return is_unpaired(record, arguments.columns)


def build_parser() -> OptionParser:
    """The parser of all options of ``fastdaa train``."""
    return option_parser("train", _KINDS, _WHAT, title="preference training")


def trainer_config(kind: Any, values: dict[str, Any], arguments: ModelArguments) -> Any:
    """The configuration of a trainer, which evaluates where there is something to evaluate on.

    Raises:
        ValueError: a bad value, ``eval_strategy`` without data to evaluate on, or another task
            than training.
    """
    _check_task(values, evaluates=arguments.evaluates)
    _check_sharding(values)
    if values["eval_strategy"] is None:
        by_steps = values["eval_steps"] is not None
        strategy = ("steps" if by_steps else "epoch") if arguments.evaluates else "no"
        values = {**values, "eval_strategy": strategy}
    config = build(kind, values)
    if config.eval_strategy != "no" and not arguments.evaluates:
        raise ValueError(
            f"eval_strategy: got {config.eval_strategy.value!r}, but nothing to evaluate on; "
            "expected eval_dataset, eval_split or test_size as well"
        )
    return config


def _check_sharding(values: dict[str, Any]) -> None:
    """Raise ``ValueError`` for settings of FSDP that the Trainer would not look at."""
    if values["fsdp_config"] and not values["fsdp"]:
        raise ValueError(
            "fsdp_config: expected fsdp beside it, without which it has no effect, got "
            f"{shown(values['fsdp_config'])}; add --fsdp"
        )


def _check_task(values: dict[str, Any], *, evaluates: bool) -> None:
    """Raise ``ValueError`` for what scripts of transformers do beside training, or in its place."""
    if not values["do_train"]:
        raise ValueError(
            "do_train: expected true, since this command trains, got false; `fastdaa evaluate` "
            "measures a policy on pairs"
        )
    if values["do_predict"]:
        raise ValueError(
            "do_predict: expected false, since no predictions are made, got true; `fastdaa "
            "evaluate` measures a policy on pairs"
        )
    if values["do_eval"] and not evaluates:
        raise ValueError(
            "do_eval: expected eval_dataset, eval_split or test_size beside it, got nothing to "
            "evaluate on"
        )
