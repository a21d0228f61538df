"""``fastdaa sft``: supervised fine-tuning on packed examples."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastdaa.cli import building
from fastdaa.cli.arguments import AdapterArguments
from fastdaa.cli.stage import read_stage, run_stage
from fastdaa.data.examples import EXAMPLES
from fastdaa.train.stage_config import SftConfig

logger = logging.getLogger(__name__)
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


def parse(argv: Sequence[str]) -> tuple[SftArguments, SftConfig]:
    """Reads a command line of ``fastdaa sft``; the errors are those of ``read_stage``."""
    return read_stage("sft", (SftArguments, SftConfig), _WHAT, argv, title="fine-tuning")


def run(argv: Sequence[str]) -> int:
    """Trains as ``argv`` says; 0, or 130 where a signal stopped the run after a checkpoint."""
    return run_stage("sft", parse, argv, _make_trainer)


def _make_trainer(arguments: Any, config: Any) -> tuple[Any, str | None]:
    from fastdaa.train.sft import SftTrainer

    start = building.start_stage(arguments, config, EXAMPLES)
    peft_config = building.lora_config(arguments)
    model = building.load_policy(
        arguments, start.tokenizer, str(config.output_dir), start.checkpoint,
        main_process=config.process_index == 0, device=config.device,
    )  # fmt: skip
    _end_where_answers_do(model, start.tokenizer, start.train[0]["prompt"], arguments)
    trainer = SftTrainer(
        model, config, start.train, start.evaluation,
        processing_class=start.tokenizer, peft_config=peft_config,
    )  # fmt: skip
    return trainer, start.checkpoint


def _end_where_answers_do(model: Any, tokenizer: Any, prompt: Any, arguments: Any) -> None:
    """Have the saved model stop at the token that closes an answer of a conversation.

    That of a base model is often another one, behind which generated answers would go on.
    """
    from fastdaa.cli.paths import adapter_of
    from fastdaa.online.generation import end_tokens
    from fastdaa.online.prompts import chat_ending
    from fastdaa.train.backbone import causal_lm

    if isinstance(prompt, str) or tokenizer.chat_template is None:
        return
    try:
        end = chat_ending(tokenizer).end_id
    except ValueError:
        return  # the template takes other conversations alone
    ends = end_tokens(model, tokenizer)
    if end is None or end in ends:
        return
    closing = tokenizer.convert_ids_to_tokens(end)
    if arguments.use_peft or adapter_of("model", arguments.model) is not None:
        # What generates with an adapter asks its base.
        logger.warning(
            "model: answers end with %r, at which its base does not stop: generate with "
            "stop_token_ids=[%d] or the like", closing, end,
        )  # fmt: skip
        return
    causal_lm(model).generation_config.eos_token_id = [*ends, end]
    logger.info(
        "model: answers end with %r, which becomes an end token of its generation_config", closing
    )
