"""Three ways of the same on-policy optimiser step: packed without logits, and padded with them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fastdaa.benchmarks.step.model import build
from fastdaa.online.advantages import whiten
from fastdaa.online.config import OnlineConfig
from fastdaa.online.critic import Critic
from fastdaa.online.objectives import TokenData, policy_losses, value_loss
from fastdaa.online.packs import token_index
from fastdaa.online.types import Experience
from fastdaa.online.update import Minibatch, Updater
from fastdaa.train.prepare import prepare_model

if TYPE_CHECKING:
    from fastdaa.benchmarks.step.cases import Case

Step = Callable[[], dict[str, float]]
"""One optimiser step on the next minibatch; its losses and gradient norms."""
PADDED = ("padded", "padded-sliced")
_COMPARED = ("loss/policy", "loss/value", "grad_norm/policy", "grad_norm/value")


def contenders(
    case: Case,
    config: OnlineConfig,
    experience: Experience,
    batches: Sequence[Tensor],
    seed: int,
    names: Sequence[str] = PADDED,
) -> dict[str, Step]:
    """``packed`` and those of ``PADDED`` that are named, each with weights of its own, all equal.

    Args:
        batches: numbers of the sequences of each step, in the order in which they are taken.
    """
    policy = build(case.model, "cpu", seed, case.workload.max_length)
    critic = Critic(policy, config.critic_head, seed=seed)
    # At zero the backbone of the critic would get no gradient in the first step.
    last = list(critic.head.layers)[-1]
    assert isinstance(last, nn.Linear)
    nn.init.normal_(last.weight, std=0.02)
    models = {name: copy.deepcopy((policy, critic)) for name in names}
    prepare_model(policy, "packed")
    updater = Updater(policy, critic, config)
    steps: dict[str, Step] = {}
    order = cycle(batches)

    def packed() -> dict[str, float]:
        found = updater.step(experience, Minibatch(0, next(order)))
        return {name: float(found[name]) for name in _COMPARED}

    steps["packed"] = packed
    for name, pair in models.items():
        step = PaddedStep(*pair, config, every_position=name == "padded")
        steps[name] = _in_order(step, experience, cycle(batches))
    return steps


def _in_order(step: PaddedStep, experience: Experience, order: Any) -> Step:
    return lambda: step(experience, next(order))


class PaddedStep:
    """The same step on padded rows with materialised logits.

    Prompts are padded on the left and completions on the right, so that completions begin in the
    same column: what generation with padded prompts gives.

    Args:
        every_position: logits of prompts and padding too, as ``model(...).logits`` has them.
    """

    def __init__(
        self, policy: Any, critic: Critic, config: OnlineConfig, *, every_position: bool
    ) -> None:
        self.policy, self.critic, self.config = policy, critic, config
        self.every_position = every_position
        assert critic.backbone is not None
        self.backbone = cast(Any, critic.backbone)
        # As the library has it: attention of PyTorch with a mask.
        self.backbone.set_attn_implementation("sdpa")
        self.parts = [list(policy.parameters()), list(critic.parameters())]
        self.optimizer = torch.optim.AdamW(
            [{"params": parameters} for parameters in self.parts], lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
        )  # fmt: skip

    def __call__(self, experience: Experience, sequences: Tensor) -> dict[str, float]:
        """One step; its losses and gradient norms."""
        config, lengths = self.config, experience.lengths
        tokens = token_index(lengths, sequences)
        advantages, returns = experience.advantages[tokens], experience.returns[tokens]
        old, ref = experience.old_logps[tokens], experience.ref_logps[tokens]
        old_values = experience.values[tokens]
        if config.whitening == "masked":
            advantages = whiten(advantages)
        inputs, targets, mask = self._rows(experience, sequences)
        width = targets.shape[1]
        logps = self._logps(inputs, targets, width)[mask]
        hidden = self.backbone(**inputs, use_cache=False).last_hidden_state
        values = self.critic.head(hidden[:, -width - 1 : -1])[mask]
        policy = policy_losses(config, logps, TokenData(old, ref, advantages)).mean()
        value = value_loss(values, returns, old_values, config.clip_range_value).mean()
        (policy + config.vf_coef * value).backward()
        most = config.max_grad_norm or math.inf
        norms = [nn.utils.clip_grad_norm_(parameters, most) for parameters in self.parts]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        found = (policy.detach(), value.detach(), *norms)
        return {name: float(number) for name, number in zip(_COMPARED, found, strict=True)}

    def _rows(
        self, experience: Experience, sequences: Tensor
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Inputs ``[s, P + C]``, targets ``[s, C]`` and which of them are tokens."""
        rollouts = experience.rollouts
        prompts, completions = (
            [side[i] for i in sequences.tolist()]
            for side in (rollouts.prompt_ids, rollouts.completion_ids)
        )
        left = pad_sequence(prompts, batch_first=True, padding_value=0, padding_side="left")
        right = pad_sequence(completions, batch_first=True, padding_value=0)
        seen = [
            pad_sequence([torch.ones_like(ids) for ids in side], batch_first=True, padding_side=to)
            for side, to in ((prompts, "left"), (completions, "right"))
        ]
        attention_mask = torch.cat(seen, dim=1)
        inputs = {
            "input_ids": torch.cat([left, right], dim=1),
            "attention_mask": attention_mask,
            "position_ids": (attention_mask.cumsum(1) - 1).clamp(min=0),
        }
        return inputs, right, seen[1].bool()

    def _logps(self, inputs: Mapping[str, Tensor], targets: Tensor, width: int) -> Tensor:
        """``[s, C]`` log-probs of the targets, from logits."""
        if self.every_position:
            logits = self.policy(**inputs, use_cache=False).logits[:, -width - 1 : -1]
        else:
            hidden = self.policy.model(**inputs, use_cache=False).last_hidden_state
            logits = self.policy.lm_head(hidden[:, -width - 1 : -1])
        logits = logits / self.config.temperature
        return logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]


def disagreement(first: Mapping[str, Mapping[str, float]], tolerance: float) -> str:
    """Where losses or gradient norms of a first step differ from ``packed``; empty if nowhere."""
    wrong = []
    for name, values in first.items():
        for key, value in values.items():
            expected = first["packed"][key]
            if not abs(value - expected) <= tolerance * max(abs(expected), 1e-6):
                wrong.append(f"{key} is {value:.6g} by {name}, {expected:.6g} by packed")
    return "; ".join(wrong)
