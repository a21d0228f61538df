"""Estimates of KL(policy || reference) from samples, held against enumeration.

:mod:`fastdaa.study.kl_samples` says what the estimators are.

``estimators.json``::

    {"preset": "H", "seed": 0, "size": "d32", "samples": 256, "repeats": 200,
     "policies": [{"name": "DPO, beta 0.02, step 13", "exact": 0.31, "variance_ratio": 4.2,
                   "estimators": {"k1" | "rb" | "k3" | "trlx": {
                       "mean": over all samples, "stderr": of that mean,
                       "spread": standard deviation of the mean of one repeat,
                       "variance": of one sample, "bias_in_stderr": (mean - exact) / stderr,
                       "p05", "p95": quantiles of the repeats' means}}}]}

``variance_ratio`` is that of one sample, k1 over rb.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback

from fastdaa.divergence import token_kl
from fastdaa.head import LmHead
from fastdaa.logps import head_logps
from fastdaa.study.enumeration import response_logps
from fastdaa.study.json_file import write_json
from fastdaa.study.kept_runs import REFERENCES
from fastdaa.study.kl_samples import kl_estimates
from fastdaa.study.language import LANGUAGE, Language
from fastdaa.study.measures import measure
from fastdaa.study.preferences import TRAIN_SEED, preference_pairs
from fastdaa.study.presets import ModelSize, Preset, size_of
from fastdaa.study.sampling import sample_responses
from fastdaa.study.sft import Reference, make_reference
from fastdaa.study.world import World, make_world
from fastdaa.study.world_training import train_in_world
from fastdaa.train.backbone import backbone_of
from fastdaa.writable import check_writable

ESTIMATORS_FILE = "estimators.json"
NAMES = ("k1", "rb", "k3", "trlx")
SAMPLES, REPEATS = 256, 200
BETA = 0.02
FRACTIONS = (0.1, 0.3, 1.0)
"""Of the run whose policies are measured: near, farther, and far from the reference."""
_CHUNK = 8192


class Policy(NamedTuple):
    """A model, and what the record calls it."""

    name: str
    model: Any


@torch.no_grad()
def estimates(
    model: Any, reference: Any, language: Language, prompts: Tensor, ids: Tensor
) -> dict[str, Tensor]:
    """All estimators of each sample, ``[S]`` fp64 in nats.

    Args:
        model, reference: policy, which the samples are from, and reference.
        prompts: ``[S]``.
        ids: ``[S, longest]``, padded after EOS.
    """
    parts = [
        _estimates(model, reference, language, *chunk)
        for chunk in zip(prompts.split(_CHUNK), ids.split(_CHUNK), strict=True)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in NAMES}


def _estimates(
    model: Any, reference: Any, language: Language, prompts: Tensor, ids: Tensor
) -> dict[str, Tensor]:
    inputs = torch.cat([prompts[:, None], ids[:, :-1]], dim=1)
    scored = ids != language.pad
    targets = ids[scored]
    hidden, ref_hidden = (
        backbone_of(each)(input_ids=inputs, use_cache=False).last_hidden_state[scored]
        for each in (model, reference)
    )
    head, ref_head = LmHead.from_model(model).detach(), LmHead.from_model(reference).detach()
    ratios = head_logps(hidden, head, targets, impl="score").double()
    ratios -= head_logps(ref_hidden, ref_head, targets, impl="score").double()
    divergences = token_kl(hidden, head, ref_hidden, ref_head)
    return kl_estimates(ratios, scored.sum(1), divergences)


def compare(
    policy: Policy,
    reference: Reference,
    world: World,
    *,
    samples: int = SAMPLES,
    repeats: int = REPEATS,
    seed: int = 0,
) -> dict[str, Any]:
    """One entry of ``policies``: ``repeats`` times ``samples`` responses of a policy.

    Args:
        seed: of the samples.

    Raises:
        ValueError: fewer than 2 repeats, or no samples.
    """
    _check_counts(samples, repeats)
    logps = response_logps(policy.model, world)
    exact = measure(world, logps, reference.logps, reference.gold).kl
    drawn = sample_responses(policy.model, world, samples * repeats, seed)
    values = estimates(policy.model, reference.model, world.language, *drawn)
    found = {name: _summary(values[name].view(repeats, samples), exact) for name in NAMES}
    most, least = (float(values[name].var()) for name in ("k1", "rb"))
    return {
        "name": policy.name,
        "exact": exact,
        "variance_ratio": most / least if least > 0 else None,
        "estimators": found,
    }


def _check_counts(samples: int, repeats: int) -> None:
    if samples < 1 or repeats < 2:
        raise ValueError(f"expected 1 sample and 2 repeats or more, got {samples} and {repeats}")


def _summary(values: Tensor, exact: float) -> dict[str, float | None]:
    """Of ``[repeats, samples]``."""
    means, mean = values.mean(1), float(values.mean())
    variance = float(values.var())
    stderr = (variance / values.numel()) ** 0.5
    low, high = torch.quantile(means, torch.tensor([0.05, 0.95], dtype=values.dtype)).tolist()
    return {
        "mean": mean,
        "stderr": stderr,
        "spread": float(means.std()),
        "variance": variance,
        "bias_in_stderr": (mean - exact) / stderr if stderr > 0 else None,
        "p05": low,
        "p95": high,
    }


def trained_policies(
    world: World,
    reference: Reference,
    *,
    fractions: Sequence[float] = FRACTIONS,
    seed: int = 0,
) -> list[Policy]:
    """Snapshots of one DPO run from the reference, with the beta :data:`BETA`.

    Args:
        fractions: of the steps, at which a snapshot is taken.
        seed: of the order of the pairs.
    """
    preset = world.preset
    stops = {max(1, round(fraction * preset.steps)) for fraction in fractions}
    taken = _Snapshots(stops, f"DPO, beta {BETA:g}")
    pairs = preference_pairs(world, reference.logps, reference.gold, preset.pairs, TRAIN_SEED)
    train_in_world(
        copy.deepcopy(reference.model), pairs, preset, taken,
        loss_type=["dpo"], beta=BETA, max_steps=max(stops), seed=seed,
    )  # fmt: skip
    return taken.policies


class _Snapshots(TrainerCallback):
    def __init__(self, stops: set[int], name: str) -> None:
        self.stops, self.name = stops, name
        self.policies: list[Policy] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.stops:
            model = copy.deepcopy(kwargs["model"]).eval()
            self.policies.append(Policy(f"{self.name}, step {state.global_step}", model))


def load_policy(folder: str | Path) -> Policy:
    """A policy of a world from its folder.

    Raises:
        FileNotFoundError: there is no model in it.
    """
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"policy: expected a folder with config.json, got {folder}")
    return Policy(Path(folder).name, AutoModelForCausalLM.from_pretrained(folder).eval())


def run_estimators(
    output: str | Path,
    seed: int = 0,
    on_policy: Callable[[str], None] = lambda text: None,
    *,
    preset: str | Preset = "H",
    size: str | ModelSize = "d32",
    policy_folders: Sequence[str | Path] = (),
    samples: int = SAMPLES,
    repeats: int = REPEATS,
    language: Language = LANGUAGE,
) -> list[str]:
    """Compare the estimators at three distances and write ``estimators.json``.

    Args:
        output: the study's folder; references are in its folder ``world``.
        seed: of the world, its reference, the training and the samples.
        on_policy: called with a line about each policy when it is measured.
        policy_folders: policies to measure instead of those of a short DPO run.

    Returns:
        All those lines.
    """
    _check_counts(samples, repeats)
    world, size = make_world(preset, seed, language), size_of(size)
    given = [load_policy(folder) for folder in policy_folders]
    check_writable(output)
    reference = make_reference(world, size, seed, Path(output) / REFERENCES)
    records, lines = [], []
    for policy in given or trained_policies(world, reference, seed=seed):
        record = compare(policy, reference, world, samples=samples, repeats=repeats, seed=seed)
        records.append(record)
        lines.append("; ".join(describe(record)))
        on_policy(lines[-1])
    content = {
        "preset": world.preset.name, "seed": seed, "size": size.name,
        "samples": samples, "repeats": repeats, "policies": records,
    }  # fmt: skip
    write_json(Path(output) / ESTIMATORS_FILE, content)
    return lines


def describe(record: dict[str, Any]) -> Iterator[str]:
    """What the estimators of a policy say, piece by piece."""
    yield f"{record['name']}: exact KL {record['exact']:.3f} nats"
    for name, found in record["estimators"].items():
        bias = found["bias_in_stderr"]
        off = "" if bias is None else f" ({bias:+.1f} standard errors)"
        yield f"{name} {found['mean']:.3f} +- {found['spread']:.3f}{off}"
    if record["variance_ratio"] is not None:
        yield f"variance k1 / rb {record['variance_ratio']:.2f}"
