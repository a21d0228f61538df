"""The objective kernel against ``fastdaa.losses`` far from where training starts.

``tests/test_loss_extremes.py`` holds the losses to the formulas of the papers there.
"""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")
from test_kernels_objective import DEVICE, VARIANTS

from fastdaa import BatchTotals, Objective, PairLogps
from fastdaa.losses import LOSSES, get_loss
from fastdaa.objective_kernel import evaluate_objective

INF = math.inf
RATIOS = [
    (0.0, 0.0), (1e-8, 0.0), (0.0, 1e-3), (140.0, 0.0), (-140.0, 0.0), (50.0, -250.0),
    (-250.0, 50.0), (-20.0, -20.0), (1e4, -1e4), (-1e4, 1e4),
]  # fmt: skip
EXCLUDED = [  # by the reference or by the policy
    ((-5.0, -6.0), (-INF, -7.0)),
    ((-5.0, -6.0), (-7.0, -INF)),
    ((-INF, -6.0), (-5.0, -7.0)),
    ((-5.0, -INF), (-5.0, -7.0)),
]
PAIRS = {
    case: (name, given)
    for case, (name, given) in VARIANTS.items()
    if name in LOSSES and LOSSES[name].level == "pair" and name != "daa"  # which are others
} | {
    "robust-clean": ("robust", {"label_smoothing": 0.0}),
    "exo-small": ("exo_pair", {"label_smoothing": 2.0**-20}),
    "discopop-1": ("discopop", {"discopop_tau": 1.0}),
    "slic_hf-0": ("slic_hf", {"regularization": 0.0}),
    "cpo-0": ("cpo", {"nll_weight": 0.0}),
    "f_dpo-alpha-near-1-fp32": (
        "f_dpo",
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1 - 1e-5},
    ),
}


def evaluate(case, policy, ref):
    """Losses and coefficients by the kernel, and by the losses in fp64."""
    name, given = PAIRS[case]
    values = get_loss(name).hyperparameters
    # What fp32 holds exactly, so that nothing but the formula is compared.
    exact = {"beta": 0.125, "label_smoothing": 0.125, "length_alpha": 0.25, "discopop_tau": 0.0625,
             "regularization": 0.125}  # fmt: skip
    objective = Objective.parse(name, **{k: v for k, v in exact.items() if k in values} | given)
    policy, ref = (torch.tensor(side, device=DEVICE) for side in (policy, ref))
    lengths = torch.tensor([[7, 4]], device=DEVICE).expand(len(policy), 2)
    totals = BatchTotals(16, 1024)
    got = evaluate_objective(
        objective, policy.flatten(), torch.ones_like(lengths).flatten(), totals=totals,
        ref_logps=ref.flatten(), completion_lengths=lengths.flatten(),
    )  # fmt: skip
    wide = policy.double().requires_grad_()
    sides = [PairLogps(*x.unbind(1), *lengths.unbind(1)) for x in (wide, ref.double())]
    losses = objective(*sides, totals)
    (slopes,) = torch.autograd.grad(losses.sum(), wide)
    return got.losses, got.coefficients.view(-1, 2), losses.detach().float(), slopes.float()


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("case", PAIRS)
def test_margins_near_far_and_infinite(case):
    policy, ref = zip(*EXCLUDED, strict=True)
    finite = RATIOS
    if not get_loss(PAIRS[case][0]).needs_ref:
        finite = [(min(a, 0.0) - 1e-3, min(b, 0.0) - 1e-5) for a, b in RATIOS]
    losses, slopes, *truth = evaluate(case, [*finite, *policy], [(0.0, 0.0)] * len(RATIOS) + [*ref])
    assert not losses.isnan().any() and not slopes.isnan().any()
    torch.testing.assert_close(losses, truth[0], rtol=3e-7, atol=1e-37)
    torch.testing.assert_close(slopes, truth[1], rtol=3e-7, atol=1e-37)


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.level == "token"])
def test_advantages_near_and_far(name):
    objective = Objective.parse(name, lam=0.5)
    advantages = torch.tensor([0.0, 1e-8, -50.0, 1e4, -1e4, -INF, math.nan, 2.0], device=DEVICE)
    lengths = torch.ones(8, dtype=torch.int64, device=DEVICE)
    logps, ref = torch.linspace(-1e4, -1e-3, 8, device=DEVICE), torch.zeros(8, device=DEVICE)
    got = evaluate_objective(
        objective, logps, lengths, totals=BatchTotals(4, 4, 8), ref_token_logps=ref,
        advantages=advantages,
    )  # fmt: skip
    wide = logps.double().requires_grad_()
    losses = objective.token_losses(wide, ref.double(), lengths, advantages=advantages.double())
    (slopes,) = torch.autograd.grad(losses.sum(), wide)
    for ours, truth in ((got.losses, losses.detach()), (got.token_coefficients, slopes)):
        torch.testing.assert_close(ours, truth.float(), rtol=3e-7, atol=1e-37, equal_nan=True)
