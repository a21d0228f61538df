"""What the trainers of the stages before alignment share: packs in, one loss out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from fastdaa.train.adapters import check_adapters, is_adapted
from fastdaa.train.backbone import causal_lm
from fastdaa.train.callbacks import Curves, default_callbacks, use_progress
from fastdaa.train.metrics import MetricStore, Sums
from fastdaa.train.pack_loop import PackLoop
from fastdaa.train.prepare import (
    check_dataset,
    choose_layout,
    disable_dropout,
    each,
    prepare_model,
)
from fastdaa.train.sharding import check_one_device, check_parallelism
from fastdaa.train.stage_config import StageConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

_ROWS_AT_ONCE = 4096


class PooledStore(MetricStore):
    """Metrics of an evaluation, in which every token or pair counts the same."""

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """The averages over all micro-batches as one."""
        for sums in self.rows:
            self.add(sums)
        self.rows, self.batch = [*self.batch.values()], {}
        return super().read(accelerator)


class StageTrainer(PackLoop):
    """Trains on batches of packs, each of which has a sum of losses and a number of items.

    The loss is the mean over the items (tokens or pairs) of a whole optimiser step, over all
    micro-batches and ranks, however they lie in packs.

    Args:
        model: prepared by the subclass as far as it is not about packs.
        args: the settings.
        train_dataset, eval_dataset: ``datasets.Dataset``, or for evaluation a dictionary of such.
        processing_class: the tokenizer.
        callbacks: further callbacks.
        options: anything else that ``Trainer`` takes.

    Raises:
        ValueError, TypeError: settings, datasets and models that do not fit together; all of them
            before any training.
    """

    # compute_loss divides by the items of the whole step.
    loss_is_scaled_for_ga = True
    store_type = PooledStore
    args: StageConfig  # type: ignore[assignment]
    layout: Any
    layout_reason: str

    def __init__(
        self,
        model: nn.Module,
        args: StageConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        **options: Any,
    ):
        settings: Any = args
        check_one_device(settings)
        if train_dataset is not None:
            check_dataset(train_dataset, "train_dataset")
        each(eval_dataset, check_dataset, "eval_dataset")
        own = [callback for callback in default_callbacks() if not isinstance(callback, Curves)]
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[*own, *(callbacks or [])],
            **options,
        )
        # Releases of transformers without loss_is_scaled_for_ga ask this.
        self.model_accepts_loss_kwargs = True
        check_parallelism(self)
        use_progress(self)
        self._prepare_policy()
        self.data_collator = self.make_collator(_pad_token(processing_class))
        self.train_dataset = each(self.train_dataset, self.rows_of, "train_dataset")
        self.eval_dataset = each(self.eval_dataset, self.rows_of, "eval_dataset")

    def make_collator(self, pad_token_id: int) -> Any:
        """From rows to a batch of packs, in ``self.layout``."""
        raise NotImplementedError

    def items_of(self, pack: Mapping[str, Any]) -> int:
        """How many losses a pack has, from numbers on the host."""
        raise NotImplementedError

    def run_pack(self, model: nn.Module, pack: Mapping[str, Any], store: MetricStore) -> Tensor:
        """The sum of a pack's losses, with gradient; its metrics go to ``store``."""
        raise NotImplementedError

    def _prepare_policy(self) -> None:
        if is_adapted(self.model):
            check_adapters(self.model)
        if not any(p.requires_grad for p in self.model.parameters()):
            raise ValueError("model: expected parameters to train, got none with requires_grad")
        wanted = self.args.layout
        found, self.layout_reason = choose_layout([self.model], wanted)
        best = type(self.args).layouts[0]
        self.layout = best if wanted == "auto" and found != "padded" else found
        prepare_model(self.model, self.layout)
        if self.args.disable_dropout:
            disable_dropout(self.model)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Items of all micro-batches of an optimiser step, on all ranks."""
        items = sum(self.items_of(pack) for batch in batch_samples for pack in batch["packs"])
        if self.accelerator.num_processes == 1:
            return max(items, 1)
        everywhere = self.accelerator.gather(torch.tensor(items, device=device))
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
        divisor = num_items_in_batch
        if divisor is None:
            divisor = max(sum(map(self.items_of, packs)), 1)
        elif self.accelerator.num_processes > 1:
            # DDP takes the mean over the ranks.
            divisor = divisor / self.accelerator.num_processes
        store = self._stores["train" if model.training else "eval"]
        counted = inputs.get("counted", len(packs))
        losses = []
        for index, pack in enumerate(packs):
            if "segments" in pack and self.args.attention != "auto":
                pack = {**pack, "segments": {**pack["segments"], "backend": self.args.attention}}
            repeated = index >= counted
            total = self.run_pack(model, pack, MetricStore() if repeated else store)
            if not model.training:
                store.add(Sums(("loss",), total.detach().view(1), (float(self.items_of(pack)),)))
            losses.append(0.0 * total if repeated else total)
        loss = torch.stack(losses).sum() / divisor
        return (loss, {}) if return_outputs else loss

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        embedding: Any = causal_lm(self.model).get_input_embeddings()
        return int(embedding.weight.shape[0])


def check_ids(dataset: Any, fields: Sequence[str], vocabulary: int, name: str) -> None:
    """Raise ``ValueError`` for token ids that a model of that vocabulary does not have."""
    import pyarrow.compute

    columns = dataset.with_format("arrow", columns=list(fields))
    for table in columns.iter(_ROWS_AT_ONCE):
        for field in fields:
            ends = pyarrow.compute.min_max(pyarrow.compute.list_flatten(table[field])).as_py()
            for token in ends.values():
                if token is not None and not 0 <= token < vocabulary:
                    raise ValueError(
                        f"{name}: expected token ids below {vocabulary}, the vocabulary of the "
                        f"model, got {token} in {field}; the tokenizer belongs to another model"
                    )


def _pad_token(tokenizer: Any) -> int:
    """Padding for the layout ``padded``: masked, so any valid id does."""
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(tokenizer, name, None)
        if isinstance(value, int):
            return value
    return 0
