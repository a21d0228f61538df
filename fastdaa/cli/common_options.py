"""What ``--help`` of the training commands shows: the options that most runs set, with examples.

The rest is in ``--help-all``.
"""

from __future__ import annotations

from dataclasses import fields

from transformers import TrainingArguments

TRAINERS_HELP = {entry.name: entry.metadata.get("help") for entry in fields(TrainingArguments)}
# Releases of transformers before this name have the other one alone.
_CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if name in TRAINERS_HELP
)

_ADAPTER = ("use_peft", "lora_r", "lora_alpha")
_DATA = ("dataset", "max_length", "on_bad_row", "chat_template")
_OPTIMISATION = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "optim", "bf16", "seed",
)  # fmt: skip
_MEMORY = ("load_in_4bit", _CHECKPOINTING, "tokens_per_pack")
_EVALUATION = ("eval_dataset", "test_size", "eval_strategy", "eval_steps")
_SAVING = (
    "output_dir", "resume_from_checkpoint", "save_steps", "save_total_limit", "logging_steps",
)  # fmt: skip
_REPORTING = (*_SAVING, "report_to")

COMMON: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "model": ("model", "ref_model", "dtype", *_ADAPTER),
        "data": _DATA,
        "objective": ("loss_type", "loss_weights", "beta", "label_smoothing", "loss_kwargs"),
        "optimisation": _OPTIMISATION,
        "memory": (*_MEMORY, "precompute_ref_log_probs"),
        "evaluation": (*_EVALUATION, "track_reward"),
        "saving and reporting": _REPORTING,
    },
    "sft": {
        "model": ("model", "dtype", *_ADAPTER),
        "data": _DATA,
        "optimisation": _OPTIMISATION,
        "memory": _MEMORY,
        "evaluation": _EVALUATION,
        "saving and reporting": _REPORTING,
    },
    "reward": {
        "model": ("model", "dtype", *_ADAPTER),
        "data": _DATA,
        "objective": ("center_rewards_coefficient",),
        "optimisation": _OPTIMISATION,
        "memory": _MEMORY,
        "evaluation": _EVALUATION,
        "saving and reporting": _REPORTING,
    },
    "online": {
        "models": ("model", "reward", "pipeline", "ref_model", "dtype", "use_peft", "lora_r"),
        "prompts": ("dataset", "max_prompt_length", "chat_template"),
        "objective": ("algorithm", "kl_lambda", "kl_coef", "clip_range", "reward_scaling"),
        "rollouts": (
            "iterations", "rollouts_per_iteration", "max_new_tokens", "temperature", "rollouts",
            "generation_batch_size",
        ),
        "optimisation": ("learning_rate", "minibatch", "epochs", "bf16", "seed"),
        "memory": ("load_in_4bit", "tokens_per_pack"),
        "evaluation": (
            "eval_dataset", "test_size", "eval_steps", "eval_rollouts", "gold_reward",
        ),
        "saving and reporting": _SAVING,
    },
    "evaluate": {
        "models": ("model", "ref_model", "dtype", "load_in_4bit"),
        "data": ("dataset", "dataset_split", "max_samples", *_DATA[1:]),
        "objective": ("loss_type", "beta", "loss_kwargs"),
        "speed and memory": ("per_device_eval_batch_size", "tokens_per_pack", "bf16", "use_cpu"),
        "reporting": ("output",),
    },
}  # fmt: skip
"""Of each command: titles, each with the names of the options below it, in the order of help."""

