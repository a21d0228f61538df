"""Tables with the columns of a study and made-up numbers near those of the small world.

Loaded with ``runpy`` by the tests of figures, claims and page; every knob flips one finding.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

BETAS = (0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
DISTANCES = {
    "dpo": (1.72, 1.66, 1.55, 1.36, 1.09, 0.72, 0.47, 0.33),
    "slic": (1.64, 1.62, 1.60, 1.52, 1.26, 0.80, 0.52, 0.34),
    "ipo": (1.65, 1.42, 1.05, 0.76, 0.48, 0.27, 0.18, 0.14),
}
FRACTIONS = (0.2, 0.4, 0.6, 0.8, 1.0)
SIZE_BETAS = (0.005, 0.05, 0.2, 1.0)
STEPS = {"H": 128, "M": 256}
# Gold of a policy at distance d: d * (RISE - FALL * d) for each preset.
SHAPES = {"H": (1.75, 0.86), "M": (1.75, 0.62)}
SIZES = {"d12": 0.55, "d32": 1.0, "d64": 1.25}


def study_rows(
    *,
    presets: tuple[str, ...] = ("H", "M"),
    seeds: int = 3,
    falls: bool = True,
    ipo_nearest: bool = True,
    early_peak: bool = False,
    accuracy_slope: float = 0.0,
    small_model_r2: float = 0.6,
    r2_by_distance: float = 0.25,
    regularised: bool = True,
    noise: float = 0.04,
) -> list[dict[str, Any]]:
    """All rows of a sweep over losses, betas and seeds, over sizes, and of R-DPO."""
    random.seed(0)
    options = {
        "falls": falls,
        "early_peak": early_peak,
        "accuracy_slope": accuracy_slope,
        "small_model_r2": small_model_r2,
        "r2_by_distance": r2_by_distance,
        "noise": noise,
    }
    rows = []
    for preset in presets:
        for seed in range(seeds):
            for loss in DISTANCES:
                for place, beta in enumerate(BETAS):
                    source = loss if ipo_nearest or loss != "ipo" else "slic"
                    far = DISTANCES[source][place] * (1.0 if ipo_nearest else 1.02)
                    rows += _run(preset, loss, "d32", beta, seed, far, options)
            if preset == "M":
                continue
            for place, beta in enumerate(BETAS):
                far = DISTANCES["dpo"][place]
                if beta in SIZE_BETAS:
                    rows += _run(preset, "dpo", "d12", beta, seed, far, options)
                    rows += _run(preset, "dpo", "d64", beta, seed, far, options)
                if regularised:
                    rows += _run(preset, "rdpo", "d32", beta, seed, far, options, alpha=0.1)
    return rows


def _run(
    preset: str,
    loss: str,
    size: str,
    beta: float,
    seed: int,
    far: float,
    options: dict[str, Any],
    alpha: float = 0.0,
) -> list[dict[str, Any]]:
    rise, fall = SHAPES[preset]
    fall = fall if options["falls"] else 0.2
    far *= 1 + 0.03 * random.gauss(0, 1) + 0.02 * seed
    lift = 1 + 0.08 * random.gauss(0, 1)
    rows = []
    for step, fraction in enumerate(FRACTIONS, 1):
        d = far * math.sqrt((fraction if not options["early_peak"] else fraction**2) ** 0.8)
        gold = SIZES[size] * lift * d * (rise - fall * d) + random.gauss(0, options["noise"])
        if options["early_peak"] and d > 0.6:
            gold += 1.0 - fraction
        gold += 0.06 * bool(alpha)
        forward = 0.85 * d * d
        accuracy = 0.56 + options["accuracy_slope"] * gold + random.gauss(0, 0.015)
        r2 = options["small_model_r2"] if size == "d12" else 0.09
        r2 += (
            options["r2_by_distance"] * (d - 1.0) if d > 0.8 or options["r2_by_distance"] < 0 else 0
        )
        rows.append(
            {
                "run": f"{preset}-{loss}-b{beta:g}-s{seed}-{size}" + ("-a0.1" if alpha else ""),
                "checkpoint": step * STEPS[preset] // 5,
                "kl": d * d,
                "score": gold,
                "gold": gold,
                "preset": preset,
                "loss": loss,
                "algorithm": "daa",
                "beta": beta,
                "seed": seed,
                "size": size,
                "length_alpha": alpha,
                "fraction": fraction,
                "final": fraction == 1.0,
                "win_rate": min(1.0, max(0.0, 0.5 + 0.27 * gold)),
                "kl_forward": forward,
                "entropy": 4.4 - d,
                "length": 3.2 + 0.4 * d - 0.8 * bool(alpha) * d,
                "violations": 0.02 + 0.1 * d * d,
                "max_prob": 0.1 + 0.1 * d,
                "accuracy": accuracy,
                "loss_value": (0.69 * (1 if loss == "dpo" else 1.4) + random.gauss(0, 0.03))
                / (4 * beta**2 if loss == "ipo" else 1),
                "chosen_logratio": 0.15 - 0.9 * forward + random.gauss(0, 0.05),
                "rejected_logratio": -0.2 - 1.1 * forward,
                "margin": 0.35 + 0.2 * forward,
                "length_r2_pairs": min(1.0, max(0.0, 0.5 * r2 + random.gauss(0, 0.01))),
                "length_r2_samples": min(1.0, max(0.0, r2 + random.gauss(0, 0.02))),
                "seconds": 2.5 * fraction,
            }
        )
    return rows


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "points.jsonl").write_text(text, encoding="utf-8")
    return folder


def tree_content() -> dict[str, Any]:
    """``tree.json`` of one seed."""
    ends = {"dpo": (1.0, 1.0, 0.99), "ipo": (1.0, 0.97, 0.46), "slic": (1.0, 0.99, 0.89)}
    table = [
        {
            "pair": pair,
            "loss": loss,
            "beta": beta,
            "seeds": 2,
            "start": {"outside": 0.25, "chosen": 0.6, "rejected": 0.15},
            "end": {
                "outside": end,
                "chosen": 0.5 * (1 - end),
                "rejected": 0.5 * (1 - end),
                "kl": 2.4 * end,
                "margin": 1.0,
                "largest_outside": 0.9 * end,
            },
            "outside_range": [max(end - 0.03, 0.0), min(end + 0.02, 1.0)],
        }
        for pair, turned in (("near_duplicate", False), ("different_start", True))
        for loss, values in ends.items()
        for beta, end in zip((0.01, 0.1, 0.5), values[::-1] if turned else values, strict=True)
    ]
    policies = [
        {"name": name, "probabilities": shares, "loss": loss, "outside": shares[2]}
        for name, shares, loss in (
            ("all mass in the data", [0.5, 0.5, 0.0], 0.6931),
            ("all mass outside the data", [0.0, 0.0, 1.0], 0.6931),
            ("one of the two preferred", [0.6, 0.3, 0.1], 0.7),
        )
    ]
    oracle = {"name": "dpo", "claim": "dpo: h* = logit(p) / beta", "expected": 4.62, "got": 4.62}
    return {
        "settings": {"seeds": 2},
        "null_space": {"policies": policies, "equal": True, "higher": True},
        "oracles": [oracle | {"error": 1e-9, "tolerance": 1e-3, "holds": True}],
        "pairs": {
            "near_duplicate": {"chosen": "aab", "rejected": "aaa"},
            "different_start": {"chosen": "aba", "rejected": "bab"},
        },
        "table": table,
    }


def online_rows(seeds: int = 2) -> list[dict[str, Any]]:
    """What ``fastdaa study online`` adds to a study's table: trained and exact policies."""
    rows = []
    ways = [("apa", 0.1, 2.0), ("apa", 0.5, 1.0), ("apa-whitened", 0.2, 3.0), ("ppo", 0.0, 4.0),
            ("ppo", 0.2, 1.2), ("awr", 0.5, 3.0)]  # fmt: skip
    exact = [("apa_fixed_point", 0.1, 1.9), ("kl_optimum", 0.1, 1.8)]
    for seed in range(seeds):
        for series, beta, far in ways + exact:
            steps = 1 if (series, beta, far) in exact else 5
            for step in range(1, steps + 1):
                d = far * math.sqrt(step / steps) * (1 + 0.02 * seed)
                gold = d * (1.1 - 0.35 * d)
                row = {
                    "run": f"H-{series}-{beta:g}-s{seed}", "checkpoint": step * 64, "kl": d * d,
                    "score": gold, "gold": gold, "proxy": d, "preset": "H", "size": "d32",
                    "series": series, "algorithm": series.removesuffix("-whitened"),
                    "beta": beta, "seed": seed, "ref_entropy": 5.0, "entropy": 5.0 - d,
                }  # fmt: skip
                if steps > 1:
                    row |= {
                        "whitened": series == "apa-whitened",
                        "iteration": 8 * step, "fraction": step / steps, "final": step == steps,
                    }  # fmt: skip
                rows.append(row)
    return rows


