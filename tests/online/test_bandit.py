"""On-policy APA with the real update code ends where theory says, on a bandit of one state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from fastdaa.losses import apa
from fastdaa.online.config import OnlineConfig
from fastdaa.online.critic import Critic
from fastdaa.online.experience import collect
from fastdaa.online.models import Models
from fastdaa.online.types import Completions
from fastdaa.online.update import Minibatch, Updater
from fastdaa.train.backbone import install_head_task
from fastdaa.train.references import frozen_copy

ACTIONS, LAM = 6, 0.5
REWARDS = torch.tensor([0.0, 0.6, -0.4, 0.3, -0.9, 0.2])
STATE = torch.tensor([0])


class _Config(PretrainedConfig):
    model_type = "bandit"

    def __init__(self, **kwargs: Any) -> None:
        self.hidden_size, self.vocab_size = 8, ACTIONS
        super().__init__(**kwargs)


class _Backbone(PreTrainedModel):
    """The state's embedding, and nothing else: an action's log-probs are a softmax of a table."""

    config_class = _Config

    def __init__(self, config: _Config) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)

    def forward(self, input_ids: Tensor, **kwargs: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=self.embedding(input_ids))


class _Bandit(PreTrainedModel):
    config_class = _Config
    base_model_prefix = "model"

    def __init__(self, config: _Config) -> None:
        super().__init__(config)
        self.model = _Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, ACTIONS, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        return self.lm_head(self.model(input_ids).last_hidden_state)

    def logps(self) -> Tensor:
        with torch.no_grad():
            return self(STATE)[0].double().log_softmax(-1)


class _InProportion:
    """Every action as often as the policy takes it, rounded: no noise of sampling."""

    def sample(self, model: Any, prompts: Sequence[Tensor], seed: int) -> Completions:
        cumulative = model.logps().exp().cumsum(0)
        points = (torch.arange(len(prompts), dtype=torch.float64) + 0.5) / len(prompts)
        actions = torch.searchsorted(cumulative, points).clamp(max=ACTIONS - 1)
        return Completions(list(actions[:, None]), torch.ones(len(prompts), dtype=torch.bool))


class _Rewards:
    def score(self, prompt_ids: Any, completion_ids: Sequence[Tensor], texts: Any = None) -> Tensor:
        return REWARDS[torch.cat(list(completion_ids))]


def test_fixed_point_and_loss_floor() -> None:
    torch.manual_seed(0)
    policy = _Bandit(_Config())
    reference = frozen_copy(policy)
    ref_logps = policy.logps()
    samples, steps = 512, 150
    config = OnlineConfig(
        output_dir=None, algorithm="apa", kl_lambda=LAM, rollouts_per_iteration=samples,
        minibatch=samples, epochs=1, iterations=steps, learning_rate=3e-2, adam_beta2=0.999,
        lr_scheduler_type="linear", reward_scaling="none", critic="shared", vf_coef=0.0,
        max_grad_norm=0.0,
    )  # fmt: skip
    for model in (policy, reference):
        install_head_task(model)
    # Never trained, it stays at 0: the advantage of an action is its reward.
    models = Models(policy, reference, Critic(policy, shared=True))
    updater = Updater(policy, models.critic, config)
    sources = (_InProportion(), _Rewards())
    for step in range(steps):
        collected = collect(models, [STATE] * samples, sources, config, seed=step, kl_coef=0.0)
        everything = Minibatch(0, torch.arange(samples))
        loss = float(updater.step(collected.experience, everything)["loss/policy"])

    tilted = ref_logps + REWARDS.double() / LAM
    optimum, log_z = tilted.softmax(0), float(tilted.logsumexp(0))
    start = float((ref_logps.exp() - optimum).abs().max())
    assert start > 0.1
    assert float((policy.logps().exp() - optimum).abs().max()) < 1e-3
    # E[(log Z)^2], which is not 0.
    assert log_z**2 > 0.01
    assert abs(loss - log_z**2) < 1e-3
    exact = policy.logps()
    assert float((exact.exp() * apa(exact, ref_logps, REWARDS.double(), lam=LAM)).sum()) > 0.01
