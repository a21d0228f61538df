"""Reward models: Bradley-Terry on packed pairs, one number read at the last token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdaa.data import PairCollator, PairRows
from fastdaa.data.fields import PAIR_SEQUENCES
from fastdaa.train.backbone import causal_lm, run_head_task
from fastdaa.train.balance import balance_of
from fastdaa.train.best_metric import REWARD_METRICS
from fastdaa.train.metrics import MetricStore, Sums
from fastdaa.train.pack_loop import check_options
from fastdaa.train.prepare import (
    check_config,
    check_dataset,
    check_datasets,
    check_tokens,
    load_policy,
    tokenize_dataset,
)
from fastdaa.train.quantization import compute_as_in_training
from fastdaa.train.reward_models import (
    check_padding,
    check_reward_model,
    last_tokens,
    load_reward_model,
)
from fastdaa.train.sharding import check_one_device
from fastdaa.train.stage_config import RewardConfig
from fastdaa.train.stages import StageTrainer
from fastdaa.train.tokenizers import tokenizer_for


class RewardTrainer(StageTrainer):
    """Trains a sequence classifier with one output to prefer what the pairs prefer.

    The loss of a pair is ``-log sigmoid(r_chosen - r_rejected)`` (Bradley-Terry), plus
    ``center_rewards_coefficient (r_chosen + r_rejected)^2``. Pairs lie in a row as in preference
    training, the prompt of a pair computed once.

    Args:
        model: see :func:`~fastdaa.train.reward_models.load_reward_model`; or such a model. Its
            padding token has to be one that no completion ends with.
        args: the settings.
        train_dataset: ``datasets.Dataset`` of preference pairs, see ``docs/data.md``; token columns
            are taken as they are.
        eval_dataset: the same to evaluate on, or a dictionary of such.
        processing_class: the tokenizer; None for that of a ``model`` given by name.
        peft_config: wraps ``model`` in a new adapter, with a copy of ``score`` (``SEQ_CLS``).
        options: ``callbacks``, and anything else that ``Trainer`` takes.

    Raises:
        ValueError, TypeError: settings, datasets and models that do not fit together; all of them
            before any training.
    """

    args: RewardConfig

    def __init__(
        self,
        model: str | nn.Module,
        args: RewardConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        **options: Any,
    ):
        args = RewardConfig(output_dir="reward_output") if args is None else args
        check_config(args, RewardConfig)
        check_options(options, args)
        check_one_device(args)
        check_datasets(train_dataset, eval_dataset)
        processing_class = tokenizer_for(processing_class, model, train_dataset, eval_dataset)
        if isinstance(model, str):
            model = load_reward_model(model, processing_class, resize=peft_config is None)
        compute_as_in_training(model)
        check_reward_model(model)
        check_padding(model, processing_class)
        policy = load_policy(model, peft_config)
        if peft_config is not None:
            # PEFT leaves the copy of `score` in the dtype of the base, where bf16 loses updates.
            for weight in policy.parameters():
                weight.data = weight.data.float() if weight.requires_grad else weight.data
        super().__init__(
            policy,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            **options,
        )

    def make_collator(self, pad_token_id: int) -> PairCollator:
        """Batches of pairs."""
        return PairCollator(self.layout, pad_token_id, self.args.tokens_per_pack)

    def rows_of(self, dataset: Any, name: str) -> Any:
        """Any dataset of pairs as the loader wants it, tokenised and checked."""
        if isinstance(dataset, PairRows):
            return dataset
        check_dataset(dataset, name)
        dataset = tokenize_dataset(dataset, self.processing_class, self.args, name)
        check_tokens(dataset, self.vocabulary, name)
        self.check_lengths(dataset, name, *PAIR_SEQUENCES)
        self._check_padding(dataset, name)
        return PairRows(dataset)

    def _check_padding(self, dataset: Any, name: str) -> None:
        """Saved, the model reads the last token that is not padding: completions must not end so.

        Raises:
            ValueError: one does.
        """
        pad = causal_lm(self.model).config.get_text_config().pad_token_id
        for field in ("chosen_ids", "rejected_ids"):
            for ids in dataset.with_format(None, columns=[field])[field]:
                if ids and ids[-1] == pad:
                    raise ValueError(
                        f"{name}: expected completions that do not end with {pad}, the model's "
                        f"padding token, got one in {field}; give the model another pad_token_id, "
                        "or its path and a tokenizer, and one is added"
                    )

    def own_metric_names(self) -> list[str]:
        """What an evaluation tells about rewards; the balance of experts is not logged."""
        return [*REWARD_METRICS]

    def run_pack(self, model: nn.Module, pack: Mapping[str, Any], store: MetricStore) -> Tensor:
        """Bradley-Terry losses of the pairs of a pack, added up."""
        core = causal_lm(model)
        rewards, aux_loss = run_head_task(model, pack, lambda hidden: _read(core, hidden, pack))
        chosen, rejected = rewards[0::2], rewards[1::2]
        losses = -F.logsigmoid(chosen - rejected)
        weight = self.args.center_rewards_coefficient
        if weight:
            losses = losses + weight * (chosen + rejected).square()
        store.add(_metrics(chosen.detach(), rejected.detach()))
        total = losses.sum()
        if aux_loss is not None:
            pairs = self.items_of(pack)
            total = total + (balance_of(core) or 0.0) * pairs * aux_loss
        return total


def _read(core: Any, hidden_states: Tensor, pack: Mapping[str, Any]) -> Tensor:
    """Rewards ``[S]`` fp32 at the last tokens of the sequences of a pack."""
    flat = hidden_states.reshape(-1, hidden_states.shape[-1])
    rows = flat.index_select(0, last_tokens(pack))
    return core.score(rows.to(core.score.weight.dtype))[:, 0].float()


def _metrics(chosen: Tensor, rejected: Tensor) -> Sums:
    values = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).float(),
        "rewards/center": 0.5 * (chosen + rejected),
    }
    totals = torch.stack([value.sum() for value in values.values()])
    return Sums(tuple(values), totals, (float(len(chosen)),) * len(values))
