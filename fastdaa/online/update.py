"""Optimiser steps on rollouts: minibatches of whole sequences, packed, several passes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import get_scheduler

from fastdaa.online.advantages import whiten, whiten_with_padding
from fastdaa.online.config import OnlineConfig
from fastdaa.online.critic import Critic
from fastdaa.online.objectives import TokenData, is_clipped, policy_losses, value_loss
from fastdaa.online.packs import packs_of_process, token_index
from fastdaa.online.pieces import load_optimizer_state, whole_optimizer_state
from fastdaa.online.ranks import add_gradients, add_up_by_name, processes
from fastdaa.online.seeds import Purpose, generator
from fastdaa.online.token_loss import TokenLoss, token_loss
from fastdaa.online.types import Experience
from fastdaa.selection import select_rows
from fastdaa.train.backbone import causal_lm, run_head_task
from fastdaa.train.balance import balance_of
from fastdaa.train.sharding import head_in_force


class Minibatch(NamedTuple):
    """Sequences of one optimiser step."""

    epoch: int
    sequences: Tensor
    """``[s]`` int64."""


def minibatches(config: OnlineConfig, iteration: int, sequences: int) -> list[Minibatch]:
    """All steps of an iteration, in order: every pass shuffles the sequences anew.

    Always the same for a seed and an iteration, so that a resumed run goes on in the middle.
    """
    random = generator(config.seed, iteration, Purpose.MINIBATCHES)
    orders = [torch.randperm(sequences, generator=random) for _ in range(config.epochs)]
    return [
        Minibatch(epoch, part)
        for epoch, order in enumerate(orders)
        for part in order.split(config.minibatch)
    ]


class Updater:
    """Adam, its schedule and clipping for policy and critic; one minibatch a call.

    Several processes compute the gradients of some of its sequences each, and take the same step.

    ``loss = policy + vf_coef * critic``, both means over the tokens of the minibatch. Gradients of
    policy and critic are clipped each for itself: the critic's errors must not shrink the
    policy's step.

    Args:
        policy: with ``install_head_task``.
        critic: of its own backbone or shared.
    """

    def __init__(self, policy: nn.Module, critic: Critic, config: OnlineConfig) -> None:
        self.policy, self.critic, self.config = policy, critic, config
        self.device = causal_lm(policy).device
        # FSDP2 takes the mean over processes of what is a sum.
        self.scale = processes() if config.fsdp else 1
        self.parts = [
            [parameter for parameter in model.parameters() if parameter.requires_grad]
            for model in (policy, critic)
        ]
        if not self.parts[0]:
            raise ValueError("policy: expected trainable parameters, got none")
        rates = (config.learning_rate, config.critic_learning_rate or config.learning_rate)
        groups = [
            {"params": parameters, "lr": rate}
            for parameters, rate in zip(self.parts, rates, strict=True)
        ]
        # With a weight decay of 0 this is Adam.
        self.optimizer = torch.optim.AdamW(
            groups, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
        )  # fmt: skip
        self.scheduler = get_scheduler(
            config.lr_scheduler_type, self.optimizer, num_warmup_steps=config.warmup_steps,
            num_training_steps=config.total_steps,
        )  # fmt: skip

    def step(self, experience: Experience, batch: Minibatch) -> dict[str, Tensor]:
        """One optimiser step; means over its tokens, as scalars on the device."""
        rollouts, config, lengths = experience.rollouts, self.config, experience.lengths
        tokens = token_index(lengths, batch.sequences)
        data = self._token_data(experience, tokens, lengths[batch.sequences])
        old_values, returns = (
            values[tokens].to(self.device) for values in (experience.values, experience.returns)
        )
        chosen = batch.sequences.tolist()
        packs = packs_of_process(
            [rollouts.prompt_ids[i] for i in chosen],
            [rollouts.completion_ids[i] for i in chosen],
            tokens_per_pack=config.tokens_per_pack, attention=config.attention,
            device=self.device, in_step=config.fsdp,
        )  # fmt: skip
        sums: dict[str, Tensor] = {}
        for sequences, pack in packs:
            here = token_index(lengths[batch.sequences], sequences).to(self.device)
            part = data.part(here)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=config.bf16):
                policy, values, aux_loss = self._forward(pack, part, len(tokens))
                errors = value_loss(
                    values, returns[here], old_values[here], config.clip_range_value
                )
            value = errors.sum() / len(tokens)
            loss = policy.loss + config.vf_coef * value
            if aux_loss is not None:
                loss = loss + aux_loss * (len(here) / len(tokens))
            counted = pack.get("counted", True)
            (loss * (self.scale * counted)).backward()
            if counted:
                _add(sums, _statistics(config, policy, part, value.detach(), len(tokens)))
        if not config.fsdp:
            for parameters in self.parts:
                add_gradients(parameters, self.device)
        sums = add_up_by_name(sums, statistics_of(config), self.device)
        sums |= self._clip()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return sums

    def _token_data(self, experience: Experience, tokens: Tensor, lengths: Tensor) -> TokenData:
        """What the policy's loss needs of a minibatch, whitened over it where that is wanted."""
        advantages = experience.advantages[tokens]
        if self.config.whitening == "masked":
            advantages = whiten(advantages)
        elif self.config.whitening == "unmasked":
            advantages = whiten_with_padding(advantages, lengths)
        old, ref = experience.old_logps[tokens], experience.ref_logps[tokens]
        return TokenData(*(values.to(self.device) for values in (old, ref, advantages)))

    def _forward(
        self, pack: Mapping[str, Any], data: TokenData, tokens: int
    ) -> tuple[TokenLoss, Tensor, Tensor | None]:
        """The policy's loss, values, and a mixture of experts' load-balancing loss, weighted."""
        config, critic = self.config, self.critic
        core = causal_lm(self.policy)

        def task(hidden_states: Tensor) -> tuple[TokenLoss, Tensor | None]:
            rows = select_rows(hidden_states.flatten(0, 1), pack["rows"])
            with head_in_force(core) as whole:
                head = replace(whole, temperature=config.temperature)
                loss = token_loss(
                    rows, head, pack["targets"],
                    lambda logps, part: policy_losses(config, logps, data.part(part)), tokens,
                    impl=config.impl, engine=config.head_engine, max_bytes=config.head_max_bytes,
                )  # fmt: skip
            return loss, critic.head(rows) if critic.shared else None

        (loss, values), aux_loss = run_head_task(self.policy, pack, task)
        if values is None:
            values = critic(pack)
        if aux_loss is not None:
            aux_loss = aux_loss * (balance_of(core) or 0.0)
        return loss, values, aux_loss

    def _clip(self) -> dict[str, Tensor]:
        """Clips the gradients; their norms before that."""
        most = self.config.max_grad_norm or float("inf")
        names = ("grad_norm/policy", "grad_norm/value")
        norms = (nn.utils.clip_grad_norm_(parameters, most).detach() for parameters in self.parts)
        return {
            name: norm.full_tensor() if isinstance(norm, DTensor) else norm
            for name, norm in zip(names, norms, strict=True)
        }

    def learning_rate(self) -> float:
        """The policy's, of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def state_dict(self) -> dict[str, Any]:
        """Optimiser and schedule; with ``fsdp`` a collective, and whole in the first process."""
        return {
            "optimizer": whole_optimizer_state(self.optimizer),
            "scheduler": self.scheduler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from :meth:`state_dict`."""
        load_optimizer_state(self.optimizer, state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])


def statistics_of(config: OnlineConfig) -> list[str]:
    """Names of the means over a minibatch's tokens."""
    names = ["loss/policy", "loss/value", "policy/approxkl", "val/ratio"]
    return [*names, "policy/clipfrac"] if config.algorithm == "ppo" else names


def _statistics(
    config: OnlineConfig, policy: TokenLoss, data: TokenData, value: Tensor, tokens: int
) -> dict[str, Tensor]:
    """A pack's share of the means over the minibatch's tokens."""
    change = policy.logps - data.old_logps
    found = {
        "loss/policy": policy.loss.detach(),
        "loss/value": value,
        # Half the mean square: KL to the policy of the rollouts, to second order.
        "policy/approxkl": 0.5 * change.square().sum() / tokens,
        "val/ratio": change.exp().sum() / tokens,
    }
    if config.algorithm == "ppo":
        clipped = is_clipped(policy.logps, data.old_logps, data.advantages, config.clip_range)
        found["policy/clipfrac"] = clipped.sum() / tokens
    return found


def _add(sums: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    for name, value in more.items():
        sums[name] = sums[name] + value if name in sums else value
