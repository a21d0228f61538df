"""Preference training of Hugging Face causal language models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastdaa.train.lazy_names import lazy_names

if TYPE_CHECKING:
    from fastdaa.train.config import PreferenceConfig
    from fastdaa.train.trainer import PreferenceTrainer
    from fastdaa.train.unpaired import UnpairedTrainer
    from fastdaa.train.unpaired_config import UnpairedConfig

__all__ = ["PreferenceConfig", "PreferenceTrainer", "UnpairedConfig", "UnpairedTrainer"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "PreferenceConfig": "config",
        "PreferenceTrainer": "trainer",
        "UnpairedConfig": "unpaired_config",
        "UnpairedTrainer": "unpaired",
    },
)
