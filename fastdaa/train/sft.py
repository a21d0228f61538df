"""Supervised fine-tuning: packed examples, a loss on completions alone, no logits."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastdaa.data.collate import SequenceCollator
from fastdaa.data.fields import SEQUENCE_FIELDS
from fastdaa.data.rows import SequenceRows
from fastdaa.data.tokenise import tokenize_examples
from fastdaa.train.backbone import causal_lm, run_head_task
from fastdaa.train.balance import balance_of
from fastdaa.train.best_metric import TOKEN_METRICS
from fastdaa.train.completion_loss import CompletionLoss, completion_loss
from fastdaa.train.metrics import MetricStore, Sums
from fastdaa.train.pack_loop import check_options
from fastdaa.train.prepare import (
    check_config,
    check_dataset,
    check_datasets,
    check_head,
    check_tokens,
    load_policy,
)
from fastdaa.train.sharding import check_one_device, head_in_force
from fastdaa.train.stage_config import SftConfig
from fastdaa.train.stages import StageTrainer
from fastdaa.train.tokenizers import tokenizer_for

logger = logging.getLogger(__name__)


class SftTrainer(StageTrainer):
    """Teaches a causal language model completions: the mean of ``-log p`` over their tokens.

    Args:
        model: a model, or the path or hub id of one (loaded in fp32).
        args: the settings.
        train_dataset: ``datasets.Dataset`` of examples, see :mod:`fastdaa.data.examples`; the
            columns ``prompt_ids`` and ``completion_ids`` are taken as they are.
        eval_dataset: the same to evaluate on, or a dictionary of such.
        processing_class: the tokenizer; None for that of a ``model`` given by name.
        peft_config: wraps ``model`` in a new adapter.
        options: ``callbacks``, and anything else that ``Trainer`` takes.

    Raises:
        ValueError, TypeError: settings, datasets and models that do not fit together; all of them
            before any training.
    """

    unit = "examples"
    args: SftConfig

    def __init__(
        self,
        model: str | nn.Module,
        args: SftConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        **options: Any,
    ):
        args = SftConfig(output_dir="sft_output") if args is None else args
        check_config(args, SftConfig)
        check_options(options, args)
        check_one_device(args)
        check_datasets(train_dataset, eval_dataset)
        processing_class = tokenizer_for(processing_class, model, train_dataset, eval_dataset)
        policy = load_policy(model, peft_config)
        check_head(policy)
        super().__init__(
            policy,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            **options,
        )

    def make_collator(self, pad_token_id: int) -> SequenceCollator:
        """Batches of whole sequences."""
        return SequenceCollator(self.layout, pad_token_id, self.args.tokens_per_pack)

    def rows_of(self, dataset: Any, name: str) -> Any:
        """Any dataset of examples as the loader wants it, tokenised and checked."""
        if isinstance(dataset, SequenceRows):
            return dataset
        check_dataset(dataset, name)
        if not all(field in dataset.column_names for field in SEQUENCE_FIELDS):
            dataset = self._tokenize(dataset, name)
        if not len(dataset):
            raise ValueError(f"{name}: expected at least one example, got none")
        check_tokens(dataset, self.vocabulary, name, SEQUENCE_FIELDS)
        self.check_lengths(dataset, name, SEQUENCE_FIELDS)
        return SequenceRows(dataset)

    def _tokenize(self, dataset: Any, name: str) -> Any:
        if self.processing_class is None:
            raise ValueError(
                f"{name}: expected processing_class, a tokenizer for its text, got None"
            )
        args = self.args
        tokenized, report = tokenize_examples(
            dataset, self.processing_class, max_length=args.max_length,
            truncation_mode=args.truncation_mode, num_proc=args.dataset_num_proc,
            on_bad_row=args.on_bad_row, every_answer=args.every_answer,
        )  # fmt: skip
        if args.should_log:
            report.log(logger, name)
        return tokenized

    def own_metric_names(self) -> list[str]:
        """What an evaluation tells about tokens."""
        return [*super().own_metric_names(), *(TOKEN_METRICS if self.args.log_token_stats else ())]

    def items_of(self, pack: Mapping[str, Any]) -> int:
        """Scored tokens."""
        return sum(pack["counts"])

    def run_pack(self, model: nn.Module, pack: Mapping[str, Any], store: MetricStore) -> Tensor:
        """Negative log-probs of the completion tokens of a pack, added up."""
        core, args = causal_lm(model), self.args

        def task(hidden_states: Tensor) -> CompletionLoss:
            flat = hidden_states.reshape(-1, hidden_states.shape[-1])
            with head_in_force(core) as head:
                return completion_loss(
                    flat.index_select(0, pack["rows"]), head, pack["targets"],
                    stats=args.log_token_stats, impl=args.impl, engine=args.head_engine,
                    max_bytes=args.head_max_bytes,
                )  # fmt: skip

        output, aux_loss = run_head_task(model, pack, task)
        tokens = self.items_of(pack)
        if output.stats is not None:
            totals = torch.stack([output.stats.entropy.sum(), output.stats.top1.sum()])
            store.add(Sums(("entropy", "mean_token_accuracy"), totals, (float(tokens),) * 2))
        total = output.total
        if aux_loss is not None:
            # A mixture of experts balances its load; a pack counts by its tokens.
            weight = balance_of(core) or 0.0
            store.add(Sums(("aux_loss",), (aux_loss.detach() * tokens).view(1), (float(tokens),)))
            total = total + weight * tokens * aux_loss
        return total
