"""Runs of TRL's trainer and of the drop-in on the same, compared."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainerCallback

STEPS = 3
TIMES = ("epoch", "step_time", "eval_step_time")


class Gradients(TrainerCallback):
    """Keeps the gradients of every step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = model.named_parameters()
        self.steps.append({n: p.grad.clone() for n, p in named if p.grad is not None})


def train(make, trainer_class, **options):
    """A trained trainer and its gradients."""
    gradients = Gradients()
    torch.manual_seed(0)  # a new adapter is random
    trainer = make(trainer_class, callbacks=[gradients], **options)
    trainer.train()
    return trainer, gradients.steps


def compare(make, theirs, ours, make_options, steps=STEPS):
    """Train both on the same; ``make_options`` builds what a trainer may change, anew for each."""
    expected, expected_gradients = train(make, theirs, **make_options())
    trainer, gradients = train(make, ours, **make_options())
    assert len(gradients) == len(expected_gradients) == steps
    for step, wanted in zip(gradients, expected_gradients, strict=True):
        assert step.keys() == wanted.keys()
        for name, gradient in step.items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-5, msg=name)
    compare_rows(trainer.state.log_history, expected.state.log_history)
    return trainer


def compare_rows(rows, expected_rows):
    assert len(rows) == len(expected_rows)
    for row, expected in zip(rows, expected_rows, strict=True):
        assert row.keys() == expected.keys()
        for name in row.keys() - set(TIMES):
            if row[name] is None:  # a mean over nothing
                assert expected[name] is None, name
            elif not name.endswith(("_runtime", "_per_second")):
                assert row[name] == pytest.approx(expected[name], rel=1e-4, abs=2e-5), name
