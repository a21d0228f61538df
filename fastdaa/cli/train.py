"""``fastdaa train``: reads options, builds what they name, and calls the trainer."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastdaa.cli.runs import command_run, train_and_save

if TYPE_CHECKING:
    from fastdaa.cli.arguments import TrainArguments
    from fastdaa.train.config import PreferenceConfig

logger = logging.getLogger(__name__)


def run(argv: Sequence[str]) -> int:
    """Trains as ``argv`` says; 0, or 130 where a signal stopped the run after a checkpoint."""
    from fastdaa.train.processes import run_together

    return run_together(functools.partial(_run, argv))


def _run(argv: Sequence[str]) -> int:
    from fastdaa.cli.arguments import parse

    arguments, config = parse(argv)
    with command_run(main_process=config.process_index == 0):
        return _train(arguments, config, argv)


def _train(arguments: TrainArguments, config: PreferenceConfig, argv: Sequence[str]) -> int:
    from transformers import set_seed

    from fastdaa.cli import building, paths
    from fastdaa.cli.load_data import load_splits
    from fastdaa.cli.summary import ALIGNMENT, UNPAIRED_ALIGNMENT, print_run
    from fastdaa.cli.tracking import Tracking
    from fastdaa.data.pairs import PAIRS
    from fastdaa.data.unpaired import UNPAIRED
    from fastdaa.train.unpaired_config import UnpairedConfig

    _say_what_trl_does(config)
    unpaired = isinstance(config, UnpairedConfig)
    folder = str(config.output_dir)
    checkpoint = paths.check_paths(arguments, folder, config.resume_from_checkpoint)
    tracking = Tracking(arguments, config)
    set_seed(config.seed)
    tokenizer = building.load_tokenizer(arguments)
    kind = UNPAIRED if unpaired else PAIRS
    train_rows, eval_rows = load_splits(
        arguments, kind, on_bad_row=config.on_bad_row, seed=config.sampling_seed
    )
    tracking.load_pairs(eval_rows)
    building.check_template(tokenizer, train_rows)
    peft_config = building.lora_config(arguments)
    model = building.load_policy(
        arguments, tokenizer, folder, checkpoint,
        main_process=config.process_index == 0, device=config.device,
    )  # fmt: skip
    ref_model = None
    if arguments.ref_model is not None:
        ref_model = building.load_model(
            arguments.ref_model, arguments, "ref_model", device=config.device,
            revision=building.model_revision(arguments, "ref_model"),
        )  # fmt: skip
    trainer = (_unpaired_trainer_class() if unpaired else _trainer_class())(
        model=model,
        ref_model=ref_model,
        args=config,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    trainer.card_dataset = arguments.dataset
    tracking.attach(trainer)
    code = train_and_save("train", trainer, checkpoint, argv)
    if code == 0 and trainer.is_world_process_zero():
        trainer.create_model_card()
        shown = UNPAIRED_ALIGNMENT if unpaired else ALIGNMENT
        print_run(trainer, shown, heading=str(config.objective()))
        tracking.print_summary()
    return code


def _say_what_trl_does(config: PreferenceConfig) -> None:
    """Losses that another objective has the name of there."""
    for name in config.loss_names():
        if name == "ipo":
            logger.info("loss: ipo is on sums over tokens, as in its paper; TRL's is ipo_norm here")
        if name in ("sigmoid", "sigmoid_norm") and config.label_smoothing:
            logger.info("loss: %s is smoothed by label_smoothing, which TRL's does not read", name)


def _trainer_class() -> Any:
    from fastdaa.train.trainer import PreferenceTrainer

    return PreferenceTrainer


def _unpaired_trainer_class() -> Any:
    from fastdaa.train.unpaired import UnpairedTrainer

    return UnpairedTrainer
