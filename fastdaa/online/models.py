"""The three networks of a run, checked and taught packed rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from fastdaa.online.config import OnlineConfig
from fastdaa.online.critic import Critic, copy_of
from fastdaa.online.pieces import check_pieces, cut
from fastdaa.online.ranks import begin_alike
from fastdaa.online.seeds import Purpose, seed_of
from fastdaa.train.adapters import (
    check_adapters,
    is_adapted,
    is_fresh,
    peft_model,
    starting_point,
    trained_base,
)
from fastdaa.train.backbone import causal_lm
from fastdaa.train.offload import check_offload
from fastdaa.train.positions import check_length, positions_of
from fastdaa.train.prepare import check_head, disable_dropout, prepare_model
from fastdaa.train.quantization import check_adapted, compute_as_in_training
from fastdaa.train.references import check_reference
from fastdaa.train.run_record import weights_fact
from fastdaa.train.savable import check_can_be_saved
from fastdaa.train.support import supports_segments


class Models(NamedTuple):
    """The three networks."""

    policy: nn.Module
    reference: nn.Module | None
    """None for the policy without its adapter."""
    critic: Critic
    reference_fact: str | None = None
    """Which weights the reference has, as :func:`prepare_models` found them."""

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[nn.Module]:
        """The reference, in evaluation mode; meanwhile the policy may be it."""
        if self.reference is not None:
            yield self.reference
            return
        with starting_point(self.policy):
            yield self.policy

    def train(self, mode: bool = True) -> None:
        """Training or evaluation mode of policy and critic; the reference stays in evaluation."""
        self.policy.train(mode)
        self.critic.train(mode)


def prepare_models(
    policy: nn.Module,
    reference: nn.Module | None,
    critic: Critic | None,
    config: OnlineConfig,
    longest_prompt: int,
) -> Models:
    """Models for :class:`~fastdaa.online.loop.OnlineTrainer`, which describes the arguments.

    Args:
        longest_prompt: tokens of the longest prompt that the policy will be asked.

    Raises:
        ValueError: models that do not fit each other, the prompts or packed rows.
    """
    check_adapted(policy, adapted=is_adapted(policy))
    check_can_be_saved(policy)
    check_offload(policy, "policy", trained=True)
    if reference is not None:
        check_offload(reference, "reference", trained=False)
    for model in (policy, reference):
        if model is not None:
            compute_as_in_training(model)
    if is_adapted(policy):
        check_adapters(policy)
    begin_alike(policy)  # before there are copies of it
    if reference is not None:
        check_reference(reference, policy, same_vocabulary=True)
    elif not _begins_as_its_base(policy):
        reference = copy_of(policy)
    if reference is not None:
        reference.eval().requires_grad_(False)
    models = [policy] if reference is None else [policy, reference]
    check_length(
        map(positions_of, models), longest_prompt + config.max_new_tokens,
        "prompts with their completions",
        "max_prompt_length, max_new_tokens: expected at most {limit} together",
    )  # fmt: skip
    for model in models:
        _prepare(model, config)
    fact = weights_fact(models[-1], trainable=reference is not None)
    if config.fsdp:
        check_pieces({"ref_model" if model is reference else "model": model for model in models})
    if reference is not None and config.fsdp:
        cut(causal_lm(reference), bf16=config.bf16)  # before there is one more whole model
    if config.activation_checkpointing:
        _checkpoint_activations(causal_lm(policy))
    critic = _prepared_critic(critic, policy, config)
    if config.fsdp:
        cut(causal_lm(policy), bf16=config.bf16)
    return Models(policy, reference, critic, fact)


def _checkpoint_activations(core: Any) -> None:
    """Of the model and of copies that are made of it from now on, in training mode."""
    enable = getattr(core, "activation_checkpointing_enable", None)
    if enable is None:  # releases of transformers before 5.20
        enable = core.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _prepared_critic(critic: Critic | None, policy: nn.Module, config: OnlineConfig) -> Critic:
    """The critic, the same in every process, of a policy that is whole."""
    if critic is None:
        shared = config.critic == "shared"
        seed = seed_of(config.seed, 0, Purpose.CRITIC)
        critic = Critic(policy, config.critic_head, shared=shared, seed=seed)
    if config.disable_dropout:
        disable_dropout(critic)
    begin_alike(critic)
    if config.fsdp:
        for part in (critic.backbone, critic.head):
            if part is not None:
                cut(part, bf16=config.bf16)
    return critic


def _begins_as_its_base(policy: nn.Module) -> bool:
    """Whether the policy without its adapter is, and stays, what it is now."""
    if not is_adapted(policy):
        return False
    peft = peft_model(policy)
    return len(peft.active_adapters) == 1 and is_fresh(peft) and not trained_base(peft)


def _prepare(model: nn.Module, config: OnlineConfig) -> None:
    """Packed rows and the head's task, for the policy or the reference."""
    support = supports_segments(causal_lm(model), probe=True)
    if not support.ok:
        raise ValueError(
            f"policy, reference: expected a model that can attend within the segments of a packed "
            f"row, got {type(causal_lm(model)).__name__}: {support.reason}"
        )
    check_head(model)
    prepare_model(model, "packed")
    if config.disable_dropout:
        disable_dropout(model)
