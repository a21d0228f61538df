"""Rewards of tokens, running deviation, missing EOS, and the controllers of the KL term."""

from __future__ import annotations

import pytest
import torch

from fastdaa.online.controllers import AdaptiveKL, FixedKL
from fastdaa.online.rewards import RunningStd, shape_scores, token_rewards

LENGTHS = torch.tensor([2, 1, 3])


def test_score_at_the_last_token() -> None:
    rewards = token_rewards(torch.tensor([1.0, 2.0, 3.0]), LENGTHS)
    assert rewards.tolist() == [0, 1, 2, 0, 0, 3]


def test_kl_at_every_token_and_the_score_at_the_last() -> None:
    logratios = torch.tensor([1.0, -2.0, 4.0, 0.0, 2.0, 6.0])
    rewards = token_rewards(
        torch.tensor([1.0, 2.0, 3.0]), LENGTHS, logratios=logratios, kl_coef=0.5
    )
    assert rewards.tolist() == [-0.5, 2.0, 0.0, 0.0, -1.0, 0.0]


def test_running_deviation_is_that_of_everything_so_far() -> None:
    scores = 3 + 2 * torch.randn(50, generator=torch.Generator().manual_seed(0))
    running = RunningStd()
    for end, part in ((10, scores[:10]), (11, scores[10:11]), (50, scores[11:])):
        assert running.update(part) == pytest.approx(float(scores[:end].double().std()), rel=1e-12)
    again = RunningStd()
    again.load_state_dict(running.state_dict())
    assert again.update(scores[:7]) == running.update(scores[:7])


@pytest.mark.parametrize("scores", [[5.0], [2.0, 2.0]], ids=["one", "equal"])
def test_unknown_deviation_leaves_the_scale(scores: list[float]) -> None:
    assert RunningStd().update(torch.tensor(scores)) == 1.0


def test_scaling_then_clipping_then_the_penalty() -> None:
    raw, finished = torch.tensor([-4.0, 0.0, 4.0]), torch.tensor([True, False, False])
    scores = shape_scores(
        raw, finished, running=RunningStd(), clip=0.5, missing_eos_penalty=0.25
    )  # the deviation is 4
    assert scores.tolist() == [-0.5, -0.25, 0.25]
    assert torch.equal(shape_scores(raw, finished), raw)


@pytest.mark.parametrize(
    ("kl", "after"),
    # 0.1 * (1 + clip(kl / 6 - 1, +-0.2) * 100 / 1000)
    [(6.0, 0.1), (6.6, 0.101), (60.0, 0.102), (0.0, 0.098)],
    ids=["on-target", "a-little-above", "far-above", "far-below"],
)
def test_adaptive_controller(kl: float, after: float) -> None:
    controller = AdaptiveKL(initial=0.1, target=6.0, horizon=1000)
    controller.update(kl, samples=100)
    assert controller.coefficient == pytest.approx(after, rel=1e-12)
    again = AdaptiveKL(initial=0.1, target=6.0, horizon=1000)
    again.load_state_dict(controller.state_dict())
    assert again.coefficient == controller.coefficient


def test_fixed_controller() -> None:
    controller = FixedKL(0.3)
    controller.update(50.0, samples=1000)
    assert controller.coefficient == 0.3


def test_an_adaptive_coefficient_of_0_would_stay_0() -> None:
    with pytest.raises(ValueError, match="initial: expected a number above 0"):
        AdaptiveKL(initial=0.0, target=6.0, horizon=1000)
