"""Preference training on ``transformers.Trainer``: packed pairs, exact log-probs, no logits.

Everything that is not about pairs (devices, sharding, accumulation, schedules, checkpoints,
trackers) is the Trainer's and accelerate's.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

from fastdaa.data import PairCollator, selection_from
from fastdaa.divergence import token_kl
from fastdaa.head import LmHead
from fastdaa.logps import pair_logps
from fastdaa.outputs import BatchTotals, PairLossOutput
from fastdaa.pair_loss import pair_loss
from fastdaa.train import checkpoints
from fastdaa.train.backbone import causal_lm, run_head_task
from fastdaa.train.callbacks import default_callbacks, restore_signals, use_progress
from fastdaa.train.config import PreferenceConfig
from fastdaa.train.metrics import MetricStore, kl_metrics, pair_metrics, token_metrics
from fastdaa.train.model_card import write_model_card
from fastdaa.train.precompute import Precompute
from fastdaa.train.prepare import (
    check_head,
    choose_layout,
    load_model,
    prepare_dataset,
    prepare_model,
    prepare_reference,
    rows_of,
)
from fastdaa.train.references import (
    AdapterReference,
    CachedReference,
    ModelReference,
    Reference,
    ReferenceScores,
    frozen_copy,
    keep_starting_adapter,
)

logger = logging.getLogger(__name__)


class _PackResult(NamedTuple):
    output: PairLossOutput
    kl: Tensor | None


class PreferenceTrainer(Trainer):
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
        self.objective = args.objective()
        tokenized = self._tokenize(train_dataset, eval_dataset, processing_class, args)
        policy = load_model(model)
        if peft_config is not None:
            from peft import get_peft_model

            policy = get_peft_model(policy, peft_config)
        check_head(policy)
        self.layout, self.layout_reason = choose_layout(causal_lm(policy), args.layout)
        self._peft = hasattr(policy, "peft_config")
        if self._peft and ref_model is None:
            keep_starting_adapter(policy)
        prepare_model(policy, self.layout, disable_dropout=args.disable_dropout)
        pad = _pad_token(processing_class)
        collator = PairCollator(self.layout, pad, args.tokens_per_pack)  # type: ignore[arg-type]
        self._stores = {"train": MetricStore(), "eval": MetricStore()}
        super().__init__(
            model=policy,
            args=args,
            data_collator=collator,
            train_dataset=rows_of(tokenized[0]),
            eval_dataset=rows_of(tokenized[1]),
            processing_class=processing_class,
            callbacks=[*default_callbacks(), *(callbacks or [])],
            **options,
        )
        use_progress(self)
        if self.args.n_gpu > 1:
            raise ValueError(
                "expected one process a GPU, got torch.nn.DataParallel over "
                f"{self.args.n_gpu} devices; start with `accelerate launch`, or set "
                "CUDA_VISIBLE_DEVICES to one of them"
            )
        self.reference = self._make_reference(ref_model, tokenized)

    def _tokenize(
        self, train: Any, evaluation: Any, tokenizer: Any, args: PreferenceConfig
    ) -> tuple[Any, Any]:
        if train is not None:
            train = prepare_dataset(train, tokenizer, args, "train_dataset")
        if isinstance(evaluation, Mapping):
            evaluation = {
                name: prepare_dataset(part, tokenizer, args, f"eval_dataset {name}")
                for name, part in evaluation.items()
            }
        elif evaluation is not None:
            evaluation = prepare_dataset(evaluation, tokenizer, args, "eval_dataset")
        return train, evaluation

    def _make_reference(
        self, ref_model: str | nn.Module | None, tokenized: tuple[Any, Any]
    ) -> Reference | None:
        """The reference of the objective; cached log-probs replace the model that made them."""
        if not self.objective.needs_ref and ref_model is None:
            return None
        if not self.args.precompute_ref_log_probs:
            return self._model_reference(ref_model)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(
                "precompute_ref_log_probs: expected an unsharded run, got FSDP or DeepSpeed; fill "
                "the cache with a run on whole models first, or leave the option out"
            )
        reference, model = self._model_for_cache(ref_model)
        precompute = Precompute(self, reference, model)
        train, evaluation = tokenized
        self.train_dataset = rows_of(precompute(train, "train"))
        if isinstance(evaluation, Mapping):
            self.eval_dataset = rows_of({k: precompute(v, k) for k, v in evaluation.items()})
        else:
            self.eval_dataset = rows_of(precompute(evaluation, "eval"))
        return CachedReference()

    def _model_for_cache(self, ref_model: str | nn.Module | None) -> tuple[Reference, nn.Module]:
        """The policy itself, before it is trained, spares a copy."""
        if ref_model is not None or self._peft:
            reference = self._model_reference(ref_model)
            return reference, reference.model  # type: ignore[attr-defined]
        self.model.to(self.args.device).eval()
        return ModelReference(self.model, self.args.head_max_bytes), self.model

    def _model_reference(self, ref_model: str | nn.Module | None) -> Reference:
        budget = self.args.head_max_bytes
        if ref_model is None and self._peft:
            return AdapterReference(self.model, budget)
        if ref_model is None or ref_model is self.model:
            ref = frozen_copy(self.model)
        else:
            ref = load_model(ref_model).eval().requires_grad_(False)
            check_head(ref)
        prepare_model(ref, self.layout, disable_dropout=True)
        return ModelReference(prepare_reference(ref, self.accelerator), budget)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Mean loss of all packs of a batch; its metrics are noted."""
        totals = _totals(inputs)
        results = [self._pack(model, pack, totals) for pack in inputs["packs"]]
        self._end_batch(inputs)
        loss = torch.stack([result.output.loss for result in results]).sum()
        return (loss, {"packs": [r.output for r in results]}) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward, pack by pack, so that one pack's activations live at a time."""
        self._stores["train"].throughput.begin()
        if len(inputs["packs"]) == 1 or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        inputs = self._prepare_inputs(inputs)
        totals = _totals(inputs)
        losses = []
        for index, pack in enumerate(inputs["packs"]):
            last = index + 1 == len(inputs["packs"])
            # Ranks may have different numbers of packs; they meet in the last backward.
            sync = contextlib.nullcontext() if last else self.accelerator.no_sync(model)
            with sync:
                with self.compute_loss_context_manager():
                    loss = self._pack(model, pack, totals).output.loss
                loss = loss / self.current_gradient_accumulation_steps
                self.accelerator.backward(loss)
            losses.append(loss.detach())
        self._end_batch(inputs)
        return torch.stack(losses).sum()

    def _pack(self, model: nn.Module, pack: Mapping[str, Any], totals: BatchTotals) -> _PackResult:
        """One forward of the reference and the policy over a pack."""
        pack = self._with_backend(pack)
        want_kl = self._wants_kl(model.training)
        ref = None
        if self.reference is not None:
            ref = self.reference.score(pack, keep_rows=want_kl)
        core = causal_lm(model)
        selection = selection_from(pack)

        def task(hidden_states: Tensor) -> _PackResult:
            head = LmHead.from_model(core)
            output = pair_loss(
                hidden_states, head, selection, self.objective,
                ref_logps=None if ref is None else ref.sequence_logps,
                ref_token_logps=None if ref is None else ref.token_logps,
                completion_lengths=pack["completion_lengths"],
                totals=totals, stats=self.args.log_token_stats,
                impl=self.args.impl, max_bytes=self.args.head_max_bytes,
            )  # fmt: skip
            return _PackResult(output, self._kl(hidden_states, head, pack, ref))

        result, aux_loss = run_head_task(model, pack, task)
        result = _PackResult(*result)
        if aux_loss is not None:
            weight = getattr(core.config.get_text_config(), "router_aux_loss_coef", 0.0)
            share = pack["pair_index"].numel() / totals.pairs
            loss = result.output.loss + weight * share * aux_loss
            result = result._replace(output=result.output._replace(loss=loss))
        self._note(model, pack, result, ref)
        return result

    def _with_backend(self, pack: Mapping[str, Any]) -> Mapping[str, Any]:
        if "segments" not in pack or self.args.attention == "auto":
            return pack
        return {**pack, "segments": {**pack["segments"], "backend": self.args.attention}}

    def _wants_kl(self, training: bool) -> bool:
        """Exact KL is measured on the last batch before a row is logged, and in evaluation."""
        if not self.args.log_exact_kl or self.reference is None or not self.reference.online:
            return False
        if not training:
            return True
        every = self.state.logging_steps
        return bool(every) and (self.state.global_step + 1) % every == 0

    def _kl(
        self,
        hidden_states: Tensor,
        head: LmHead,
        pack: Mapping[str, Any],
        ref: ReferenceScores | None,
    ) -> Tensor | None:
        if ref is None or ref.rows is None or ref.head is None:
            return None
        flat = hidden_states.detach().reshape(-1, hidden_states.shape[-1])
        rows = flat.index_select(0, pack["rows"])
        return token_kl(rows, head.detach(), ref.rows, ref.head, max_bytes=self.args.head_max_bytes)

    def _note(
        self,
        model: nn.Module,
        pack: Mapping[str, Any],
        result: _PackResult,
        ref: ReferenceScores | None,
    ) -> None:
        store = self._stores["train" if model.training else "eval"]
        output = result.output
        logps = None if ref is None else pair_logps(ref.sequence_logps, pack["completion_lengths"])
        with torch.no_grad():
            store.add(pair_metrics(output, logps, self.objective))
            if output.stats is not None:
                store.add(token_metrics(output.stats, pack["lengths"]))
            if result.kl is not None:
                store.add(kl_metrics(result.kl, len(pack["counts"])))

    def _end_batch(self, inputs: Mapping[str, Any]) -> None:
        self._stores["train" if self.model.training else "eval"].end_batch(inputs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Loss and metrics of an evaluation batch."""
        inputs = self._prepare_inputs(inputs)
        self._stores["eval"].throughput.begin()
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """The Trainer's loop, with this library's metrics beside the loss."""
        self._stores["eval"] = MetricStore()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        values = self._stores["eval"].read(self.accelerator)
        output.metrics.update({f"{metric_key_prefix}_{k}": v for k, v in values.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of the interval to a row with a training loss."""
        if "loss" in logs:
            logs.update(self._stores["train"].read(self.accelerator))
            logs["num_tokens"] = self.state.num_input_tokens_seen
        super().log(logs, start_time)

    def _track_num_input_tokens(self, inputs: Mapping[str, Any]) -> None:
        # Known on the host; the checkpoint keeps the sum.
        tokens = sum(pack["tokens"] for pack in inputs["packs"])
        self.state.num_input_tokens_seen += tokens * self.args.world_size

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """``6 x`` parameters without embeddings ``x`` tokens computed, as the Trainer counts."""
        if self._parameters is None:
            self._parameters = causal_lm(self.model).num_parameters(exclude_embeddings=True)
        return 6 * self._parameters * sum(pack["tokens"] for pack in inputs["packs"])

    _parameters: int | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train; ``True`` continues from the last complete checkpoint of the output folder."""
        if isinstance(resume_from_checkpoint, bool):
            found = None
            if resume_from_checkpoint:
                found = checkpoints.last_complete(self.args.output_dir)
                if found is None:
                    logger.warning("no complete checkpoint yet: training from the beginning")
            resume_from_checkpoint = found
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            restore_signals(self)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write ``README.md`` into the output folder: what was trained, how, and how it did."""
        if not self.is_world_process_zero():
            return
        base = getattr(causal_lm(self.model).config, "_name_or_path", "") or None
        write_model_card(
            self.args.output_dir,
            objective=self.objective,
            name=Path(self.args.output_dir).resolve().name,
            rows=self.state.log_history,
            base_model=base,
            dataset=kwargs.get("dataset"),
            layout=self.layout,
            settings=self.args.to_dict(),
            peft=self._peft,
        )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = checkpoints.folder(self._get_output_dir(trial=trial), self.state.global_step)
        if self.args.should_save:
            checkpoints.invalidate(folder)
        super()._save_checkpoint(model, trial)


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
