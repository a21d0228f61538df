"""The same model, pairs and order: losses and metrics of TRL's DPOTrainer and of this one."""

from __future__ import annotations

import importlib.metadata
import json
import os
import warnings

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(20)]
STEPS = 5
# TRL's name of a loss, ours.
LOSSES = {"sigmoid": "dpo", "ipo": "ipo_norm", "hinge": "hinge", "sft": "sft"}
METRICS = (
    *("loss", "grad_norm", "learning_rate", "entropy", "mean_token_accuracy"),
    *(f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")),
    *(f"{kind}/{side}" for kind in ("logps", "logits") for side in ("chosen", "rejected")),
)


@pytest.fixture(scope="module")
def trl():
    pytest.importorskip("trl", reason="TRL is not installed")
    version = importlib.metadata.version("trl")
    if tuple(map(int, version.split(".")[:2])) < (1, 15):
        pytest.skip(f"metrics are defined as in TRL 1.15 and later, not {version}")
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl import DPOConfig, DPOTrainer
    return DPOConfig, DPOTrainer


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>",
    )  # fmt: skip


@pytest.fixture(scope="module")
def texts():
    generator = torch.Generator().manual_seed(0)

    def text(longest):
        length = int(torch.randint(1, longest, (), generator=generator))
        picked = torch.randint(len(WORDS), (length,), generator=generator).tolist()
        return " ".join(WORDS[i] for i in picked)

    return Dataset.from_list(
        [
            {"prompt": text(12), "chosen": " " + text(9), "rejected": " " + text(9)}
            for _ in range(4 * STEPS)
        ]
    )


def logged(trainer):
    return [row for row in trainer.state.log_history if "loss" in row]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("losses", "accumulation", "weighting"),
    [
        pytest.param(["sigmoid"], 1, {}, id="sigmoid"),
        pytest.param(["ipo"], 1, {}, id="ipo"),
        pytest.param(["hinge"], 1, {}, id="hinge"),
        pytest.param(["sigmoid"], 2, {}, id="accumulated"),
        pytest.param(["sigmoid"], 1, {"use_weighting": True}, id="wpo"),
        pytest.param(["sigmoid", "sft"], 1, {"ld_alpha": 0.4}, id="ld_dpo"),
        pytest.param(["ipo"], 2, {"ld_alpha": 0.0, "use_weighting": True}, id="both"),
    ],
)
def test_five_steps_agree_with_trl(
    trl, make_trainer, tiny_model, tokenizer, texts, tmp_path, losses, accumulation, weighting
):
    common = {
        **weighting,
        "per_device_train_batch_size": 4 // accumulation,
        "gradient_accumulation_steps": accumulation,
        "max_steps": STEPS,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "linear",
        "train_sampling_strategy": "sequential",
        "beta": 0.2,
    }
    ours = make_trainer(
        data=texts, processing_class=tokenizer, loss_type=[LOSSES[name] for name in losses],
        layout="prefix_shared", tokens_per_pack=60, **common,
    )  # fmt: skip
    ours.train()
    config, trainer_class = trl
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")  # from which TRL loads the reference
    model.config._name_or_path = str(tmp_path / "model")
    theirs = trainer_class(
        model,
        args=config(
            output_dir=str(tmp_path / "trl"), loss_type=losses, max_length=1024, report_to="none",
            logging_steps=1, save_strategy="no", use_cpu=True, bf16=False,
            gradient_checkpointing=False, dataloader_pin_memory=False, disable_tqdm=True, **common,
        ),
        train_dataset=texts,
        processing_class=tokenizer,
    )  # fmt: skip
    theirs.train()
    assert len(logged(ours)) == len(logged(theirs)) == STEPS
    for row, expected in zip(logged(ours), logged(theirs), strict=True):
        for name in METRICS:
            assert row[name] == pytest.approx(expected[name], abs=1e-4), (row["step"], name)
    margins = [abs(row["rewards/margins"]) for row in logged(ours)]
    assert margins[0] == 0 and max(margins) > 1e-2, json.dumps(margins)
