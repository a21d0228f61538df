"""What `fastdaa doctor` says about the head is what a training run would do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config

from fastdaa import planner
from fastdaa.cli import doctor, main


def test_the_head_is_planned_with_its_own_sizes_and_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the hidden size the sums of gradients, most of the memory, are not in the plan."""
    asked: list[dict[str, Any]] = []
    plan_head = planner.plan_head

    def noted(vocab: int, device: str, **given: Any) -> planner.HeadPlan:
        asked.append({"vocab": vocab, "device": device, **given})
        return plan_head(vocab, "cpu", **given)

    monkeypatch.setattr(planner, "plan_head", noted)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1,
        vocab_size=500,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    rows = doctor._head_rows(model, "cuda")
    assert [row.name for row in rows] == ["head", "head path, full", "head path, LoRA"]
    assert [given["head_grad"] for given in asked] == [True, False]
    for given in asked:
        assert (given["vocab"], given["hidden_size"], given["device"]) == (500, 64, "cuda")
        assert (given["operand"], given["hidden_dtype"]) == (torch.bfloat16, torch.bfloat16)
        assert given["weight_dtype"] == torch.float32 and given["selected"]


def test_a_model_of_another_kind_is_named_in_one_short_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers lists every class that it would have taken."""
    T5Config(d_model=8, num_layers=1).save_pretrained(tmp_path)
    assert main(["doctor", "--model", str(tmp_path)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "expected a causal language model" in error and "T5Config" in error
    assert "LlamaConfig" not in error and len(error) < 400
