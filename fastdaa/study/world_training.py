"""The library's own trainer on the preference pairs of a world: small, quiet and reproducible."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from fastdaa.study.presets import Preset
from fastdaa.train.callbacks import Curves, Interrupt, MetricsWriter, Progress
from fastdaa.train.config import PreferenceConfig
from fastdaa.train.trainer import PreferenceTrainer

if TYPE_CHECKING:
    from datasets import Dataset


def train_in_world(
    policy: Any, pairs: Dataset, preset: Preset, callback: TrainerCallback, **settings: Any
) -> None:
    """Trains ``policy`` on ``pairs`` in place, as ``preset`` says.

    Packing is ``prefix_shared``, the head is the library's own, the optimiser Adam without weight
    decay or clipping at a constant learning rate after the warm-up.

    Args:
        callback: sees the policy on the way; nothing else is left of the training.
        settings: further ones of :class:`~fastdaa.train.PreferenceConfig`: the loss, the seed.
    """
    with tempfile.TemporaryDirectory(prefix="fastdaa-study-") as scratch:
        config = PreferenceConfig(
            output_dir=scratch,
            layout="prefix_shared",
            # Segments of a few tokens: the kernel that cuts long ones up takes half as long again.
            attention="sdpa_loop",
            per_device_train_batch_size=preset.batch_size,
            num_train_epochs=preset.epochs,
            learning_rate=preset.learning_rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=round(preset.warmup_ratio * preset.steps),
            weight_decay=0.0,
            max_grad_norm=0.0,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            log_exact_kl=False,
            log_token_stats=False,
            disable_tqdm=True,
            report_to="none",
            **settings,
        )
        trainer = PreferenceTrainer(
            model=policy, args=config, train_dataset=pairs, callbacks=[callback]
        )
        # Whoever started a run that takes seconds answers Ctrl-C, and shows how far it is.
        for unwanted in (Curves, Interrupt, MetricsWriter, Progress):
            trainer.remove_callback(unwanted)
        trainer.train()
