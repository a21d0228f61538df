"""``fastdaa reward``: a reward model from preference pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastdaa.cli import building
from fastdaa.cli.arguments import ModelArguments, trainer_config
from fastdaa.cli.options import option_parser, read_options
from fastdaa.cli.runs import command_run, train_and_save
from fastdaa.cli.summary import STAGE, print_summary
from fastdaa.data import load_pairs
from fastdaa.train.stage_config import RewardConfig

_WHAT = (
    "Trains a sequence classifier with one output to prefer what preference pairs prefer "
    "(Bradley-Terry)."
)


@dataclass
class RewardArguments(ModelArguments):
    """What ``fastdaa reward`` builds before it calls the trainer."""

    model: str = field(
        metadata={"help": "A causal language model, whose backbone is taken, or a reward model."}
    )


def run(argv: Sequence[str]) -> int:
    """Trains as ``argv`` says; 0, or 130 where a signal stopped the run after a checkpoint."""
    kinds = (RewardArguments, RewardConfig)
    parser = option_parser("reward", kinds, _WHAT, title="reward model")
    (arguments,), values = read_options(parser, kinds, argv)
    config = trainer_config(RewardConfig, values, arguments)
    with command_run(main_process=config.process_index == 0):
        return _train(arguments, config, argv)


def _train(arguments: Any, config: Any, argv: Sequence[str]) -> int:
    from fastdaa.train.reward import RewardTrainer
    from fastdaa.train.reward_models import load_reward_model

    start = building.start_stage(arguments, config, load_pairs)
    building.check_template(start.tokenizer, start.train)
    options = building.model_options(arguments)
    model = load_reward_model(arguments.model, start.tokenizer, **options)
    building.check_vocabulary(model, start.tokenizer)
    trainer = RewardTrainer(
        model, config, start.train, start.evaluation, processing_class=start.tokenizer
    )
    code = train_and_save("reward", trainer, start.checkpoint, argv)
    if code == 0 and trainer.is_world_process_zero():
        print_summary(trainer.state.log_history, config.output_dir, STAGE)
    return code
