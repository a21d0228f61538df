"""Settings of on-policy training: one dataclass, whose fields are the command's flags."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from fastdaa.train.options import HeadOptions, PackOptions, check_count
from fastdaa.validation import check_choice

Algorithm = Literal["apa", "ppo", "awr"]
ALGORITHMS: tuple[str, ...] = get_args(Algorithm)
WHITENING = ("auto", "none", "masked", "unmasked")
CONTROLLERS = ("fixed", "adaptive")
CRITICS = ("separate", "shared")
CRITIC_HEADS = ("mlp", "linear")
SCALINGS = ("none", "running_std")
CONFIG_FILE = "online_config.json"
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")

_POSITIVE = (
    "kl_lambda", "learning_rate", "temperature", "clip_range", "max_advantage_weight",
    "kl_target", "kl_horizon", "adam_epsilon",
)  # fmt: skip
_POSITIVE_OR_NONE = ("clip_range_value", "reward_clip", "critic_learning_rate")
_NOT_NEGATIVE = (
    "kl_coef", "vf_coef", "missing_eos_penalty", "max_grad_norm", "weight_decay", "warmup_steps",
    "save_total_limit", "seed",
)  # fmt: skip
_COUNTS = (
    "iterations", "rollouts_per_iteration", "minibatch", "epochs", "max_new_tokens",
    "logging_steps", "save_steps",
)  # fmt: skip


@dataclass
class OnlineConfig(HeadOptions, PackOptions):
    """Settings of :class:`fastdaa.online.loop.OnlineTrainer`; ``HfArgumentParser`` reads them.

    One iteration draws ``rollouts_per_iteration`` completions from the policy and takes
    ``epochs * rollouts_per_iteration / minibatch`` optimiser steps on them. Defaults are those of
    the authors of APA (arXiv 2306.02231) where they have any, but advantages are not whitened.
    Steps of logging and saving count iterations.

    Raises:
        ValueError: a value that cannot be used.
    """

    output_dir: str | None = field(
        default="online_output",
        metadata={"help": "Folder of metrics, checkpoints and model."},
    )
    algorithm: Algorithm = field(
        default="apa", metadata={"help": "On-policy algorithm.", "choices": ALGORITHMS}
    )
    iterations: int = field(
        default=100, metadata={"help": "Rounds of rollouts and of updates on them."}
    )
    rollouts_per_iteration: int = field(
        default=128, metadata={"help": "Completions per iteration."}
    )
    minibatch: int = field(default=8, metadata={"help": "Completions per optimiser step."})
    epochs: int = field(
        default=2,
        metadata={"help": "Passes over the rollouts of an iteration.", "aliases": ["--ppo_epochs"]},
    )

    kl_lambda: float = field(
        default=0.1,
        metadata={
            "help": "APA, AWR: the advantage that is worth one nat, in units of the score. "
            "Larger stays closer to the reference (APA)."
        },
    )
    max_advantage_weight: float = field(
        default=20.0, metadata={"help": "AWR: largest weight exp(advantage / kl_lambda)."}
    )
    clip_range: float = field(
        default=0.2, metadata={"help": "PPO: how far the probability ratio may leave 1."}
    )
    clip_range_value: float | None = field(
        default=None,
        metadata={"help": "How far values may leave the old ones. Default: no limit."},
    )
    kl_coef: float = field(
        default=0.05, metadata={"help": "PPO: cost of a nat of KL, in units of the score."}
    )
    kl_controller: str = field(
        default="fixed",
        metadata={"help": "PPO: keep kl_coef, or adapt it to kl_target.", "choices": CONTROLLERS},
    )
    kl_target: float = field(
        default=6.0, metadata={"help": "Adaptive controller: KL in nats a sequence."}
    )
    kl_horizon: float = field(
        default=10_000.0, metadata={"help": "Adaptive controller: its pace, in rollouts."}
    )

    gamma: float = field(default=1.0, metadata={"help": "Discount of later rewards."})
    gae_lambda: float = field(
        default=0.95, metadata={"help": "Advantages: 0 one-step errors, 1 whole returns."}
    )
    whiten_advantages: str = field(
        default="auto",
        metadata={
            "help": "Whiten advantages over a minibatch: masked (valid tokens), unmasked "
            "(padding counts, as in the "
            "authors' code) or none; auto: masked for ppo, else none, because it would undo the "
            "anchor of apa.",
            "choices": WHITENING,
        },
    )
    vf_coef: float = field(default=1.0, metadata={"help": "Weight of the critic's loss."})
    critic: str = field(
        default="separate",
        metadata={
            "help": "The critic has a copy of the backbone, or the policy's own.",
            "choices": CRITICS,
        },
    )
    critic_head: str = field(
        default="mlp",
        metadata={"help": "mlp: h -> 2h -> 1 with ReLU; or linear.", "choices": CRITIC_HEADS},
    )
    reward_scaling: str = field(
        default="running_std",
        metadata={
            "help": "running_std: divide scores by their standard deviation so far.",
            "choices": SCALINGS,
        },
    )
    reward_clip: float | None = field(
        default=None,
        metadata={"help": "Largest absolute value of a scaled score. Default: no limit."},
    )
    missing_eos_penalty: float = field(
        default=0.0, metadata={"help": "Taken off the scaled score of completions without EOS."}
    )

    temperature: float = field(
        default=1.0, metadata={"help": "Temperature of sampling, and of all log-probs with it."}
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Longest completion, in tokens."})

    learning_rate: float = field(default=1e-6, metadata={"help": "Learning rate of the policy."})
    critic_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of a separate critic, or of its head. Default: the policy's."
        },
    )
    lr_scheduler_type: str = field(
        default="constant",
        metadata={"help": "Schedule of both learning rates.", "choices": SCHEDULES},
    )
    warmup_steps: int = field(default=0, metadata={"help": "Optimiser steps of linear warm-up."})
    adam_beta1: float = field(default=0.9, metadata={"help": "Decay of Adam's first moment."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Decay of Adam's second moment."})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "Adam's epsilon."})
    weight_decay: float = field(default=0.0, metadata={"help": "Decoupled weight decay (AdamW)."})
    max_grad_norm: float = field(
        default=1.0,
        metadata={
            "help": "Largest gradient norm of policy and critic, each by itself; 0: no clipping."
        },
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Set all dropout probabilities to 0."}
    )
    bf16: bool = field(default=False, metadata={"help": "bf16 mixed precision."})
    activation_checkpointing: bool = field(
        default=False,
        metadata={
            "help": "Recompute activations: less memory, slower.",
            "aliases": ["--gradient_checkpointing"],
        },
    )
    fsdp: bool = field(
        default=False,
        metadata={
            "help": "Cut weights, gradients and optimizer states into as many parts as there are "
            "processes (FSDP2)."
        },
    )

    seed: int = field(default=0, metadata={"help": "Seed of prompts, rollouts and minibatches."})
    logging_steps: int = field(default=1, metadata={"help": "Iterations between logged rows."})
    save_steps: int = field(default=10, metadata={"help": "Iterations between checkpoints."})
    save_total_limit: int = field(
        default=2, metadata={"help": "Newest checkpoints to keep; 0: all."}
    )
    stop_on_collapse: bool = field(
        default=False, metadata={"help": "Stop where the monitor sees a collapse of the policy."}
    )
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bar."})

    def __post_init__(self) -> None:
        for name, choices in (
            ("algorithm", ALGORITHMS), ("whiten_advantages", WHITENING),
            ("kl_controller", CONTROLLERS), ("critic", CRITICS), ("critic_head", CRITIC_HEADS),
            ("reward_scaling", SCALINGS), ("lr_scheduler_type", SCHEDULES),
        ):  # fmt: skip
            check_choice(name, getattr(self, name), choices)
        for name in _POSITIVE + _POSITIVE_OR_NONE:
            value = getattr(self, name)
            if not ((value is None and name in _POSITIVE_OR_NONE) or 0 < value < math.inf):
                raise ValueError(f"{name}: expected a number above 0, got {value}")
        for name in _NOT_NEGATIVE:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        self.check_head()
        self.check_packs()
        for name in _COUNTS:
            check_count(name, getattr(self, name))
        for name in ("gamma", "gae_lambda", "adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected 0 to 1, got {getattr(self, name)}")
        if self.kl_controller == "adaptive" and self.kl_coef == 0:
            raise ValueError("kl_coef: expected a number above 0 to start from, got 0.0")
        if self.minibatch > self.rollouts_per_iteration:
            raise ValueError(
                f"minibatch: expected at most rollouts_per_iteration "
                f"({self.rollouts_per_iteration}), got {self.minibatch}"
            )

    @property
    def whitening(self) -> str:
        """``masked``, ``unmasked`` or ``none``, where ``auto`` is decided."""
        if self.whiten_advantages != "auto":
            return self.whiten_advantages
        return "masked" if self.algorithm == "ppo" else "none"

    @property
    def minibatches(self) -> int:
        """Minibatches of one pass; the last one may be smaller."""
        return -(-self.rollouts_per_iteration // self.minibatch)

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.iterations * self.epochs * self.minibatches

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON can hold them."""
        return dataclasses.asdict(self)

    def save(self, folder: str | Path) -> Path:
        """Writes ``online_config.json`` into ``folder``."""
        path = Path(folder) / CONFIG_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        return path
