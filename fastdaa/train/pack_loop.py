"""The loops of a trainer whose batches are packs: forward and backward, evaluation, metrics."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from fastdaa.train.adapters import adapter_dropout, check_adapters, is_adapted
from fastdaa.train.backbone import causal_lm
from fastdaa.train.balance import balance_of, left_unbalanced, set_balance
from fastdaa.train.base import PairTrainer
from fastdaa.train.best_metric import check_best_metric, running_metrics
from fastdaa.train.callbacks import default_callbacks, use_progress
from fastdaa.train.compilation import compile_backbone, take_over_compilation
from fastdaa.train.evaluation_batches import BatchesInStep
from fastdaa.train.finite import check_row
from fastdaa.train.metrics import MetricStore, Sums
from fastdaa.train.missed_evaluation import make_up_evaluation
from fastdaa.train.offload import check_offload
from fastdaa.train.pooled_metrics import PooledStore
from fastdaa.train.positions import check_length, longest, positions_of
from fastdaa.train.prepare import choose_layout, disable_dropout, prepare_model
from fastdaa.train.savable import check_can_be_saved
from fastdaa.train.sharding import (
    check_parallelism,
    keep_results_wide,
    meets_in_packs,
    more_to_come,
    pieces_fact,
    settle_ddp,
)
from fastdaa.train.zero3 import load_whole, rows_of

logger = logging.getLogger(__name__)
_PREDICTIONS = "since no logits are made that it could be given"
_UNUSED = {
    "compute_metrics": _PREDICTIONS,
    "preprocess_logits_for_metrics": _PREDICTIONS,
    "compute_loss_func": "since the loss is the trainer's own",
    "data_collator": "since batches of packs are collated by the trainer's own",
    "model_init": "give the model itself",
}
"""What the Trainer takes and nothing here would ask, and why."""


_ELSEWHERE = {
    "tokenizer": "give it as processing_class",
    **dict.fromkeys(
        ("model_init_kwargs", "ref_model_init_kwargs", "quantization_config"),
        "load the model with it, and give the model itself",
    ),
}
"""What other trainers take, or took, and where it belongs."""


def check_options(options: Mapping[str, Any], args: Any) -> None:
    """Raise ``TypeError`` for an option that would not be read, or that there is none of.

    Args:
        options: for ``transformers.Trainer``.
        args: the settings.
    """
    known = inspect.signature(Trainer.__init__).parameters
    for name, value in options.items():
        if name in _UNUSED and value is not None:
            raise TypeError(f"{name}: expected None, {_UNUSED[name]}")
        if name in known:
            continue
        if name in _ELSEWHERE:
            hint = f"; {_ELSEWHERE[name]}"
        elif name in {entry.name for entry in fields(args)}:
            hint = f"; give it to {type(args).__name__}, as args"
        else:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TypeError(f"expected options of transformers.Trainer, got {name!r}{hint}")


class PackLoop(PairTrainer):
    """One forward and backward a pack, metrics of packs in the logged rows.

    A subclass computes the loss of a batch; of ``inputs["packs"]`` only the first
    ``inputs["counted"]`` count, where that is there. Before the first batch it calls
    :meth:`check_policy` and :meth:`settle_layout`.
    """

    store_type: ClassVar[type[PooledStore]] = PooledStore
    """Of an evaluation."""
    draws_curves: ClassVar[bool] = True
    """Whether ``curves.png`` is drawn."""
    layout: Any
    layout_reason: str

    def __init__(
        self, model: nn.Module, callbacks: list[TrainerCallback] | None = None, **options: Any
    ):
        check_offload(model, "model", trained=True)
        self._stores: dict[str, MetricStore] = {"train": MetricStore(), "eval": self.store_type()}
        if "args" in options:
            settle_ddp(options["args"], model)
        own = default_callbacks(curves=self.draws_curves)
        super().__init__(model=model, callbacks=[*own, *(callbacks or [])], **options)
        load_whole(self.args)
        check_parallelism(self)
        keep_results_wide(self.accelerator)
        self.frozen_facts |= pieces_fact(self)
        self.compilation = take_over_compilation(self.args, self.accelerator)
        use_progress(self)

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        embedding: Any = causal_lm(self.model).get_input_embeddings()
        return rows_of(embedding.weight)

    def check_policy(self) -> None:
        """Raise ``ValueError`` for adapters that do not fit, or a model with nothing to train."""
        if is_adapted(self.model):
            check_adapters(self.model)
        if not any(p.requires_grad for p in self.model.parameters()):
            raise ValueError(
                "model: expected parameters to train, got none with requires_grad; load a trained "
                "adapter with is_trainable=True"
            )

    def settle_layout(self, *references: nn.Module) -> None:
        """Choose the layout that the policy and ``references`` can take; prepare the policy.

        Raises:
            ValueError: a layout that one of them cannot take, a weight of balance for a model
                without experts, or ``metric_for_best_model`` is none of the metrics that there
                will be.
        """
        self._settle_balance()
        check_best_metric(self.args, self.metric_names(), self.eval_dataset)
        self._positions = [positions_of(model) for model in (self.model, *references)]
        wanted, layouts = self.args.layout, self.args.layouts
        choice = list(choose_layout([self.model, *references], wanted, layouts))
        # Ranks that wait for the weights of rank 0 could not look as closely.
        self.layout, self.layout_reason = broadcast_object_list(choice)
        if self.layout == "padded" and wanted == "auto" and self.args.should_log:
            logger.warning("layout: padded, because of %s", self.layout_reason)
        prepare_model(self.model, self.layout)
        compile_backbone(self.model, self.compilation)
        if self.args.disable_dropout:
            asked = adapter_dropout(self.model)
            if asked and self.args.should_log:
                logger.warning(
                    "lora_dropout: %g is without effect under disable_dropout; with "
                    "--disable_dropout false all dropout is on",
                    asked,
                )
            disable_dropout(self.model)

    def _settle_balance(self) -> None:
        core = causal_lm(self.model)
        set_balance(core, self.args.router_aux_loss_coef)
        unused = left_unbalanced(core)
        if unused is not None and self.args.should_log:
            logger.info(
                "router_aux_loss_coef: none, since output_router_logits is off in the "
                "configuration of %s; %g, which it has, would balance the experts",
                type(core).__name__, unused,
            )  # fmt: skip

    def check_lengths(self, dataset: Any, name: str, *sequences: Sequence[str]) -> None:
        """Raise ``ValueError`` where the models have no positions for the longest sequence.

        Args:
            dataset: tokenised.
            name: of it.
            sequences: the columns whose tokens make one sequence, of every kind of sequence.
        """
        what = f"max_length: expected at most {{limit}}, got {self.args.max_length}"
        cached = self.has_cached_reference
        check_length(self._positions, longest(dataset, sequences), name, what, cached=cached)

    @property
    def has_cached_reference(self) -> bool:
        """Whether log-probs of a reference are kept from other forward passes."""
        return False

    def metric_names(self) -> list[str]:
        """What an evaluation has, without ``eval_``."""
        return ["loss", *self.own_metric_names(), *running_metrics(self.unit)]

    def own_metric_names(self) -> list[str]:
        """Those of them that are about what is learnt; a subclass adds its own."""
        return [] if balance_of(causal_lm(self.model)) is None else ["aux_loss"]

    def with_backend(self, pack: Mapping[str, Any]) -> Mapping[str, Any]:
        """The pack, with the attention backend that the settings name."""
        if "segments" not in pack or self.args.attention == "auto":
            return pack
        return {**pack, "segments": {**pack["segments"], "backend": self.args.attention}}

    def items_of(self, pack: Mapping[str, Any]) -> int:
        """How many items a pack has, by which a mean loss is taken: pairs; known on the host."""
        return len(pack["counts"]) // 2

    def batch_facts(self, inputs: Mapping[str, Any], *, training: bool) -> dict[str, Any]:
        """What packs have to know of their whole batch, added to the inputs of each.

        In training, all processes call it for every batch.
        """
        return {}

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward, pack by pack, so that one pack's activations live at a time.

        Raises:
            ValueError: before the first step, what belongs to the weights cannot be saved.
            MemoryError: the memory is full, and ``auto_find_batch_size`` would start again from
                weights that have been trained.
        """
        if self._first_step is None:
            check_can_be_saved(self.model)
            self._first_step = self.state.global_step
            make_up_evaluation(self)
        try:
            return self._train_on(model, inputs, num_items_in_batch)
        except torch.OutOfMemoryError as error:
            if self.args.auto_find_batch_size:
                self._check_restart(error)
            raise

    def _check_restart(self, error: torch.OutOfMemoryError) -> None:
        """The Trainer starts over with smaller batches, and leaves weights and sums as they are."""
        step = self.state.global_step
        if step != self._first_step:
            raise MemoryError(
                f"auto_find_batch_size: expected the memory to do for all batches once it did for "
                f"the first, it is full after step {step}; start again with tokens_per_pack or a "
                "smaller per_device_train_batch_size"
            ) from error
        self._stores["train"], self._new_tokens = MetricStore(), 0

    def _train_on(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any
    ) -> Tensor:
        store = self._stores["train"]
        store.begin_batch()
        packs, left = self._evened(inputs["packs"]), len(inputs["packs"])
        facts, losses = self.batch_facts(inputs, training=True), []
        for index, pack in enumerate(packs):
            part = {**inputs, **facts, "packs": [pack], "counted": left - index}
            last = index + 1 == len(packs)
            with contextlib.nullcontext() if last else more_to_come(self, model):
                losses.append(super().training_step(model, part, num_items_in_batch))
        store.end_batch(inputs)
        return torch.stack(losses).sum()

    def _evened(self, packs: list[Any]) -> list[Any]:
        """As many packs on every rank, where ranks meet in each; the last is repeated."""
        if not meets_in_packs(self) or self.args.tokens_per_pack is None:
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
    ) -> tuple[None, None, None]:
        """Metrics of an evaluation batch, the loss among them.

        The Trainer gets no loss: it would weigh batches alike, whatever they hold.
        """
        inputs = self._prepare_inputs(inputs)
        store = self._stores["eval"]
        store.begin_batch()
        packs, facts = inputs["packs"], self.batch_facts(inputs, training=False)
        counted = inputs.get("counted", len(packs))
        whole = {**inputs, **facts, "packs": self._evened(packs), "counted": counted}
        with torch.no_grad(), self.compute_loss_context_manager():
            loss: Any = self.compute_loss(model, whole)
        if counted:
            items = float(sum(map(self.items_of, packs)))
            store.add(Sums(("loss",), loss.detach().double().view(1) * items, (items,)))
            store.end_batch(inputs)
        return None, None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        *args: Any,
        metric_key_prefix: str = "eval",
        **kwargs: Any,
    ) -> Any:
        """The Trainer's loop, for this library's metrics of every row once."""
        began = time.perf_counter()
        store = self._stores["eval"] = self.store_type()
        kwargs["metric_key_prefix"] = metric_key_prefix
        batches: Any = dataloader
        if meets_in_packs(self):
            batches = BatchesInStep(dataloader, self.accelerator)
        output: Any = super().evaluation_loop(batches, description, *args, **kwargs)
        values = self._named(store.read(self.accelerator))
        values = {"loss": values.pop("loss"), **values}
        output.metrics.update({f"{metric_key_prefix}_{k}": v for k, v in values.items()})
        self.leave_out(time.perf_counter() - began)
        return output

    def leave_out(self, seconds: float) -> None:
        """Something else than training took so long: the logged rates leave it out."""
        self._stores["train"].throughput.leave_out(seconds)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of the interval to a row with a training loss.

        Raises:
            FloatingPointError: the loss or the gradient norm is not finite; the row is written.
        """
        if "train_runtime" in logs and self._first_step is None:
            return  # of no step: the summary of the run that is finished already stays
        trained = "loss" in logs
        if trained:
            logs.update(self._named(self._stores["train"].read(self.accelerator)))
            self._settle_tokens()
            logs["num_tokens"] = self.state.num_input_tokens_seen
        super().log(logs, start_time)
        if trained:
            check_row(self, logs)

    def _named(self, values: dict[str, float]) -> dict[str, float]:
        old, new = "throughput/pairs_per_second", f"throughput/{self.unit}_per_second"
        return {new if name == old else name: value for name, value in values.items()}
