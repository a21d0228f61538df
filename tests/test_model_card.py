"""``README.md`` of a trained model."""

from __future__ import annotations

import re
from pathlib import Path

from fastdaa.losses import Objective
from fastdaa.train.model_card import model_card, write_model_card


def test_model_card(tmp_path: Path) -> None:
    path = write_model_card(
        tmp_path,
        objective=Objective.parse(["dpo", "sft"], weights=[1.0, 0.5], beta=0.2),
        name="my-model",
        rows=[{"loss": 0.7}, {"loss": 0.25, "eval_loss": 0.5}],
        base_model="someone/base",
        dataset=str(tmp_path / "pairs.jsonl"),
        layout="prefix_shared",
        settings={"learning_rate": 1e-6, "hub_token": "secret"},
    )
    text = path.read_text()
    front, body = re.match(r"---\n(.*?)\n---\n(.*)", text, re.S).groups()  # type: ignore[union-attr]
    import yaml

    matter = yaml.safe_load(front)
    assert matter["base_model"] == "someone/base"
    assert matter["tags"] == ["fastdaa", "preference-optimization", "dpo", "sft"]
    assert "datasets" not in matter
    for expected in ("beta=0.2", "arxiv.org/abs/2305.18290", "| loss | 0.25 | 0.5 |",
                     "prefix_shared", "learning_rate: 1e-06", "@software{fastdaa"):  # fmt: skip
        assert expected in body, expected
    assert "secret" not in text and str(tmp_path) not in text


def test_model_card_has_no_empty_column_and_no_package_that_was_not_used() -> None:
    text = model_card(
        Objective.parse("ipo"), name="x", rows=[{"loss": 0.7, "kl/token": -1e-9}],
        dataset=["someone/pairs", "/home/me/mine.jsonl"], reference="someone/base", dtype="float32",
        settings={"lr_scheduler_type": "cosine"},
    )  # fmt: skip
    assert "| last value of | training |\n|---|---|\n| loss | 0.7 |\n" in text
    assert "| KL to the reference per token (nats) | 0 |" in text
    assert "trl" not in text and "peft" not in text and "/home/me" not in text
    for line in ("- reference: [someone/base](https://huggingface.co/someone/base)",
                 "- weights: float32", "- lr_scheduler_type: cosine",
                 "[someone/pairs](https://huggingface.co/datasets/someone/pairs), `mine.jsonl`",
                 "datasets:\n- someone/pairs"):  # fmt: skip
        assert line in text, line


def test_model_card_of_an_adapter_without_rows() -> None:
    text = model_card(
        Objective.parse("ipo"),
        name="x",
        peft=True,
        reference="",
        adapter="LoRA, rank 8",
        quantization="bitsandbytes 4-bit nf4",
    )
    assert "- base: bitsandbytes 4-bit nf4\n- adapter: LoRA, rank 8" in text and "- peft " in text
    assert "- reference: the model that training began with" in text
    assert "library_name: peft" in text
    assert "## Results" not in text