def tilt_rows() -> list[dict[str, Any]]:
    """``tilt.jsonl`` of six worlds and one seed."""
    worlds = [("H", 256, 0.36), ("H", 2048, 0.42), ("H", 16384, 0.3), ("P1.5V10", 2048, 0.2),
              ("P1.5V3", 2048, 0.25), ("M", 2048, 0.16)]  # fmt: skip
    rows = []
    for preset, pairs, fall in worlds:
        for algorithm, far in (("tilt", 3.6), ("bon", 2.9)):
            for step in range(1, 25):
                d = far * step / 24
                gold = d * (1.1 - fall * d)
                rows.append(
                    {
                        "run": f"{algorithm}-{preset}-N{pairs}-s0",
                        "checkpoint": step,
                        "algorithm": algorithm,
                        "kl": d * d,
                        "score": gold,
                        "gold": gold,
                        "proxy": 1.1 * d - 0.06 * d * d,
                        "temperature": 8 / step if algorithm == "tilt" else None,
                        "n": None if algorithm == "tilt" else 2**step,
                        "preset": preset,
                        "pairs": pairs,
                        "penalty": 3.0,
                        "violation_share": 0.02,
                        "seed": 0,
                    }
                )
    return rows


def estimators_content() -> dict[str, Any]:
    """``estimators.json`` of three policies."""

    def summary(exact: float, mean: float, variance: float, bias: float) -> dict[str, float]:
        spread = math.sqrt(variance / 256)
        return {
            "mean": mean,
            "stderr": spread / math.sqrt(200),
            "spread": spread,
            "variance": variance,
            "bias_in_stderr": bias,
            "p05": max(mean - 1.6 * spread, 0.4 * mean),
            "p95": mean + 1.6 * spread,
        }

    return {
        "preset": "H",
        "seed": 0,
        "samples": 256,
        "repeats": 200,
        "policies": [
            {
                "name": f"DPO, step {step}",
                "exact": exact,
                "variance_ratio": ratio,
                "estimators": {
                    "k1": summary(exact, exact, 2 * exact, 0.4),
                    "rb": summary(exact, exact, 2 * exact / ratio, -1.2),
                    "k3": summary(exact, exact, 9 * exact**3, 0.9),
                    "trlx": summary(exact, 3.1 * exact, 30 * exact, 90.0),
                },
            }
            for step, exact, ratio in ((13, 0.31, 4.2), (38, 1.4, 3.1), (128, 3.4, 2.6))
        ],
    }
