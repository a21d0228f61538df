"""Weights of 16 bits into which the optimizer's steps vanish are said before training."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from fastdaa.train.rounding import share_lost


def _weights(dtype, *values):
    model = nn.Module()
    model.weight = nn.Parameter(torch.tensor(values, dtype=dtype))
    return model


@pytest.mark.parametrize(
    ("dtype", "step", "share"),
    [
        # bf16: 1 has a neighbour 2^-7 above, so that steps up to 2^-8 are lost.
        pytest.param(torch.bfloat16, 2**-8, 0.5, id="bf16, lost at 1"),
        pytest.param(torch.bfloat16, 1.01 * 2**-8, 0.0, id="bf16, seen"),
        pytest.param(torch.bfloat16, 1e-6, 1.0, id="bf16, usual"),
        pytest.param(torch.float16, 2**-11, 0.5, id="fp16, lost at 1"),
        pytest.param(torch.float16, 1.01 * 2**-11, 0.0, id="fp16, seen"),
        pytest.param(torch.float32, 1e-9, 0.0, id="fp32 is not asked"),
    ],
)
def test_share(dtype, step, share):
    # Neighbours of 0.25 are a quarter as far away as those of 1.
    model = _weights(dtype, 1.0, 0.25)
    assert share_lost(model, step) == share


def test_only_what_is_trained_counts():
    model = _weights(torch.bfloat16, 1.0)
    model.adapter = nn.Parameter(torch.ones(4))
    assert share_lost(model, 1e-6) == 1.0
    model.weight.requires_grad = False
    assert share_lost(model, 1e-6) == 0.0


@pytest.mark.parametrize(
    ("dtype", "options", "warned"),
    [
        (torch.bfloat16, {"learning_rate": 1e-6}, True),
        (torch.float32, {"learning_rate": 1e-6}, False),
        (torch.bfloat16, {"learning_rate": 1e-2}, False),
        (torch.bfloat16, {"learning_rate": 1e-6, "optim": "sgd"}, False),
    ],
    ids=["bf16", "fp32", "large steps", "SGD"],
)
def test_one_warning(make_trainer, tiny_model, caplog, dtype, options, warned):
    trainer = make_trainer(model=tiny_model().to(dtype), **options)
    with caplog.at_level(logging.WARNING, "fastdaa"):
        trainer.train()
    said = "weights in bfloat16: a step of AdamW is about learning_rate 1e-06"
    assert caplog.text.count(said) == warned
    assert ("--dtype float32" in caplog.text) == warned
