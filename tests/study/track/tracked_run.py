"""One rank of a tracked training run, for the tests with several processes.

Called with JSON: ``settings`` of the config, ``folder`` (with model, tokenizer and pairs), ``lora``
and ``out`` (where the rows of ``track.jsonl`` are meant to be).
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdaa.data import load_pairs
from fastdaa.study.track import TrackQuality, TrackSettings
from fastdaa.study.track.reward_function import RewardFunction
from fastdaa.train import PreferenceConfig, PreferenceTrainer
from fastdaa.train.callbacks import Curves


def words(prompts: list[Any], completions: list[str]) -> list[int]:
    return [len(text.split()) for text in completions]


def main(options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    folder = options["folder"]
    args = PreferenceConfig(**options["settings"])
    if args.fsdp:
        # accelerate would quietly take DDP on CPU; FSDP2 itself runs there as it does on GPUs.
        from accelerate.state import PartialState
        from accelerate.utils import DistributedType

        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    lora = None
    if options["lora"]:
        from peft import LoraConfig

        lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    torch.manual_seed(0)
    trainer = PreferenceTrainer(
        AutoModelForCausalLM.from_pretrained(f"{folder}/model"),
        args=args,
        train_dataset=load_pairs(f"{folder}/pairs.jsonl"),
        processing_class=AutoTokenizer.from_pretrained(f"{folder}/model"),
        peft_config=lora,
    )
    trainer.remove_callback(Curves)
    # Three batches: ranks have different numbers of them.
    settings = TrackSettings(prompts=9, max_new_tokens=5, batch_size=3)
    callback = TrackQuality(
        trainer,
        load_pairs(f"{folder}/held_out.jsonl"),
        scorers=[RewardFunction(words)] if trainer.is_world_process_zero() else [],
        settings=settings,
        steps=1,
    )
    trainer.add_callback(callback)
    trainer.train()
    if torch.distributed.is_initialized():
        # Its threads would abort a process that ends while they run, and with FSDP2's meshes do so
        # now and then even after this: all is done, so the interpreter is not wound up.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
