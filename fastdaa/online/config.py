"""Settings of on-policy training: one dataclass, whose fields are the command's flags."""

from __future__ import annotations

import dataclasses
import json
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
        metadata={"help": "Metrics, checkpoints, model; none: nothing is written."},
    )
    algorithm: Algorithm = field(
        default="apa", metadata={"help": "apa, ppo or awr.", "choices": ALGORITHMS}
    )
    iterations: int = field(
        default=100, metadata={"help": "Rounds of rollouts and updates on them."}
    )
    rollouts_per_iteration: int = field(default=128, metadata={"help": "Completions a round."})
    minibatch: int = field(default=8, metadata={"help": "Completions an optimiser step."})
    epochs: int = field(
        default=2, metadata={"help": "Passes over the rollouts.", "aliases": ["--ppo_epochs"]}
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
    clip_range: float = field(default=0.2, metadata={"help": "PPO: clipping of the ratio."})
    clip_range_value: float | None = field(
        default=None,
        metadata={"help": "Clipping of values around the old ones. Default: none."},
    )
    kl_coef: float = field(
        default=0.05, metadata={"help": "PPO: cost of a nat of KL, in units of the score."}
    )
    kl_controller: str = field(
        default="fixed",
        metadata={"help": "PPO: whether kl_coef moves.", "choices": CONTROLLERS},
    )
    kl_target: float = field(
        default=6.0, metadata={"help": "Adaptive controller: KL in nats a sequence."}
    )
    kl_horizon: float = field(
        default=10_000.0, metadata={"help": "Adaptive controller: its pace, in rollouts."}
    )

    gamma: float = field(default=1.0, metadata={"help": "Discount."})
    gae_lambda: float = field(
        default=0.95, metadata={"help": "Advantages: 0 one-step errors, 1 whole returns."}
    )
    whiten_advantages: str = field(
        default="auto",
        metadata={
            "help": "Over a minibatch: masked (valid tokens), unmasked (padding counts, as in the "
            "authors' code) or none; auto: masked for ppo, else none, because it would undo the "
            "anchor of apa.",
            "choices": WHITENING,
        },
    )
    vf_coef: float = field(default=1.0, metadata={"help": "Weight of the critic's loss."})
    critic: str = field(
        default="separate",
        metadata={"help": "A copy of the backbone, or the policy's own.", "choices": CRITICS},
    )
    critic_head: str = field(
        default="mlp",
        metadata={"help": "mlp: h -> 2h -> 1 with ReLU; or linear.", "choices": CRITIC_HEADS},
    )
    reward_scaling: str = field(
        default="running_std",
        metadata={"help": "Divide scores by their deviation so far.", "choices": SCALINGS},
    )
    reward_clip: float | None = field(
        default=None, metadata={"help": "Largest absolute scaled score. Default: none."}
    )
    missing_eos_penalty: float = field(
        default=0.0, metadata={"help": "Taken off the scaled score of completions without EOS."}
    )

    temperature: float = field(
        default=1.0, metadata={"help": "Of sampling, and of all log-probs with it."}
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Longest completion."})

    learning_rate: float = field(default=1e-6, metadata={"help": "Of the policy."})
    critic_learning_rate: float | None = field(
        default=None, metadata={"help": "Of a separate critic or its head. Default: the policy's."}
    )
    lr_scheduler_type: str = field(
        default="constant", metadata={"help": "Of both rates.", "choices": SCHEDULES}
    )
    warmup_steps: int = field(default=0, metadata={"help": "Optimiser steps of linear warm-up."})
    adam_beta1: float = field(default=0.9, metadata={"help": "Adam's first moment."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Adam's second moment."})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "Adam's epsilon."})
    weight_decay: float = field(default=0.0, metadata={"help": "Decoupled (AdamW)."})
    max_grad_norm: float = field(
        default=1.0, metadata={"help": "Of policy and critic, each for itself; 0: no clipping."}
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Dropout 0 in all models."})
    bf16: bool = field(default=False, metadata={"help": "bf16 mixed precision."})

    seed: int = field(default=0, metadata={"help": "Of prompts, rollouts and minibatches."})
    logging_steps: int = field(default=1, metadata={"help": "Iterations between logged rows."})
    save_steps: int = field(default=10, metadata={"help": "Iterations between checkpoints."})
    save_total_limit: int = field(
        default=2, metadata={"help": "Checkpoints that are kept; 0: all."}
    )
    stop_on_collapse: bool = field(
        default=False, metadata={"help": "End where the monitor sees a collapse."}
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
            if not ((value is None and name in _POSITIVE_OR_NONE) or value > 0):
                raise ValueError(f"{name}: expected a number above 0, got {value}")
        for name in _NOT_NEGATIVE:
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        self.check_head()
        self.check_packs()
        for name in _COUNTS:
            check_count(name, getattr(self, name))
        for name in ("gamma", "gae_lambda", "adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected 0 to 1, got {getattr(self, name)}")
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
        path = Path(folder) / "online_config.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        return path
