"""One of several processes that train with TRL's trainers and with the drop-ins under FSDP2.

``python fsdp_runs.py FOLDER`` with the environment of a launcher. ``FOLDER`` has ``model``,
``runs.json`` (a list of trainer, settings and LoRA settings) and a ``.jsonl`` of data for each
trainer; losses and final weights go there, too.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import trl
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from datasets import load_dataset
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import fastdaa.drop_in.trl

read_fsdp = TrainingArguments._process_fsdp_args


def fsdp_on_cpu(args: TrainingArguments) -> Any:
    """accelerate would quietly take DDP on CPU; FSDP2 itself runs there as it does on GPUs."""
    plugin = read_fsdp(args)
    assert args.distributed_state is not None
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return plugin


def lengths(completions: list[Any], **columns: Any) -> list[float]:
    """A reward."""
    return [float(len(str(text))) for text in completions]


def train(package: Any, name: str, settings: dict[str, Any], lora: Any, folder: Path) -> Any:
    """A trained trainer of a package."""
    more: dict[str, Any] = {"reward_funcs": lengths} if name == "GRPO" else {}
    if lora is not None:
        more["peft_config"] = LoraConfig(task_type="CAUSAL_LM", **lora)
    args = getattr(trl, f"{name}Config")(
        output_dir=str(folder / "out"), max_steps=3, per_device_train_batch_size=2, use_cpu=True,
        optim="sgd", learning_rate=0.1, logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, ddp_backend="gloo", fsdp=True,
        fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
        **{"bf16": False, **settings},
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    data = load_dataset(
        "json", data_files=str(folder / f"{name}.jsonl"), split="train",
        cache_dir=str(folder / "cache"),
    )  # fmt: skip
    torch.manual_seed(0)  # a new adapter is random
    trainer = getattr(package, f"{name}Trainer")(
        model=model, args=args, train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(folder / "model"), **more,
    )  # fmt: skip
    trainer.train()
    return trainer


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    TrainingArguments._process_fsdp_args = fsdp_on_cpu  # type: ignore[method-assign]
    for number, run in enumerate(json.loads((folder / "runs.json").read_text())):
        for side, package in (("theirs", trl), ("ours", fastdaa.drop_in.trl)):
            trainer = train(package, *run, folder)
            state = trainer.accelerator.get_state_dict(trainer.model)
            if trainer.is_world_process_zero():
                weights = {name: tensor.clone() for name, tensor in state.items()}
                save_file(weights, folder / f"{side}-{number}.safetensors")
                losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
                sharded = type(trainer.model).__name__.startswith("FSDP")
                (folder / f"{side}-{number}.json").write_text(json.dumps([sharded, losses]))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
