"""The loops of a trainer whose batches are packs: forward and backward, evaluation, metrics."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastdaa.train.base import PairTrainer
from fastdaa.train.metrics import MetricStore


class PackLoop(PairTrainer):
    """One forward and backward a pack, metrics of packs in the logged rows.

    A subclass computes the loss of a batch; of ``inputs["packs"]`` only the first
    ``inputs["counted"]`` count, where that is there.
    """

    unit: ClassVar[str] = "pairs"
    """What a row of the dataset is, in the plural, for the names of rates."""
    store_type: ClassVar[type[MetricStore]] = MetricStore
    """Of an evaluation."""

    def __init__(self, model: nn.Module, **options: Any):
        self._stores = {"train": MetricStore(), "eval": self.store_type()}
        super().__init__(model=model, **options)

    def batch_facts(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What packs have to know of their whole batch, added to the inputs of each."""
        return {}

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward, pack by pack, so that one pack's activations live at a time."""
        store = self._stores["train"]
        store.begin_batch()
        packs, left = self._evened(inputs["packs"]), len(inputs["packs"])
        # DeepSpeed steps by itself after as many backwards as there are micro-batches.
        groups = [packs] if self.is_deepspeed_enabled else [[pack] for pack in packs]
        facts, losses = self.batch_facts(inputs), []
        for index, group in enumerate(groups):
            part = {**inputs, **facts, "packs": group, "counted": left}
            left -= len(group)
            # DDP ranks may have different numbers of packs; they meet in the last backward. FSDP
            # meets in each: the gradients of whole weights would not fit.
            meets = index + 1 == len(groups) or self.is_fsdp_enabled
            with contextlib.nullcontext() if meets else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, part, num_items_in_batch))
        store.end_batch(inputs)
        return torch.stack(losses).sum()

    def _evened(self, packs: list[Any]) -> list[Any]:
        """As many packs on every rank, where a forward is a collective; the last is repeated."""
        if not self.is_fsdp_enabled or self.args.tokens_per_pack is None:
            return packs
        mine = torch.tensor(len(packs), device=self.args.device)
        most = int(self.accelerator.gather(mine).max())
        return packs + packs[-1:] * (most - len(packs))

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Loss and metrics of an evaluation batch."""
        inputs = self._prepare_inputs(inputs)
        self._stores["eval"].begin_batch()
        with torch.no_grad(), self.compute_loss_context_manager():
            loss: Any = self.compute_loss(model, inputs)
        self._stores["eval"].end_batch(inputs)
        return loss.detach(), None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        *args: Any,
        metric_key_prefix: str = "eval",
        **kwargs: Any,
    ) -> Any:
        """The Trainer's loop, with this library's metrics beside the loss."""
        began = time.perf_counter()
        store = self._stores["eval"] = self.store_type()
        kwargs["metric_key_prefix"] = metric_key_prefix
        output: Any = super().evaluation_loop(dataloader, description, *args, **kwargs)
        values = self._named(store.read(self.accelerator))
        output.metrics.update({f"{metric_key_prefix}_{k}": v for k, v in values.items()})
        self._stores["train"].throughput.leave_out(time.perf_counter() - began)
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of the interval to a row with a training loss."""
        if "loss" in logs:
            logs.update(self._named(self._stores["train"].read(self.accelerator)))
            self._settle_tokens()
            logs["num_tokens"] = self.state.num_input_tokens_seen
        super().log(logs, start_time)

    def _named(self, values: dict[str, float]) -> dict[str, float]:
        old, new = "throughput/pairs_per_second", f"throughput/{self.unit}_per_second"
        return {new if name == old else name: value for name, value in values.items()}
