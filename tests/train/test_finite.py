"""A run whose numbers are no longer finite stops, and what was good stays."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from fastdaa.train.finite import all_finite, check_row

HUGE = {"learning_rate": 1e30, "max_steps": 6, "lr_scheduler_type": "constant"}


@pytest.mark.parametrize(
    "options",
    [{}, {"logging_nan_inf_filter": True}, {"max_grad_norm": 0.0}],
    ids=["defaults", "filtered loss", "no clipping"],
)
def test_stops_at_the_first_row_that_is_not_finite(make_trainer, tmp_path, options):
    trainer = make_trainer(**HUGE, **options)
    with pytest.raises(FloatingPointError, match=r"step 2: expected finite .*no checkpoint"):
        trainer.train()
    rows = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2]


class _Breaks:
    """Makes a weight infinite behind a step, in which all numbers were finite."""

    def __init__(self, step):
        from transformers import TrainerCallback

        class Callback(TrainerCallback):
            def on_step_end(self, args, state, control, model=None, **_):
                if state.global_step == step:
                    next(model.parameters()).data[0, 0] = math.inf

        self.callback = Callback()


@pytest.mark.parametrize("rows", ["steps", "no"])
def test_no_checkpoint_of_broken_weights_and_the_good_one_is_named(make_trainer, tmp_path, rows):
    trainer = make_trainer(
        max_steps=6, save_strategy="steps", save_steps=2, save_total_limit=1,
        logging_strategy=rows, logging_steps=6, callbacks=[_Breaks(3).callback],
    )  # fmt: skip
    with pytest.raises(FloatingPointError, match=r"step 4: expected finite weights .*checkpoint-2"):
        trainer.train()
    assert sorted(p.name for p in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-2"]


def test_the_model_is_not_saved_with_broken_weights(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=2, logging_strategy="no", callbacks=[_Breaks(2).callback])
    trainer.train()
    with pytest.raises(FloatingPointError, match="step 2: expected finite weights to save"):
        trainer.save_model()
    assert not (tmp_path / "out" / "model.safetensors").exists()


class _Fake:
    def __init__(self, precision, folder):
        self.accelerator = type("A", (), {"mixed_precision": precision})
        self.state = type("S", (), {"global_step": 7})
        self.args = type("O", (), {"output_dir": folder})


@pytest.mark.parametrize(
    ("precision", "row", "stops"),
    [
        ("no", {"loss": 1.0, "grad_norm": math.inf}, True),
        ("no", {"loss": math.nan, "grad_norm": 1.0}, True),
        ("no", {"loss": 1.0, "grad_norm": 1.0}, False),
        ("no", {"loss": 1.0}, False),
        ("fp16", {"loss": 1.0, "grad_norm": math.inf}, False),
        ("fp16", {"loss": math.inf, "grad_norm": 1.0}, True),
    ],
)
def test_what_counts_in_a_row(tmp_path, precision, row, stops):
    trainer = _Fake(precision, tmp_path)
    if not stops:
        check_row(trainer, row)
        return
    with pytest.raises(FloatingPointError, match="step 7"):
        check_row(trainer, row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_weights_of_all_dtypes(dtype, value):
    model = nn.Linear(4, 4).to(dtype)
    model.empty = nn.Parameter(torch.empty(0))
    assert all_finite(model)
    model.bias.data[3] = value
    assert not all_finite(model)
    model.bias.requires_grad = False  # not trained
    assert all_finite(model)


def test_the_command_ends_with_one_line(monkeypatch, capsys):
    from fastdaa.cli import main, train

    def broken(argv):
        raise FloatingPointError("step 2: expected finite numbers, got loss nan")

    monkeypatch.setattr(train, "run", broken)
    assert main(["train"]) == 2
    assert capsys.readouterr().err.endswith(
        "error: step 2: expected finite numbers, got loss nan\n"
    )
