"""Sequences longer than a model has positions are found before training."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers
from datasets import Dataset

from fastdaa.train.positions import Positions, check_length, longest, positions_of
from fastdaa.train.reward import RewardTrainer
from fastdaa.train.sft import SftTrainer
from fastdaa.train.stage_config import RewardConfig, SftConfig

SMALL = {"vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
PAIRS = ("prompt_ids", "chosen_ids"), ("prompt_ids", "rejected_ids")
N = 16


def _model(family, **config):
    return getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(**{**SMALL, **config})
    )


def _gpt2(kind="GPT2LMHeadModel", **config):
    options = {"n_positions": N, "n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 32}
    return getattr(transformers, kind)(transformers.GPT2Config(**options, **config))


BUILDS = {
    "GPT-2": _gpt2,
    "OPT": lambda: _model("OPT", max_position_embeddings=N, ffn_dim=8, word_embed_proj_dim=8),
    "GPT-Neo": lambda: transformers.GPTNeoForCausalLM(
        transformers.GPTNeoConfig(
            vocab_size=32, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=8,
            attention_types=[[["global"], 1]], max_position_embeddings=N,
        )
    ),
    "GPT-J": lambda: transformers.GPTJForCausalLM(
        transformers.GPTJConfig(
            vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=N, rotary_dim=4
        )
    ),
    "BioGPT": lambda: _model("BioGpt", max_position_embeddings=N, intermediate_size=8),
}  # fmt: skip


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_tables_are_as_long_as_the_model_can_take(build):
    model = build().eval()
    positions = positions_of(model)
    assert positions.table == N and positions.trained is None
    with torch.no_grad():
        model(input_ids=torch.ones(1, N, dtype=torch.long), use_cache=False)
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.ones(1, N + 1, dtype=torch.long), use_cache=False)


@pytest.mark.parametrize(
    ("rope", "trained"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, N),
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, None),
    ],
    ids=["plain", "scaled"],
)
def test_rotary_positions_have_no_end(rope, trained, caplog):
    model = _model(
        "Llama", max_position_embeddings=N, intermediate_size=8, rope_parameters=rope
    )  # fmt: skip
    positions = positions_of(model)
    assert (positions.table, positions.trained) == (None, trained)
    caplog.set_level(logging.WARNING, "fastdaa")
    check_length([positions], N, "data", "")
    assert not caplog.text
    check_length([positions], N + 1, "data", "")
    assert ("made for up to 16" in caplog.text) == (trained is not None)


LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": N,
    "short_factor": [1.0, 1.0], "long_factor": [2.0, 5.0],
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


def _scaled(rope):
    # LongRoPE names where its first scale ends, dynamic NTK ends it at the table's length.
    limit = N if rope is DYNAMIC else 4 * N
    return _model("Llama", max_position_embeddings=limit, intermediate_size=8, rope_parameters=rope)


@pytest.mark.parametrize("rope", [LONG, DYNAMIC], ids=["longrope", "dynamic"])
def test_positions_that_scale_with_the_longest_of_a_pass(rope, make_trainer, tmp_path, caplog):
    def data(tokens):
        row = {"prompt_ids": [3] * (tokens - 2), "chosen_ids": [4, 5], "rejected_ids": [6]}
        return Dataset.from_list([row] * 4)

    assert positions_of(_scaled(rope)).own == N
    caplog.set_level(logging.WARNING, "fastdaa")
    cached = {"precompute_ref_log_probs": True, "ref_cache_dir": str(tmp_path / "cache")}
    make_trainer(model=_scaled(rope), data=data(N), **cached)
    assert "forward pass" not in caplog.text
    make_trainer(model=_scaled(rope), data=data(N + 1))
    assert "has 17 tokens; the rotary positions of LlamaForCausalLM change for a" in caplog.text
    with pytest.raises(ValueError, match=r"precompute_ref_log_probs: expected .* at most 16 .* 17"):
        make_trainer(model=_scaled(rope), data=data(N + 1), **cached)
    # Nothing is cached for a loss without a reference.
    make_trainer(model=_scaled(rope), data=data(N + 1), loss_type="simpo", **cached)


def test_scales_of_kinds_of_layers():
    plain = {"rope_type": "default", "rope_theta": 1e4}
    model = _scaled(plain)
    assert positions_of(model).own is None
    model.config.rope_parameters = {"sliding_attention": plain, "full_attention": LONG}
    assert positions_of(model).own == N


def test_an_image_has_positions_of_its_own():
    text = {**SMALL, "model_type": "llama", "intermediate_size": 8, "max_position_embeddings": N}
    vision = {**SMALL, "model_type": "clip_vision_model", "image_size": 8, "patch_size": 4}
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=31)
    model = transformers.LlavaForConditionalGeneration(config)
    assert positions_of(model) == Positions(type(model).__name__, None, N)


def test_longest_sequence():
    rows = [([1] * 3, [1] * 2, [1]), ([1], [1] * 2, [1] * 6), ([1], [], [])]
    data = Dataset.from_list(
        [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), r, strict=True)) for r in rows]
    )
    assert longest(data, PAIRS) == 7
    assert longest(data, PAIRS[:1]) == 5
    assert longest(data.select([0]), PAIRS) == 5
    with pytest.raises(ValueError, match=r"most 6: the positions of X end there.* data has 7 tok"):
        check_length([Positions("X", 6, None)], 7, "data", "expected at most {limit}")
    check_length([Positions("X", 7, None)], 7, "data", "")


@pytest.mark.parametrize("kind", ["train", "sft", "reward"])
@pytest.mark.parametrize("part", ["train_dataset", "eval_dataset"])
def test_every_trainer_asks_before_training(make_trainer, tmp_path, kind, part):
    def data(tokens):
        ids = {"prompt_ids": [3] * (tokens - 3)}
        names = ("completion_ids",) if kind == "sft" else ("chosen_ids", "rejected_ids")
        return Dataset.from_list([{**ids, **{name: [4, 5, 6] for name in names}}] * 4)

    def make(tokens):
        sets = {"train_dataset": data(N), "eval_dataset": data(N), part: data(tokens)}
        if kind == "train":
            return make_trainer(
                model=_gpt2(), data=sets["train_dataset"], eval_dataset=sets["eval_dataset"]
            )
        settings = {"output_dir": str(tmp_path), "use_cpu": True, "max_steps": 1}
        if kind == "sft":
            return SftTrainer(_gpt2(), SftConfig(**settings), **sets)
        model = _gpt2("GPT2ForSequenceClassification", num_labels=1, pad_token_id=0)
        return RewardTrainer(model, RewardConfig(**settings), **sets)

    make(N)
    with pytest.raises(ValueError, match=f"max_length: expected at most 16, got .*{part} has 17"):
        make(N + 1)


def test_the_reference_counts_too(make_trainer):
    data = Dataset.from_list(
        [{"prompt_ids": [3] * 10, "chosen_ids": [4] * 10, "rejected_ids": [5] * 3}] * 4
    )
    policy = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_positions=32, n_embd=8, n_layer=1, n_head=2, vocab_size=32)
    )
    make_trainer(model=policy, data=data)
    with pytest.raises(ValueError, match="max_length: expected at most 16"):
        make_trainer(model=policy, data=data, ref_model=_gpt2())
