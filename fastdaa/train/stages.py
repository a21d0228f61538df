"""What the trainers of the stages before alignment share: packs in, one loss out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastdaa.train.metrics import MetricStore
from fastdaa.train.pack_loop import PackLoop
from fastdaa.train.packed_config import PackedConfig
from fastdaa.train.prepare import each, padding_token


class StageTrainer(PackLoop):
    """Trains on batches of packs, each of which has a sum of losses and a number of items.

    The loss is the mean over the items (tokens or pairs) of a whole optimiser step, over all
    micro-batches and ranks, however they lie in packs.

    Args:
        model: prepared by the subclass as far as it is not about packs.
        args: the settings.
        train_dataset, eval_dataset: ``datasets.Dataset``, or for evaluation a dictionary of such.
        processing_class: the tokenizer.
        options: ``callbacks``, and anything else that ``Trainer`` takes.

    Raises:
        ValueError, TypeError: settings, datasets and models that do not fit together; all of them
            before any training.
    """

    # compute_loss divides by the items of the whole step.
    loss_is_scaled_for_ga = True
    draws_curves = False

    def __init__(
        self,
        model: nn.Module,
        args: PackedConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **options: Any,
    ):
        super().__init__(
            model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **options,
        )
        # Releases of transformers without loss_is_scaled_for_ga ask this.
        self.model_accepts_loss_kwargs = True
        self.check_policy()
        self.settle_layout()
        self.data_collator = self.make_collator(padding_token(processing_class))
        self.train_dataset = each(self.train_dataset, self.rows_of, "train_dataset")
        self.eval_dataset = each(self.eval_dataset, self.rows_of, "eval_dataset")

    def make_collator(self, pad_token_id: int) -> Any:
        """From rows to a batch of packs, in ``self.layout``."""
        raise NotImplementedError

    def run_pack(self, model: nn.Module, pack: Mapping[str, Any], store: MetricStore) -> Tensor:
        """The sum of a pack's losses, with gradient; its metrics go to ``store``."""
        raise NotImplementedError

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Items of all micro-batches of an optimiser step, on all ranks."""
        items = sum(self.items_of(pack) for batch in batch_samples for pack in batch["packs"])
        if self.accelerator.num_processes == 1:
            return max(items, 1)
        # Filled on the device: a copy of a number would wait for it.
        everywhere = self.accelerator.gather(torch.full((), items, device=device))
        return everywhere.sum().clamp(min=1)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The share of the step's mean loss that the packs of ``inputs`` have."""
        packs = inputs["packs"]
        counted = inputs.get("counted", len(packs))
        divisor = num_items_in_batch
        if divisor is None:
            divisor = max(sum(map(self.items_of, packs[:counted])), 1)
        elif self.accelerator.num_processes > 1:
            # DDP takes the mean over the ranks.
            divisor = divisor / self.accelerator.num_processes
        store = self._stores["train" if model.training else "eval"]
        losses = []
        for index, pack in enumerate(map(self.with_backend, packs)):
            repeated = index >= counted
            total = self.run_pack(model, pack, MetricStore() if repeated else store)
            losses.append(0.0 * total if repeated else total)
        loss = torch.stack(losses).sum() / divisor
        return (loss, {}) if return_outputs else loss
