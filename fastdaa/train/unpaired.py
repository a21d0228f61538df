"""Training on unpaired preferences: completions that are desirable or not, each by itself."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastdaa.data.fields import (
    LABEL_FIELD,
    MISMATCHED_FIELD,
    REF_MISMATCHED_FIELD,
    REF_SEQUENCE_FIELD,
    SEQUENCE_FIELDS,
)
from fastdaa.data.packs import selection_from
from fastdaa.data.rows import UnpairedRows
from fastdaa.data.tokenise import tokenize_unpaired
from fastdaa.data.unpaired import read_label
from fastdaa.data.unpaired_collate import UnpairedCollator
from fastdaa.losses.unpaired import UnpairedObjective
from fastdaa.train.backbone import HeadTask, causal_lm, run_head_task
from fastdaa.train.balance import balance_of
from fastdaa.train.best_metric import (
    KL_METRICS,
    LOGIT_METRICS,
    TOKEN_METRICS,
    UNPAIRED_METRICS,
)
from fastdaa.train.eval_mode import in_eval_mode
from fastdaa.train.lone_examples import check_found_size, check_lone
from fastdaa.train.metrics import kl_metrics
from fastdaa.train.pack_loop import PackLoop
from fastdaa.train.policy import exact_kl
from fastdaa.train.precompute import UnpairedPrecompute
from fastdaa.train.prepare import check_tokens
from fastdaa.train.references import ReferenceScores, score_pack
from fastdaa.train.reward_shift import RewardShift
from fastdaa.train.sequence_loss import SequenceLoss, sequence_loss
from fastdaa.train.sharding import head_in_force
from fastdaa.train.trainer import PreferenceTrainer
from fastdaa.train.unpaired_config import UnpairedConfig
from fastdaa.train.unpaired_labels import check_labels
from fastdaa.train.unpaired_metrics import (
    batch_metric,
    sequence_metrics,
    token_metrics,
    with_margins,
)

logger = logging.getLogger(__name__)
_BASELINES = {"kl": "kl", "rewards": "delta"}
"""What a baseline is called in logged rows; that of KTO as in TRL."""


class UnpairedTrainer(PreferenceTrainer):
    """Aligns a causal language model with completions labelled desirable or undesirable.

    KTO's baseline ``z0`` is estimated on every micro-batch: the prompts with each other's
    completions (:class:`~fastdaa.data.unpaired_collate.UnpairedCollator`), scored by policy and
    reference without gradient (1U each) before the batch, averaged over all processes, at least 0.
    So no loss depends on other completions of its forward pass, and the head takes 3U. In an
    evaluation ``z0`` is that of a batch alone. With ``precompute_ref_log_probs`` the completion
    that a prompt gets is one of the whole dataset, the same for the run
    (:mod:`fastdaa.data.mismatched`), so that the reference's log-probs of both are cached.

    Args:
        args: the settings, an :class:`~fastdaa.train.UnpairedConfig`.
        train_dataset, eval_dataset: ``datasets.Dataset`` with ``prompt``, ``completion`` and
            ``label``, see ``docs/data.md``, or with the columns ``prompt_ids``, ``completion_ids``
            and ``label``, which are taken as they are; for evaluation also a dictionary of such.
        model, ref_model, processing_class, peft_config, callbacks, options: as of
            :class:`~fastdaa.train.PreferenceTrainer`.

    Raises:
        ValueError, TypeError: settings, datasets and models that do not fit together; all of them
            before any training.
    """

    unit = "examples"
    data_kind = "unpaired preferences (labelled completions)"
    config_type = UnpairedConfig
    rows_type: ClassVar[Any] = UnpairedRows
    precompute_type = UnpairedPrecompute
    ref_fields: tuple[str, ...] = (REF_SEQUENCE_FIELD,)
    args: UnpairedConfig
    objective: UnpairedObjective  # type: ignore[assignment]

    def __init__(self, model: str | nn.Module, *args: Any, **options: Any):
        self.shift: RewardShift | None = None
        super().__init__(model, *args, **options)
        if self.objective.loss.baseline == "kl":
            self.ref_fields = (REF_SEQUENCE_FIELD, MISMATCHED_FIELD, REF_MISMATCHED_FIELD)
        if self.objective.loss.baseline == "rewards":
            self.shift = RewardShift()
            self.add_callback(self.shift)

    def make_collator(self, pad_token_id: int) -> UnpairedCollator:
        """Batches of whole sequences, and of mismatched ones if the loss reads them."""
        args = self.args
        # A long prompt with another's long completion may be longer than any sequence of the data.
        limits = [args.max_length, *(positions.table for positions in self._positions)]
        return UnpairedCollator(
            self.layout, pad_token_id, args.tokens_per_pack,
            mismatched=self.objective.loss.baseline == "kl",
            max_length=min((limit for limit in limits if limit is not None), default=None),
            truncation_mode=args.truncation_mode,
        )  # fmt: skip

    def _tokenize(self, dataset: Any, name: str) -> Any:
        args = self.args
        if not all(field in dataset.column_names for field in (*SEQUENCE_FIELDS, LABEL_FIELD)):
            if self.processing_class is None:
                raise ValueError(
                    f"{name}: expected processing_class, a tokenizer for its text, got None"
                )
            dataset, report = tokenize_unpaired(
                dataset, self.processing_class, max_length=args.max_length,
                truncation_mode=args.truncation_mode, num_proc=args.dataset_num_proc,
                on_bad_row=args.on_bad_row,
            )  # fmt: skip
            if args.should_log:
                report.log(logger, name)
        if not len(dataset):
            raise ValueError(f"{name}: expected at least one example, got none")
        mismatched = [MISMATCHED_FIELD] if MISMATCHED_FIELD in dataset.column_names else []
        check_tokens(dataset, self.vocabulary, name, [*SEQUENCE_FIELDS, *mismatched])
        self.check_lengths(dataset, name, SEQUENCE_FIELDS)
        training = name == "train_dataset"
        if self.objective.loss.baseline == "kl" and not mismatched:
            check_lone(len(dataset), name, self.args, training=training)
        labels = [*map(read_label, dataset.with_format(None)[LABEL_FIELD])]
        if dataset.features[LABEL_FIELD].dtype != "bool":
            dataset = dataset.remove_columns(LABEL_FIELD).add_column(LABEL_FIELD, labels)
        if training:
            check_labels(labels, self.objective, name, say=args.should_log)
        return dataset

    def get_train_dataloader(self) -> Any:
        """The base class's, for batches that have a baseline."""
        if not self.args.precompute_ref_log_probs and self.objective.loss.baseline == "kl":
            check_found_size(self._train_batch_size)
        return super().get_train_dataloader()

    def own_metric_names(self) -> list[str]:
        """What an evaluation tells about labelled completions."""
        args, baseline = self.args, self.objective.loss.baseline
        return [
            *PackLoop.own_metric_names(self),
            *UNPAIRED_METRICS,
            *(() if baseline == "none" else (_BASELINES[baseline],)),
            *(KL_METRICS if args.log_exact_kl and not args.precompute_ref_log_probs else ()),
            *((*TOKEN_METRICS, *LOGIT_METRICS) if args.log_token_stats else ()),
        ]

    def items_of(self, pack: Mapping[str, Any]) -> int:
        """Completions."""
        return len(pack["counts"])

    def batch_facts(self, inputs: Mapping[str, Any], *, training: bool) -> dict[str, Any]:
        """How many completions the micro-batch has, and what they are compared with."""
        device = self.args.device
        if self.shift is not None:
            if training:
                self.shift.settle(self.accelerator)
            baseline = self.shift.delta.to(device)
        elif "kl_packs" in inputs:
            baseline = self._kl_baseline(inputs, training)
        else:
            baseline = torch.zeros((), device=device)
        return {"rows": len(inputs["row_ids"]), "baseline": baseline}

    def _kl_baseline(self, inputs: Mapping[str, Any], training: bool) -> Tensor:
        """KTO's ``z0``: the mean log-ratio of the mismatched completions, at least 0."""
        assert self.reference is not None
        moved: Any = self._prepare_inputs({"packs": inputs["kl_packs"]})
        packs: list[Any] = moved["packs"]
        counted, args = len(packs), self.args
        sums = torch.zeros(2, device=args.device)
        sums[1].fill_(inputs["mismatched"])
        options: dict[str, Any] = {"engine": args.head_engine, "max_bytes": args.head_max_bytes}
        with torch.no_grad(), self.accelerator.autocast(), in_eval_mode(self.model):
            for index, pack in enumerate(map(self.with_backend, self._evened(packs))):
                ref = self.reference.score(pack).sequence_logps
                policy = score_pack(self.model, pack, keep_rows=False, **options).sequence_logps
                if index < counted and inputs["mismatched"]:
                    sums[0] += (policy - ref).sum()
        if training:
            sums = self.accelerator.reduce(sums, reduction="sum")
        return (sums[0] / sums[1].clamp(min=1)).clamp(min=0)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Mean loss of all packs of a batch; their metrics are noted."""
        packs, training = inputs["packs"], model.training
        if "baseline" not in inputs:
            inputs = {**inputs, **self.batch_facts(inputs, training=training)}
        counted = inputs.get("counted", len(packs))
        losses = [
            self._run_pack(model, pack, inputs, counts=index < counted)
            for index, pack in enumerate(map(self.with_backend, packs))
        ]
        loss = torch.stack(losses).sum()
        return (loss, {}) if return_outputs else loss

    def _run_pack(
        self, model: nn.Module, pack: Mapping[str, Any], facts: Mapping[str, Any], *, counts: bool
    ) -> Tensor:
        """The pack's share of the loss of the batch, from one forward of reference and policy."""
        assert self.reference is not None
        ref = self.reference.score(pack, keep_rows=self._wants_kl(model.training))
        (output, kl), aux_loss = run_head_task(model, pack, self._head_task(pack, ref, facts))
        loss: Tensor = output.loss
        sequences = self.items_of(pack)
        if aux_loss is not None:
            weight = balance_of(causal_lm(model)) or 0.0
            # Of several packs each counts by its completions.
            loss = loss + weight * sequences / facts["rows"] * aux_loss
        if not counts:
            return 0.0 * loss
        with torch.no_grad():
            self._note(pack, output, ref, kl, facts["baseline"], training=model.training)
            if aux_loss is not None:
                store = self._stores["train" if model.training else "eval"]
                store.add(batch_metric("aux_loss", aux_loss.detach(), sequences))
        return loss

    def _head_task(
        self, pack: Mapping[str, Any], ref: ReferenceScores, facts: Mapping[str, Any]
    ) -> HeadTask:
        """From hidden states to losses and, where the reference has kept its own, exact KL."""
        args, core, selection = self.args, causal_lm(self.model), selection_from(pack)
        labels, baseline, ref_logps = pack["labels"], facts["baseline"], ref.sequence_logps

        def objective(logps: Tensor, which: slice) -> Tensor:
            return self.objective(logps - ref_logps[which], labels[which], baseline)

        def task(hidden_states: Tensor) -> tuple[SequenceLoss, Tensor | None]:
            flat = hidden_states.reshape(-1, hidden_states.shape[-1])
            with head_in_force(core) as head:
                output = sequence_loss(
                    flat.index_select(0, selection.rows), head, selection, objective,
                    facts["rows"], stats=args.log_token_stats, impl=args.impl,
                    engine=args.head_engine, max_bytes=args.head_max_bytes,
                )  # fmt: skip
                kl = exact_kl(hidden_states, head, selection.rows, ref, args.head_max_bytes)
            return output, kl

        return task

    def _note(
        self, pack: Mapping[str, Any], output: SequenceLoss, ref: ReferenceScores,
        kl: Tensor | None, baseline: Tensor, *, training: bool,
    ) -> None:  # fmt: skip
        """Metrics of a pack."""
        store, beta = self._stores["train" if training else "eval"], self.objective.beta
        sequences = self.items_of(pack)
        found = sequence_metrics(pack, output.logps, ref.sequence_logps, beta)
        if self.objective.loss.baseline != "none":
            name = _BASELINES[self.objective.loss.baseline]
            found.append(batch_metric(name, baseline, sequences))
        if output.stats is not None:
            found += token_metrics(pack, output.stats)
        if kl is not None:
            found.append(kl_metrics(kl, sequences))
        for sums in found:
            store.add(sums)
        if training and self.shift is not None:
            self.shift.add(beta * (output.logps - ref.sequence_logps), pack["labels"])

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The base class's, around the mean of all rewards so far."""
        if self.shift is not None:
            self.shift.settle(self.accelerator)
        return super().evaluation_loop(*args, **kwargs)

    def _named(self, values: dict[str, float]) -> dict[str, float]:
        return with_margins(super()._named(values))

    def _write_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.shift is not None:
            self.shift.settle(self.accelerator)
        super()._write_checkpoint(model, trial)
