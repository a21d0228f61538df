"""What would fail only when a whole model is saved, looked for before the first step."""

from __future__ import annotations

import tempfile
from typing import Any

from torch import nn

from fastdaa.train.adapters import is_adapted
from fastdaa.train.backbone import causal_lm


def check_can_be_saved(model: nn.Module) -> None:
    """Look at what belongs to the weights of a whole model; of an adapter only itself is saved.

    Raises:
        ValueError: a checkpoint could not be written, or would be read as another model.
    """
    if is_adapted(model):
        return
    core = causal_lm(model)
    _check_ties(core)
    _check_generation_config(core)


def _check_ties(core: Any) -> None:
    """transformers saves weights that are one tensor only where the model says which are."""
    declared = getattr(core, "all_tied_weights_keys", None)
    if declared is None:
        return  # older releases, or a model that was put together by hand
    places: dict[int, list[str]] = {}
    for name, weight in core.named_parameters(remove_duplicate=False):
        if name not in declared:
            places.setdefault(id(weight), []).append(name)
    for names in places.values():
        if len(names) > 1:
            raise ValueError(
                f"model: expected weights of their own, got one tensor for {' and '.join(names)}, "
                "which the configuration does not tie (tie_word_embeddings), so that the model "
                "could not be saved and loaded as it is"
            )


def _check_generation_config(core: Any) -> None:
    """transformers saves one that contradicts itself only as long as nobody has changed it, and the
    Trainer changes it where the tokenizer has other special tokens."""
    settings = getattr(core, "generation_config", None)
    if settings is None or not core.can_generate():
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            settings.save_pretrained(folder)
        except ValueError as error:
            said = " ".join(str(error).split())
            raise ValueError(
                "model: expected a generation configuration that can be saved with the weights, "
                "got one that cannot; correct generation_config.json of the model, or from Python "
                f"its generation_config: {said}"
            ) from error
