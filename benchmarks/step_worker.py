"""One contender of the step benchmark: an ordinary training run that asks leave for every step."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# One line each: what is different from the library's defaults.
CONTENDERS: dict[str, dict[str, Any]] = {
    "trl": {"library": "trl"},
    "trl, keep activations": {"library": "trl", "gradient_checkpointing": False},
    "trl, sorted": {"library": "trl", "sort": True},
    "trl, sorted, keep activations": {
        "library": "trl", "sort": True, "gradient_checkpointing": False,
    },
    "fastdaa": {"library": "fastdaa"},
    "fastdaa, sorted": {"library": "fastdaa", "sort": True},
    "fastdaa, packed": {"library": "fastdaa", "layout": "packed"},
    "fastdaa, padded": {"library": "fastdaa", "layout": "padded"},
}  # fmt: skip
# The same objective under each library's name.
LOSSES = {"sigmoid": ("sigmoid", "dpo"), "hinge": ("hinge", "slic"), "ipo": ("ipo", "ipo_norm")}


def work(name: str, case: dict[str, Any], folder: str, pipe: Connection) -> None:
    """One contender: an ordinary training run that asks for leave after every step."""
    import torch
    from datasets import load_from_disk
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from transformers.utils import logging

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to stop
    torch.set_num_threads(case["threads"])
    warnings.simplefilter("ignore")  # TRL 1.16 uses names that transformers 5.23 deprecates
    logging.set_verbosity_error()
    losses: list[float] = []
    peak = _Peak(case["device"])

    class Baton(TrainerCallback):
        began = began_cpu = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.wait()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            seconds = time.perf_counter() - self.began
            cpu = time.process_time() - self.began_cpu
            report = {"seconds": seconds, "cpu_seconds": cpu, "loss": losses[-1]}
            pipe.send({**report, "peak_mib": peak.read()})
            control.should_training_stop = not self.wait()
            return control

        def wait(self) -> bool:
            go_on = pipe.recv() == "go"
            self.began, self.began_cpu = time.perf_counter(), time.process_time()
            return go_on

    options = dict(CONTENDERS[name])
    library = options.pop("library")
    dataset = load_from_disk(f"{folder}/{'sorted' if options.pop('sort', False) else 'pairs'}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    common = {
        "output_dir": f"{folder}/{name}", "per_device_train_batch_size": case["batch"],
        "max_steps": case["steps"] + case["warmup"] + 1, "learning_rate": case["lr"], "beta": 0.1,
        "lr_scheduler_type": "constant", "max_length": 1024,
        "use_cpu": case["device"] == "cpu", "bf16": case["device"] == "cuda",
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "seed": 0,
        "train_sampling_strategy": "sequential",
    }  # fmt: skip
    trainer = _trainer(library, case["loss"], {**common, **options}, model, tokenizer, dataset)
    trainer.add_callback(Baton())
    step = trainer.training_step

    def training_step(*args: Any, **kwargs: Any) -> Any:
        loss = step(*args, **kwargs)
        losses.append(float(loss))
        return loss

    trainer.training_step = training_step
    pipe.send("ready")
    peak.start()
    # What the libraries print during training would fall between the lines of the benchmark.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        trainer.train()


def _trainer(
    library: str, loss: str, options: dict[str, Any], model: Any, tokenizer: Any, dataset: Any
) -> Any:
    theirs, ours = LOSSES[loss]
    if library == "trl":
        from trl import DPOConfig, DPOTrainer

        config: Any = DPOConfig(loss_type=[theirs], **options)
        kind: Any = DPOTrainer
    else:
        from fastdaa.train.config import PreferenceConfig
        from fastdaa.train.trainer import PreferenceTrainer

        config = PreferenceConfig(loss_type=[ours], **options)
        kind = PreferenceTrainer
    return kind(model=model, args=config, train_dataset=dataset, processing_class=tokenizer)


class _Peak:
    """Highest memory since the start of training, above what was there before.

    Resident memory of the process on CPU, allocated device memory on CUDA.
    """

    def __init__(self, device: str):
        self.cuda = device == "cuda"

    def start(self) -> None:
        """Forget what happened so far."""
        if self.cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() // 1024
            return
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self.before = self._field("VmRSS")

    def read(self) -> float:
        """MiB above the start."""
        if self.cuda:
            import torch

            return (torch.cuda.max_memory_allocated() // 1024 - self.before) / 1024
        return (self._field("VmHWM") - self.before) / 1024

    def _field(self, name: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1])
        raise RuntimeError(f"expected {name} in /proc/self/status")
