"""The configuration of preference training: ``TrainingArguments`` and what pairs need beside it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from transformers import TrainingArguments

from fastdaa.losses.objective import Objective
from fastdaa.planner import PATHS
from fastdaa.train.segment_backends import BACKENDS
from fastdaa.validation import check_choice, check_positive

LayoutChoice = Literal["auto", "prefix_shared", "packed", "padded"]
LAYOUT_CHOICES: tuple[str, ...] = get_args(LayoutChoice)
ATTENTION_CHOICES = ("auto", *BACKENDS)
# The path `score` gives no gradient, so nothing could be trained with it.
IMPL_CHOICES = tuple(path for path in PATHS if path != "score")
# `fused` gives no gradient either.
ENGINE_CHOICES = ("auto", "torch", "triton")

_COUNTS = (
    "max_length",
    "dataset_num_proc",
    "tokens_per_pack",
    "head_max_bytes",
    "precompute_ref_batch_size",
)


@dataclass
class PreferenceConfig(TrainingArguments):
    """Settings of :class:`fastdaa.train.PreferenceTrainer`.

    Every field of ``transformers.TrainingArguments`` is here under its own name. Batch sizes count
    pairs. Other defaults than there: ``learning_rate`` 1e-6, ``logging_steps`` 10,
    ``logging_nan_inf_filter`` False (a broken loss shows, and no step waits for the device),
    ``remove_unused_columns`` False, and ``bf16`` None, which means True on a CUDA device that has
    bf16, unless ``fp16`` is set or accelerate was launched with another mixed precision.

    Args:
        loss_type: names or aliases of losses; several make a mixture.
        loss_weights: one weight a loss; 1 each by default.
        beta: strength of the KL regularisation; by default the loss's own.
        label_smoothing: probability that a label is flipped; by default the loss's own.
        loss_kwargs: any other hyperparameter of the chosen losses, by name; JSON text or a dict.
        max_length: longest sequence of prompt and completion, in tokens; None for no limit.
        truncation_mode: ``"keep_start"`` keeps the first tokens of a sequence and drops pairs whose
            prompt fills it; ``"keep_end"`` keeps the last tokens.
        on_bad_row: ``"error"`` stops at a row that cannot be used, ``"skip"`` counts such rows.
        dataset_num_proc: processes that tokenise; pays off for slow chat templates.
        layout: ``"prefix_shared"`` computes the prompt of a pair once, ``"packed"`` stores
            sequences without padding, ``"padded"`` is the classical batch; ``"auto"`` takes the
            first of them that the model can run.
        attention: which kernel attends over the segments of a packed row.
        tokens_per_pack: tokens of one forward; a batch is split into forwards of at most that many.
            None puts a whole per-device batch into one.
        impl: which way through the LM head is taken; ``"auto"`` plans it.
        head_engine: what works on tiles of logits, ``"torch"`` or ``"triton"``.
        head_max_bytes: bytes of fp32 logits held at a time; by default the device's.
        precompute_ref_log_probs: compute all reference log-probs before training, from the cache
            on disk where it has them; the reference model is then not kept.
        precompute_ref_batch_size: pairs of a batch while precomputing; by default the evaluation
            batch size.
        ref_cache_dir: where reference log-probs are kept; by default ``fastdaa/reference`` in the
            Hugging Face home, so that other runs find them.
        disable_dropout: set all dropout probabilities of policy and reference to 0.
        log_exact_kl: log the exact per-token KL to the reference, on the last batch of every
            logging interval and on the evaluation set. Needs an online reference.
        log_token_stats: log entropy, top-1 accuracy and mean logits.

    Raises:
        ValueError: a value that cannot be used, a loss that does not exist, or a hyperparameter
            that no chosen loss has.
        TypeError: ``loss_kwargs`` is not a mapping.
    """

    learning_rate: float = field(default=1e-6, metadata={"help": "Peak learning rate."})
    logging_steps: float = field(
        default=10,
        metadata={"help": "Steps between two logged rows; below 1: a share of all steps."},
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Log the average instead of a loss that is not finite."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Leave it off: the trainer picks columns itself."}
    )
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "bf16 mixed precision. Default: on where a CUDA device has it, unless fp16.",
            "nargs": "?",
            "const": True,
        },
    )

    loss_type: list[str] = field(
        default_factory=lambda: ["dpo"],
        metadata={"help": "Names of losses; several make a mixture.", "aliases": ["--loss"]},
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight a loss; 1 each by default."}
    )
    beta: float | None = field(
        default=None, metadata={"help": "Strength of the KL regularisation. Default: the loss's."}
    )
    label_smoothing: float | None = field(
        default=None,
        metadata={"help": "Probability that a label is flipped. Default: the loss's."},
    )
    # HfArgumentParser reads this union, in this order, as text.
    loss_kwargs: dict[str, Any] | str | None = field(
        default_factory=dict,
        metadata={"help": "Other hyperparameters of the losses, as JSON: '{\"delta\": 1.0}'."},
    )

    max_length: int | None = field(
        default=1024,
        metadata={"help": "Longest sequence of prompt and completion in tokens, or none."},
    )
    truncation_mode: Literal["keep_start", "keep_end"] = field(
        default="keep_start", metadata={"help": "Which tokens of too long a sequence are kept."}
    )
    on_bad_row: Literal["error", "skip"] = field(
        default="error", metadata={"help": "Stop at a row that cannot be used, or count such rows."}
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes that tokenise, for slow chat templates."}
    )

    layout: LayoutChoice = field(
        default="auto", metadata={"help": "How pairs lie in a batch; auto: the fastest that fits."}
    )
    attention: str = field(
        default="auto",
        metadata={"help": "Kernel that attends over packed rows.", "choices": ATTENTION_CHOICES},
    )
    tokens_per_pack: int | None = field(
        default=None,
        metadata={"help": "Tokens of one forward. Default: a whole batch at once."},
    )
    impl: str = field(
        default="auto",
        metadata={"help": "Way through the LM head; auto: planned.", "choices": IMPL_CHOICES},
    )
    head_engine: str = field(
        default="auto",
        metadata={
            "help": "What works on tiles of logits: torch, or triton for the kernels (CUDA; not "
            "yet measured on a GPU); auto: torch.",
            "choices": ENGINE_CHOICES,
        },
    )
    head_max_bytes: int | None = field(
        default=None,
        metadata={"help": "Bytes of fp32 logits held at a time. Default: the device's."},
    )

    precompute_ref_log_probs: bool = field(
        default=False,
        metadata={"help": "Reference log-probs before training, cached on disk between runs."},
    )
    precompute_ref_batch_size: int | None = field(
        default=None,
        metadata={"help": "Pairs of a batch while precomputing. Default: the evaluation batch."},
    )
    ref_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of cached log-probs. Default: in the Hugging Face home."},
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Set dropout to 0 in policy and reference."}
    )
    log_exact_kl: bool = field(
        default=True, metadata={"help": "Log the exact per-token KL to the reference."}
    )
    log_token_stats: bool = field(
        default=True, metadata={"help": "Log entropy, top-1 accuracy and mean logits."}
    )

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and _bf16_wanted()
        if not torch.accelerator.is_available():
            # There is nothing to pin for, and torch would warn in every run.
            self.dataloader_pin_memory = False
        self._normalise_loss()
        self._check_fields()
        self._check_objective()
        super().__post_init__()

    def objective(self) -> Objective:
        """The objective that the loss fields describe.

        Raises:
            ValueError: an unknown loss, a hyperparameter that no chosen loss has, or a value out
                of range.
        """
        hyperparameters = dict(cast("dict[str, Any]", self.loss_kwargs))
        for name in ("beta", "label_smoothing"):
            value = getattr(self, name)
            if value is None:
                continue
            if name in hyperparameters:
                raise ValueError(
                    f"{name}: expected it once, got {name}={value} and "
                    f"{hyperparameters[name]!r} in loss_kwargs"
                )
            hyperparameters[name] = value
        return Objective.parse(self.loss_type, weights=self.loss_weights, **hyperparameters)

    def ref_cache_root(self) -> Path:
        """The folder of cached reference log-probs, ``ref_cache_dir`` or its default."""
        if self.ref_cache_dir is not None:
            return Path(self.ref_cache_dir).expanduser()
        from huggingface_hub import constants

        return Path(constants.HF_HOME) / "fastdaa" / "reference"

    def _normalise_loss(self) -> None:
        # Python callers and YAML files may give one name or one weight without a list.
        names: Any = self.loss_type
        weights: Any = self.loss_weights
        self.loss_type = [names] if isinstance(names, str) else list(names)
        if weights is not None:
            weights = [weights] if isinstance(weights, int | float) else weights
            self.loss_weights = [float(weight) for weight in weights]
        self.loss_kwargs = _read_loss_kwargs(self.loss_kwargs)

    def _check_fields(self) -> None:
        for name, choices in (
            ("truncation_mode", ("keep_start", "keep_end")),
            ("on_bad_row", ("error", "skip")),
            ("layout", LAYOUT_CHOICES),
            ("attention", ATTENTION_CHOICES),
            ("impl", IMPL_CHOICES),
            ("head_engine", ENGINE_CHOICES),
        ):
            check_choice(name, getattr(self, name), choices)
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise ValueError(f"{name}: expected an integer above 0, got {value!r}")
            check_positive(name, value)
        if self.layout == "padded" and self.attention != "auto":
            raise ValueError(
                "attention: expected 'auto' with layout 'padded', which has no segments to attend "
                f"over, got {self.attention!r}; the model's own attn_implementation is used there"
            )

    def _check_objective(self) -> None:
        objective = self.objective()
        if not objective.coupled:
            return
        if self.tokens_per_pack is not None:
            raise ValueError(
                f"tokens_per_pack: expected None for {objective}, which couples the pairs of a "
                f"batch, so that it cannot be split, got {self.tokens_per_pack}"
            )
        if self.impl == "single_pass":
            raise ValueError(
                f"impl: expected another path than 'single_pass' for {objective}, which couples "
                "the pairs of a batch"
            )


def _bf16_wanted() -> bool:
    # `accelerate launch --mixed_precision fp16` is an explicit wish, too.
    if os.environ.get("ACCELERATE_MIXED_PRECISION") in ("fp16", "fp8"):
        return False
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def _read_loss_kwargs(given: dict[str, Any] | str | None) -> dict[str, Any]:
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"loss_kwargs: expected a JSON object such as '{{\"delta\": 1.0}}', got {given!r} "
                f"({error})"
            ) from error
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise TypeError(f"loss_kwargs: expected a mapping of hyperparameters, got {given!r}")
    try:
        json.dumps(given)
    except TypeError as error:
        raise ValueError(
            f"loss_kwargs: expected values that JSON can hold, got {given!r} ({error})"
        ) from error
    return given
