"""KL estimates of sampled answers, by hand and in expectation."""

from __future__ import annotations

import math

import pytest
import torch

from fastdaa.study.kl_samples import kl_estimates


def test_by_hand():
    ratios = torch.tensor([0.5, -0.2, 1.0])
    found = kl_estimates(ratios, torch.tensor([2, 1]), torch.tensor([0.1, 0.2, 0.4]))
    assert found["k1"].tolist() == pytest.approx([0.3, 1.0], abs=1e-6)
    assert found["rb"].tolist() == pytest.approx([0.3, 0.4], abs=1e-6)
    k3 = [math.exp(-0.3) - 1 + 0.3, math.exp(-1) - 1 + 1]
    assert found["k3"].tolist() == pytest.approx(k3, abs=1e-6)
    trlx = [math.exp(0.5) + math.exp(-0.2) - 2 - 0.3, math.e - 2]
    assert found["trlx"].tolist() == pytest.approx(trlx, abs=1e-6)
    assert {values.dtype for values in found.values()} == {torch.float64}


def test_expectations_over_one_token():
    """Over all outcomes of a token, weighted by the policy: k1, k3 and rb are KL, trlx is not."""
    policy, reference = (torch.randn(6, dtype=torch.float64).log_softmax(0) for _ in range(2))
    kl = (policy.exp() * (policy - reference)).sum()
    found = kl_estimates(policy - reference, torch.ones(6, dtype=torch.int64), kl.expand(6))
    mean = {name: float((policy.exp() * values).sum()) for name, values in found.items()}
    for name in ("k1", "k3", "rb"):
        assert mean[name] == pytest.approx(float(kl), rel=1e-12), name
    chi2 = float((policy.exp() ** 2 / reference.exp()).sum() - 1)
    assert mean["trlx"] == pytest.approx(chi2 - float(kl), rel=1e-12)


@pytest.mark.parametrize(
    ("ratios", "kls", "message"),
    [
        (torch.zeros(2, 2), None, r"log_ratios: expected \[4\], .* got \[2, 2\]"),
        (torch.zeros(4), torch.zeros(3), r"token_kls: expected \[4\]"),
    ],
    ids=["padded", "too few"],
)
def test_shapes_that_do_not_belong_together(ratios, kls, message):
    with pytest.raises(ValueError, match=message):
        kl_estimates(ratios, torch.tensor([3, 1]), kls)
