"""PreferenceConfig: defaults, what it refuses, and that it survives a round trip."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from fastdaa.online.config import OnlineConfig
from fastdaa.train.config import PreferenceConfig
from fastdaa.train.stage_config import RewardConfig, SftConfig

OWN = {field.name for field in dataclasses.fields(PreferenceConfig)} - {
    field.name for field in dataclasses.fields(TrainingArguments)
}


def make(tmp_path: Path, **fields: Any) -> PreferenceConfig:
    return PreferenceConfig(output_dir=str(tmp_path / "out"), use_cpu=True, **fields)


def test_defaults(tmp_path: Path) -> None:
    config = make(tmp_path)
    assert config.learning_rate == 1e-6
    assert config.logging_steps == 10
    assert config.remove_unused_columns is False
    assert config.bf16 is False
    assert config.report_to == []
    assert not config.gradient_checkpointing
    assert config.loss_kwargs == {}
    assert not config.dataloader_pin_memory
    assert str(config.objective()).startswith("dpo(")


def test_every_own_field_has_help_and_a_doc_line() -> None:
    documented = inspect.cleandoc(PreferenceConfig.__doc__ or "")
    for field in dataclasses.fields(PreferenceConfig):
        if field.name in OWN:
            assert field.metadata.get("help"), field.name
            assert f"\n    {field.name}: " in documented, field.name


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        pytest.param({"loss_type": "ipo"}, "ipo(", id="one name"),
        pytest.param({"loss_type": ["hinge"], "beta": 0.2}, "slic(", id="alias"),
        pytest.param(
            {"loss_type": ["dpo", "sft"], "loss_weights": [1, 0.5]}, "0.5 * sft()", id="mixture"
        ),
        pytest.param(
            {"loss_kwargs": '{"delta": 2.0}', "loss_type": "slic"}, "delta=2.0", id="json"
        ),
        pytest.param({"loss_kwargs": {"delta": 2.0}, "loss_type": "slic"}, "delta=2.0", id="dict"),
        pytest.param({"label_smoothing": 0.1}, "label_smoothing=0.1", id="label smoothing"),
        pytest.param({"loss_kwargs": {"beta": 0.3}}, "beta=0.3", id="beta in kwargs"),
    ],
)
def test_objective(tmp_path: Path, fields: dict[str, Any], expected: str) -> None:
    assert expected in str(make(tmp_path, **fields).objective())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param({"loss_type": "dppo"}, "did you mean 'dpo'", id="unknown loss"),
        pytest.param({"loss_type": "dpo", "loss_kwargs": {"delta": 1}}, "delta", id="not its own"),
        pytest.param({"beta": -1.0}, "beta", id="beta"),
        pytest.param({"beta": 0.1, "loss_kwargs": {"beta": 0.2}}, "once", id="beta twice"),
        pytest.param({"loss_weights": [1.0, 2.0]}, "weights: expected one a loss", id="weights"),
        pytest.param({"loss_kwargs": "{delta: 1}"}, "JSON object", id="bad json"),
        pytest.param({"loss_kwargs": {"delta": object()}}, "JSON can hold", id="no json"),
        pytest.param({"layout": "flat"}, "layout: expected one of", id="layout"),
        pytest.param({"attention": "flash"}, "attention: expected one of", id="attention"),
        pytest.param({"impl": "score"}, "impl: expected one of", id="impl"),
        pytest.param({"head_engine": "cuda"}, "head_engine: expected one of", id="engine"),
        pytest.param({"truncation_mode": "keep"}, "truncation_mode", id="truncation"),
        pytest.param({"on_bad_row": "drop"}, "on_bad_row", id="bad row"),
        pytest.param({"max_length": 0}, "max_length", id="max_length 0"),
        pytest.param({"max_length": 10.5}, "max_length: expected an integer", id="fraction"),
        pytest.param({"tokens_per_pack": -3}, "tokens_per_pack", id="tokens_per_pack"),
        pytest.param({"head_max_bytes": True}, "head_max_bytes", id="boolean count"),
        pytest.param(
            {"loss_type": "kto", "tokens_per_pack": 512}, "couples the pairs", id="coupled split"
        ),
        pytest.param(
            {"loss_type": "aot", "impl": "single_pass"}, "couples the pairs", id="coupled pass"
        ),
        pytest.param(
            {"layout": "padded", "attention": "sdpa_loop"}, "with layout 'padded'", id="no segments"
        ),
    ],
)
def test_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **fields)


@pytest.mark.parametrize("kind", [PreferenceConfig, SftConfig, RewardConfig])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size: expected an integer"),
        ({"per_device_eval_batch_size": -1}, "per_device_eval_batch_size: expected an integer"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: expected 0, .* got 0.1"),
        ({"use_liger_kernel": True}, "use_liger_kernel: expected a GPU"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a finite number, got nan"),
        ({"learning_rate": -1e-6}, "learning_rate: expected at least 0, got -1e-06"),
        ({"weight_decay": -0.1}, "weight_decay: expected at least 0, got -0.1"),
        ({"adam_beta2": 1.5}, "adam_beta2: expected at least 0 and below 1, got 1.5"),
        ({"optim_args": "rank"}, "optim_args: expected name=value, .* got 'rank'"),
    ],
    ids=[
        *("no pairs", "fewer", "smoothing of the Trainer", "Liger on CPU", "rate", "negative rate"),
        *("decay", "beta", "optimizer"),
    ],
)
def test_options_of_the_trainer_that_cannot_work(
    tmp_path: Path, kind: Any, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kind(output_dir=str(tmp_path), use_cpu=True, **fields)


@pytest.mark.parametrize("kind", [PreferenceConfig, SftConfig, RewardConfig, OnlineConfig])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tokens_per_pack", 0, "expected an integer above 0, got 0"),
        ("tokens_per_pack", 2.5, "expected an integer above 0, got 2.5"),
        ("head_max_bytes", True, "expected an integer above 0, got True"),
        ("impl", "score", "expected one of 'auto'"),
        ("attention", "flash", "expected one of 'auto'"),
    ],
)
def test_what_all_have_is_refused_alike(
    tmp_path: Path, kind: Any, name: str, value: Any, message: str
) -> None:
    if name not in {field.name for field in dataclasses.fields(kind)}:
        assert kind is RewardConfig  # it has no LM head
        return
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        kind(output_dir=str(tmp_path / "out"), **{name: value})


def test_loss_kwargs_of_another_type(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="mapping"):
        make(tmp_path, loss_kwargs="[1, 2]")


def test_round_trip(tmp_path: Path) -> None:
    config = make(
        tmp_path,
        loss_type=["dpo", "sft"],
        loss_weights=[1, 0.25],
        beta=0.05,
        loss_kwargs='{"length_alpha": 0.02}',
        max_length=None,
        layout="packed",
    )
    stored = json.loads(config.to_json_string())
    again = PreferenceConfig(**stored)
    assert again.to_dict() == config.to_dict()
    assert str(again.objective()) == str(config.objective())
    assert stored["loss_kwargs"] == {"length_alpha": 0.02}
    assert stored["max_length"] is None


@pytest.mark.parametrize(
    ("fields", "has_bf16", "launched", "expected"),
    [
        pytest.param({}, True, None, True, id="where the device has it"),
        pytest.param({}, False, None, False, id="device without"),
        pytest.param({"fp16": True}, True, None, False, id="fp16 asked for"),
        pytest.param({"use_cpu": True}, True, None, False, id="CPU asked for"),
        pytest.param({"bf16": False}, True, None, False, id="off is off"),
        pytest.param({}, True, "fp16", False, id="accelerate launch in fp16"),
        pytest.param({}, True, "no", True, id="accelerate's default"),
    ],
)
def test_bf16(
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
    has_bf16: bool,
    launched: str | None,
    expected: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    # Only the choice is looked at: the rest would ask this machine's devices.
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: None)
    monkeypatch.setattr("fastdaa.train.packed_config.check_after", lambda args: None)
    monkeypatch.setattr(PreferenceConfig, "device", torch.device("cpu"), raising=False)
    assert PreferenceConfig(**fields).bf16 is expected


def test_explicit_bf16_on_cpu(tmp_path: Path) -> None:
    assert make(tmp_path, bf16=True).bf16 is True


def test_cache_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))
    assert make(tmp_path).ref_cache_root() == tmp_path / "hf" / "fastdaa" / "reference"
    assert make(tmp_path, ref_cache_dir=str(tmp_path)).ref_cache_root() == tmp_path
