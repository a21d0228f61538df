"""Settings that all trainers on packed batches share: ``TrainingArguments`` and what packs need."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from transformers import TrainingArguments

from fastdaa.data.collate import Layout
from fastdaa.train.balance import check_coefficient
from fastdaa.train.device_options import check_needs, check_ways
from fastdaa.train.options import PackOptions, check_count
from fastdaa.train.trainer_options import check_after, check_before, launched_processes
from fastdaa.train.zero3 import load_whole
from fastdaa.validation import check_choice

LAYOUTS: tuple[str, ...] = get_args(Layout)
TRUNCATION_MODES = ("keep_start", "keep_end")
ON_BAD_ROW = ("error", "skip")
_OF_OPTIMIZER = ("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")


@dataclass
class PackedConfig(PackOptions, TrainingArguments):
    """``transformers.TrainingArguments``, and what packed batches need beside it.

    Other defaults than there: ``logging_steps`` 10, ``logging_nan_inf_filter`` False (a broken loss
    shows, and no step waits for the device), ``remove_unused_columns`` False, and ``bf16`` None,
    which means True on a CUDA device that has bf16, unless ``fp16`` is set or accelerate was
    launched with another mixed precision. Without an ``accelerator_config``, pinned batches are
    copied to a CUDA device without waiting (``non_blocking``).

    The fields of its own are described in :class:`fastdaa.train.PreferenceConfig`.

    Raises:
        ValueError: a value that cannot be used.
        ImportError: a tracker of ``report_to`` is not installed.
    """

    layouts: ClassVar[tuple[str, ...]] = LAYOUTS
    """What ``layout`` may be beside ``"auto"``, the best first."""

    logging_steps: float = field(
        default=10,
        metadata={"help": "Steps between logged rows. Below 1: a share of all steps."},
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Where a loss is not finite, log the average so far instead."},
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay off: the trainer picks columns itself."}
    )
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "bf16 mixed precision. Default: true on CUDA devices that have it, unless "
            "fp16 is set.",
            "nargs": "?",
            "const": True,
        },
    )

    max_length: int | None = field(
        default=1024,
        metadata={"help": "Longest prompt with completion, in tokens, or none."},
    )
    truncation_mode: Literal["keep_start", "keep_end"] = field(
        default="keep_start", metadata={"help": "Which end of a sequence that is too long is kept."}
    )
    on_bad_row: Literal["error", "skip"] = field(
        default="error",
        metadata={"help": "At a row that cannot be used: stop, or skip and count it."},
    )
    dataset_num_proc: int | None = field(
        default=None,
        metadata={"help": "Processes that tokenise; helps with slow chat templates. Default: one."},
    )
    layout: str = field(
        default="auto",
        metadata={
            "help": "How sequences lie in a batch; auto: the fastest that the model can run.",
            "choices": ("auto", *LAYOUTS),
        },
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Set all dropout probabilities to 0."}
    )
    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the load-balancing loss of a mixture of experts, 0 for none. "
            "Default: the model configuration's, if it has output_router_logits."
        },
    )

    def __post_init__(self) -> None:
        if launched_processes() > 1 and not torch.accelerator.is_available():
            # Processes on CPUs meet only where this says so; each would train alone.
            self.use_cpu = True
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and _bf16_wanted()
        if not torch.accelerator.is_available():
            # There is nothing to pin for, and torch would warn in every run.
            self.dataloader_pin_memory = False
        check_choice("truncation_mode", self.truncation_mode, TRUNCATION_MODES)
        check_choice("on_bad_row", self.on_bad_row, ON_BAD_ROW)
        check_choice("layout", self.layout, ("auto", *self.layouts))
        check_count("max_length", self.max_length, optional=True)
        check_count("dataset_num_proc", self.dataset_num_proc, optional=True)
        check_coefficient(self.router_aux_loss_coef)
        self.check_packs()
        check_before(self)
        if self.layout == "padded" and self.attention != "auto":
            raise ValueError(
                "attention: expected 'auto' with layout 'padded', which has no segments to attend "
                f"over, got {self.attention!r}; the model's own attn_implementation is used there"
            )
        check_needs(self)
        own_config = self.accelerator_config is None
        super().__post_init__()
        load_whole(self)
        if own_config and self.dataloader_pin_memory and self.device.type == "cuda":
            # Or the host would wait at every batch until the device has done all before it.
            self.accelerator_config.non_blocking = True  # type: ignore[union-attr]
        check_after(self)
        check_ways(self, self.device)

    def identity(self) -> dict[str, Any]:
        """Settings without which a run would be another one, as JSON can hold them.

        A checkpoint is continued only with the same: rate, schedule and what the optimizer is set
        to come out of it, whatever the settings say, and seeds decide which rows a run has seen.
        """
        schedule, optimizer = self.lr_scheduler_type, self.optim
        balance = self.router_aux_loss_coef
        return {
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": str(getattr(schedule, "value", schedule)),
            "lr_scheduler_kwargs": self.lr_scheduler_kwargs or None,
            "warmup_steps": self.warmup_steps,
            "optim": str(getattr(optimizer, "value", optimizer)),
            "optim_args": self.optim_args,
            **{name: getattr(self, name) for name in _OF_OPTIMIZER},
            "seed": self.seed,
            "data_seed": self.data_seed,
            **({} if balance is None else {"router_aux_loss_coef": balance}),
        }

    @property
    def device(self) -> torch.device:
        """The device of this process; of a CPU without a number.

        With several processes accelerate calls it ``cpu:0``, where ``torch.load`` can put nothing,
        and older releases of transformers load the optimizer's state onto this device.
        """
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    @property
    def sampling_seed(self) -> int:
        """What decides the order of data: ``data_seed``, or else ``seed``."""
        return self.seed if self.data_seed is None else self.data_seed


def _bf16_wanted() -> bool:
    # `accelerate launch --mixed_precision fp16` is an explicit wish, too.
    if os.environ.get("ACCELERATE_MIXED_PRECISION") in ("fp16", "fp8"):
        return False
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
