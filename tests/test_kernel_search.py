"""The opt-in search for tile shapes, in the interpreter with a timer of the test's own."""

from __future__ import annotations

import pytest
import torch

from fastdaa import plan_head
from fastdaa.cli.kernel_search import choose, search_kernels
from fastdaa.kernels.configs import ROW_CONFIGS
from fastdaa.kernels.score_configs import SCORE_CONFIGS, TileConfig
from fastdaa.kernels.search import (
    Trial,
    random_problem,
    row_candidates,
    score_candidates,
    search_products,
    search_score,
    search_sizes,
    searches,
)
from fastdaa.kernels.search_tiles import ProductConfig, product_candidates, score_through_tiles

SMALL = TileConfig(16, 32, 16, 4, 2, split_v=64)


def problem():
    return random_problem(5, 70, 16, torch.device("cpu"))


@pytest.mark.parametrize("half", [True, False])
def test_candidates_begin_with_the_tables_entry_and_repeat_nothing(half):
    entry = SCORE_CONFIGS[90, half, False]
    candidates = list(score_candidates(entry, half))
    assert candidates[0] == entry
    assert len(set(candidates)) == len(candidates) > 20
    assert all(config.split_v % config.block_v == 0 for config in candidates)
    rows = list(row_candidates(ROW_CONFIGS["row_statistics"][90]))
    assert rows[0] == ROW_CONFIGS["row_statistics"][90]
    assert len(set(rows)) == len(rows) > 10


def test_every_kernel_with_a_table_is_searched(monkeypatch):
    from fastdaa.kernels import search

    monkeypatch.setattr(search, "product_candidates", lambda: [ProductConfig(4, 32)])
    monkeypatch.setattr(search, "score_candidates", lambda entry, half: [SMALL])
    monkeypatch.setattr(search, "row_candidates", lambda entry: [entry._replace(block_v=32)])
    found = {name: list(trials) for name, trials in searches(*problem(), timer=lambda run: 2.0)}
    assert list(found) == [
        "score through tiles", "score", "score with statistics", "row_statistics", "row_gradient",
    ]  # fmt: skip
    assert all([trial.milliseconds for trial in trials] == [2.0] for trials in found.values())


def test_candidates_of_products_begin_with_what_the_planner_takes():
    taken = plan_head(
        128256, "cuda", hidden_grad=False, head_grad=False, engine="triton", tokens=8192,
        hidden_size=4096, operand=torch.bfloat16,
    )  # fmt: skip
    candidates = list(product_candidates())
    assert candidates[0] == (taken.tile_rows, taken.tile_columns, 1)
    assert len(set(candidates)) == len(candidates) > 12
    assert {c.lanes for c in candidates} == {1, 2}


@pytest.mark.parametrize("config", [(2, 32), (16, 32), (2, 96)], ids=str)
def test_scores_through_tiles_are_log_probs(config):
    hidden, weight, targets = problem()
    want = (hidden @ weight.T).log_softmax(1).gather(1, targets[:, None])[:, 0]
    got = score_through_tiles(hidden, weight, targets, ProductConfig(*config))
    assert torch.allclose(got, want, atol=1e-5)


def test_two_streams_are_for_gpus():
    candidates = search_products(*problem(), timer=lambda run: 1.0)
    trials = {trial.config.lanes: trial for trial in candidates}
    assert trials[1].milliseconds == 1.0
    assert trials[2].problem == "2 streams: expected a CUDA device, got cpu"


def test_every_candidate_is_run_checked_and_timed():
    calls = []

    def timer(run):
        calls.append(run())
        return float(len(calls))

    candidates = [SMALL, SMALL._replace(block_v=16)]
    trials = list(search_score(*problem(), candidates=candidates, timer=timer))
    assert [trial.config for trial in trials] == candidates
    assert [trial.milliseconds for trial in trials] == [1.0, 2.0]
    assert torch.allclose(calls[0], calls[1], atol=1e-5)


def test_a_wrong_or_failing_candidate_is_not_timed(monkeypatch):
    from fastdaa.kernels import search

    inner = search.score_tokens

    def broken(*args, config, **options):
        scores = inner(*args, config=SMALL, **options)
        if config.block_v == 48:
            raise RuntimeError("out of resource: shared memory\nmore")
        return scores._replace(logps=scores.logps + (0.1 if config.block_v == 128 else 0.0))

    monkeypatch.setattr(search, "score_tokens", broken)
    candidates = [SMALL, SMALL._replace(block_v=128), SMALL._replace(block_v=48)]
    trials = list(search_score(*problem(), candidates=candidates, timer=lambda run: 1.0))
    assert [trial.milliseconds for trial in trials] == [1.0, None, None]
    assert trials[1].problem == "wrong: results differ by 1.0e-01"
    assert trials[2].problem == "out of resource: shared memory"


def test_choose_prints_every_trial_and_names_the_fastest(capsys):
    trials = [Trial(SMALL, 2.0), Trial(SMALL._replace(block_n=32), 1.5), Trial(SMALL, None, "bad")]
    line = choose(iter(trials))
    assert line.startswith("fastest: 1.500 ms (the table's entry: 2.000 ms): TileConfig(block_n=32")
    assert capsys.readouterr().out.count("\n") == 3
    assert choose(trials[:1]) == "fastest: the table's entry, 2.000 ms"
    with pytest.raises(ValueError, match="a configuration that works, got none"):
        choose(trials[2:])


def test_errors_name_what_was_expected(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="expected a CUDA device, got none"):
        search_kernels("1,2,3")
    assert search_sizes("8192,128256,4096") == (8192, 128256, 4096)
    with pytest.raises(ValueError, match=r"expected N,V,D as three numbers above 0, got '8,x'"):
        search_sizes("8,x")
