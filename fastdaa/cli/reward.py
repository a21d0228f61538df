"""``fastdaa reward``: a reward model from preference pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fastdaa.cli import building
from fastdaa.cli.arguments import AdapterArguments
from fastdaa.cli.runs import hold_folder
from fastdaa.cli.stage import read_stage, run_stage
from fastdaa.data.pairs import PAIRS
from fastdaa.train.stage_config import RewardConfig

_WHAT = (
    "Trains a sequence classifier with one output to prefer what preference pairs prefer "
    "(Bradley-Terry)."
)


@dataclass
class RewardArguments(AdapterArguments):
    """What ``fastdaa reward`` builds before it calls the trainer."""

    continues_adapters: ClassVar[bool] = False

    model: str = field(
        metadata={"help": "A causal language model, whose backbone is taken, or a reward model."}
    )


def parse(argv: Sequence[str]) -> tuple[RewardArguments, RewardConfig]:
    """Reads a command line of ``fastdaa reward``; the errors are those of ``read_stage``."""
    kinds = (RewardArguments, RewardConfig)
    return read_stage("reward", kinds, _WHAT, argv, title="reward model")


def run(argv: Sequence[str]) -> int:
    """Trains as ``argv`` says; 0, or 130 where a signal stopped the run after a checkpoint."""
    return run_stage("reward", parse, argv, _make_trainer)


def _make_trainer(arguments: Any, config: Any) -> tuple[Any, str | None]:
    from fastdaa.train.reward import RewardTrainer

    start = building.start_stage(arguments, config, PAIRS)
    peft_config = building.lora_config(arguments, "SEQ_CLS")
    model = _load_model(arguments, config, start)
    building.check_vocabulary(model, start.tokenizer)
    trainer = RewardTrainer(
        model, config, start.train, start.evaluation,
        processing_class=start.tokenizer, peft_config=peft_config,
    )  # fmt: skip
    return trainer, start.checkpoint


def _load_model(arguments: RewardArguments, config: Any, start: building.Start) -> Any:
    """The classifier; under a new adapter on a base of its own, to which that can point."""
    from accelerate import PartialState
    from transformers import set_seed

    from fastdaa.cli.paths import adapter_of
    from fastdaa.train.merged_base import merged_base
    from fastdaa.train.reward_models import load_reward_model

    source, options = arguments.model, building.model_options(arguments)
    revision = building.model_revision(arguments)
    adapter = adapter_of("model", source)
    if arguments.use_peft and adapter is not None:
        if adapter.config.get("task_type") == "SEQ_CLS":
            raise ValueError(
                f"model: expected a whole model or an adapter of a causal language model under a "
                f"new adapter (--use_peft), got the reward model {adapter}; leave --use_peft out "
                "to train it whole"
            )
        folder = str(config.output_dir)
        hold_folder(folder)
        base = merged_base(
            adapter, folder, start.checkpoint, tokenizer=start.tokenizer,
            write=config.process_index == 0, **options,
        )  # fmt: skip
        source, revision = base.name_or_path, {}
        del base
        PartialState().wait_for_everyone()
        # The new `score` is drawn as it was before an interruption, whatever else was drawn here.
        set_seed(config.seed)
    quantized = building.quantized_options(source, arguments, config.device, revision) or {}
    return load_reward_model(
        source, start.tokenizer, resize=not arguments.use_peft, **options, **revision, **quantized
    )
