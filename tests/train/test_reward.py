"""Reward models: the Bradley-Terry loss, where rewards are read, and what is saved."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from fastdaa.train.reward import RewardTrainer
from fastdaa.train.reward_models import load_reward_model
from fastdaa.train.stage_config import RewardConfig

SIDES = ("chosen_ids", "rejected_ids")


@pytest.fixture
def reward_model(tiny_model, tmp_path):
    """A tiny classifier from a causal language model; always with the same weights."""
    tiny_model().save_pretrained(tmp_path / "causal")

    def build():
        torch.manual_seed(0)
        return load_reward_model(str(tmp_path / "causal"))

    return build


@pytest.fixture
def make_reward(tmp_path, reward_model, pairs):
    def make(model=None, data=None, eval_dataset=None, processing_class=None, **options):
        settings = {
            "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 4,
            "max_steps": 1, "learning_rate": 1e-2, "lr_scheduler_type": "constant",
            "logging_steps": 1, "save_strategy": "no", "train_sampling_strategy": "sequential",
            "use_cpu": True, **options,
        }  # fmt: skip
        return RewardTrainer(
            reward_model() if model is None else model, RewardConfig(**settings),
            pairs() if data is None else data, eval_dataset, processing_class,
        )  # fmt: skip

    return make


def naive_rewards(model, rows):
    """``[B, 2]`` rewards by the model's own forward, one sequence at a time."""
    return torch.stack([
        torch.stack([
            model(input_ids=torch.tensor([row["prompt_ids"] + row[side]])).logits[0, 0]
            for side in SIDES
        ])
        for row in rows
    ])  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"layout": "prefix_shared"},
        {"layout": "packed"},
        {"layout": "padded"},
        {"tokens_per_pack": 24},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"center_rewards_coefficient": 0.5},
    ],
    ids=["prefix_shared", "packed", "padded", "several packs", "accumulation", "centred"],
)
def test_loss_and_gradients_are_the_naive_ones(make_reward, reward_model, pairs, options):
    model, rows = reward_model(), pairs().select(range(4))
    rewards = naive_rewards(model, rows)
    expected = -F.logsigmoid(rewards[:, 0] - rewards[:, 1]).mean()
    weight = options.get("center_rewards_coefficient", 0.0)
    expected = expected + weight * rewards.sum(1).square().mean()
    expected.backward()
    trainer = make_reward(optim="sgd", learning_rate=1.0, max_grad_norm=0.0, **options)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    row = trainer.state.log_history[0]
    assert row["loss"] == pytest.approx(expected.item(), rel=1e-5)
    if trainer.args.gradient_accumulation_steps == 1:
        margins = rewards[:, 0] - rewards[:, 1]
        assert row["rewards/margins"] == pytest.approx(margins.mean().item(), rel=1e-4, abs=1e-6)
        assert row["rewards/accuracies"] == (margins > 0).float().mean().item()
        assert row["rewards/center"] == pytest.approx(rewards.mean().item(), rel=1e-4, abs=1e-6)
    for (name, moved), parameter in zip(
        trainer.model.named_parameters(), model.parameters(), strict=True
    ):
        torch.testing.assert_close(before[name] - moved, parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def tokenizer():
    words = ["why", "</s>", "good", "bad", "so", "very"]
    tokens = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "why"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # As many causal models have it: padding is EOS.
    return PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="</s>", pad_token="</s>")


def test_learns_and_loads_back_to_the_same_scores(make_reward, tiny_model, tokenizer, tmp_path):
    folder = tmp_path / "policy"
    tiny_model(vocab_size=6, eos_token_id=1, pad_token_id=1).save_pretrained(folder)
    rows = [
        {"prompt": "why " * (1 + n % 3), "chosen": "so " * (n % 4) + "good", "rejected": "so bad"}
        for n in range(12)
    ]
    torch.manual_seed(0)
    trainer = make_reward(
        str(folder), Dataset.from_list(rows), Dataset.from_list(rows), tokenizer,
        max_steps=15, learning_rate=2e-2, per_device_train_batch_size=12,
    )  # fmt: skip
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_rewards/accuracies"] == 1 and metrics["eval_loss"] < 0.2
    trainer.save_model()
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.config.num_labels == 1
    assert again.pad_token_id == model.config.pad_token_id == 6 != again.eos_token_id
    texts = [row["prompt"] + row[side] + " </s>" for row in rows for side in ("chosen", "rejected")]
    batch = again(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        scores = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    chosen, rejected = scores.view(-1, 2).unbind(1)
    for name, values in (("chosen", chosen), ("rejected", rejected)):
        expected = values.mean().item()
        assert metrics[f"eval_rewards/{name}"] == pytest.approx(expected, rel=1e-5)
    losses = -F.logsigmoid(chosen - rejected)
    assert metrics["eval_loss"] == pytest.approx(losses.mean().item(), rel=1e-4)


def test_a_saved_reward_model_is_trained_on(make_reward, tmp_path):
    trainer = make_reward()
    trainer.train()
    trainer.save_model()
    again = load_reward_model(str(tmp_path / "out"))
    assert torch.equal(again.score.weight, trainer.model.score.weight)


def test_completions_must_not_end_with_padding(make_reward):
    rows = [{"prompt_ids": [5], "chosen_ids": [6, 0], "rejected_ids": [7]}]
    with pytest.raises(ValueError, match="do not end with 0, the model's padding token"):
        make_reward(data=Dataset.from_list(rows))


def test_models_that_are_no_reward_models(tiny_model, make_reward, tmp_path):
    with pytest.raises(ValueError, match="a linear `score` of 1 output, got LlamaForCausalLM"):
        make_reward(tiny_model())
    two = transformers.LlamaForSequenceClassification(tiny_model().config)
    with pytest.raises(ValueError, match="with 2"):
        make_reward(two)
    one = transformers.LlamaForSequenceClassification(tiny_model(num_labels=1).config)
    one.config.pad_token_id = None
    with pytest.raises(
        ValueError, match="a pad_token_id in the configuration that ends nothing, got None"
    ):
        make_reward(one)
    with pytest.raises(ValueError, match="center_rewards_coefficient"):
        make_reward(center_rewards_coefficient=-1.0)
