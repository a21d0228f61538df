"""The losses named as in TRL have TRL's values and gradients."""

from __future__ import annotations

import importlib.metadata
import warnings
from types import SimpleNamespace

import pytest
import torch

from fastdaa.losses import Objective
from fastdaa.outputs import PairLogps

LENGTHS = torch.tensor([[4, 1, 6], [2, 5, 3]])
BETA = 0.3

CASES = {
    "sigmoid": ("sigmoid", {}),
    "hinge": ("hinge", {}),
    "ipo": ("ipo_norm", {}),
    "sigmoid_norm": ("sigmoid_norm", {}),
    "robust": ("robust", {"label_smoothing": 0.2}),
    "exo_pair": ("exo_pair", {"label_smoothing": 0.2}),
    "nca_pair": ("nca_pair", {}),
    "bco_pair": ("bco_pair", {}),
    "sppo_hard": ("sppo_hard", {}),
    "aot": ("aot", {"label_smoothing": 0.2}),
    "aot_unpaired": ("aot_unpaired", {"label_smoothing": 0.2}),
    "apo_zero": ("apo_zero", {}),
    "apo_down": ("apo_down", {}),
    "discopop": ("discopop", {"discopop_tau": 0.4}),
    "sft": ("sft", {}),
}
DIVERGENCES = [
    ("reverse_kl", 0.5),
    ("forward_kl", 0.5),
    ("js_divergence", 0.5),
    ("alpha_divergence", 0.3),
    ("alpha_divergence", 1.5),
    ("alpha_divergence", 1.0),
]


@pytest.fixture(scope="module")
def dpo_trainer():
    pytest.importorskip("trl", reason="TRL is not installed")
    version = importlib.metadata.version("trl")
    if version.split(".")[:2] not in (["1", "15"], ["1", "16"]):
        pytest.skip(
            f"DPOTrainer._compute_loss is private and known for TRL 1.15 and 1.16, not {version}"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl import DPOTrainer
    return DPOTrainer


def trl_loss(
    trainer, token_logps, mask, ref, loss_types, weights, label_smoothing, tau, divergence
):
    """TRL's own loss on given token log-probabilities, without a model or a trainer."""
    outputs = SimpleNamespace(
        log_probs=token_logps,
        entropy=torch.zeros_like(token_logps),
        mean_logits=torch.zeros_like(token_logps),
        is_top1=torch.zeros_like(token_logps, dtype=torch.bool),
        aux_loss=None,
    )
    model = lambda **_: outputs  # noqa: E731 - needs the attribute below
    model.training = True
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
    )
    state = SimpleNamespace(
        accelerator=accelerator, aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True,
        **divergence, use_weighting=False, beta=BETA, loss_types=loss_types,
        loss_weights=weights, label_smoothing=label_smoothing, _total_train_tokens=0, _tp_size=1,
        args=SimpleNamespace(discopop_tau=tau), model=model, ref_model=None,
        _metrics={"train": {k: [] for k in METRICS}, "eval": {}},
    )  # fmt: skip
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": ref[0],
        "ref_rejected_logps": ref[1],
    }
    return trainer._compute_loss(state, model, inputs, False)


METRICS = [
    *("entropy", "num_tokens", "mean_token_accuracy", "aux_loss"),
    *(
        f"{kind}/{side}"
        for kind in ("logits", "logps", "rewards")
        for side in ("chosen", "rejected")
    ),
    *("rewards/accuracies", "rewards/margins"),
]


def check_parity(trainer, trl_names, ours, weights, dtype=torch.float64, **hyperparameters):
    generator = torch.Generator().manual_seed(0)
    lengths = LENGTHS.flatten()  # all chosen, then all rejected, right padded, prompt of 2 tokens
    mask = torch.zeros(6, 9, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, 2 : 2 + length] = 1
    draws = [torch.rand(*s, generator=generator, dtype=torch.float64) for s in ((6, 8), (2, 3))]
    logps = (-3 * draws[0] * mask[:, 1:]).to(dtype)
    ref = (-1.5 * lengths.view(2, 3) - draws[1]).to(dtype)

    theirs = logps.clone().requires_grad_()
    smoothing, tau = (hyperparameters.get(k, 0.0) for k in ("label_smoothing", "discopop_tau"))
    divergence = {"f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5}
    divergence |= {k: v for k, v in hyperparameters.items() if k in divergence}
    expected = trl_loss(trainer, theirs, mask, ref, trl_names, weights, smoothing, tau, divergence)
    expected.backward()

    mine = logps.clone().requires_grad_()
    policy = PairLogps(*mine.sum(dim=1).view(2, 3), *LENGTHS)
    beta = {} if ours == ["sft"] else {"beta": BETA}
    objective = Objective.parse(ours, weights=weights, **beta, **hyperparameters)
    loss = objective(policy, PairLogps(*ref, *LENGTHS)).mean()
    loss.backward()

    # exo_pair: TRL holds epsilon in fp32.
    rtol = 1e-6 if "exo_pair" in ours or dtype == torch.float32 else 1e-12
    atol = 1e-7 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(loss, expected, rtol=rtol, atol=1e-12)
    torch.testing.assert_close(
        mine.grad * mask[:, 1:], theirs.grad * mask[:, 1:], rtol=rtol, atol=atol
    )


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_trl(dpo_trainer, name):
    ours, hyperparameters = CASES[name]
    check_parity(dpo_trainer, [name], [ours], [1.0], **hyperparameters)


@pytest.mark.parametrize(("kind", "alpha"), DIVERGENCES)
def test_divergences_are_those_of_trl(dpo_trainer, kind, alpha):
    # TRL has no alpha divergence in fp64.
    dtype = torch.float32 if kind == "alpha_divergence" else torch.float64
    given = {"f_divergence_type": kind, "f_alpha_divergence_coef": alpha}
    check_parity(dpo_trainer, ["sigmoid"], ["f_dpo"], [1.0], dtype, **given)


def test_a_mixture_is_that_of_trl(dpo_trainer):
    names = ["sigmoid", "bco_pair", "sft"]
    check_parity(dpo_trainer, names, names, [0.8, 0.2, 1.5])