EXAMPLES: dict[str, dict[str, str]] = {
    "train": {
        "DPO on a file of pairs": "fastdaa train --model Qwen/Qwen3-0.6B --dataset pairs.jsonl",
        "IPO, evaluated on 200 pairs":
            "fastdaa train --model M --dataset D --loss ipo --beta 0.1 --test_size 200",
        "KTO on completions with labels":
            "fastdaa train --model M --dataset thumbs.jsonl --loss kto",
        "LoRA on a base in 4 bits":
            "fastdaa train --model M --dataset D --use_peft --load_in_4bit",
        "options from a file, from the last checkpoint on":
            "fastdaa train --config run.yaml --resume_from_checkpoint",
        "8 GPUs": "torchrun --nproc_per_node 8 -m fastdaa.cli train --model M --dataset D",
    },
    "sft": {
        "completions of a file": "fastdaa sft --model Qwen/Qwen3-0.6B --dataset examples.jsonl",
        "the chosen sides of pairs, with LoRA": "fastdaa sft --model M --dataset D --use_peft",
    },
    "reward": {
        "a reward model, evaluated on 200 pairs":
            "fastdaa reward --model M --dataset pairs.jsonl --test_size 200",
        "rewards around 0":
            "fastdaa reward --model M --dataset D --center_rewards_coefficient 0.01",
    },
    "online": {
        "APA with a reward model": "fastdaa online --model M --dataset D --reward R",
        "PPO with a function of prompts and completions":
            "fastdaa online --model M --dataset D --algorithm ppo --reward score.py:reward",
        "fine-tuning and reward model first": "fastdaa online --model M --dataset D --pipeline",
    },
    "evaluate": {
        "accuracy, margins and KL": "fastdaa evaluate --model out --ref_model M --dataset D",
        "the numbers as JSON, too":
            "fastdaa evaluate --model out --ref_model M --dataset D --output out.json",
        "8 GPUs share the pairs; options from a file":
            "torchrun --nproc_per_node 8 -m fastdaa.cli evaluate --config run.yaml",
    },
}  # fmt: skip
"""Of each command: what an example does, and its command line."""

WORDS = {
    "per_device_train_batch_size": "Batch size on each device. It counts pairs or examples.",
    "per_device_eval_batch_size": "Batch size of evaluations on each device. It counts "
    "pairs or examples.",
    "gradient_accumulation_steps": "Batches per optimizer step.",
    "num_train_epochs": "Passes over the training data.",
    "max_steps": "Optimizer steps; above 0, overrides num_train_epochs.",
    "lr_scheduler_type": "Schedule, such as cosine.",
    "warmup_steps": "Steps of linear warm-up. Below 1: a share of all steps.",
    "optim": "Optimizer, such as paged_adamw_8bit.",
    "seed": "Seed of all random numbers. They order the data and initialise adapters.",
    "use_cpu": "Stay on the CPU where there is an accelerator.",
    "tf32": "Multiply float32 matrices in TF32 on GPUs that have it.",
    "activation_checkpointing": "Recompute activations: less memory, slower.",
    "eval_strategy": "When to evaluate. Default: where there is something to evaluate on, steps "
    "with --eval_steps, else epoch.",
    "eval_steps": "Steps between evaluations. Below 1: a share of all steps. Default: "
    "logging_steps.",
    "save_steps": "Steps between checkpoints. Below 1: a share of all steps.",
    "save_total_limit": "Newest checkpoints to keep. With --load_best_model_at_end the best one "
    "stays, too. Default: all.",
    "report_to": "Trackers, such as wandb. With all: every installed one.",
    "use_liger_kernel": "Liger's kernels for the layers (GPU only); its losses stay off.",
    "neftune_noise_alpha": "Noise on embeddings (NEFTune); needs --layout padded.",
    "label_smoothing_factor": "Must stay 0: it is for the labels of classifiers.",
    "bf16_full_eval": "Must stay off: --bf16 serves evaluation, too.",
    "fp16_full_eval": "Must stay off: --fp16 serves evaluation, too.",
    "include_for_metrics": "Must stay empty: no predictions are handed to a metric.",
    "train_sampling_strategy": "Order of the training data; batch_rebalance is refused.",
    "do_train": "For scripts of transformers: true, since this command trains.",
    "do_eval": "For scripts of transformers: asks for data to evaluate on.",
    "do_predict": "For scripts of transformers: false, since nothing is predicted.",
}
if _CHECKPOINTING == "gradient_checkpointing":
    WORDS[_CHECKPOINTING] = WORDS["activation_checkpointing"]


def plain_words(name: str, given: str | None) -> str | None:
    """The help of an option: shorter, or truer here, where transformers' own text would be shown.

    Args:
        name: of the option.
        given: its text so far; one that is not transformers' is returned as it is.
    """
    return WORDS.get(name, given) if given == TRAINERS_HELP.get(name) else given
