"""One alignment of the demo: ``PreferenceTrainer`` with a progress bar and looks in between."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from fastdaa.demo.recipes import Recipe, Size
from fastdaa.train.callbacks import Interrupt, Progress
from fastdaa.train.config import PreferenceConfig
from fastdaa.train.trainer import PreferenceTrainer

if TYPE_CHECKING:
    from datasets import Dataset
    from rich.progress import Progress as Bars
    from torch import Tensor
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

Look = Callable[["dict[str, Tensor]", int], str]
"""Called with the policy's weights and the step; returns a few words for the progress bar."""
BATCH_PAIRS = 16


def align(
    policy: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    held_out: Dataset,
    recipe: Recipe,
    size: Size,
    *,
    look: Look,
    seed: int,
    output_dir: Path,
    progress: Bars,
) -> dict[str, Any]:
    """Trains ``policy`` in place; its starting point is the reference.

    Args:
        train, held_out: tokenised pairs.
        look: sees the policy ``size.points`` times, the last time at the end of training.

    Returns:
        ``log`` (rows with ``step``, ``loss`` and ``accuracy``), ``reward_accuracy`` on the
        held-out pairs (0 to 1), and ``seconds`` of training without the looks.
    """
    watch = _Watch(size.points, look, progress, recipe.loss)
    args = PreferenceConfig(
        output_dir=str(output_dir),
        loss_type=[recipe.loss],
        beta=recipe.beta,
        learning_rate=recipe.learning_rate,
        num_train_epochs=size.align_epochs,
        per_device_train_batch_size=BATCH_PAIRS,
        per_device_eval_batch_size=50,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        logging_steps=5,
        log_exact_kl=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
        bf16=False,
        seed=seed,
    )
    trainer = PreferenceTrainer(
        model=policy,
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        callbacks=[watch],
    )
    # The demo has its own bar, and Ctrl-C ends all of it at once: nothing here is to be resumed.
    for callback in (Progress, Interrupt):
        trainer.remove_callback(callback)
    trainer.train()
    metrics = trainer.evaluate()
    return {
        "log": watch.rows,
        "reward_accuracy": metrics["eval_rewards/accuracies"],
        "seconds": watch.seconds,
    }


class _Watch(TrainerCallback):
    """Moves the bar, keeps the logged rows, and looks at the policy at equal distances."""

    def __init__(self, looks: int, look: Look, progress: Bars, name: str) -> None:
        self.looks, self.look, self.progress = looks, look, progress
        self.bar = progress.add_task(name, total=None, note="")
        self.rows: list[dict[str, float]] = []
        self.notes = {"accuracy": "", "gold": ""}
        self.seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        steps = state.max_steps
        self.stops = {round(steps * (i + 1) / self.looks) for i in range(self.looks)}
        self.progress.update(self.bar, total=steps)
        self.since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if step in self.stops:
            self.seconds += time.perf_counter() - self.since
            model = kwargs["model"]
            model.eval()
            self.notes["gold"] = self.look(model.state_dict(), step)
            model.train()
            self.since = time.perf_counter()
        note = ", ".join(filter(None, self.notes.values()))
        self.progress.update(self.bar, completed=step, note=note)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "rewards/accuracies" in logs and "loss" in logs:
            accuracy = logs["rewards/accuracies"]
            row = {"step": state.global_step, "loss": logs["loss"], "accuracy": accuracy}
            self.rows.append(row)
            self.notes["accuracy"] = f"pairs ranked right {accuracy:.0%}"
