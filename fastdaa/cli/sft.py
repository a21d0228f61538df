"""``fastdaa sft``: supervised fine-tuning on packed examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastdaa.cli import building
from fastdaa.cli.stages import StageArguments, load_splits, parse_options, run_stage, stage_config
from fastdaa.cli.train import _log_lines
from fastdaa.data.examples import load_examples
from fastdaa.train.stage_config import SftConfig

_WHAT = "Teaches a causal language model the completions of a dataset."


@dataclass
class SftArguments(StageArguments):
    """What ``fastdaa sft`` builds before it calls the trainer."""

    _argument_group_name = "model and data"

    model: str = field(metadata={"help": "Model to train: a local folder or a hub id."})
    dataset: str = field(
        metadata={
            "help": "A file, folder or hub id of prompts with completions, preference pairs (the "
            "chosen side is learnt), conversations (messages) or plain text."
        }
    )


def run(argv: Sequence[str]) -> int:
    """Trains as ``argv`` says; 0, or 130 where a signal stopped the run after a checkpoint."""
    (arguments,), values = parse_options("sft", [SftArguments, SftConfig], argv, _WHAT)
    config = stage_config(SftConfig, values, arguments)
    with _log_lines(config.process_index == 0):
        return _train(arguments, config, argv)


def _train(arguments: Any, config: Any, argv: Sequence[str]) -> int:
    from transformers import set_seed

    from fastdaa.train.sft import SftTrainer

    checkpoint = building.check_paths(arguments, config)
    set_seed(config.seed)
    tokenizer = building.load_tokenizer(arguments)
    train, evaluation = load_splits(arguments, config, load_examples)
    peft_config = building.lora_config(arguments)
    model = building.load_model(arguments.model, arguments)
    building.check_vocabulary(model, tokenizer)
    trainer = SftTrainer(
        model, config, train, evaluation, processing_class=tokenizer, peft_config=peft_config
    )
    return run_stage("sft", trainer, checkpoint, argv)
