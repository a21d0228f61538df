"""Options that need a device, a package or each other are refused before anything is loaded."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from fastdaa.train import PreferenceConfig
from fastdaa.train.stage_config import SftConfig

NO_GPU = pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")


@pytest.fixture
def config(tmp_path, monkeypatch):
    for name in ("WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)

    def build(kind=PreferenceConfig, **options):
        return kind(output_dir=str(tmp_path), **{"use_cpu": True, **options})

    return build


@pytest.mark.parametrize(
    ("name", "why"), [("flash_attn", "needs a cuda device"), ("torch_varlen", "not cpu")]
)
def test_attention_of_another_device(config, name, why):
    with pytest.raises(ValueError, match=f"attention: expected 'auto' or .* got '{name}', .*{why}"):
        config(attention=name)


@pytest.mark.parametrize("name", ["cpu_blocks", "sdpa_loop", "eager_loop"])
def test_attention_of_this_device(config, name):
    assert config(attention=name).attention == name


@pytest.mark.parametrize("kind", [PreferenceConfig, SftConfig])
def test_triton_on_the_cpu(config, kind, monkeypatch):
    configs = pytest.importorskip("fastdaa.kernels.configs", reason="needs triton")
    monkeypatch.setattr(configs, "interpreted", lambda: False)
    with pytest.raises(ValueError, match=r"head_engine: .*expected tensors on a CUDA device"):
        config(kind, head_engine="triton")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"head_engine: .*pip install 'fastdaa\[triton\]'"):
        config(kind, head_engine="triton")
    assert config(kind, head_engine="torch").head_engine == "torch"


@NO_GPU
def test_bf16_without_a_gpu(config):
    with pytest.raises(ValueError, match="bf16: expected a GPU, or --use_cpu beside it"):
        config(use_cpu=False, bf16=True)
    assert config(bf16=True).bf16


def test_deepspeed(config, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"deepspeed: .* there is no file ds\.json"):
        config(deepspeed="ds.json")
    (tmp_path / "ds.json").write_text("{}")
    monkeypatch.setattr("fastdaa.train.device_options.find_spec", lambda name: None)
    for given in (str(tmp_path / "ds.json"), {}, "{}"):
        if given:
            with pytest.raises(ImportError, match="not installed: pip install deepspeed"):
                config(deepspeed=given)


@pytest.mark.parametrize(
    ("evaluate", "save", "fits"),
    [
        ("epoch", "steps", False),
        ("steps", "epoch", False),
        ("no", "steps", False),
        ("epoch", "epoch", True),
        ("steps", "steps", True),
        ("steps", "best", True),
    ],
)
def test_the_best_model_needs_checkpoints_where_it_is_evaluated(config, evaluate, save, fits):
    options = {
        "load_best_model_at_end": True, "eval_strategy": evaluate, "save_strategy": save,
        "eval_steps": 500, "metric_for_best_model": "loss",
    }  # fmt: skip
    if fits:
        config(**options)
        return
    said = f"got eval_strategy '{evaluate}' .* and save_strategy '{save}'; give --eval_strategy"
    with pytest.raises(ValueError, match=said):
        config(**options)
