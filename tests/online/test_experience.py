"""What is logged about rollouts, against numbers from materialised logits."""

from __future__ import annotations

import copy

import pytest
import torch

from fastdaa.online.config import OnlineConfig
from fastdaa.online.critic import Critic
from fastdaa.online.experience import collect
from fastdaa.online.models import prepare_models
from fastdaa.online.types import Completions

FINISHED = torch.tensor([True, False, True, True, False])


class Given:
    """Completions and rewards that are there already."""

    def __init__(self, completions, rewards):
        self.completions, self.rewards = completions, rewards

    def sample(self, model, prompts, seed):
        return Completions(self.completions, FINISHED)

    def score(self, prompt_ids, completion_ids, texts=None):
        return self.rewards


def config(**changes):
    return OnlineConfig(output_dir=None, reward_scaling="none", max_new_tokens=9, **changes)


@pytest.fixture
def collected(tiny_policy, sequences):
    """Experience and metrics, with the policy, the reference and the token log-probs of both."""

    def build(settings, rewards, critic=None):
        prompts, completions = sequences(5)
        policy, reference = tiny_policy(0), tiny_policy(1)
        logps = []
        for model in (policy, reference):
            rows = []
            for prompt, completion in zip(prompts, completions, strict=True):
                with torch.no_grad():
                    logits = model(input_ids=torch.cat([prompt, completion])[None]).logits[0]
                rows.append(logits[len(prompt) - 1 : -1].double().log_softmax(-1))
            logps.append(rows)
        models = prepare_models(copy.deepcopy(policy), reference, critic, settings, 9)
        given = Given(completions, rewards)
        found = collect(models, prompts, (given, given), settings, seed=0, kl_coef=0.3)
        return found, completions, logps

    return build


def of_tokens(rows, completions):
    """The log-probs of the sampled tokens, a tensor a sequence."""
    return [row.gather(1, ids[:, None])[:, 0] for row, ids in zip(rows, completions, strict=True)]


def test_metrics_by_hand(collected, tiny_policy):
    critic = Critic(tiny_policy(0))
    torch.nn.init.normal_(critic.head.layers[-1].weight)
    rewards = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.5])
    settings = config(algorithm="ppo", missing_eos_penalty=1.0)
    (experience, metrics), completions, (policy, reference) = collected(settings, rewards, critic)
    ratios = zip(of_tokens(policy, completions), of_tokens(reference, completions), strict=True)
    kl = torch.stack([(ours - theirs).sum() for ours, theirs in ratios]).mean()
    entropies = [-(row.exp() * row).sum(-1) for row in policy]
    residual = experience.returns - experience.values
    explained = 1 - residual.var(correction=0) / experience.returns.var(correction=0)
    expected = {
        "objective/kl": kl,
        "objective/entropy": torch.stack([entropy.sum() for entropy in entropies]).mean(),
        "objective/raw_scores": 0.6,
        "objective/scores": 0.6 - 2 / 5,
        "objective/rlhf_reward": 0.2 - 0.3 * kl,
        "objective/kl_coef": 0.3,
        "policy/token_entropy": torch.cat(entropies).mean(),
        "policy/max_prob": torch.cat([row.exp().amax(-1) for row in policy]).mean(),
        "ref/token_entropy": torch.cat([-(row.exp() * row).sum(-1) for row in reference]).mean(),
        "val/explained_variance": explained,
        "completions/length": sum(map(len, completions)) / 5,
        "completions/finished": 3 / 5,
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(float(value), rel=1e-4), name
    assert abs(float(explained)) > 0.01


def test_nothing_to_explain_and_no_cost_of_kl(collected):
    """Without rewards and with the critic's first values, 0, all returns are the same."""
    (_, metrics), _, _ = collected(config(algorithm="apa"), torch.zeros(5))
    assert metrics["val/explained_variance"] == 0
    assert metrics["objective/rlhf_reward"] == 0 != metrics["objective/kl"]
    assert "objective/kl_coef" not in metrics
