"""Settings of the stages before alignment: supervised fine-tuning and reward models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from fastdaa.train.options import HeadOptions
from fastdaa.train.packed_config import PackedConfig


@dataclass
class SftConfig(HeadOptions, PackedConfig):
    """Settings of :class:`fastdaa.train.sft.SftTrainer`.

    Batch sizes count examples. ``learning_rate`` is 2e-5 by default.

    Args:
        every_answer: learn every answer of a conversation, also those within a prompt: one
            example each, with the turns before it.
        impl, head_engine, head_max_bytes, log_token_stats: as in
            :class:`fastdaa.train.PreferenceConfig`.

    Raises:
        ValueError: a value that cannot be used.
    """

    layouts: ClassVar[tuple[str, ...]] = ("packed", "padded")

    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate."})
    layout: str = field(
        default="auto",
        metadata={
            "help": "How sequences lie in a batch; auto: the fastest that fits.",
            "choices": ("auto", "packed", "padded"),
        },
    )
    disable_dropout: bool = field(
        default=False, metadata={"help": "Set all dropout probabilities to 0."}
    )
    every_answer: bool = field(
        default=False,
        metadata={
            "help": "Learn every answer of a conversation, one example each. Default: the last."
        },
    )
    log_token_stats: bool = field(
        default=True, metadata={"help": "Log entropy and top-1 accuracy of the tokens."}
    )

    def __post_init__(self) -> None:
        self.check_head()
        super().__post_init__()


@dataclass
class RewardConfig(PackedConfig):
    """Settings of :class:`fastdaa.train.reward.RewardTrainer`.

    Batch sizes count pairs. ``learning_rate`` is 1e-5 by default.

    Args:
        center_rewards_coefficient: weight of ``(r_chosen + r_rejected)^2``, which keeps the rewards
            around 0 (arXiv 2312.09244, as in TRL); 0 or None for none.

    Raises:
        ValueError: a value that cannot be used.
    """

    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate."})
    center_rewards_coefficient: float | None = field(
        default=0.0,
        metadata={"help": "Weight of (chosen + rejected reward) squared; keeps rewards near 0."},
    )

    def __post_init__(self) -> None:
        if self.center_rewards_coefficient is None:
            self.center_rewards_coefficient = 0.0
        if not self.center_rewards_coefficient >= 0:
            raise ValueError(
                "center_rewards_coefficient: expected 0 or more, got "
                f"{self.center_rewards_coefficient}"
            )
        super().__post_init__()

    def identity(self) -> dict[str, Any]:
        """The base class's settings, and the loss."""
        return {
            **super().identity(), "center_rewards_coefficient": self.center_rewards_coefficient
        }  # fmt: skip
