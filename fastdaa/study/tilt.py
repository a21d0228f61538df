"""Over-optimisation without training a policy: gold reward along exact tilting and best-of-n.

A reward model is trained on N preference pairs; :mod:`fastdaa.study.closed_form` then gives the
policies that follow it ever further from the reference, and enumeration what they are worth. No
noise from training a policy or from samples (Gao et al. 2022, arXiv 2210.10760, figures 1 and 2).

``tilt.jsonl`` has a row a point, readable as a table of :mod:`fastdaa.study.table`::

    {"run": "tilt-H-N2048-s0" or "bon-H-N2048-s0", "checkpoint": 0, "algorithm": "tilt" or "bon",
     "kl", "score" (= gold), "kl_forward", "gold", "win_rate", "entropy", "length", "violations",
     "max_prob": see fastdaa.study.measures,
     "proxy": mean proxy reward, in its deviations under the reference,
     "temperature": b, or null, "n": or null, "kl_formula": log n - (n-1)/n, or null,
     "preset": "H", "penalty": 3.0, "violation_share": 0.02, "pairs": 2048, "seed": 0,
     "size": "d32", "reward_accuracy", "label_agreement": of held-out pairs,
     "proxy_correlation": with gold, within prompts, under the reference,
     "final": last point of its curve, "settings": hash of everything the curve depends on}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from fastdaa.counted import counted
from fastdaa.study.closed_form import best_of_n, best_of_n_kl, correlation, standardised, tilt
from fastdaa.study.kept_runs import REFERENCES
from fastdaa.study.language import LANGUAGE, Language
from fastdaa.study.laws import LAWS, MIN_DISTANCE
from fastdaa.study.measures import measure
from fastdaa.study.preferences import HELD_OUT_SEED, TRAIN_SEED, draw_pairs, label_agreement
from fastdaa.study.presets import PRESETS, ModelSize, Preset, size_of
from fastdaa.study.reward_model import response_rewards, train_reward_model
from fastdaa.study.sft import Reference, make_reference
from fastdaa.study.table_files import json_rows
from fastdaa.study.world import World, make_world
from fastdaa.whole_file import whole_file
from fastdaa.writable import check_writable

TILT_FILE = "tilt.jsonl"
# In standard deviations of the proxy under the reference: from next to nothing to the far end.
TEMPERATURES = tuple(8.0 * 2 ** (-step / 3) for step in range(34))
SAMPLES = tuple(2**power for power in range(1, 17))
_RECIPE = 1


def presets() -> list[Preset]:
    """The worlds, and how many pairs the reward model of each is trained on."""
    harsh, mild = PRESETS["H"], PRESETS["M"]
    return [
        *(replace(harsh, pairs=pairs) for pairs in (256, 2048, 16_384)),
        replace(mild, name="P1.5V10", penalty=1.5, violations=0.10, pairs=2048),
        replace(mild, name="P1.5V3", penalty=1.5, violations=0.03, pairs=2048),
        replace(mild, pairs=2048),
    ]


class Proxy(NamedTuple):
    """What a reward model says, and how well it does."""

    rewards: Tensor
    """``[P, R]`` fp64, mean 0 and unit deviation under the reference."""
    accuracy: float
    """On held-out pairs, 0 to 1."""
    agreement: float
    """Of those pairs' labels with gold: what no reward model can exceed by much."""
    correlation: float
    """With gold under the reference."""


