"""The options of ``fastdaa online`` beside those of the algorithm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastdaa.cli.arguments import AdapterArguments
from fastdaa.cli.options import build, option_parser, read_options
from fastdaa.online.config import OnlineConfig
from fastdaa.train.options import check_count, read_mapping
from fastdaa.train.packed_config import ON_BAD_ROW
from fastdaa.validation import check_choice

ROLLOUT_SOURCES = ("transformers", "vllm")
_WHAT = (
    "Improves a policy on its own completions: APA, PPO or AWR. With --pipeline, fine-tuning and a "
    "reward model come first, from the same preference pairs."
)


@dataclass
class OnlineArguments(AdapterArguments):
    """What ``fastdaa online`` builds before it calls the loop."""

    _argument_group_name = "models and prompts"

    model: str = field(metadata={"help": "Policy to train: a local folder or a hub id."})
    dataset: list[str] = field(
        metadata={
            "help": "Prompts: files, folders or hub ids. They hold prompts, prompts with "
            "completions, preference pairs or conversations; several are mixed."
        }
    )
    reward: str | None = field(
        default=None,
        metadata={
            "help": "Reward model (folder or hub id), or a function of prompts and completions "
            "(module:function or file.py:function)."
        },
    )
    gold_reward: str | None = field(
        default=None,
        metadata={
            "help": "A second reward, given in the same way, that is not trained on: it scores the "
            "answers to held-out prompts, to see when the reward gets exploited."
        },
    )
    ref_model: str | None = field(
        default=None, metadata={"help": "Reference model. Default: the policy at the start."}
    )
    ref_model_revision: str | None = field(
        default=None,
        metadata={"help": "Branch, tag or commit of REF_MODEL on the hub. Default: its main one."},
    )
    max_prompt_length: int | None = field(
        default=512, metadata={"help": "Longer prompts are left out."}
    )
    eval_steps: int = field(
        default=10, metadata={"help": "Iterations between measurements on held-out prompts."}
    )
    eval_rollouts: int = field(
        default=64,
        metadata={"help": "Completions per measurement, of the held-out prompts in turn."},
    )
    rollouts: str = field(
        default="transformers",
        metadata={"help": "What generates completions.", "choices": ROLLOUT_SOURCES},
    )
    generation_batch_size: int = field(default=64, metadata={"help": "Prompts answered at once."})
    vllm_memory: float = field(
        default=0.3, metadata={"help": "Share of the GPU's memory that vLLM may use."}
    )
    use_cpu: bool = field(
        default=False, metadata={"help": "Stay on the CPU where there is an accelerator."}
    )
    on_bad_row: str = field(
        default="error",
        metadata={
            "help": "At a row that cannot be used: stop, or skip and count it.",
            "choices": ON_BAD_ROW,
        },
    )
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": ""})
    pipeline: bool = field(
        default=False,
        metadata={
            "help": "Run `fastdaa sft` and `fastdaa reward` first, on dataset, which holds "
            "preference pairs. They go to output_dir/sft and output_dir/reward, and are skipped "
            "where they are done."
        },
    )
    sft_options: dict[str, Any] | str | None = field(
        default_factory=dict,
        metadata={"help": "Options of `fastdaa sft` in the pipeline: '{\"num_train_epochs\": 1}'."},
    )
    reward_options: dict[str, Any] | str | None = field(
        default_factory=dict,
        metadata={"help": "Options of `fastdaa reward` in the pipeline, in the same form."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("rollouts", self.rollouts, ROLLOUT_SOURCES)
        check_choice("on_bad_row", self.on_bad_row, ON_BAD_ROW)
        check_count("max_prompt_length", self.max_prompt_length, optional=True)
        for name in ("eval_steps", "eval_rollouts", "generation_batch_size"):
            check_count(name, getattr(self, name))
        if not 0 < self.vllm_memory <= 1:
            raise ValueError(f"vllm_memory: expected a share up to 1, got {self.vllm_memory}")
        for name in ("sft_options", "reward_options"):
            given = getattr(self, name)
            setattr(self, name, read_mapping(name, given, "options", '{"num_train_epochs": 1}'))
        measured = self.test_size or self.eval_dataset or self.eval_split
        if self.gold_reward is not None and not measured:
            raise ValueError(
                "gold_reward: expected held-out prompts for it (test_size, eval_dataset or "
                "eval_split), got none"
            )
        if self.reward is None and not self.pipeline:
            raise ValueError(
                "reward: expected --reward with a model or a function, or --pipeline to train one"
            )


def parse(argv: Sequence[str]) -> tuple[OnlineArguments, OnlineConfig]:
    """Reads a command line of ``fastdaa online``.

    Raises:
        ValueError: an unknown option or key, with the nearest valid one, or a bad value.
        OSError: the YAML file cannot be read.
    """
    kinds = (OnlineArguments, OnlineConfig)
    parser = option_parser("online", kinds, _WHAT, title="on-policy training")
    (arguments,), values = read_options(parser, kinds, argv)
    config = build(OnlineConfig, values)
    if config.output_dir in (None, "none"):
        raise ValueError("output_dir: expected a folder for checkpoints and the policy, got none")
    return arguments, config
