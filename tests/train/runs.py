"""One training run in a process of its own, which may end in the middle.

Run by the fixture ``start_run`` with the global ``OPTIONS``: ``settings`` of the config, ``model``
(configuration of a tiny Llama), ``reference`` (of another one that is the reference), ``pairs``,
``adapter`` (folder of one to continue), ``resume``, ``end`` (where and how the process ends),
``slow_end`` (whether the first process takes long after its last step), ``env``, ``groups``
(mismatched completions are those of so many rows at a time) and ``lone`` (the trainer may keep no
model but the policy).
Pairs with a ``label`` are unpaired data. Writes the final weights to ``final.safetensors`` in the
output folder. With ``argv`` it is the command line that runs.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

OPTIONS: dict[str, Any] = globals().get("OPTIONS", {})
os.environ.update(OPTIONS.get("env", {}))

import torch  # noqa: E402
import transformers  # noqa: E402
from datasets import Dataset  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import TrainerCallback, TrainerState  # noqa: E402

from fastdaa.data.unpaired_collate import UnpairedCollator  # noqa: E402
from fastdaa.train import (  # noqa: E402
    PreferenceConfig,
    PreferenceTrainer,
    UnpairedConfig,
    UnpairedTrainer,
)
from fastdaa.train.callbacks import Curves, was_interrupted  # noqa: E402


class End(TrainerCallback):
    """Kills the process after a step, or sends it another signal during that step."""

    def __init__(self, step: int, number: int, rank: int | None = None):
        self.step, self.number, self.rank = step, number, rank

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.number != signal.SIGKILL:
            self.send(state.global_step + 1, args.process_index)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.number == signal.SIGKILL:
            self.send(state.global_step, args.process_index)

    def send(self, step: int, rank: int) -> None:
        if step == self.step and self.rank in (None, rank):
            os.kill(os.getpid(), self.number)


class SlowEnd(TrainerCallback):
    """Writes a file after the last step, which takes long, as that of curves may."""

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            time.sleep(1.0)
            Path(args.output_dir, "ended").touch()


def kill(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_while_saving(step: int, place: str) -> None:
    """Have the process killed while the checkpoint of a step is written."""

    def before(owner: Any, name: str, replaced: Any) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            state = self if isinstance(self, TrainerState) else self.state
            if state.global_step == step:
                replaced(self, *args, **kwargs)
            return original(self, *args, **kwargs)

        setattr(owner, name, run)

    def half_a_state(state: TrainerState, path: str) -> None:
        text = json.dumps(dict(vars(state), stateful_callbacks={}), default=str)
        Path(path).write_text(text[: len(text) // 2])
        kill()

    if place == "before":
        before(PreferenceTrainer, "_save_checkpoint", kill)
    elif place == "model":
        before(PreferenceTrainer, "_save_optimizer_and_scheduler", kill)
    elif place == "optimizer":
        before(PreferenceTrainer, "_save_rng_state", kill)
    elif place == "state":
        before(TrainerState, "save_to_json", half_a_state)
    elif place == "rotation":
        # After the state of the new checkpoint is written, while the old ones are deleted.
        transformers.trainer.rotate_checkpoints = kill
    else:
        raise ValueError(place)


def mismatch_in_groups(size: int) -> None:
    """Have one process take the mismatched completions that several would take."""
    original = UnpairedCollator.__call__

    def collate(self: UnpairedCollator, rows: Any) -> dict[str, Any]:
        parts = [original(self, rows[i : i + size]) for i in range(0, len(rows), size)]
        packs = [pack for part in parts for pack in part["kl_packs"]]
        return {
            **original(self, rows), "kl_packs": packs,
            "mismatched": sum(part["mismatched"] for part in parts),
        }  # fmt: skip

    UnpairedCollator.__call__ = collate  # type: ignore[method-assign]


def allow_fsdp_on_cpu(args: PreferenceConfig) -> None:
    """accelerate would quietly take DDP on CPU; FSDP2 itself runs there as it does on GPUs."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    assert args.distributed_state is not None
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def build_model(config: dict[str, Any], adapter: str | None = None, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    if adapter is None:
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, adapter, is_trainable=True)


def assert_no_other_weights(model: torch.nn.Module) -> None:
    """No weights are in memory but those of ``model``."""
    gc.collect()
    own = {id(parameter) for parameter in model.parameters()}
    others = [
        one
        for one in gc.get_objects()
        if isinstance(one, torch.nn.Parameter) and id(one) not in own
    ]
    pieces = [weight.ds_tensor for weight in others if hasattr(weight, "ds_tensor")]
    assert sum(weight.numel() for weight in [*others, *pieces]) == 0


def main(options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # the imports are no garbage, and the Trainer would look through all of them
    end = dict(options.get("end") or {})
    callbacks: list[TrainerCallback] = []
    if "place" in end:
        killed_while_saving(end["step"], end["place"])
    elif end:
        callbacks.append(End(**end))
    if options.get("slow_end"):
        callbacks.append(SlowEnd())
    data = Dataset.from_list(options["pairs"])
    reference = options.get("reference")
    if reference is not None:
        reference = build_model(reference, seed=1)
    torch.manual_seed(0)
    lora = options.get("lora")
    if lora is not None:
        from peft import LoraConfig

        lora = LoraConfig(task_type="CAUSAL_LM", **lora)
    unpaired = "label" in data.column_names
    args = (UnpairedConfig if unpaired else PreferenceConfig)(**options["settings"])
    if args.fsdp:
        allow_fsdp_on_cpu(args)
    if "groups" in options:
        mismatch_in_groups(options["groups"])
    trainer = (UnpairedTrainer if unpaired else PreferenceTrainer)(
        build_model(options["model"], options.get("adapter")),
        reference,
        args=args,
        train_dataset=data,
        eval_dataset=Dataset.from_list(options["eval"]) if "eval" in options else None,
        peft_config=lora,
        callbacks=callbacks,
    )
    trainer.remove_callback(Curves)
    if options.get("lone"):
        assert_no_other_weights(trainer.model)
    if options.get("reshard"):
        trainer.reference.model.set_reshard_after_forward(True)
    trainer.train(resume_from_checkpoint=options.get("resume", False))
    if was_interrupted(trainer):
        sys.exit(130)
    folder = Path(str(trainer.args.output_dir))
    state = trainer.accelerator.get_state_dict(trainer.deepspeed or trainer.model)
    if trainer.is_world_process_zero():
        weights = {name: tensor.clone() for name, tensor in state.items()}
        save_file(weights, folder / "final.safetensors")


def command(options: dict[str, Any]) -> None:
    """``fastdaa`` with the arguments ``argv``; what it prints goes to the file ``log``."""
    from fastdaa.cli import main as fastdaa
    from fastdaa.cli import train

    torch.set_num_threads(1)
    gc.freeze()

    class Trainer(PreferenceTrainer):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            self.remove_callback(Curves)
            if options.get("end"):
                self.add_callback(End(**options["end"]))

    train._trainer_class = lambda: Trainer
    if options.get("fsdp"):
        read = PreferenceConfig._process_fsdp_args

        def on_cpu(args: PreferenceConfig) -> Any:
            plugin = read(args)
            allow_fsdp_on_cpu(args)
            return plugin

        PreferenceConfig._process_fsdp_args = on_cpu  # type: ignore[method-assign]
    with open(options["log"], "w") as log, contextlib.redirect_stdout(log):
        code = fastdaa(options["argv"])
    sys.exit(code)


if OPTIONS:
    (command if "argv" in OPTIONS else main)(OPTIONS)
