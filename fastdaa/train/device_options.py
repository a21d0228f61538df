"""Options that need a device, a package or each other, asked before anything is loaded."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastdaa.planner import check_engine
from fastdaa.train.segment_backends import missing_for

if TYPE_CHECKING:
    from fastdaa.train.options import PackOptions
    from fastdaa.train.packed_config import PackedConfig


def check_needs(args: PackedConfig) -> None:
    """Look at what the Trainer would only say in its own words, or after models are loaded.

    Raises:
        ValueError: bf16 on a CPU that was not asked for, or strategies that do not fit together.
        FileNotFoundError: there is no such DeepSpeed configuration.
        ImportError: DeepSpeed is not installed.
    """
    accelerated = torch.accelerator.is_available() or torch.cuda.is_available()
    if args.bf16 and not args.use_cpu and not accelerated:
        raise ValueError(
            "bf16: expected a GPU, or --use_cpu beside it to train on the CPU, got neither"
        )
    _check_deepspeed(args.deepspeed)
    _check_strategies(args)


def check_ways(args: PackOptions, device: torch.device) -> None:
    """Compare ``attention`` and ``head_engine`` with the device that computes.

    Raises:
        ValueError, ImportError: they cannot work there.
    """
    if args.attention != "auto":
        missing = missing_for(args.attention, device.type)
        if missing is not None:
            raise ValueError(
                f"attention: expected 'auto' or a kernel that works here, got {args.attention!r}, "
                f"which {missing}"
            )
    engine = getattr(args, "head_engine", "auto")
    if engine != "auto":
        try:
            check_engine(engine, device)
        except (ValueError, ImportError) as error:
            raise type(error)(f"head_engine: {error}") from error


def _check_deepspeed(given: object) -> None:
    if not given:
        return
    if isinstance(given, str) and not given.lstrip().startswith("{") and not Path(given).is_file():
        raise FileNotFoundError(f"deepspeed: expected a JSON file, there is no file {given}")
    if find_spec("deepspeed") is None:
        raise ImportError(
            "deepspeed: expected the package deepspeed, which is not installed: pip install "
            "deepspeed"
        )


def _check_strategies(args: PackedConfig) -> None:
    """The Trainer's rule for ``load_best_model_at_end``, with the options to give."""
    save, evaluate = (
        str(getattr(value, "value", value)) for value in (args.save_strategy, args.eval_strategy)
    )
    if not args.load_best_model_at_end or save in (evaluate, "best"):
        return
    raise ValueError(
        "load_best_model_at_end: expected checkpoints where there are evaluations, got "
        f"eval_strategy {evaluate!r} (without the option: 'epoch' where there is data to evaluate "
        f"on) and save_strategy {save!r}; give --eval_strategy and --save_strategy the same value, "
        "epoch or steps"
    )
