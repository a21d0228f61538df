"""Settings that the stages before alignment share: supervised fine-tuning and reward models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from transformers import TrainingArguments

from fastdaa.train.config import ATTENTION_CHOICES, ENGINE_CHOICES, IMPL_CHOICES, _bf16_wanted
from fastdaa.validation import check_choice, check_positive


@dataclass
class StageConfig(TrainingArguments):
    """``transformers.TrainingArguments``, and what packed batches need beside it.

    Other defaults than there: ``logging_steps`` 10, ``logging_nan_inf_filter`` False,
    ``remove_unused_columns`` False, and ``bf16`` None, which means True on a CUDA device that has
    bf16, unless ``fp16`` is set or accelerate was launched with another mixed precision.

    Args:
        max_length, truncation_mode, on_bad_row, dataset_num_proc, attention, tokens_per_pack,
        disable_dropout: as in :class:`fastdaa.train.PreferenceConfig`.
        layout: one of ``layouts``, or ``"auto"`` for the fastest that the model can run.

    Raises:
        ValueError: a value that cannot be used.
    """

    layouts: ClassVar[tuple[str, ...]] = ("packed", "padded")
    # No stage has a reference.
    precompute_ref_log_probs: ClassVar[bool] = False

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
    layout: str = field(
        default="auto",
        metadata={"help": "How sequences lie in a batch; auto: the fastest that fits."},
    )
    attention: str = field(
        default="auto",
        metadata={"help": "Kernel that attends over packed rows.", "choices": ATTENTION_CHOICES},
    )
    tokens_per_pack: int | None = field(
        default=None,
        metadata={"help": "Tokens of one forward. Default: a whole batch at once."},
    )
    disable_dropout: bool = field(
        default=False, metadata={"help": "Set all dropout probabilities to 0."}
    )

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and _bf16_wanted()
        if not torch.accelerator.is_available():
            # There is nothing to pin for, and torch would warn in every run.
            self.dataloader_pin_memory = False
        for name, choices in (
            ("truncation_mode", ("keep_start", "keep_end")),
            ("on_bad_row", ("error", "skip")),
            ("layout", ("auto", *self.layouts)),
            ("attention", ATTENTION_CHOICES),
        ):
            check_choice(name, getattr(self, name), choices)
        for name in ("max_length", "dataset_num_proc", "tokens_per_pack"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise ValueError(f"{name}: expected an integer above 0, got {value!r}")
            check_positive(name, value)
        if self.layout == "padded" and self.attention != "auto":
            raise ValueError(
                "attention: expected 'auto' with layout 'padded', which has no segments to attend "
                f"over, got {self.attention!r}; the model's own attn_implementation is used there"
            )
        super().__post_init__()


@dataclass
class SftConfig(StageConfig):
    """Settings of :class:`fastdaa.train.sft.SftTrainer`.

    Batch sizes count examples. ``learning_rate`` is 2e-5 by default.

    Args:
        impl, head_engine, head_max_bytes, log_token_stats: as in
            :class:`fastdaa.train.PreferenceConfig`.

    Raises:
        ValueError: a value that cannot be used.
    """

    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate."})
    impl: str = field(
        default="auto",
        metadata={"help": "Way through the LM head; auto: planned.", "choices": IMPL_CHOICES},
    )
    head_engine: str = field(
        default="auto",
        metadata={"help": "What works on tiles of logits.", "choices": ENGINE_CHOICES},
    )
    head_max_bytes: int | None = field(
        default=None,
        metadata={"help": "Bytes of fp32 logits held at a time. Default: the device's."},
    )
    log_token_stats: bool = field(
        default=True, metadata={"help": "Log entropy and top-1 accuracy of the tokens."}
    )

    def __post_init__(self) -> None:
        check_choice("impl", self.impl, IMPL_CHOICES)
        check_choice("head_engine", self.head_engine, ENGINE_CHOICES)
        check_positive("head_max_bytes", self.head_max_bytes)
        super().__post_init__()


@dataclass
class RewardConfig(StageConfig):
    """Settings of :class:`fastdaa.train.reward.RewardTrainer`.

    Batch sizes count pairs. ``learning_rate`` is 1e-5 by default.

    Args:
        center_rewards_coefficient: weight of ``(r_chosen + r_rejected)^2``, which keeps the rewards
            around 0 (arXiv 2312.09244, as in TRL); 0 for none.

    Raises:
        ValueError: a value that cannot be used.
    """

    layouts: ClassVar[tuple[str, ...]] = ("prefix_shared", "packed", "padded")

    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate."})
    center_rewards_coefficient: float = field(
        default=0.0,
        metadata={"help": "Weight of (chosen + rejected reward) squared; keeps rewards near 0."},
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Set all dropout probabilities to 0."}
    )

    def __post_init__(self) -> None:
        if not self.center_rewards_coefficient >= 0:
            raise ValueError(
                "center_rewards_coefficient: expected 0 or more, got "
                f"{self.center_rewards_coefficient}"
            )
        super().__post_init__()
