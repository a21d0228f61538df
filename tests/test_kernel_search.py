"""The opt-in search for tile shapes, in the interpreter with a timer of the test's own."""

from __future__ import annotations

import time

import pytest
import torch

from fastdaa import plan_head
from fastdaa.cli.kernel_search import fastest, search_kernels, try_all
from fastdaa.cli.score_choice import Way, advise, choose_score, ways
from fastdaa.kernels import search
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
    assert len(set(candidates)) == len(candidates)
    # Each takes seconds to compile, and the search three minutes at most.
    assert 8 <= len(candidates) <= 11 and len({c.group_n for c in candidates}) == 3
    assert all(config.split_v % config.block_v == 0 for config in candidates)
    rows = list(row_candidates(ROW_CONFIGS["row_statistics"][90]))
    assert rows[0] == ROW_CONFIGS["row_statistics"][90]
    assert len(set(rows)) == len(rows) > 10


def test_every_kernel_with_a_table_is_searched(monkeypatch):
    monkeypatch.setattr(search, "product_candidates", lambda: [ProductConfig(4, 32)])
    monkeypatch.setattr(search, "score_candidates", lambda entry, half: [SMALL])
    monkeypatch.setattr(search, "row_candidates", lambda entry: [entry._replace(block_v=32)])
    found = {name: list(trials) for name, trials in searches(*problem(), timer=lambda run: 2.0)}
    assert list(found) == [
        "score through tiles", "score", "row_statistics", "row_gradient", "score with statistics",
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


def test_where_the_tables_entry_fails_the_others_are_tried(monkeypatch):
    inner = search.score_tokens

    def broken(*args, config, **options):
        if config == SMALL:
            raise AttributeError("ptxas said no")  # nothing that Triton documents
        return inner(*args, config=config, **options)

    monkeypatch.setattr(search, "score_tokens", broken)
    candidates = [SMALL, SMALL._replace(block_v=16), SMALL._replace(group_n=8)]
    trials = list(search_score(*problem(), candidates=candidates, timer=lambda run: 1.0))
    assert [trial.milliseconds for trial in trials] == [None, 1.0, 1.0]
    assert trials[0].problem == "ptxas said no"


def test_every_trial_is_printed_and_the_fastest_is_named(capsys):
    trials = [Trial(SMALL, 2.0), Trial(SMALL._replace(block_n=32), 1.5), Trial(SMALL, None, "bad")]
    assert try_all(iter(trials), time.monotonic() + 60) == trials
    assert capsys.readouterr().out.count("\n") == 3
    line = fastest(trials)
    assert line.startswith("fastest: 1.500 ms (the table's entry: 2.000 ms): TileConfig(block_n=32")
    assert fastest(trials[:1]) == "fastest: the table's entry, 2.000 ms"
    assert fastest(trials[2:]) == "nothing works"


def test_a_search_ends_when_its_time_is_up(capsys):
    endless = (Trial(SMALL, 1.0) for _ in iter(int, 1))
    assert len(try_all(endless, time.monotonic() - 1)) == 1
    assert "the time is up: what is left is not tried" in capsys.readouterr().out


FLOOR, ALONE = Way("1U", int), Way("alone", int)
NOW, FUSED_WAY = Way("triton", int, ""), Way("fused", int, "ask for it")
TILED, STREAMS = Way("tiles", int, "set it"), Way("streams", int, None)


@pytest.mark.parametrize(
    ("others", "medians", "said"),
    [
        ([FUSED_WAY], [10, 10.4, 11, 13], ["nothing to change (now 1.10 x 1U, of which products "
                                           "alone 1.04; others gain less than 1 %)"]),
        ([TILED], [10, 10.4, 11, 10.95], ["nothing to change"]),
        ([FUSED_WAY, TILED], [10, 10.4, 11, 10.6, 10.7], ["fused, 1.06 x 1U", "ask for it"]),
        ([FUSED_WAY, TILED], [10, 10.4, 11, 13, 10.7], ["tiles, 1.07 x 1U", "set it"]),
        ([TILED, STREAMS], [10, 10.4, 11, 10.7, 10.5], ["tiles, 1.07", "beyond that: streams"]),
        ([STREAMS], [10, 10.4, 11, 10.5], ["nothing to change", "beyond that: streams, 1.05 x 1U"]),
    ],
    ids=["now", "less-than-1-percent", "fused", "tiles", "tiles-and-more", "only-two-streams"],
)  # fmt: skip
def test_one_clear_recommendation(others, medians, said):
    lines = advise([FLOOR, ALONE, NOW, *others], medians)
    assert lines[0].startswith("recommended: ")
    assert len(lines) == 1 + ("beyond that" in said[-1])
    for part in said:
        assert part in "\n".join(lines)


def test_the_best_that_were_found_are_compared_with_what_is_taken_now(monkeypatch):
    from fastdaa.cli import score_choice

    tiles = [
        Trial(ProductConfig(4, 32), 2.0), Trial(ProductConfig(2, 64, 2), 1.5),
        Trial(ProductConfig(2, 48), 1.7), Trial(ProductConfig(2, 16), 1.8),
    ]  # fmt: skip
    fused = [Trial(SMALL, 3.0), Trial(SMALL._replace(block_v=16), 2.5)]
    found = ways(problem(), tiles, fused)
    assert [way.how is None for way in found] == [True, True, False, False, True, False, False]
    assert [way.how for way in found if way.how == ""] == [""]
    assert "SPLIT_V = 48 in kernels/configs.py, STATISTICS_ROWS = 2 and STATISTICS_BYTES = 4 * 2 " \
        "* 48 in fastdaa/slices.py" in (found[5].how or "")  # fmt: skip
    assert "SCORE_CONFIGS" in (found[6].how or "")
    higher = [tiles[0], Trial(ProductConfig(8, 48), 1.0)]
    assert [way.how for way in ways(problem(), higher, fused)][4] is None, "more rows than blocks"
    monkeypatch.setattr(score_choice, "_MOST_BYTES", 0)
    assert len(ways(problem(), tiles, fused)) == 6, "none fits"
    assert len(ways(problem(), tiles[:1], [Trial(SMALL, None, "no")])) == 3, "fused fails"


def test_the_comparison_runs_every_way(monkeypatch):
    """In the interpreter, without the one on two streams."""
    from fastdaa.cli import score_choice

    monkeypatch.setattr(score_choice, "_ROUNDS", 1)
    tiles = [Trial(ProductConfig(4, 32), 2.0), Trial(ProductConfig(2, 48), 1.7)]
    fused = [Trial(SMALL, 3.0), Trial(SMALL._replace(block_v=16), 2.5)]
    lines = choose_score(problem(), tiles, fused, device="cpu")
    assert lines[0] == "score, the median of 1 rounds in turns:"
    assert len(lines) == 1 + 6 + 1 and all(" x 1U  " in line for line in lines[1:7])
    assert lines[-1].startswith("recommended: ")


def test_what_is_recommended_is_what_the_planner_then_takes(monkeypatch):
    from fastdaa import memory, slices
    from fastdaa.kernels import configs

    monkeypatch.setattr(configs, "SPLIT_V", 16896)
    for module in (slices, memory):
        monkeypatch.setattr(module, "STATISTICS_ROWS", 512)
        monkeypatch.setattr(module, "STATISTICS_BYTES", 4 * 512 * 16896)
    taken = plan_head(
        128256, "cuda", hidden_grad=False, head_grad=False, engine="triton", tokens=8192,
        hidden_size=4096, operand=torch.bfloat16,
    )  # fmt: skip
    assert (taken.tile_rows, taken.tile_columns) == (512, 16896)
    assert taken.extra_bytes <= 64 << 20


def test_errors_name_what_was_expected(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="expected a CUDA device, got none"):
        search_kernels("1,2,3")
    trials = iter([Trial(ProductConfig(4, 32), None, "no")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(search, "random_problem", lambda *_, device: problem())
    monkeypatch.setattr(search, "searches", lambda *_: [(search.TILES, trials)])
    with pytest.raises(ValueError, match="engine triton fails here: no"):
        search_kernels("1,2,3")
    assert search_sizes("8192,128256,4096") == (8192, 128256, 4096)
    with pytest.raises(ValueError, match=r"expected N,V,D as three numbers above 0, got '8,x'"):
        search_sizes("8,x")
