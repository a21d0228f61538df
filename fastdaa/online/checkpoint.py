"""A checkpoint of an on-policy run: everything it needs to go on, there as a whole or not at all.

``<output_dir>/checkpoint-<optimiser steps>/`` holds the weights of policy and critic, and
``state.pt``: place in the run, optimiser, schedule, KL controller, running deviation, collapse
monitor, random states and, in the middle of an iteration, its rollouts.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from fastdaa.counted import counted
from fastdaa.online.config import CONFIG_FILE, OnlineConfig
from fastdaa.online.models import Models
from fastdaa.online.pieces import is_cut, load_state, whole_state
from fastdaa.online.ranks import number
from fastdaa.online.types import Experience, Rollouts
from fastdaa.train import checkpoints
from fastdaa.train.adapters import is_adapted
from fastdaa.train.backbone import causal_lm
from fastdaa.train.quantization import is_quantized

STATE_FILE, COMPLETE_FILE = "state.pt", "trainer_state.json"
# What may differ from the run that is resumed: it changes no number but by rounding.
_FREE = {
    *("output_dir", "iterations", "logging_steps", "save_steps", "save_total_limit"),
    *("stop_on_collapse", "disable_tqdm", "tokens_per_pack", "attention", "impl"),
    *("head_engine", "head_max_bytes", "activation_checkpointing", "fsdp"),
}


class Place(NamedTuple):
    """How far a run is."""

    iteration: int
    """Iterations that are finished."""
    minibatches: int
    """Minibatches of the next one that are."""
    steps: int
    """Optimiser steps altogether."""
    rollouts: int
    """Completions that were sampled altogether."""


def save_checkpoint(
    config: OnlineConfig,
    place: Place,
    models: Models,
    state: Mapping[str, Any],
    experience: Experience | None,
    random_of: Sequence[Mapping[str, Any]],
) -> Path:
    """Writes a checkpoint beside its place and moves it there; older ones beyond the limit go.

    All processes call it, and the first one writes.

    Args:
        models: of which the policy and the critic are saved.
        state: what else goes on, of tensors and plain values.
        experience: of the iteration that is under way.
        random_of: :func:`random_states` of every process.
    """
    if config.output_dir is None:
        raise ValueError("output_dir: expected a folder for the checkpoint, got None")
    target = checkpoints.folder(config.output_dir, place.steps)
    partial = target.with_name(f".{target.name}.partial")
    if number() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _save_weights(models, partial)
    if number() != 0:
        return target
    config.save(partial)
    content = {
        **state,
        "place": tuple(place),
        "experience": None if experience is None else flatten(experience),
        "random": list(random_of),
    }
    torch.save(content, partial / STATE_FILE)
    text = json.dumps({"global_step": place.steps, **place._asdict()})
    (partial / COMPLETE_FILE).write_text(text, encoding="utf-8")
    if target.exists():
        # The same step again, now with rollouts.
        replaced = target.with_name(f".{target.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(target, replaced)
        os.rename(partial, target)
        shutil.rmtree(replaced)
    else:
        os.rename(partial, target)
    _remove_old(config)
    return target


def _save_weights(models: Models, folder: Path) -> None:
    """Of policy and critic, and what tells the policy's form; the first process writes."""
    policy: Any = models.policy
    save = _save_trained if is_quantized(policy) else save_model
    state = _save(policy, folder / "model.safetensors", save, metadata={"format": "pt"})
    if number() == 0:
        # An adapter also as PEFT saves it: the weights that it has together with its base have
        # other names than those of a model, which would be loaded without them.
        if is_adapted(policy):
            policy.save_pretrained(folder, state_dict=state)
        else:
            causal_lm(policy).config.save_pretrained(folder)
    del state
    _save(models.critic, folder / "critic.safetensors", save)


def _save(
    model: nn.Module, path: Path, save: Callable[..., None], **options: Any
) -> dict[str, Tensor] | None:
    """Writes weights in the first process; of a model in pieces the whole state, which it returns.

    Args:
        save: for a model that is whole.
        options: of it.
    """
    if is_cut(model):
        state = whole_state(model)
        if number() == 0:
            # Of names for one tensor the first.
            first = {id(value): name for name, value in reversed(state.items())}
            save_file({name: state[name] for name in first.values()}, path, **options)
        return state
    if number() == 0:
        save(model, str(path), **options)
    return None


def _save_trained(model: nn.Module, path: str, metadata: dict[str, str] | None = None) -> None:
    """What a quantised base carries: the base itself is loaded and compared when a run goes on."""
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    save_file(weights, path, metadata=metadata)


