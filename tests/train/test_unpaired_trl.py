"""The same model, rows and order: what TRL's KTOTrainer and this trainer compute."""

from __future__ import annotations

import importlib.metadata
import os
import warnings

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from word_files import WORDS, word_tokenizer

from fastdaa.train import UnpairedConfig, UnpairedTrainer
from fastdaa.train.callbacks import Curves

STEPS = 4
METRICS = (
    *("loss", "grad_norm", "learning_rate", "entropy", "kl", "rewards/margins"),
    *(
        f"{kind}/{side}"
        for kind in ("rewards", "logps", "logits")
        for side in ("chosen", "rejected")
    ),
)
LOSSES = {"kto": "kto", "apo_zero_unpaired": "apo_zero"}


@pytest.fixture(scope="module")
def trl():
    pytest.importorskip("trl", reason="TRL is not installed")
    version = importlib.metadata.version("trl")
    if version.split(".")[:2] != ["1", "16"]:
        pytest.skip(f"formulas and metrics are those of TRL 1.16, not {version}")
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl import KTOConfig, KTOTrainer
    return KTOConfig, KTOTrainer


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(0)

    def text(longest):
        length = int(torch.randint(1, longest, (), generator=generator))
        picked = torch.randint(len(WORDS), (length,), generator=generator).tolist()
        return " ".join(WORDS[i] for i in picked)

    # Batches of 4 with 3, 1, 2 and 3 desirable ones.
    labels = [1, 0, 1, 1, 0, 0, 1, 0, 1, 0, 1, 0, 1, 1, 1, 0]
    return Dataset.from_list(
        [{"prompt": text(9), "completion": " " + text(9), "label": bool(n)} for n in labels]
    )


class Gradients(TrainerCallback):
    """Keeps the gradients of every step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters()})


def logged(trainer):
    return [row for row in trainer.state.log_history if "loss" in row]


@pytest.fixture
def agree(trl, tiny_model, rows, tmp_path):
    """``agree(loss, options, ours, policy, ref, **model)``: train both, compare, and give our rows.

    ``policy`` and ``ref`` are the ranges of the models' initial weights, and ``model`` what both
    models are.
    """

    def compare(loss, options, ours, policy, ref, **model):
        weights = {name: value for name, value in options.items() if name.endswith("weight")}
        rest = {name: value for name, value in options.items() if name not in weights}
        common = {
            "per_device_train_batch_size": 4, "max_steps": STEPS, "learning_rate": 3e-3,
            "lr_scheduler_type": "linear", "train_sampling_strategy": "sequential", "beta": 0.4,
            "report_to": "none", "logging_steps": 1, "save_strategy": "no", "use_cpu": True,
            "bf16": False, "disable_tqdm": True, **rest,
        }  # fmt: skip
        gradients = [Gradients(), Gradients()]
        config, trainer_class = trl
        theirs = trainer_class(
            tiny_model(initializer_range=policy, **model),
            ref_model=tiny_model(initializer_range=ref, **model),
            args=config(
                output_dir=str(tmp_path / "trl"), loss_type=loss, gradient_checkpointing=False,
                dataloader_pin_memory=False, **common, **weights,
            ),
            train_dataset=rows,
            processing_class=word_tokenizer(),
            callbacks=[gradients[0]],
        )  # fmt: skip
        theirs.train()
        mine = UnpairedTrainer(
            tiny_model(initializer_range=policy, **model),
            ref_model=tiny_model(initializer_range=ref, **model),
            args=UnpairedConfig(
                output_dir=str(tmp_path / "ours"), loss_type=LOSSES[loss], loss_kwargs=weights,
                **common, **ours,
            ),
            train_dataset=rows,
            processing_class=word_tokenizer(),
            callbacks=[gradients[1]],
        )  # fmt: skip
        mine.remove_callback(Curves)
        mine.train()
        assert len(logged(mine)) == len(logged(theirs)) == STEPS
        for row, expected in zip(logged(mine), logged(theirs), strict=True):
            for name in (*METRICS, *(("aux_loss",) if model else ())):
                if name != "kl" or loss == "kto":
                    assert row[name] == pytest.approx(expected[name], abs=1e-4), (row["step"], name)
        for got, wanted in zip(*(kept.steps for kept in reversed(gradients)), strict=True):
            for name, gradient in wanted.items():
                torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-5)
        return logged(mine)

    return compare


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("loss", "options", "ours"),
    [
        pytest.param("kto", {}, {}, id="kto"),
        pytest.param("kto", {}, {"layout": "padded"}, id="padded"),
        pytest.param("kto", {}, {"tokens_per_pack": 24}, id="packs"),
        pytest.param("kto", {}, {"impl": "recompute"}, id="recompute"),
        pytest.param("kto", {"desirable_weight": 1.3, "undesirable_weight": 0.6}, {}, id="weights"),
        # A mismatched completion is cut with its own prompt, too, so z0 would differ.
        pytest.param("apo_zero_unpaired", {"max_length": 9}, {}, id="truncated"),
        pytest.param("apo_zero_unpaired", {"desirable_weight": 0.7}, {}, id="apo_zero"),
    ],
)
def test_steps_agree_with_trl(agree, loss, options, ours):
    """The reference has larger weights than the policy, so that z0 is above 0."""
    steps = agree(loss, options, ours, policy=0.1, ref=0.3)
    assert loss != "kto" or min(row["kl"] for row in steps) > 1e-2


@pytest.mark.filterwarnings("ignore")
def test_mixture_of_experts(agree):
    """The balance of experts is that of the policy on the completions, not on mismatched ones."""
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5}
    experts = {"family": "Mixtral", "output_router_logits": True, **sizes}
    steps = agree("kto", {}, {"layout": "padded"}, policy=0.1, ref=0.3, **experts)
    assert steps[0]["aux_loss"] > 0


@pytest.mark.filterwarnings("ignore")
def test_a_baseline_below_0_is_0_as_in_trl(agree):
    steps = agree("kto", {}, {}, policy=0.3, ref=0.2)
    assert steps[0]["kl"] == 0
