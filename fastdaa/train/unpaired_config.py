"""Settings of training on unpaired preferences."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from fastdaa.losses.unpaired import UNPAIRED_LOSSES, UnpairedObjective
from fastdaa.train.config import PreferenceConfig


@dataclass
class UnpairedConfig(PreferenceConfig):
    """Settings of :class:`fastdaa.train.UnpairedTrainer`: those of ``PreferenceConfig``.

    Batch sizes count completions. ``loss_type`` is one of
    :data:`~fastdaa.losses.unpaired.UNPAIRED_LOSSES`, ``"kto"`` by default. ``layout`` is
    ``"packed"`` or ``"padded"``, since rows share no prompt.

    Raises:
        ValueError: a value that cannot be used.
        TypeError: ``loss_kwargs`` is not a mapping.
    """

    layouts: ClassVar[tuple[str, ...]] = ("packed", "padded")
    objective_type: ClassVar[Any] = UnpairedObjective

    loss_type: list[str] = field(
        default_factory=lambda: ["kto"],
        metadata={
            "help": f"The loss: {', '.join(UNPAIRED_LOSSES)} (docs/objectives.md).",
            "aliases": ["--loss"],
        },
    )

    def identity(self) -> dict[str, Any]:
        """The base class's settings, and where mismatched completions are from if not a batch."""
        fixed = self.precompute_ref_log_probs and self.objective().loss.baseline == "kl"
        return {
            **super().identity(),
            **({"mismatched completions": "of the dataset"} if fixed else {}),
        }

    def _check_objective(self) -> None:
        objective = self.objective()
        if self.layout == "prefix_shared":
            raise ValueError(
                "layout: expected auto, packed or padded with unpaired data, whose rows share no "
                "prompt, got 'prefix_shared'"
            )
        if objective.loss.baseline != "kl" or self.precompute_ref_log_probs:
            return
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
            if getattr(self, name) < 2:
                raise ValueError(
                    f"{name}: expected at least 2 for {objective.loss.name}, whose KL baseline is "
                    "estimated on a batch's prompts with each other's completions, got "
                    f"{getattr(self, name)}"
                )
