"""``load_best_model_at_end``: everything that is said is about the model that is saved."""

from __future__ import annotations

import json
import logging

import pytest
from safetensors.torch import load_file
from transformers import TrainerCallback

from fastdaa.cli.summary import print_run
from fastdaa.train.best_model import BestModel, best_model

BEST = {
    "max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps",
    "load_best_model_at_end": True,
}  # fmt: skip


class _Losses(TrainerCallback):
    """Has evaluations find these losses, one after the other."""

    def __init__(self, *losses):
        self.losses = list(losses)

    def on_evaluate(self, args, state, control, metrics=None, **_):
        metrics["eval_loss"] = state.log_history[-1]["eval_loss"] = self.losses.pop(0)


@pytest.fixture
def trained(make_trainer, pairs):
    def train(*losses, **options):
        trainer = make_trainer(
            data=pairs(12), eval_dataset=pairs(4, seed=1), callbacks=[_Losses(*losses)],
            **{**BEST, "save_steps": 1, **options},
        )  # fmt: skip
        trainer.train()
        trainer.save_model()
        trainer.create_model_card()
        return trainer

    return train


def test_a_kl_below_zero_is_rounding():
    best = BestModel(2, 3, "eval_kl/token", -7.5e-9, greater=False)
    assert str(best) == "step 2 of 3, best by eval_kl/token 0 (lower is better)"


def test_card_table_and_record_are_about_the_best_step(trained, tmp_path, capsys, caplog):
    caplog.set_level(logging.INFO, "fastdaa")
    trainer = trained(3.0, 1.25, 2.0)
    folder = tmp_path / "out"
    saved, second = (load_file(f / "model.safetensors") for f in (folder, folder / "checkpoint-2"))
    assert all((saved[name] == second[name]).all() for name in saved)
    rows = [row for row in trainer.state.log_history if row["step"] == 2]
    values = {key: value for row in rows for key, value in row.items()}
    said = "step 2 of 3, best by eval_loss 1.25 (lower is better)"
    card = (folder / "README.md").read_text()
    assert f"The model is the checkpoint of {said}." in card
    assert f"| loss | {values['loss']:.4g} | 1.25 |" in card
    print_run(trainer, [("loss", "loss"), ("rewards/margins", "margin")])
    printed = capsys.readouterr().out
    assert f"saved model: that of {said}" in printed
    assert f"{values['rewards/margins']:,.4g}" in printed and " 1.25 " in printed
    assert json.loads((folder / "fastdaa_run.json").read_text())["best"] == 2
    assert f"the model is that of {said}" in caplog.text


def test_says_where_the_best_step_has_no_checkpoint(trained, tmp_path, caplog):
    trainer = trained(1.0, 3.0, 4.0, 5.0, save_steps=2, max_steps=4)
    assert best_model(trainer) is None
    assert "no checkpoint was written at the best step, 1; the model is that of the last" in (
        caplog.text
    )
    assert json.loads((tmp_path / "out" / "fastdaa_run.json").read_text())["best"] is None
    assert "last value of" in (tmp_path / "out" / "README.md").read_text()
