"""The running mean of rewards that BCO classifies around; it goes into checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState


class RewardShift(TrainerCallback, ExportableState):
    """BCO's ``delta`` (arXiv 2404.04656): the mean of the two labels' mean rewards so far.

    Rewards are added on every process by itself and brought together by :meth:`settle`. A delta is
    that of all batches before the current one, whose loss then depends on no other completion. The
    first is 0, as are the rewards of a policy that has not moved.
    """

    def __init__(self) -> None:
        # Sums of rewards and their numbers: desirable, undesirable.
        self._totals = torch.zeros(4, dtype=torch.float64)
        self._new: Tensor | None = None

    def add(self, rewards: Tensor, labels: Tensor) -> None:
        """Add the rewards ``[S]`` of some completions of a batch."""
        sides = [torch.where(side, rewards, 0).sum() for side in (labels, ~labels)]
        sums = torch.stack([*sides, labels.sum(), (~labels).sum()]).double().detach()
        self._new = sums if self._new is None else self._new + sums

    def settle(self, accelerator: Accelerator) -> None:
        """Bring together what all processes have added; every one has to call it."""
        if self._new is not None:
            added = accelerator.reduce(self._new, reduction="sum")
            self._totals, self._new = self._totals.to(added.device) + added, None

    @property
    def delta(self) -> Tensor:
        """A scalar in units of the reward, fp32; of one label alone, the mean of that."""
        sums, counts = self._totals.view(2, 2)
        known = (counts > 0).sum().clamp(min=1)
        return ((sums / counts.clamp(min=1)).sum() / known).float()

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"args": {}, "attributes": {"totals": self._totals.tolist()}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A run that goes on has the rewards of its checkpoint."""
        states: Any = state.stateful_callbacks
        stored = states.get(type(self).__name__) if state.global_step else None
        totals = [0.0] * 4 if stored is None else stored["attributes"]["totals"]
        self._totals, self._new = torch.tensor(totals, dtype=torch.float64), None
