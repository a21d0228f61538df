"""E8 on a small language: exact fixed points, runs, resuming, sentences and the picture."""

from __future__ import annotations

import argparse
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.text import Text
from torch import Tensor

from fastdaa.cli.study_actions import online as command
from fastdaa.losses import apa
from fastdaa.study import online_sweep as sweep_module
from fastdaa.study.apa_fixed_point import apa_fixed_point
from fastdaa.study.enumeration import response_logps
from fastdaa.study.figures.end_labels import spread
from fastdaa.study.figures.online import picture
from fastdaa.study.figures.style import render
from fastdaa.study.language import Language
from fastdaa.study.online_plan import OnlineRun, online_grid
from fastdaa.study.online_sweep import online_rows, online_sweep
from fastdaa.study.online_words import Setting, best_within, compare, sentences, settings_of
from fastdaa.study.online_world import TableReward, WorldRollouts, run_online
from fastdaa.study.presets import PRESETS, SIZES
from fastdaa.study.sft import new_model
from fastdaa.study.table import read_table
from fastdaa.study.world import make_world

LANGUAGE = Language(longest=3)
TINY = replace(
    PRESETS["H"], name="tiny", pairs=64, held_out_pairs=40, sft_samples=512, sft_epochs=1
)
SMALL: dict[str, Any] = {
    "iterations": 4, "evaluate_every": 2, "rollouts": 16, "minibatch": 8, "language": LANGUAGE
}  # fmt: skip


def _tiny(algorithm: str = "apa", strength: float = 0.5, **changes: Any) -> OnlineRun:
    return OnlineRun(TINY, algorithm, strength, 0, SIZES["d12"], **{**SMALL, **changes})


def _random_logps(prompts: int = 2) -> tuple[Language, Tensor, Tensor]:
    language = Language(prompts=prompts, classes=1, class_size=2, longest=2)
    generator = torch.Generator().manual_seed(0)
    shape = (prompts, language.responses)
    logits, rewards = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return language, logits.log_softmax(1), rewards


def test_fixed_point_by_hand() -> None:
    """Responses of 0 to 2 tokens out of 2: 7 of them, 3 states a prompt that have a choice."""
    language, ref, rewards = _random_logps()
    found, floor = apa_fixed_point(language, ref, rewards, lam=0.7)
    assert torch.allclose(found.exp().sum(1), torch.ones(2, dtype=torch.float64))
    for prompt in range(2):
        p, r = ref[prompt].exp(), rewards[prompt]
        values, rests, masses, inner = [], [], [], []
        for token in (0, 1):
            # After the first token: each second token (responses 3 to 6), or the end (1 or 2).
            children = torch.tensor([3 + 2 * token, 4 + 2 * token, 1 + token])
            weights = p[children] / p[children].sum() * (r[children] / 0.7).exp()
            policy = weights / weights.sum()
            inner.append(policy)
            values.append((policy * r[children]).sum())
            rests.append(weights.sum().log().square())
            masses.append(p[children].sum())
        q = torch.stack([*values, r[0]])
        weights = torch.stack([*masses, p[0]]) * (q / 0.7).exp()
        first = weights / weights.sum()
        expected = torch.stack(
            [first[2], first[0] * inner[0][2], first[1] * inner[1][2],
             *(first[t] * inner[t][s] for t, s in itertools.product((0, 1), (0, 1)))]
        )  # fmt: skip
        torch.testing.assert_close(found[prompt].exp(), expected)
        left = weights.sum().log().square() + first[0] * rests[0] + first[1] * rests[1]
        torch.testing.assert_close(floor[prompt], left)


def test_of_single_steps_it_is_the_tilted_reference() -> None:
    language = Language(prompts=1, classes=1, class_size=3, longest=1)
    ref = torch.randn(1, 4, dtype=torch.float64).log_softmax(1)
    rewards = torch.randn(1, 4, dtype=torch.float64)
    found, floor = apa_fixed_point(language, ref, rewards, lam=0.5)
    tilted = ref + rewards / 0.5
    torch.testing.assert_close(found, tilted.log_softmax(1))
    losses = apa(found, ref, rewards, lam=0.5)
    torch.testing.assert_close(floor, (found.exp() * losses).sum(1))