@torch.no_grad()
def _load_trained(model: nn.Module, path: str, device: str) -> None:
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    saved = load_file(path, device=device)
    if saved.keys() != weights.keys():
        wrong = sorted(saved.keys() ^ weights.keys())
        raise ValueError(
            f"resume: expected the adapters of the run in {path}, but only one of them "
            f"has {counted(len(wrong), 'tensor')}, such as {wrong[0]}"
        )
    for name, weight in weights.items():
        weight.copy_(saved[name])


def tidy(output_dir: str | Path) -> None:
    """Removes what killed processes have left half-written in ``output_dir``."""
    root = Path(output_dir)
    for replaced in root.glob(".checkpoint-*.replaced"):
        target = root / replaced.name.removeprefix(".").removesuffix(".replaced")
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.rename(replaced, target)
    for partial in root.glob(".checkpoint-*.partial"):
        shutil.rmtree(partial, ignore_errors=True)
    checkpoints.remove_incomplete(root)


class Loaded(NamedTuple):
    """What :func:`read_checkpoint` read."""

    place: Place
    state: dict[str, Any]
    experience: Experience | None


def read_checkpoint(folder: str | Path, config: OnlineConfig, *, lazily: bool) -> Loaded:
    """A checkpoint but for its weights; random states go into torch, numpy and Python.

    Args:
        lazily: no process reads more of the file than it takes.

    Raises:
        FileNotFoundError: no complete checkpoint there.
        ValueError: it was made with other settings.
    """
    folder = Path(folder)
    if not checkpoints.is_complete(folder) or not (folder / STATE_FILE).is_file():
        raise FileNotFoundError(f"resume: expected a complete checkpoint, got {folder}")
    _check_config(folder, config)
    content = torch.load(
        folder / STATE_FILE, map_location="cpu", weights_only=True, mmap=lazily
    )  # fmt: skip
    random_of = content.pop("random")
    restore_random_states(random_of[number() % len(random_of)])
    saved = content.pop("experience")
    place = Place(*content.pop("place"))
    return Loaded(place, content, None if saved is None else unflatten(saved))


def load_weights(folder: str | Path, models: Models) -> None:
    """The weights of a checkpoint into policy and critic."""
    device = str(causal_lm(models.policy).device)
    load = _load_trained if is_quantized(models.policy) else load_model
    for model, name in ((models.policy, "model"), (models.critic, "critic")):
        path = str(Path(folder) / f"{name}.safetensors")
        if is_cut(model):
            load_state(model, path)
        else:
            load(model, path, device=device)


def _check_config(folder: Path, config: OnlineConfig) -> None:
    saved = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    now = config.to_dict()
    free = set(_FREE)
    if config.lr_scheduler_type not in ("constant", "constant_with_warmup"):
        free -= {"iterations"}  # the schedule would be another one
    changed = [
        f"{name} {saved.get(name)!r} then, {value!r} now"
        for name, value in now.items()
        if name not in free and saved.get(name) != value
    ]
    if changed:
        raise ValueError(
            f"resume: expected the settings of {folder}, got others ({'; '.join(changed)}); choose "
            "another output_dir for a new run"
        )


def flatten(experience: Experience) -> dict[str, Any]:
    """Experience as a dictionary of tensors."""
    rollouts = experience.rollouts
    return {
        "prompt_ids": torch.cat(rollouts.prompt_ids),
        "prompt_lengths": torch.tensor([len(ids) for ids in rollouts.prompt_ids]),
        "completion_ids": torch.cat(rollouts.completion_ids),
        "completion_lengths": rollouts.lengths,
        **{name: getattr(rollouts, name) for name in ("finished", "scores", "raw_scores")},
        **{name: getattr(experience, name) for name in Experience._fields[1:]},
    }


def unflatten(saved: Mapping[str, Tensor]) -> Experience:
    """The experience of :func:`flatten`."""
    prompts, completions = (
        list(saved[f"{side}_ids"].split(saved[f"{side}_lengths"].tolist()))
        for side in ("prompt", "completion")
    )
    rollouts = Rollouts(
        prompts, completions, saved["finished"], saved["scores"], saved["raw_scores"]
    )
    return Experience(rollouts, *(saved[name] for name in Experience._fields[1:]))


def random_states() -> dict[str, Any]:
    """States of this process's generators, which sources of rewards or dropout may use."""
    kind, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    numbers = torch.from_numpy(np.asarray(keys).astype(np.int64))
    return {
        "torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate(),
        "numpy": (kind, numbers, *rest),
    }  # fmt: skip


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Puts the states of :func:`random_states` back."""
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))


def _remove_old(config: OnlineConfig) -> None:
    if not config.save_total_limit:
        return
    complete = checkpoints.complete(str(config.output_dir))
    for _, path in complete[: -config.save_total_limit]:
        # Under a name that does not count, so that a half-deleted one is not taken for a whole one.
        partial = path.with_name(f".{path.name}.partial")
        os.rename(path, partial)
        shutil.rmtree(partial, ignore_errors=True)