def train_proxy(world: World, reference: Reference, pairs: int, seed: int) -> Proxy:
    """A reward model on ``pairs`` pairs; fewer pairs are read more often, 1 to 4 times.

    Args:
        seed: of the training.
    """
    logps, gold = reference.logps, reference.gold
    data = draw_pairs(world, logps, gold, pairs, TRAIN_SEED)
    held_out = draw_pairs(world, logps, gold, 8192, HELD_OUT_SEED)
    epochs = max(1, min(4, 4096 // pairs))
    model = train_reward_model(reference.model, world, data, seed, epochs=epochs)
    rewards = standardised(response_rewards(model, world), logps)
    accuracy = float((held_out.margins(rewards) > 0).double().mean())
    agreement = label_agreement(held_out, gold)
    return Proxy(rewards, accuracy, agreement, correlation(rewards, gold, logps))


def curves(
    world: World,
    reference: Reference,
    proxy: Proxy,
    temperatures: Sequence[float] = TEMPERATURES,
    samples: Sequence[int] = SAMPLES,
) -> list[dict[str, Any]]:
    """The measured points of both families, each from the reference outwards."""
    rows = []
    for algorithm, values in (("tilt", temperatures), ("bon", samples)):
        for number, value in enumerate(values):
            rows.append(
                {
                    "checkpoint": number,
                    "algorithm": algorithm,
                    **_point(world, reference, proxy.rewards, algorithm, value),
                    "reward_accuracy": proxy.accuracy,
                    "label_agreement": proxy.agreement,
                    "proxy_correlation": proxy.correlation,
                    "final": number == len(values) - 1,
                }
            )
    return rows


def _point(
    world: World, reference: Reference, proxy: Tensor, algorithm: str, value: float
) -> dict[str, Any]:
    if algorithm == "tilt":
        logps = tilt(reference.logps, proxy, value)
        where = {"temperature": value, "n": None, "kl_formula": None}
    else:
        logps = best_of_n(reference.logps, proxy, int(value))
        where = {"temperature": None, "n": int(value), "kl_formula": best_of_n_kl(int(value))}
    measures = measure(world, logps, reference.logps, reference.gold)
    mean_proxy = float((logps.exp() * proxy).sum(1).mean())
    return {**measures._asdict(), "score": measures.gold, "proxy": mean_proxy, **where}


def run_tilt(
    output: str | Path,
    seeds: Sequence[int] = (0,),
    on_curve: Callable[[str], None] = lambda text: None,
    *,
    size: str | ModelSize = "d32",
    settings: Sequence[Preset] | None = None,
    language: Language = LANGUAGE,
) -> list[str]:
    """Both curves of every preset and seed, into ``tilt.jsonl``; what is there already is kept.

    So are curves of other presets and seeds; those of the same name and other settings (another
    model size) are replaced. The file is rewritten, atomically, after each preset and seed.

    Args:
        output: the study's folder; references are in its folder ``world``.
        on_curve: called with a line about each pair of curves when it is there.
        settings: presets, whose ``pairs`` train the reward model; default: :func:`presets`.

    Returns:
        All those lines.
    """
    file, size = Path(output) / TILT_FILE, size_of(size)
    kept = _rows_by_settings(file)
    check_writable(output)
    lines = []
    for seed in seeds:
        for preset in presets() if settings is None else settings:
            key = _fingerprint(preset, seed, size, language)
            if key not in kept:
                world = make_world(preset, seed, language)
                rows = _labelled(world, size, key, Path(output) / REFERENCES)
                kept = {old: was for old, was in kept.items() if was[0]["run"] != rows[0]["run"]}
                kept[key] = rows
                _write_rows(file, [row for curve in kept.values() for row in curve])
            lines.append(describe(kept[key]))
            on_curve(lines[-1])
    return lines


def _labelled(world: World, size: ModelSize, key: str, references: Path) -> list[dict[str, Any]]:
    preset, seed = world.preset, world.seed
    reference = make_reference(world, size, seed, references)
    proxy = train_proxy(world, reference, preset.pairs, seed)
    labels = {
        "preset": preset.name,
        "penalty": preset.penalty,
        "violation_share": preset.violations,
        "pairs": preset.pairs,
        "seed": seed,
        "size": size.name,
        "settings": key,
    }
    name = f"{preset.name}-N{preset.pairs}-s{seed}"
    rows = curves(world, reference, proxy)
    return [{"run": f"{row['algorithm']}-{name}", **row, **labels} for row in rows]


def describe(rows: Sequence[dict[str, Any]]) -> str:
    """One line about the two curves of a world: where gold peaks and ends, and which law fits."""
    first = rows[0]
    parts = [
        f"{first['preset']} (penalty {first['penalty']:g}, violations "
        f"{100 * first['violation_share']:g} %), {counted(first['pairs'], 'pair')}, "
        f"seed {first['seed']}: reward model {first['reward_accuracy']:.3f} of pairs (labels "
        f"{first['label_agreement']:.3f}), correlation {first['proxy_correlation']:.2f}"
    ]
    for algorithm, name in (("tilt", "tilting"), ("bon", "best of n")):
        curve = [row for row in rows if row["algorithm"] == algorithm]
        peak = max(curve, key=lambda row: row["gold"])
        end = curve[-1]
        errors = law_errors(curve)
        parts.append(
            f"{name} peak {peak['gold']:.2f} at sqrt(KL) {peak['kl'] ** 0.5:.2f}, end "
            f"{end['gold']:.2f} at {end['kl'] ** 0.5:.2f}, RMSE "
            + " ".join(f"{law} {error:.3f}" for law, error in errors.items())
        )
    return "; ".join(parts)


def law_errors(curve: Sequence[dict[str, Any]]) -> dict[str, float]:
    """RMSE of each law of :mod:`fastdaa.study.laws`, fitted by least squares without intercept."""
    d = np.sqrt([max(row["kl"], 0.0) for row in curve])
    gain = np.array([row["gold"] for row in curve])[d >= MIN_DISTANCE]
    d = d[d >= MIN_DISTANCE]
    errors = {}
    for name, law in LAWS.items():
        design = law.design(d)
        solution = np.linalg.lstsq(design, gain, rcond=None)[0]
        errors[name] = float(np.sqrt(np.mean((design @ solution - gain) ** 2)))
    return errors


def _fingerprint(preset: Preset, seed: int, size: ModelSize, language: Language) -> str:
    parts = [asdict(preset), seed, asdict(size), asdict(language)]
    given = [_RECIPE, *parts, TEMPERATURES, SAMPLES]
    return hashlib.sha256(json.dumps(given).encode()).hexdigest()[:16]


def _rows_by_settings(file: Path) -> dict[str, list[dict[str, Any]]]:
    kept: dict[str, list[dict[str, Any]]] = {}
    for where, row in json_rows(file) if file.is_file() else ():
        if "settings" not in row:
            raise ValueError(f"{where}: expected a row that `fastdaa study` wrote")
        kept.setdefault(row["settings"], []).append(row)
    return kept


def _write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    with whole_file(file) as partial:
        partial.write_text(text, encoding="utf-8")