def test_lambda_has_to_be_positive() -> None:
    with pytest.raises(ValueError, match="lam: expected a number above 0"):
        apa_fixed_point(*_random_logps(), lam=0.0)


def test_rollouts_follow_the_policy_and_rewards_are_looked_up() -> None:
    world = make_world(TINY, 0, LANGUAGE)
    model = new_model("d12", 0, LANGUAGE)
    prompts = [torch.tensor([index % 8]) for index in range(16_000)]
    found = WorldRollouts(LANGUAGE).sample(model, prompts, seed=1)
    assert found.finished.all()
    again = WorldRollouts(LANGUAGE).sample(model, prompts, seed=1)
    assert all(map(torch.equal, found.completion_ids, again.completion_ids))
    numbers = torch.arange(LANGUAGE.responses).expand(8, -1)
    drawn = TableReward(LANGUAGE, numbers).score(prompts, found.completion_ids).long()
    for index in (0, 17, 999):
        ids = LANGUAGE.completion_ids(int(drawn[index]))
        assert found.completion_ids[index].tolist() == ids
    exact = response_logps(model, world).exp()
    for prompt in range(8):
        shares = torch.bincount(drawn[prompt::8], minlength=LANGUAGE.responses) / 2000
        top = exact[prompt].topk(5).indices
        error = (exact[prompt][top] * (1 - exact[prompt][top]) / 2000).sqrt()
        assert ((shares[top] - exact[prompt][top]).abs() < 4 * error).all()


@pytest.mark.parametrize(
    ("algorithm", "strength", "whitened"),
    [("apa", 0.5, False), ("apa", 0.5, True), ("ppo", 0.1, False), ("awr", 1.0, False)],
    ids=["apa", "whitened", "ppo", "awr"],
)
def test_a_run_is_measured_on_the_way(
    tmp_path_factory: pytest.TempPathFactory, algorithm: str, strength: float, whitened: bool
) -> None:
    run = _tiny(algorithm, strength, whitened=whitened)
    folder = tmp_path_factory.getbasetemp() / "references"
    rows = run_online(run, folder)
    # 2 passes of 2 minibatches an iteration.
    assert [(row["checkpoint"], row["iteration"], row["final"]) for row in rows] == [
        (8, 2, False), (16, 4, True)
    ]  # fmt: skip
    assert rows[-1]["kl"] > 0
    assert rows[-1]["series"] == run.series
    if algorithm == "apa" and not whitened:
        again = run_online(run, folder)
        assert [row["kl"] for row in again] == [row["kl"] for row in rows]


def _no_run(*arguments: Any) -> Any:
    raise AssertionError("a finished run was done again")


