"""Preference training on ``transformers.Trainer``: packed pairs, exact log-probs, no logits.

Everything that is not about pairs (devices, sharding, accumulation, schedules, checkpoints,
trackers) is the Trainer's and accelerate's.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, TrainerCallback

from fastdaa.data import PairCollator, PairRows
from fastdaa.data.collate import REF_FIELDS, Layout
from fastdaa.losses import Objective
from fastdaa.outputs import BatchTotals
from fastdaa.train.adapters import check_adapters, is_adapted
from fastdaa.train.backbone import causal_lm
from fastdaa.train.base import PairTrainer
from fastdaa.train.callbacks import default_callbacks, use_progress
from fastdaa.train.config import PreferenceConfig
from fastdaa.train.metrics import MetricStore, pack_metrics
from fastdaa.train.model_card import write_model_card
from fastdaa.train.policy import PackResult, run_policy
from fastdaa.train.precompute import Precompute
from fastdaa.train.prepare import (
    check_dataset,
    check_head,
    check_tokens,
    choose_layout,
    disable_dropout,
    each,
    load_model,
    prepare_model,
    rows_of,
    tokenize_dataset,
)
from fastdaa.train.references import (
    CachedReference,
    Reference,
    check_reference,
    online_reference,
    reference_for_cache,
)
from fastdaa.train.sharding import check_one_device, check_parallelism, place_early

logger = logging.getLogger(__name__)


class PreferenceTrainer(PairTrainer):
    """Aligns a causal language model with preference pairs.

    Args:
        model: a model, or the path or hub id of one (loaded in fp32).
        ref_model: the reference, also as a path; None for the starting point of ``model``: its
            adapter off, or a frozen copy.
        args: the settings.
        train_dataset: ``datasets.Dataset`` of preference pairs, see ``docs/data.md``; token
            columns are taken as they are.
        eval_dataset: the same to evaluate on, or a dictionary of such.
        processing_class: the tokenizer.
        peft_config: wraps ``model`` in a new adapter.
        callbacks: further callbacks.
        options: anything else that ``Trainer`` takes.

    Raises:
        ValueError, TypeError: settings, datasets and models that do not fit together; all of them
            before any training.
    """

    # The loss is the mean over the pairs of a micro-batch: the Trainer divides by the number of
    # accumulation steps, whatever the model says about itself.
    loss_is_scaled_for_ga = False
    layout: Layout
    layout_reason: str

    def __init__(
        self,
        model: str | nn.Module,
        ref_model: str | nn.Module | None = None,
        args: PreferenceConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        **options: Any,
    ):
        args = PreferenceConfig(output_dir="trainer_output") if args is None else args
        self.objective: Objective = args.objective()
        check_one_device(args)
        if train_dataset is not None:
            check_dataset(train_dataset, "train_dataset")
        each(eval_dataset, check_dataset, "eval_dataset")
        policy = load_model(model)
        if peft_config is not None:
            from peft import get_peft_model

            policy = get_peft_model(policy, peft_config)
        super().__init__(
            model=policy,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[*default_callbacks(), *(callbacks or [])],
            **options,
        )
        check_parallelism(self)
        use_progress(self)
        self._stores = {"train": MetricStore(), "eval": MetricStore()}
        given = self._prepare_models(ref_model)
        pad = _pad_token(processing_class)
        self.data_collator = PairCollator(self.layout, pad, args.tokens_per_pack)
        self._prepare_data(given)

    def _prepare_models(self, ref_model: str | nn.Module | None) -> nn.Module | None:
        """Check the models and set up the policy; the reference model, if one was given."""
        self._peft = is_adapted(self.model)
        if self._peft:
            check_adapters(self.model)
        if not any(p.requires_grad for p in self.model.parameters()):
            raise ValueError(
                "model: expected parameters to train, got none with requires_grad; load a trained "
                "adapter with is_trainable=True"
            )
        check_head(self.model)
        given = None
        if ref_model is not None and ref_model is not self.model:
            given = load_model(ref_model, "ref_model")
            check_reference(given, self.model, same_vocabulary=self.args.log_exact_kl)
            place_early(given.eval().requires_grad_(False), self)
            check_head(given)
        models = [self.model] if given is None else [self.model, given]
        choice = list(choose_layout(models, self.args.layout))
        # Ranks that wait for the weights of rank 0 could not look as closely.
        self.layout, self.layout_reason = broadcast_object_list(choice)
        if self.layout == "padded" and self.args.layout == "auto" and self.args.should_log:
            logger.warning("layout: padded, because of %s", self.layout_reason)
        prepare_model(self.model, self.layout)
        if self.args.disable_dropout:
            disable_dropout(self.model)
        return given

    def _prepare_data(self, given: nn.Module | None) -> None:
        """Tokenise the datasets and set up the reference, with its log-probs if they are cached."""
        train = each(self.train_dataset, self._tokenize, "train_dataset")
        evaluation = each(self.eval_dataset, self._tokenize, "eval_dataset")
        self.reference: Reference | None = None
        if self.objective.needs_ref or given is not None:
            if self.args.precompute_ref_log_probs:
                precompute = Precompute(self, *reference_for_cache(self, given))
                train = each(train, precompute, "train_dataset")
                evaluation = each(evaluation, precompute, "eval_dataset")
                self.reference = CachedReference()
            else:
                self.reference = online_reference(self, given)
        self.train_dataset, self.eval_dataset = rows_of(train), rows_of(evaluation)

    def _tokenize(self, dataset: Any, name: str) -> Any:
        dataset = tokenize_dataset(dataset, self.processing_class, self.args, name)
        embedding: Any = causal_lm(self.model).get_input_embeddings()
        check_tokens(dataset, embedding.weight.shape[0], name)
        return dataset

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Mean loss of all packs of a batch; their metrics are noted."""
        packs, whole = inputs["packs"], "totals" not in inputs
        totals = _totals(inputs) if whole else BatchTotals(*inputs["totals"])
        counted = inputs.get("counted", len(packs))
        results = [
            self._run(model, pack, totals, counts=index < counted)
            for index, pack in enumerate(self._evened(packs) if whole else packs)
        ]
        loss = torch.stack([result.loss for result in results]).sum()
        return (loss, {"packs": [r.output for r in results]}) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward, pack by pack, so that one pack's activations live at a time."""
        store = self._stores["train"]
        store.begin_batch()
        packs, left = self._evened(inputs["packs"]), len(inputs["packs"])
        # DeepSpeed steps by itself after as many backwards as there are micro-batches.
        groups = [packs] if self.is_deepspeed_enabled else [[pack] for pack in packs]
        totals, losses = list(_totals(inputs)), []
        for index, group in enumerate(groups):
            part = {**inputs, "packs": group, "totals": totals, "counted": left}
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

    def _run(
        self, model: nn.Module, pack: Mapping[str, Any], totals: BatchTotals, *, counts: bool
    ) -> PackResult:
        """One forward of the reference and the policy over a pack, and its metrics."""
        if "segments" in pack and self.args.attention != "auto":
            pack = {**pack, "segments": {**pack["segments"], "backend": self.args.attention}}
        ref = None
        if self.reference is not None:
            ref = self.reference.score(pack, keep_rows=self._wants_kl(model.training))
        result = run_policy(model, pack, self.objective, ref, totals, self.args)
        if not counts:
            return result._replace(loss=0.0 * result.loss)
        store = self._stores["train" if model.training else "eval"]
        for sums in pack_metrics(pack, result, ref, self.objective):
            store.add(sums)
        return result

    def _wants_kl(self, training: bool) -> bool:
        """Exact KL is measured on the last batch before a row is logged, and in evaluation."""
        if not self.args.log_exact_kl or self.reference is None or not self.reference.online:
            return False
        if not training:
            return True
        step, every = self.state.global_step + 1, self.state.logging_steps
        if self.args.logging_strategy == "no" or not every:
            return False
        return step % every == 0 or (step == 1 and self.args.logging_first_step)

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
            loss = self.compute_loss(model, inputs)
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
        store = self._stores["eval"] = MetricStore()
        kwargs["metric_key_prefix"] = metric_key_prefix
        output: Any = super().evaluation_loop(dataloader, description, *args, **kwargs)
        values = store.read(self.accelerator)
        output.metrics.update({f"{metric_key_prefix}_{k}": v for k, v in values.items()})
        self._stores["train"].throughput.leave_out(time.perf_counter() - began)
        return output

    def rows_of(self, dataset: Any, name: str) -> PairRows:
        """Any dataset of pairs as the loader wants it.

        Raises:
            ValueError: its reference log-probs are missing, and no model can make them any more.
        """
        check_dataset(dataset, name)
        dataset = self._tokenize(dataset, name)
        cached = isinstance(self.reference, CachedReference)
        if cached and REF_FIELDS[0] not in dataset.column_names:
            raise ValueError(
                f"{name}: expected a dataset that the trainer was made with, or one with the "
                f"columns {', '.join(REF_FIELDS)}: with precompute_ref_log_probs no reference "
                "model is kept"
            )
        return PairRows(dataset)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of the interval to a row with a training loss."""
        if "loss" in logs:
            logs.update(self._stores["train"].read(self.accelerator))
            self._settle_tokens()
            logs["num_tokens"] = self.state.num_input_tokens_seen
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write ``README.md`` into the output folder: what was trained, how, and how it did."""
        if not self.is_world_process_zero():
            return
        folder = str(self.args.output_dir)
        write_model_card(
            folder,
            objective=self.objective,
            name=Path(folder).resolve().name,
            rows=self.state.log_history,
            base_model=getattr(causal_lm(self.model).config, "_name_or_path", "") or None,
            dataset=kwargs.get("dataset"),
            layout=self.layout,
            settings=self.args.to_dict(),
            peft=self._peft,
        )


def _totals(inputs: Mapping[str, Any]) -> BatchTotals:
    """Sizes of the micro-batch, from numbers on the host."""
    counts = [count for pack in inputs["packs"] for count in pack["counts"]]
    chosen = sum(sum(pack["counts"][::2]) for pack in inputs["packs"])
    return BatchTotals(len(inputs["row_ids"]), max(chosen, 1), sum(counts))


def _pad_token(tokenizer: Any) -> int:
    """Padding for the layout ``padded``: masked, so any valid id does."""
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(tokenizer, name, None)
        if isinstance(value, int):
            return value
    return 0
