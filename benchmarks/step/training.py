"""One contender: an ordinary ``trainer.train()`` that asks leave for every step."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastdaa.benchmarks.step.contenders import Contender
from fastdaa.benchmarks.step.model import build, lora_config
from fastdaa.benchmarks.step.plan import BETA, LOSSES, MAX_GRAD_NORM, Plan

Report = dict[str, Any]
# How to go on: True for another step.
Leave = Callable[[Report], bool]
# The parent says when to stop; after the last pair the first one comes again.
_NO_END = 1_000_000


def train(contender: Contender, plan: Plan, leave: Leave) -> None:
    """Build the trainer, call ``leave`` once with how it was set up, then after every step.

    A step is everything from one optimizer step to the next: data, reference, forward, backward,
    clipping, optimizer, metrics. The first report has ``setup_seconds`` (of the trainer, reference
    log-probs included where they are precomputed); the others ``seconds``, ``cpu_seconds``,
    ``loss``, ``grad_norm`` and ``peak_bytes`` since the training began.
    """
    import torch
    from transformers.utils import logging

    torch.set_num_threads(plan.threads)
    logging.set_verbosity_error()
    # What the libraries print would fall between the lines of the benchmark.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        began = time.perf_counter()
        trainer = _trainer(contender, plan)
        setup = time.perf_counter() - began
        # The factory reads its step times itself: a callback cannot see the loss of a step.
        losses, norms = _watch(trainer)
        peak = _Peak(plan.device)
        trainer.add_callback(_baton(plan, leave, setup, losses, norms, peak))
        trainer.train()


def _baton(
    plan: Plan,
    leave: Leave,
    setup: float,
    losses: list[Any],
    norms: list[Any],
    peak: _Peak,
) -> Any:
    from transformers import TrainerCallback

    class Baton(TrainerCallback):
        began = began_cpu = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            peak.start()
            return self.wait({"setup_seconds": setup, "bytes_before": peak.before}, control)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            _synchronize(plan.device)
            report = {
                "seconds": time.perf_counter() - self.began,
                "cpu_seconds": time.process_time() - self.began_cpu,
                "loss": float(losses[-1]),
                "grad_norm": float(norms[-1]) if norms else None,
                "peak_bytes": peak.read(),
            }
            losses.clear()
            norms.clear()
            return self.wait(report, control)

        def wait(self, report: Report, control: Any) -> Any:
            if not leave(report):
                control.should_training_stop = True
            self.began, self.began_cpu = time.perf_counter(), time.process_time()
            return control

    return Baton()


def _watch(trainer: Any) -> tuple[list[Any], list[Any]]:
    """Tensors of loss and gradient norm of every step; nothing waits for the device here."""
    losses: list[Any] = []
    norms: list[Any] = []
    step, clip = trainer.training_step, trainer.accelerator.clip_grad_norm_

    def training_step(*args: Any, **kwargs: Any) -> Any:
        loss = step(*args, **kwargs)
        losses.append(loss.detach())
        return loss

    def clip_grad_norm_(*args: Any, **kwargs: Any) -> Any:
        norm = clip(*args, **kwargs)
        if norm is not None:
            norms.append(norm.detach())
        return norm

    trainer.training_step = training_step
    trainer.accelerator.clip_grad_norm_ = clip_grad_norm_
    return losses, norms


def _trainer(contender: Contender, plan: Plan) -> Any:
    from datasets import load_from_disk
    from transformers import AutoTokenizer, set_seed

    model = build(plan.case.model, plan.device, plan.seed, plan.case.workload.max_length)
    given = {
        "model": model,
        "train_dataset": load_from_disk(
            f"{plan.folder}/{'sorted' if contender.sorted else 'given'}"
        ),
        "processing_class": AutoTokenizer.from_pretrained(plan.folder),
        "peft_config": lora_config() if plan.case.tuning == "lora" else None,
    }
    settings = {**_settings(contender, plan), **contender.config}
    set_seed(plan.seed)  # adapters begin with random numbers: the same in all contenders
    if contender.library == "trl":
        return _trl(settings, given, plan)
    from fastdaa.train.config import PreferenceConfig
    from fastdaa.train.trainer import PreferenceTrainer

    return PreferenceTrainer(args=PreferenceConfig(**settings), **given)


def _settings(contender: Contender, plan: Plan) -> dict[str, Any]:
    theirs, ours = LOSSES[plan.loss]
    settings: dict[str, Any] = {
        "output_dir": f"{plan.folder}/{contender.name}",
        "per_device_train_batch_size": plan.case.batch,
        "max_steps": _NO_END,
        "learning_rate": plan.lr, "lr_scheduler_type": "constant", "max_grad_norm": MAX_GRAD_NORM,
        "beta": BETA, "max_length": plan.case.workload.max_length,
        "use_cpu": plan.device == "cpu", "bf16": plan.mixed,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "seed": plan.seed,
        "train_sampling_strategy": "sequential",
        "precompute_ref_log_probs": contender.cached,
    }  # fmt: skip
    if plan.case.activations != "default":
        settings["gradient_checkpointing"] = plan.case.activations == "recomputed"
    if contender.library == "trl":
        settings |= {"loss_type": [theirs], "use_liger_kernel": contender.liger}
    else:
        cache = f"{plan.folder}/{contender.name}/cache"
        settings |= {"loss_type": [ours], "layout": contender.layout, "ref_cache_dir": cache}
    return settings


def recomputes(contender: Contender, plan: Plan) -> bool:
    """Whether activations are recomputed: as the case says, or else as the library does."""
    if plan.case.activations == "default":
        return bool(contender.config.get("gradient_checkpointing", contender.library == "trl"))
    return plan.case.activations == "recomputed"


def _trl(settings: dict[str, Any], given: dict[str, Any], plan: Plan) -> Any:
    from trl import DPOConfig, DPOTrainer

    class Tokenised(DPOTrainer):
        """Takes token columns as they are, as fastdaa does: all contenders train on the same."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    online = not settings["precompute_ref_log_probs"]
    if online and given["peft_config"] is None:
        # TRL would load the starting point from the folder it came from; there is none.
        given["ref_model"] = build(
            plan.case.model, plan.device, plan.seed, plan.case.workload.max_length
        )
    return Tokenised(args=DPOConfig(**settings), **given)


def _synchronize(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


class _Peak:
    """Highest memory since the start of training, above what was there before (both models).

    Resident memory of the process on CPU, allocated device memory on CUDA, in bytes.
    """

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        self.before = 0

    def start(self) -> None:
        """Forget what happened so far."""
        if self.cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self.before = _status_bytes("VmRSS")

    def read(self) -> int | None:
        """Bytes above the start; None where the system does not tell."""
        if self.cuda:
            import torch

            return torch.cuda.max_memory_allocated() - self.before
        highest = _status_bytes("VmHWM")
        return highest - self.before if self.before and highest else None


def _status_bytes(name: str) -> int:
    """A field of Linux's ``/proc/self/status``; 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)