def _options(folder: Path, **changes: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    options = parser.parse_args(["--output_dir", str(folder), "--workers", "1"])
    vars(options).update(changes)
    return options


@pytest.fixture
def tiny_study(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's grid in the small language."""

    def grid(algorithms: Any, seeds: Any, **options: Any) -> list[OnlineRun]:
        options |= {"preset": TINY, "size": "d12", **SMALL}
        return online_grid(algorithms, seeds, **options)

    monkeypatch.setattr("fastdaa.study.online_plan.online_grid", grid)


def test_the_command(
    tiny_study: None, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    changes = {
        "apa_lambdas": [0.5], "whitened_lambdas": [], "ppo_coefs": [0.0], "awr_lambdas": [1.0],
        "seeds": [0, 1],
    }  # fmt: skip
    assert command.run(_options(tmp_path, dry_run=True, **changes)) == 0
    assert capsys.readouterr().out.split() == [
        f"tiny-{way}-s{seed}-d12" for seed in (0, 1) for way in ("apa-l0.5", "ppo-k0", "awr-l1")
    ]
    assert command.run(_options(tmp_path, **changes)) == 0
    out = capsys.readouterr().out
    assert "8 done in" in out
    assert "APA: KL ends at" in out
    assert (tmp_path / "online.png").read_bytes().startswith(b"\x89PNG")
    table = read_table(tmp_path / "points.jsonl")
    assert {row["algorithm"] for row in table} == {
        "apa", "ppo", "awr", "apa_fixed_point", "kl_optimum"
    }  # fmt: skip
    monkeypatch.setattr(sweep_module, "_perform", _no_run)
    assert command.run(_options(tmp_path, **changes)) == 0
    assert "0 done in 0 s, 8 done before" in capsys.readouterr().out


def test_other_settings_do_not_mix(tmp_path: Path) -> None:
    online_sweep([_tiny(iterations=1, evaluate_every=1)], tmp_path, workers=1)
    with pytest.raises(ValueError, match=r"tiny-apa-l0.5-s0-d12: .*iterations 1 then, 2 now"):
        online_sweep([_tiny(iterations=2)], tmp_path, workers=1)
    assert len(online_rows([_tiny()], tmp_path)) == 1 + 16
    with pytest.raises(ValueError, match="runs: expected at least one"):
        online_sweep([], tmp_path)


def _rows(series: str, strength: float, seed: int, points: list[tuple[float, float]]) -> list[dict]:
    """Rows of a made-up run through (KL, gold), evenly spaced over 40 iterations."""
    count = len(points)
    return [
        {
            "run": f"{series}-{strength}-{seed}", "checkpoint": place, "series": series,
            "beta": strength, "seed": seed, "kl": kl, "gold": gold + 0.01 * seed, "proxy": 1.0,
            "iteration": 40 * place // count, "fraction": place / count, "entropy": 2.0,
            "ref_entropy": 4.0,
        }
        for place, (kl, gold) in enumerate(points, 1)
    ]  # fmt: skip


def _made_up() -> list[dict]:
    rows = []
    for seed in (0, 1, 2):
        rows += _rows("apa", 0.5, seed, [(0.6, 0.4), (1.0, 0.5), (1.0, 0.5), (1.0, 0.5)])
        rows += _rows("apa", 0.1, seed, [(1.5, 0.6), (4.0, 0.9), (4.0, 0.9), (4.1, 0.9)])
        rows += _rows("awr", 0.5, seed, [(1.0, 0.3), (2.0, 0.4), (4.0, 0.5), (8.0, 0.1)])
        rows += _rows("ppo", 0.0, seed, [(1.0, 0.5), (4.0, 0.7), (9.0, -1.0), (16.0, -5.0)])
        rows += _rows("ppo", 0.2, seed, [(1.0, 0.4), (2.0, 0.6), (2.0, 0.6), (2.0, 0.6)])
    return rows


def test_sentences_say_what_the_rows_say() -> None:
    told = "\n".join(sentences(_made_up()))
    assert "APA: KL ends at 4.10 at lambda 0.1, 1.00 at lambda 0.5; it is flat" in told
    assert "in 2 of 2 settings." in told
    assert "AWR: KL ends at 8.00 at lambda 0.5" in told
    assert "still rises at lambda 0.5 (by 6.00 nats)" in told
    assert (
        "PPO without a KL term collapses: gold is best with +0.71 at iteration 20 and ends at "
        "-4.99 with KL 16.00"
    ) in told
    assert "PPO with a fixed KL coefficient: KL ends at 2.00 at coefficient 0.2" in told
    assert "Best final gold of any setting, mean of the seeds: APA +0.91 at √KL 2.02" in told


def test_turned_around_the_sentences_turn_around() -> None:
    rows = []
    for seed in (0, 1, 2):
        rows += _rows("apa", 0.5, seed, [(1.0, 0.1), (1.0, 0.1), (3.0, 0.1), (9.0, -2.0)])
        rows += _rows("ppo", 0.0, seed, [(1.0, 0.5), (2.0, 0.5), (4.0, 0.6), (4.0, 0.6)])
    told = "\n".join(sentences(rows))
    assert "in 0 of 1 setting, and still rises" in told
    assert "PPO without a KL term does not collapse" in told
    assert (
        "Ahead by more than the 95 % interval over 3 seeds, of 8 distances: APA at 0, PPO" in told
    )


def test_frontiers_allow_stopping_early() -> None:
    found = settings_of(_made_up())
    rows = [row for run in found["ppo"][0].runs[:1] for row in run]
    assert [best_within(rows, reach) for reach in (0.5, 1.0, 2.0, 4.0)] == [0.0, 0.5, 0.7, 0.7]
    places = compare(found["apa"], found["ppo"])
    # The farthest of APA in each seed is at KL 4.1.
    assert [place.distance for place in places] == [0.25 * step for step in range(1, 9)]
    assert places[-1].difference == pytest.approx(0.2)
    assert compare(found["apa"], [Setting(0.0, found["ppo"][0].runs[:1])]) == []


@pytest.mark.parametrize("layout", ["wide", "narrow"])
def test_the_picture(layout: Any) -> None:
    figure = render(picture(_made_up()), layout)
    figure.draw_without_rendering()
    labels = {text.get_text() for legend in figure.legends for text in legend.get_texts()}
    assert "APA, best within a distance" in labels
    assert "PPO, end of a setting" in labels
    assert "cut off at -2" in figure.axes[0].get_title(loc="left")


@pytest.mark.parametrize("layout", ["wide", "narrow"])
def test_strengths_beside_the_ends_do_not_touch(layout: Any) -> None:
    strengths = [0.1 * place for place in range(1, 15)]
    rows = [
        row for strength in strengths
        for row in _rows("apa", strength, 0, [(1.0, 0.1), (2.0, 0.2), (3.0 + strength / 9, 0.3)])
    ]  # fmt: skip
    rows += _rows("ppo", 0.0, 0, [(1.0, 0.1), (2.0, 0.2), (20.0, 0.3)])
    figure = render(picture(rows), layout)
    figure.draw_without_rendering()
    texts = figure.axes[1].texts
    assert len(texts) == 15
    boxes = sorted((Text.get_window_extent(text) for text in texts), key=lambda box: box.y0)
    for below, above in itertools.pairwise(boxes):
        assert below.y1 <= above.y0
    assert boxes[0].x0 > figure.axes[1].get_window_extent().x1
    assert max(box.x1 for box in boxes) <= figure.bbox.x1


@pytest.mark.parametrize(
    ("heights", "gap", "expected"),
    [
        ([0.9, 0.1], 0.2, [0.9, 0.1]),
        ([0.5, 0.5], 0.2, [0.4, 0.6]),
        ([0.2, 0.6, 0.5, 0.7], 0.2, [0.2, 0.6, 0.4, 0.8]),
        ([1.0, 1.0, 0.0], 0.3, [0.7, 1.0, 0.0]),
        ([0.5] * 5, 0.9, [0.0, 0.25, 0.5, 0.75, 1.0]),
        ([1.2], 0.1, [1.0]),
    ],
    ids=["apart", "a pair", "a pool", "at the top", "too many", "one"],
)
def test_spread(heights: list[float], gap: float, expected: list[float]) -> None:
    assert spread(heights, gap) == pytest.approx(expected)


def test_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match="rows: expected on-policy runs"):
        picture([])


def test_what_is_asked_for_twice_is_run_once() -> None:
    runs = online_grid(["ppo", "ppo"], [0, 1, 0], strengths={"ppo": (0.1, 0.1)})
    assert [run.id for run in runs] == ["H-ppo-k0.1-s0-d32", "H-ppo-k0.1-s1-d32"]
