"""``fastdaa sft``: supervised fine-tuning on packed examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastdaa.cli import building
from fastdaa.cli.arguments import AdapterArguments, trainer_config
from fastdaa.cli.options import option_parser, read_options
from fastdaa.cli.runs import command_run, train_and_save
from fastdaa.cli.summary import STAGE, print_run
from fastdaa.data.examples import EXAMPLES
from fastdaa.train.stage_config import SftConfig

_WHAT = "Teaches a causal language model the completions of a dataset."


@dataclass
class SftArguments(AdapterArguments):
    """What ``fastdaa sft`` builds before it calls the trainer."""

    model: str = field(metadata={"help": "Model to train: a local folder or a hub id."})
    dataset: list[str] = field(
        metadata={
            "help": "Examples: files, folders or hub ids. They hold prompts with completions, "
            "preference pairs (the chosen side is learnt), conversations (messages) or plain text."
        }
    )


def run(argv: Sequence[str]) -> int:
    """Trains as ``argv`` says; 0, or 130 where a signal stopped the run after a checkpoint."""
    kinds = (SftArguments, SftConfig)
    parser = option_parser("sft", kinds, _WHAT, title="fine-tuning")
    (arguments,), values = read_options(parser, kinds, argv)
    config = trainer_config(SftConfig, values, arguments)
    with command_run(main_process=config.process_index == 0):
        return _train(arguments, config, argv)


def _train(arguments: Any, config: Any, argv: Sequence[str]) -> int:
    from fastdaa.train.sft import SftTrainer

    start = building.start_stage(arguments, config, EXAMPLES)
    peft_config = building.lora_config(arguments)
    model = building.load_policy(
        arguments, start.tokenizer, str(config.output_dir), start.checkpoint,
        main_process=config.process_index == 0, device=config.device,
    )  # fmt: skip
    trainer = SftTrainer(
        model, config, start.train, start.evaluation,
        processing_class=start.tokenizer, peft_config=peft_config,
    )  # fmt: skip
    code = train_and_save("sft", trainer, start.checkpoint, argv)
    if code == 0 and trainer.is_world_process_zero():
        print_run(trainer, STAGE)
    return code
