"""``fastdaa reward``: a reward model from preference pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastdaa.cli import building
from fastdaa.cli.stages import StageArguments, load_splits, parse_options, run_stage, stage_config
from fastdaa.cli.train import _log_lines
from fastdaa.data import load_pairs
from fastdaa.train.stage_config import RewardConfig

_WHAT = (
    "Trains a sequence classifier with one output to prefer what preference pairs prefer "
    "(Bradley-Terry)."
)


@dataclass
class RewardArguments(StageArguments):
    """What ``fastdaa reward`` builds before it calls the trainer."""

    _argument_group_name = "model and data"

    model: str = field(
        metadata={"help": "A causal language model, whose backbone is taken, or a reward model."}
    )
    use_peft: bool = field(init=False, default=False)
    lora_r: int = field(init=False, default=16)
    lora_alpha: int = field(init=False, default=32)
    lora_dropout: float = field(init=False, default=0.0)
    lora_target_modules: list[str] | None = field(init=False, default=None)


def run(argv: Sequence[str]) -> int:
    """Trains as ``argv`` says; 0, or 130 where a signal stopped the run after a checkpoint."""
    (arguments,), values = parse_options("reward", [RewardArguments, RewardConfig], argv, _WHAT)
    config = stage_config(RewardConfig, values, arguments)
    with _log_lines(config.process_index == 0):
        return _train(arguments, config, argv)


def _train(arguments: Any, config: Any, argv: Sequence[str]) -> int:
    from transformers import set_seed

    from fastdaa.train.reward import RewardTrainer
    from fastdaa.train.reward_models import load_reward_model

    checkpoint = building.check_paths(arguments, config)
    set_seed(config.seed)
    tokenizer = building.load_tokenizer(arguments)
    train, evaluation = load_splits(arguments, config, load_pairs)
    building.check_template(tokenizer, train)
    options: dict[str, Any] = {"trust_remote_code": arguments.trust_remote_code}
    if arguments.attn_implementation is not None:
        options["attn_implementation"] = arguments.attn_implementation
    model = load_reward_model(arguments.model, tokenizer, dtype=arguments.dtype, **options)
    building.check_vocabulary(model, tokenizer)
    trainer = RewardTrainer(model, config, train, evaluation, processing_class=tokenizer)
    return run_stage("reward", trainer, checkpoint, argv)
