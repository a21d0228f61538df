"""Preference training on ``transformers.Trainer``: packed pairs, exact log-probs, no logits.

Everything that is not about pairs (devices, sharding, accumulation, schedules, checkpoints,
trackers) is the Trainer's and accelerate's.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from fastdaa.counted import counted
from fastdaa.data import PairCollator, PairRows
from fastdaa.data.fields import PAIR_SEQUENCES, REF_FIELDS, REF_TOKEN_FIELDS
from fastdaa.losses import Objective
from fastdaa.outputs import BatchTotals
from fastdaa.train.adapters import (
    adapter_words,
    check_frozen_base,
    is_adapted,
    keep_starting_adapter,
)
from fastdaa.train.backbone import causal_lm
from fastdaa.train.best_metric import (
    KL_METRICS,
    LOGIT_METRICS,
    PAIR_METRICS,
    REF_METRICS,
    TOKEN_METRICS,
    WEIGHT_METRICS,
)
from fastdaa.train.best_model import best_model, rows_of_saved
from fastdaa.train.config import PreferenceConfig
from fastdaa.train.metrics import pack_metrics
from fastdaa.train.model_card import write_model_card
from fastdaa.train.offload import check_offload
from fastdaa.train.pack_loop import PackLoop, check_options
from fastdaa.train.policy import PackResult, run_policy
from fastdaa.train.precompute import Precompute
from fastdaa.train.prepare import (
    check_config,
    check_dataset,
    check_datasets,
    check_head,
    check_tokens,
    each,
    load_model,
    load_policy,
    padding_token,
    tokenize_dataset,
)
from fastdaa.train.references import (
    CachedReference,
    Reference,
    check_reference,
    online_reference,
)
from fastdaa.train.run_record import weights_fact
from fastdaa.train.sharding import check_one_device, place_early
from fastdaa.train.tokenizers import tokenizer_for

logger = logging.getLogger(__name__)


class PreferenceTrainer(PackLoop):
    """Aligns a causal language model with preference pairs.

    Args:
        model: a model, or the path or hub id of one (loaded in fp32).
        ref_model: the reference, also as a path; None for the starting point of ``model``: its
            adapter off, or a frozen copy.
        args: the settings.
        train_dataset: ``datasets.Dataset`` of preference pairs, see ``docs/data.md``; token
            columns are taken as they are.
        eval_dataset: the same to evaluate on, or a dictionary of such.
        processing_class: the tokenizer; None for that of a ``model`` given by name.
        peft_config: wraps ``model`` in a new adapter.
        callbacks: further callbacks.
        options: ``optimizers`` and what else ``Trainer`` takes, but nothing that makes or reads
            logits.

    Raises:
        ValueError, TypeError: settings, datasets and models that do not fit together; all of them
            before any training.
    """

    # The loss is the mean over the pairs of a micro-batch: the Trainer divides by the number of
    # accumulation steps, whatever the model says about itself.
    loss_is_scaled_for_ga = False
    config_type: ClassVar[type[PreferenceConfig]] = PreferenceConfig
    rows_type: ClassVar[Any] = PairRows
    """What reads the rows of a tokenised dataset."""
    precompute_type: ClassVar[type[Precompute]] = Precompute
    ref_fields: tuple[str, ...] = REF_FIELDS
    """Columns of precomputed reference log-probs."""
    args: PreferenceConfig
    data_kind: ClassVar[str] = "preference pairs"
    """What the model card calls any training data."""
    card_dataset: str | Sequence[str] | None = None
    """What the model card calls the training data, also the one that ``push_to_hub`` writes."""

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
        args = self.config_type(output_dir="trainer_output") if args is None else args
        check_config(args, self.config_type)
        check_options(options, args)
        self.objective: Objective = args.objective()
        check_one_device(args)
        check_datasets(train_dataset, eval_dataset)
        processing_class = tokenizer_for(processing_class, model, train_dataset, eval_dataset)
        super().__init__(
            load_policy(model, peft_config),
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            **options,
        )
        given = self._prepare_models(ref_model)
        self.data_collator = self.make_collator(padding_token(processing_class))
        self._prepare_data(given)

    def __repr__(self) -> str:
        rows = self.train_dataset
        sizes = [counted(len(rows), self.unit.removesuffix("s"))] if isinstance(rows, Sized) else []
        return (
            f"{type(self).__name__}({type(causal_lm(self.model)).__name__}, {self.objective}, "
            f"{', '.join([*sizes, f'{self.layout} layout', f'step {self.state.global_step}'])})"
        )

    def make_collator(self, pad_token_id: int) -> Any:
        """From rows to a batch of packs, in ``self.layout``."""
        return PairCollator(self.layout, pad_token_id, self.args.tokens_per_pack)

    def _prepare_models(self, ref_model: str | nn.Module | None) -> nn.Module | None:
        """Check the models and set up the policy; the reference model, if one was given."""
        self.check_policy()
        check_head(self.model)
        starting_point = ref_model is None or ref_model is self.model
        self._has_ref = self.objective.needs_ref or not starting_point
        self._reference_name = "" if self._has_ref else None
        if starting_point:
            if self.objective.needs_ref:
                if is_adapted(self.model):
                    check_frozen_base(self.model)
                else:
                    self.frozen_facts["reference"] = weights_fact(self.model)
            self.settle_layout()
            return None
        assert ref_model is not None
        given = load_model(ref_model, "ref_model")
        check_offload(given, "ref_model", trained=False)
        self._reference_name = causal_lm(given).name_or_path or type(given).__name__
        self.frozen_facts["reference"] = weights_fact(given)
        check_reference(given, self.model, same_vocabulary=self.args.log_exact_kl)
        place_early(given.eval().requires_grad_(False), self)
        check_head(given)
        self.settle_layout(given)
        return given

    def _prepare_data(self, given: nn.Module | None) -> None:
        """Tokenise the datasets and set up the reference, with its log-probs if they are cached."""
        if self._has_ref and self.args.should_log:
            for part in ("train_dataset", "eval_dataset"):
                each(getattr(self, part), self._say_unread, part)
        train = each(self.train_dataset, self._tokenize, "train_dataset")
        evaluation = each(self.eval_dataset, self._tokenize, "eval_dataset")
        self.reference: Reference | None = None
        if self.args.precompute_ref_log_probs and not self._has_ref and self.args.should_log:
            logger.warning(
                "precompute_ref_log_probs: without effect, since %s has no reference",
                self.objective,
            )
        if self._has_ref:
            if given is None and is_adapted(self.model):
                keep_starting_adapter(self.model)
            if self.args.precompute_ref_log_probs:
                precompute = self.precompute_type(self, given)
                train = each(train, precompute, "train_dataset")
                evaluation = each(evaluation, precompute, "eval_dataset")
                precompute.close()
                self.reference = CachedReference()
            else:
                self.reference = online_reference(self, given)
            if given is None and is_adapted(self.model):
                # With the frozen copy of an adapter that was trained before.
                self.frozen_facts["reference"] = weights_fact(self.model, trainable=False)
        self.train_dataset = each(train, lambda part, _: self.rows_type(part), "")
        self.eval_dataset = each(evaluation, lambda part, _: self.rows_type(part), "")

    def _say_unread(self, dataset: Any, name: str) -> None:
        """Warn of a reference's log-probs in a dataset, as TRL writes them: this run's count."""
        unread = [column for column in self.ref_fields if column in dataset.column_names]
        if unread:
            logger.warning(
                "%s: its %s are not read; the reference is a model (ref_model, or the model as it "
                "starts)", name, " and ".join(unread),
            )  # fmt: skip

    @property
    def has_cached_reference(self) -> bool:
        """Whether there is a reference and it is precomputed."""
        return self._has_ref and self.args.precompute_ref_log_probs

    def _tokenize(self, dataset: Any, name: str) -> Any:
        dataset = tokenize_dataset(dataset, self.processing_class, self.args, name)
        check_tokens(dataset, self.vocabulary, name)
        self.check_lengths(dataset, name, *PAIR_SEQUENCES)
        return dataset

    def own_metric_names(self) -> list[str]:
        """What an evaluation tells about pairs."""
        args = self.args
        exact = self._has_ref and args.log_exact_kl and not args.precompute_ref_log_probs
        return [
            *super().own_metric_names(),
            *PAIR_METRICS,
            *(REF_METRICS if self._has_ref else ()),
            *(KL_METRICS if exact else ()),
            *((*TOKEN_METRICS, *LOGIT_METRICS) if args.log_token_stats else ()),
            *(WEIGHT_METRICS if args.use_weighting else ()),
        ]

    def batch_facts(self, inputs: Mapping[str, Any], *, training: bool) -> dict[str, Any]:
        """The sizes of the micro-batch, by which its mean loss is taken."""
        return {"totals": list(_totals(inputs))}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Mean loss of all packs of a batch; their metrics are noted.

        In training it is called once a pack, for that pack's share of the batch's mean. So what a
        subclass adds to it belongs in proportion: ``pairs of the pack / inputs["totals"][0]``.
        """
        packs = inputs["packs"]
        totals = BatchTotals(*inputs["totals"]) if "totals" in inputs else _totals(inputs)
        counted = inputs.get("counted", len(packs))
        results = [
            self._run(model, pack, totals, counts=index < counted)
            for index, pack in enumerate(map(self.with_backend, packs))
        ]
        loss = torch.stack([result.loss for result in results]).sum()
        return (loss, {"packs": [r.output for r in results]}) if return_outputs else loss

    def _run(
        self, model: nn.Module, pack: Mapping[str, Any], totals: BatchTotals, *, counts: bool
    ) -> PackResult:
        """One forward of the reference and the policy over a pack, and its metrics."""
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
        first = step == 1 and self.args.logging_first_step
        return first or step % every == 0 or step == self.state.max_steps

    def rows_of(self, dataset: Any, name: str) -> Any:
        """Any dataset of pairs as the loader wants it.

        Raises:
            ValueError: its reference log-probs are missing, and no model can make them any more.
        """
        if isinstance(dataset, self.rows_type):
            return dataset
        check_dataset(dataset, name)
        dataset = self._tokenize(dataset, name)
        cached = isinstance(self.reference, CachedReference)
        columns = [*self.ref_fields, *(REF_TOKEN_FIELDS if self.objective.needs_ref_tokens else ())]
        if cached and not set(columns) <= set(dataset.column_names):
            raise ValueError(
                f"{name}: expected a dataset that the trainer was made with, or one with the "
                f"columns {', '.join(columns)}: with precompute_ref_log_probs no reference "
                "model is kept"
            )
        return self.rows_type(dataset)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        given, names = self.args.loss_type, self.args.loss_names()
        try:
            # A function of the caller's need not be one that can be pickled.
            self.args.loss_type = names
            super()._save(output_dir, state_dict)
        finally:
            self.args.loss_type = given

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write ``README.md`` into the output folder: what was trained, how, and how it did."""
        if not self.is_world_process_zero():
            return
        folder = str(self.args.output_dir)
        write_model_card(
            folder,
            objective=self.objective,
            name=Path(folder).resolve().name,
            rows=rows_of_saved(self),
            best=best_model(self),
            base_model=getattr(causal_lm(self.model).config, "_name_or_path", "") or None,
            dataset=kwargs.get("dataset", self.card_dataset),
            data_kind=self.data_kind,
            reference=self._reference_name,
            dtype=str(causal_lm(self.model).dtype).removeprefix("torch."),
            adapter=adapter_words(self.model),
            quantization=self.frozen_facts.get("quantization"),
            layout=self.layout,
            settings=self.args.to_dict(),
            peft=is_adapted(self.model),
        )


def _totals(inputs: Mapping[str, Any]) -> BatchTotals:
    """Sizes of the micro-batch, from numbers on the host."""
    counts = [count for pack in inputs["packs"] for count in pack["counts"]]
    chosen = sum(sum(pack["counts"][::2]) for pack in inputs["packs"])
    return BatchTotals(len(inputs["row_ids"]), max(chosen, 1), sum(counts))
