"""Options of ``transformers.TrainingArguments`` that could not do here what they say.

The Trainer takes them all. Each of these would be without effect, or fail in the middle of a run.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from fastdaa.train.compilation import MODES
from fastdaa.train.options import check_count
from fastdaa.validation import check_choice, check_number, shown

if TYPE_CHECKING:
    from fastdaa.train.packed_config import PackedConfig

_LIGER_OFF = ("cross_entropy", "fused_linear_cross_entropy")
_TRACKERS = {
    "azure_ml": ("azureml", "azureml-sdk"),
    "comet_ml": ("comet", "comet_ml"),
    "dagshub": ("dagshub", "dagshub mlflow"),
    "flyte": ("flytekit", "flytekit"),
}
"""What transformers and pip call the packages of trackers, where these are other names."""
_BY_MODULES = ("galore", "apollo")
_MANY_STEPS = 1_000_000


def check_before(args: PackedConfig) -> None:
    """Raise ``ValueError`` for values as they were given, before the Trainer's own checks."""
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        check_count(name, getattr(args, name))
    check_count("gradient_accumulation_steps", args.gradient_accumulation_steps)
    _check_length_of_run(args)
    _check_optimizer(args)
    _check_intervals(args)
    _check_loading(args)
    _check_metrics(args)
    # SIGTERM saves a checkpoint anyway; with the Trainer's handler the run would count as done.
    args.enable_jit_checkpoint = False
    on_cpu = args.use_cpu or not torch.accelerator.is_available()
    if args.use_liger_kernel:
        if on_cpu:
            raise ValueError("use_liger_kernel: expected a GPU for its Triton kernels, got the CPU")
        args.liger_kernel_config = _liger_config(args.liger_kernel_config)
    if args.torch_compile_mode is not None:
        check_choice("torch_compile_mode", args.torch_compile_mode, MODES)
    if args.neftune_noise_alpha is not None and args.layout != "padded":
        raise ValueError(
            "neftune_noise_alpha: expected layout 'padded', where a row is one sequence, got "
            f"{args.layout!r}; NEFTune divides its noise by the root of the length of a row"
        )
    if args.ddp_backend is not None and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            f"ddp_backend: expected several processes, got one with {args.ddp_backend!r}; start "
            "them with torchrun or accelerate launch"
        )


def check_after(args: PackedConfig) -> None:
    """Raise for values as the Trainer has read them.

    Raises:
        ValueError: one that cannot be used.
        ImportError: a tracker of ``report_to`` is not installed.
    """
    if args.mixed_precision == "fp16" and args.device.type == "cpu":
        raise ValueError("fp16: expected a GPU for it, got the CPU, on which bf16 works")
    if getattr(args.accelerator_config, "dispatch_batches", None):
        raise ValueError(
            "accelerator_config: expected dispatch_batches off, since packs cannot be cut into the "
            "parts of processes, got true"
        )
    started = launched_processes()
    if started > 1 and not getattr(args.accelerator_config, "even_batches", True):
        raise ValueError(
            "accelerator_config: expected even_batches on, since in training all processes need as "
            "many batches, got false; evaluations count every pair once anyway"
        )
    _check_trackers(args.report_to)
    _check_schedule(args)
    if started > 1 and args.world_size == 1:
        raise ValueError(
            f"use_cpu: expected it, or devices that {started} processes can share, got "
            f"{args.device} in each of them; every one would run alone"
        )


