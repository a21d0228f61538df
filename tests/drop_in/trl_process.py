"""One run of a trainer of TRL, or of the drop-in, in a process of its own.

Run with the global ``OPTIONS``: ``trainer`` (its name, as ``"DPO"``), ``ours``, ``folder`` (of the
output), ``model`` (folder of a saved one with its tokenizer; ``in_memory``: loaded before the
settings are read), ``data`` (folder of a dataset), ``evaluated`` (whether on its first rows),
``settings`` of the config, ``lora``, ``reference`` (folder), ``resume`` (folder of a checkpoint),
``head_max_bytes`` of the drop-in and ``env``. Writes what was logged to ``log.json`` and the model
to ``final`` in the folder.
"""

from __future__ import annotations

import gc
import json
import os
import warnings
from pathlib import Path
from typing import Any

OPTIONS: dict[str, Any] = globals().get("OPTIONS", {})
os.environ.update(OPTIONS.get("env", {}))
warnings.simplefilter("ignore")

import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from datasets import Dataset  # noqa: E402

import fastdaa.drop_in.trl as drop_in  # noqa: E402


def word_share(completions: list[str], **_: Any) -> list[float]:
    """A reward that does not hang on who computes it."""
    return [sum(map(ord, text)) % 7 / 7 for text in completions]


def main(options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # the imports are no garbage, and the trainers would look through all of them
    name, folder = options["trainer"], Path(options["folder"])
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(options["model"]) if options.get("in_memory") else options["model"]
    args = getattr(trl, f"{name}Config")(output_dir=str(folder), **options["settings"])
    given: dict[str, Any] = {}
    if options.get("lora") is not None:
        from peft import LoraConfig

        given["peft_config"] = LoraConfig(task_type="CAUSAL_LM", **options["lora"])
    if options.get("reference"):
        given["ref_model"] = load(options["reference"])
    if name in ("GRPO", "RLOO"):
        given["reward_funcs"] = word_share
    if options["ours"] and "head_max_bytes" in options:
        given["head_max_bytes"] = options["head_max_bytes"]
    data = Dataset.load_from_disk(options["data"])
    if options.get("evaluated"):
        given["eval_dataset"] = data.select(range(6))
    torch.manual_seed(0)  # a new adapter is random
    trainer = getattr(drop_in if options["ours"] else trl, f"{name}Trainer")(
        model,
        args=args,
        train_dataset=data,
        processing_class=transformers.AutoTokenizer.from_pretrained(options["model"]),
        **given,
    )
    trainer.train(resume_from_checkpoint=options.get("resume"))
    trainer.save_model(str(folder / "final"))
    if trainer.is_world_process_zero():
        (folder / "log.json").write_text(json.dumps(trainer.state.log_history))


if OPTIONS:
    main(OPTIONS)
