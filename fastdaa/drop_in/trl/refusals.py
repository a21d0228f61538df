"""What the head of fastdaa does not serve in a trainer of TRL: one clear error each."""

from __future__ import annotations

from typing import Any

from transformers import ProcessorMixin


def check_arguments(trainer_name: str, given: dict[str, Any]) -> None:
    """Refuse what can be refused before anything is loaded.

    Args:
        trainer_name: of TRL's class.
        given: the arguments of its ``__init__``.

    Raises:
        ValueError: a vision model's processor, ``use_liger_kernel`` or ``torch_compile``.
    """
    processor = given.get("processing_class")
    if isinstance(processor, ProcessorMixin):
        got = type(processor).__name__
        raise refused(trainer_name, "processing_class", "a tokenizer", got)
    for name in ("use_liger_kernel", "torch_compile"):
        if getattr(given.get("args"), name, False):
            raise refused(trainer_name, name, "False", "True")


def check_trainer(trainer_name: str, trainer: Any) -> None:
    """Refuse what is known once TRL has set up model and accelerator.

    Raises:
        ValueError: a vision model, FSDP1, or tensor, context or sequence parallelism.
    """
    if trainer._is_vlm:
        raise refused(trainer_name, "processing_class", "a tokenizer", "that of a vision model")
    state = trainer.accelerator.state
    if trainer.is_fsdp_enabled and state.fsdp_plugin.fsdp_version != 2:
        raise refused(trainer_name, "fsdp", "FSDP2 (fsdp_version: 2)", "FSDP1")
    parallelism = trainer.accelerator.parallelism_config
    for name in ("tp_size", "cp_size", "sp_size"):
        if getattr(parallelism, name, 1) > 1:
            raise refused(trainer_name, name, "1", str(getattr(parallelism, name)))


def refused(trainer_name: str, name: str, expected: str, got: str) -> ValueError:
    """The error for a setting that TRL's own trainer serves."""
    return ValueError(
        f"{name}: expected {expected} with fastdaa.drop_in.trl.{trainer_name}, got {got}; "
        f"trl.{trainer_name} serves it"
    )