def launched_processes() -> int:
    """How many processes a launcher has started, of which this is one."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def _check_length_of_run(args: PackedConfig) -> None:
    steps, epochs = args.max_steps, args.num_train_epochs
    if steps == 0 or steps < -1:
        raise ValueError(
            f"max_steps: expected steps above 0, or -1 for num_train_epochs, got {steps}"
        )
    if steps == -1 and not epochs > 0:
        raise ValueError(f"num_train_epochs: expected a number above 0, got {epochs}")


def _check_optimizer(args: PackedConfig) -> None:
    # Fused optimizers would also take a negative decay, and blow the weights up.
    for name in ("learning_rate", "weight_decay", "adam_epsilon"):
        if check_number(name, getattr(args, name)) < 0:
            raise ValueError(f"{name}: expected at least 0, got {getattr(args, name)}")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= check_number(name, getattr(args, name)) < 1:
            raise ValueError(f"{name}: expected at least 0 and below 1, got {getattr(args, name)}")
    optimizer = _word(args.optim)
    if args.optim_target_modules and not optimizer.startswith(_BY_MODULES):
        raise ValueError(
            "optim_target_modules: expected nothing, since only the optimizers "
            f"{' and '.join(_BY_MODULES)} look at it, got {optimizer!r}; to train some layers "
            "alone, use LoRA with lora_target_modules"
        )
    given = args.optim_args
    if isinstance(given, str) and any(part.count("=") != 1 for part in given.split(",")):
        raise ValueError(
            f"optim_args: expected name=value, several with commas between them, got {given!r}"
        )


def _check_intervals(args: PackedConfig) -> None:
    for what in ("logging", "save", "eval"):
        name = f"{what}_steps"
        value = getattr(args, name)
        # Without eval_steps those of logging count.
        missing = what == "eval" and not value
        if _word(getattr(args, f"{what}_strategy")) != "steps" or missing:
            continue
        if not value > 0:
            raise ValueError(f"{name}: expected a number above 0, got {value}")


def _check_loading(args: PackedConfig) -> None:
    if args.remove_unused_columns:
        raise ValueError(
            "remove_unused_columns: expected False, since the trainer picks its columns itself and "
            "the model's forward knows none of them, got True"
        )
    if getattr(args, "train_sampling_strategy", None) == "batch_rebalance":
        raise ValueError(
            "train_sampling_strategy: expected random, sequential or group_by_length, got "
            "'batch_rebalance', which makes micro-batches of unequal numbers of rows to avoid "
            "padding; packs have none"
        )
    if args.dataloader_persistent_workers and not args.dataloader_num_workers:
        raise ValueError(
            "dataloader_persistent_workers: expected dataloader_num_workers above 0 beside it, "
            "got 0"
        )


def _check_metrics(args: PackedConfig) -> None:
    if args.label_smoothing_factor:
        own = "; the label_smoothing of preference losses is an option of its own"
        raise ValueError(
            "label_smoothing_factor: expected 0, it is for the labels of classifiers, got "
            f"{args.label_smoothing_factor}{own if hasattr(args, 'label_smoothing') else ''}"
        )
    if args.include_for_metrics:
        raise ValueError(
            "include_for_metrics: expected nothing, since no predictions are handed to a "
            f"compute_metrics function, got {shown(args.include_for_metrics)}"
        )
    for name in ("fp16_full_eval", "bf16_full_eval"):
        if getattr(args, name):
            raise ValueError(
                f"{name}: expected False, since during training it is without effect, and before "
                f"it the policy alone would be rounded, not its reference, got True; "
                f"{name.removesuffix('_full_eval')} is for training and evaluation"
            )


def _liger_config(given: Any) -> dict[str, Any]:
    """Liger's kernels for the backbone; its loss would take the place of the model's forward."""
    config = dict(given) if isinstance(given, dict) else {}
    for name in _LIGER_OFF:
        if config.get(name):
            raise ValueError(
                f"liger_kernel_config: expected {name} off, since the loss is not the model's own, "
                "got true"
            )
    return {**config, **dict.fromkeys(_LIGER_OFF, False)}


def _check_trackers(names: Any) -> None:
    from transformers.integrations import integration_utils

    known = integration_utils.INTEGRATION_TO_CALLBACK
    for name in names:
        if name not in known:
            raise ValueError(
                f"report_to: expected none, all, or some of {', '.join(sorted(known))}, got "
                f"{shown(name)}"
            )
        module, package = _TRACKERS.get(name, (name, name))
        installed = getattr(integration_utils, f"is_{module}_available", None)
        # Those without such a function say themselves what they need.
        if installed is not None and not installed():
            raise ImportError(
                f"report_to: expected the package of {name}, which is not installed: "
                f"pip install {package}"
            )


def _check_schedule(args: PackedConfig) -> None:
    """Build the schedule once for nothing: it would be built after the models are loaded."""
    from transformers import get_scheduler

    kwargs: Any = args.lr_scheduler_kwargs
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
    steps = args.max_steps if args.max_steps > 0 else _MANY_STEPS
    try:
        get_scheduler(
            args.lr_scheduler_type, optimizer, num_warmup_steps=args.get_warmup_steps(steps),
            num_training_steps=steps, scheduler_specific_kwargs=kwargs,
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"lr_scheduler_kwargs: expected what {_word(args.lr_scheduler_type)} needs, got "
            f"{shown(kwargs)}: {error}"
        ) from error


def _word(value: Any) -> str:
    return str(getattr(value, "value", value))
