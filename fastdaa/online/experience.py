"""From the policy to experience: sample, score, ask reference and critic, estimate advantages."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdaa.counted import counted
from fastdaa.online.advantages import gae
from fastdaa.online.config import OnlineConfig
from fastdaa.online.models import Models
from fastdaa.online.packs import packs_of_process
from fastdaa.online.pieces import whole
from fastdaa.online.ranks import add_up, of_the_first, processes, share
from fastdaa.online.rewards import RunningStd, sequence_sums, shape_scores, token_rewards
from fastdaa.online.scoring import TokenScores, score_tokens, score_values
from fastdaa.online.types import Completions, Experience, RewardSource, Rollouts, RolloutSource
from fastdaa.train.backbone import causal_lm


class Collected(NamedTuple):
    """Experience, and the metrics of its rollouts."""

    experience: Experience
    metrics: dict[str, float]


def sample(
    source: RolloutSource, policy: nn.Module, prompts: Sequence[Tensor], seed: int
) -> Completions:
    """Completions of the source, checked; of several processes those of the first count.

    Raises:
        ValueError: not one completion of at least one token for every prompt.
    """
    with whole(policy):
        completions = source.sample(policy, prompts, seed)
    found = len(completions.completion_ids)
    if found != len(prompts) or len(completions.finished) != found:
        raise ValueError(
            f"rollouts: expected {counted(len(prompts), 'completion')}, one a prompt, got "
            f"{found} and {counted(len(completions.finished), 'mark')} of whether they are finished"
        )
    completions = of_the_first(completions)
    empty = [index for index, ids in enumerate(completions.completion_ids) if len(ids) == 0]
    if empty:
        raise ValueError(f"rollouts: expected at least one token each, got none in {empty[:5]}")
    return completions


def raw_scores(
    source: RewardSource,
    prompts: Sequence[Tensor],
    completions: Completions,
    tokenizer: Any = None,
    device: torch.device | None = None,
) -> Tensor:
    """``[S]`` fp64 rewards of the source, which reads text where there is a tokenizer; on the CPU.

    Args:
        device: over which several processes talk, each of which asks for its share.

    Raises:
        ValueError: the source did not give one finite number a completion.
    """
    rewards = torch.zeros(len(prompts), dtype=torch.float64)
    mine = share([len(ids) for ids in completions.completion_ids])
    if mine:
        asked = [prompts[i] for i in mine], [completions.completion_ids[i] for i in mine]
        rewards[mine] = _rewards_of(source, *asked, tokenizer)
    return add_up(rewards, device or rewards.device)


def _rewards_of(
    source: RewardSource, prompts: list[Tensor], answers: list[Tensor], tokenizer: Any
) -> Tensor:
    texts = None
    if tokenizer is not None:
        sides = (
            tokenizer.batch_decode(side, skip_special_tokens=True) for side in (prompts, answers)
        )
        texts = list(zip(*sides, strict=True))
    raw = torch.as_tensor(source.score(prompts, answers, texts))
    if raw.shape != (len(prompts),) or not bool(torch.isfinite(raw).all()):
        raise ValueError(
            f"reward: expected {counted(len(prompts), 'finite number')}, one a completion, got "
            f"shape {list(raw.shape)}, of which {int((~torch.isfinite(raw)).sum())} not finite"
        )
    return raw.detach().cpu().double()


def score_rollouts(
    source: RewardSource,
    prompts: Sequence[Tensor],
    completions: Completions,
    config: OnlineConfig,
    running: RunningStd | None,
    tokenizer: Any = None,
    device: torch.device | None = None,
) -> Rollouts:
    """Completions with their scores; the arguments as those of :func:`raw_scores`.

    Raises:
        ValueError: the source did not give one finite number a completion.
    """
    raw = raw_scores(source, prompts, completions, tokenizer, device).float()
    finished = completions.finished.bool().cpu()
    scores = shape_scores(
        raw, finished, running=running, clip=config.reward_clip,
        missing_eos_penalty=config.missing_eos_penalty,
    )  # fmt: skip
    return Rollouts(list(prompts), completions.completion_ids, finished, scores, raw)


def assess(
    models: Models, rollouts: Rollouts, config: OnlineConfig, kl_coef: float
) -> tuple[Experience, TokenScores, TokenScores]:
    """Experience, and the token scores of policy and reference behind it."""
    policy, critic = models.policy, models.critic
    device = causal_lm(policy).device
    lengths = rollouts.lengths
    packs = packs_of_process(
        rollouts.prompt_ids, rollouts.completion_ids,
        # Without gradient nothing is kept: what a minibatch needs at once is enough.
        tokens_per_pack=config.tokens_per_pack or _minibatch_tokens(rollouts, config),
        attention=config.attention, device=device, in_step=config.fsdp,
    )  # fmt: skip
    options: dict[str, Any] = {
        "temperature": config.temperature,
        "engine": config.head_engine,
        "max_bytes": config.head_max_bytes,
    }
    with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
        shared = critic if critic.shared else None
        policy_scores = score_tokens(policy, packs, lengths, critic=shared, **options)
        with models.as_reference() as reference:
            ref_scores = score_tokens(reference, packs, lengths, **options)
        values = policy_scores.values if critic.shared else score_values(critic, packs, lengths)
    assert values is not None
    logratios = policy_scores.logps - ref_scores.logps if config.algorithm == "ppo" else None
    rewards = token_rewards(rollouts.scores, lengths, logratios=logratios, kl_coef=kl_coef)
    advantages, returns = gae(
        rewards, values, lengths, gamma=config.gamma, gae_lambda=config.gae_lambda
    )
    experience = Experience(
        rollouts, policy_scores.logps, ref_scores.logps, values, advantages, returns
    )
    return experience, policy_scores, ref_scores


def collect(
    models: Models,
    prompts: Sequence[Tensor],
    sources: tuple[RolloutSource, RewardSource],
    config: OnlineConfig,
    *,
    seed: int,
    kl_coef: float,
    running: RunningStd | None = None,
    tokenizer: Any = None,
) -> Collected:
    """One iteration's experience, and what can be said of it.

    Args:
        prompts: one for every rollout.
        seed: of the rollouts.
        kl_coef: what a nat of KL costs, for PPO.
        running: deviation of the scores so far, if they are scaled by it; takes in these.
        tokenizer: for reward sources that read text.
    """
    began = time.perf_counter()
    completions = sample(sources[0], models.policy, prompts, seed)
    sampled = time.perf_counter()
    device = causal_lm(models.policy).device
    rollouts = score_rollouts(sources[1], prompts, completions, config, running, tokenizer, device)
    scored = time.perf_counter()
    experience, policy_scores, ref_scores = assess(models, rollouts, config, kl_coef)
    metrics = _metrics(experience, policy_scores, ref_scores, config, kl_coef)
    tokens = int(rollouts.lengths.sum())
    metrics |= {
        "rollout_tokens_per_second": tokens / max(sampled - began, 1e-9),
        "time/rollouts": sampled - began,
        "time/reward": scored - sampled,
        "time/models": time.perf_counter() - scored,
    }
    return Collected(experience, metrics)


def _metrics(
    experience: Experience,
    policy_scores: TokenScores,
    ref_scores: TokenScores,
    config: OnlineConfig,
    kl_coef: float,
) -> dict[str, float]:
    rollouts, lengths = experience.rollouts, experience.lengths
    kl = float(sequence_sums(policy_scores.logps - ref_scores.logps, lengths).mean())
    residual = experience.returns - experience.values
    variance = float(experience.returns.var(correction=0))
    explained = 1 - float(residual.var(correction=0)) / variance if variance > 0 else 0.0
    score = float(rollouts.scores.mean())
    metrics = {
        "objective/kl": kl,
        "objective/entropy": float(sequence_sums(policy_scores.entropy, lengths).mean()),
        "objective/scores": score,
        "objective/raw_scores": float(rollouts.raw_scores.mean()),
        "objective/rlhf_reward": score - (kl_coef * kl if config.algorithm == "ppo" else 0.0),
        "policy/token_entropy": float(policy_scores.entropy.mean()),
        "policy/max_prob": float(policy_scores.max_prob.mean()),
        "ref/token_entropy": float(ref_scores.entropy.mean()),
        "val/explained_variance": explained,
        "completions/length": float(lengths.double().mean()),
        "completions/finished": float(rollouts.finished.double().mean()),
    }
    if config.algorithm == "ppo":
        metrics["objective/kl_coef"] = kl_coef
    return metrics


def _minibatch_tokens(rollouts: Rollouts, config: OnlineConfig) -> int:
    """A process's share of a minibatch of average length."""
    sequences = max(len(rollouts.prompt_ids), 1) * processes()
    return max(1, sum(rollouts.sizes) * config.minibatch // sequences)
