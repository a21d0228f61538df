"""Every logged number against a plain computation, and how they are averaged."""

from __future__ import annotations

import copy
import math
import re
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastdaa import Objective, PairLossOutput
from fastdaa.logps import pair_logps
from fastdaa.reference import kl_divergence
from fastdaa.train.metrics import MetricStore, Sums, Throughput, pack_metrics
from fastdaa.train.policy import PackResult
from fastdaa.train.references import ReferenceScores

BETA = 0.3
FIELDS = ("chosen_ids", "rejected_ids")


@torch.no_grad()
def expected_metrics(policy, ref, data):
    """Metrics of pairs, sequence by sequence."""
    rows, values = list(data), {}
    (chosen, rejected), (ref_chosen, ref_rejected) = policy.logps(rows), ref.logps(rows)
    lengths = [torch.tensor([len(r[f]) for r in rows]) for f in FIELDS]
    rewards = BETA * (chosen - ref_chosen), BETA * (rejected - ref_rejected)
    logits = [torch.cat([policy.logits(r, f) for r in rows]) for f in FIELDS]
    every = torch.cat(logits)
    chosen_targets = torch.cat([torch.tensor(r["chosen_ids"]) for r in rows])
    kl = [kl_divergence(policy.logits(r, f), ref.logits(r, f)) for f in FIELDS for r in rows]
    values["rewards/chosen"], values["rewards/rejected"] = (r.mean() for r in rewards)
    values["rewards/margins"] = (rewards[0] - rewards[1]).mean()
    values["loss"] = -torch.nn.functional.logsigmoid(rewards[0] - rewards[1]).mean()
    values["rewards/accuracies"] = (rewards[0] > rewards[1]).float().mean()
    values["logps/chosen"], values["logps/rejected"] = chosen.mean(), rejected.mean()
    values["logits/chosen"], values["logits/rejected"] = (z.mean(-1).mean() for z in logits)
    values["entropy"] = -(every.softmax(-1) * every.log_softmax(-1)).sum(-1).mean()
    values["mean_token_accuracy"] = (logits[0].argmax(-1) == chosen_targets).float().mean()
    values["kl/k1"] = torch.cat([chosen - ref_chosen, rejected - ref_rejected]).mean()
    values["kl/token"] = torch.cat(kl).mean()
    values["kl/sequence"] = torch.stack([k.sum() for k in kl]).mean()
    values["displacement/chosen"] = (chosen - ref_chosen).mean()
    values["displacement/fraction"] = (chosen < ref_chosen).float().mean()
    values["logps/chosen_per_token"] = (chosen / lengths[0]).mean()
    values["logps/rejected_per_token"] = (rejected / lengths[1]).mean()
    values["completions/chosen_length"] = lengths[0].float().mean()
    values["completions/rejected_length"] = lengths[1].float().mean()
    return {name: value.item() for name, value in values.items()}


def average(parts):
    return {name: float(np.mean([part[name] for part in parts])) for name in parts[0]}


def assert_metrics(row, expected, prefix=""):
    for name, value in expected.items():
        assert row[prefix + name] == pytest.approx(value, abs=2e-5, rel=1e-5), name


@pytest.mark.parametrize(
    "options",
    [{"layout": "padded"}, {"layout": "packed"}, {"tokens_per_pack": 25}, {}],
    ids=["padded", "packed", "prefix_shared in packs", "prefix_shared"],
)
def test_every_number_of_training_and_evaluation(
    make_trainer, tiny_model, shifted, naive, pairs, options
):
    data, evaluation = pairs(8), pairs(7, seed=1)
    policy, ref = naive(tiny_model()), naive(shifted)
    trainer = make_trainer(
        data=data, eval_dataset=evaluation, ref_model=copy.deepcopy(shifted), beta=BETA,
        gradient_accumulation_steps=2, **options,
    )  # fmt: skip
    before = trainer.evaluate()
    # Batches of 4 and 3 pairs, in which every pair counts the same.
    assert_metrics(before, expected_metrics(policy, ref, evaluation), "eval_")
    trainer.train()
    parts = [data.select(range(4)), data.select(range(4, 8))]
    expected = average([expected_metrics(policy, ref, part) for part in parts])
    row = next(r for r in trainer.state.log_history if "loss" in r)
    assert_metrics(row, expected)
    assert {name.removeprefix("eval_") for name in before} >= expected.keys()


def test_sizes_and_rates(make_trainer, pairs):
    data = pairs(4)
    p, c, r = (np.array([len(ids) for ids in data[f]]) for f in ("prompt_ids", *FIELDS))
    shared, whole = int((p + c + r).sum()), int((2 * p + c + r).sum())
    positions = 8 * int((p + np.maximum(c, r)).max())
    for layout, computed, stored in (
        ("prefix_shared", shared, shared), ("packed", whole, whole), ("padded", whole, positions),
    ):  # fmt: skip
        began = time.perf_counter()
        trainer = make_trainer(data=data, layout=layout)
        trainer.train()
        longest = time.perf_counter() - began
        row = trainer.state.log_history[0]
        assert row["num_tokens"] == computed
        assert row["packing/efficiency"] == pytest.approx(computed / stored)
        assert row["packing/saved"] == pytest.approx(1 - stored / positions)
        assert row["throughput/pairs_per_second"] > 4 / longest
        rates = row["throughput/tokens_per_second"] / row["throughput/pairs_per_second"]
        assert rates == pytest.approx(computed / 4)
        assert 0.05 < row["memory/peak_gib"] < 64


def test_rows_have_the_documented_names_and_no_others(make_trainer, pairs, repository_root):
    text = Path(repository_root, "docs", "metrics.md").read_text()
    table = re.findall(r"^\| (`.*?) \|", text, flags=re.MULTILINE)
    documented = {name for cell in table for name in re.findall(r"`([^`]+)`", cell)}
    trainer = make_trainer(eval_dataset=pairs(4), use_weighting=True)
    trainer.train()
    from_trainer = {"loss", "grad_norm", "learning_rate", "epoch", "step"}
    row = trainer.state.log_history[0]
    others = {"aux_loss", "kl", "delta"}  # of mixtures of experts, and of unpaired data
    assert row.keys() - from_trainer == documented - others
    speed = {"loss", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time"}
    names = {name.removeprefix("eval_") for name in trainer.evaluate()}
    assert names - speed - {"epoch"} == documented - others - {"num_tokens"}


def test_options_turn_groups_of_numbers_off(make_trainer):
    trainer = make_trainer(log_token_stats=False, log_exact_kl=False)
    trainer.train()
    row = trainer.state.log_history[0]
    assert not row.keys() & {"entropy", "mean_token_accuracy", "logits/chosen", "kl/token"}
    assert "kl/k1" in row


def test_evaluation_sets_by_name(make_trainer, pairs):
    trainer = make_trainer(
        eval_dataset={"a": pairs(4), "b": pairs(4, seed=1)}, eval_strategy="steps", eval_steps=1
    )
    trainer.train()
    names = ("rewards/margins", "kl/token", "loss", "throughput/pairs_per_second")
    for part in ("a", "b"):
        rows = [r for r in trainer.state.log_history if f"eval_{part}_loss" in r]
        assert len(rows) == 1 and all(f"eval_{part}_{name}" in rows[0] for name in names)
    result = trainer.evaluate()
    assert result["eval_a_logps/chosen"] != result["eval_b_logps/chosen"]
    assert not any("eval_a" in name and "eval_b" in name for name in result)


@pytest.mark.parametrize(
    ("options", "measured"),
    [
        ({"logging_steps": 3}, [3, 6]),
        ({"logging_steps": 3, "logging_first_step": True}, [1, 3, 6]),
        ({"logging_steps": 3, "gradient_accumulation_steps": 2}, [3, 6]),
        ({"logging_steps": 3, "logging_strategy": "no"}, []),
        ({"logging_steps": 1, "log_exact_kl": False}, []),
    ],
    ids=["interval", "first step", "accumulation", "no logging", "off"],
)
def test_exact_kl_is_computed_where_it_is_logged(
    make_trainer, pairs, monkeypatch, options, measured
):
    import fastdaa.train.policy as module

    steps, token_kl = [], module.token_kl
    trainer = make_trainer(data=pairs(48), max_steps=6, **options)

    def counting(*args, **kwargs):
        steps.append(trainer.state.global_step + 1)
        return token_kl(*args, **kwargs)

    monkeypatch.setattr(module, "token_kl", counting)
    trainer.train()
    assert sorted(set(steps)) == measured
    rows = [row["step"] for row in trainer.state.log_history if "kl/token" in row]
    assert rows == measured


def test_averages_of_an_interval(make_trainer, pairs):
    data = pairs(16)
    single = make_trainer(data=data, max_steps=4)
    single.train()
    rows = [row for row in single.state.log_history if "loss" in row]
    double = make_trainer(data=data, max_steps=4, logging_steps=4)
    double.train()
    row = next(row for row in double.state.log_history if "loss" in row)
    for name in ("rewards/chosen", "logps/chosen", "entropy", "logits/rejected", "kl/k1"):
        assert row[name] == pytest.approx(np.mean([r[name] for r in rows]), abs=1e-6), name
    assert row["kl/token"] == pytest.approx(rows[-1]["kl/token"], rel=1e-6)
    assert row["num_tokens"] == rows[-1]["num_tokens"]


def test_nothing_waits_for_the_device_between_logged_rows(make_trainer, pairs, monkeypatch):
    """No read of a tensor on the host in the steps, except the Trainer's own check for NaN."""
    trainer = make_trainer(
        data=pairs(32), max_steps=8, logging_steps=8, logging_nan_inf_filter=False,
        tokens_per_pack=30, impl="recompute",  # the single pass looks at its numbers, on CPU only
    )  # fmt: skip
    # Checks look at values on CPU only.
    monkeypatch.setattr("fastdaa.validation._readable", lambda tensor: False)
    reads = []
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "cpu", "numpy"):
        method = getattr(torch.Tensor, name)

        def reading(self, *args, _method=method, _name=name, **kwargs):
            reads.append((trainer.state.global_step, _name))
            return _method(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, reading)
    step = trainer.training_step
    counted = []

    def training_step(*args, **kwargs):
        del reads[:]
        loss = step(*args, **kwargs)
        counted.append(list(reads))
        return loss

    monkeypatch.setattr(trainer, "training_step", training_step)
    trainer.train()
    assert counted == [[]] * 8


def test_time_of_an_evaluation_is_not_the_trainings(make_trainer, pairs, monkeypatch):
    trainer = make_trainer(
        data=pairs(8), eval_dataset=pairs(4), max_steps=2, logging_steps=2, eval_strategy="steps",
        eval_steps=1,
    )  # fmt: skip
    clock = 1.0

    def takes(seconds, step):
        def timed(*args, **kwargs):
            nonlocal clock
            result = step(*args, **kwargs)
            clock += seconds
            return result

        return timed

    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    monkeypatch.setattr(trainer, "training_step", takes(0.25, trainer.training_step))
    monkeypatch.setattr(trainer, "prediction_step", takes(100.0, trainer.prediction_step))
    trainer.train()
    row = next(row for row in trainer.state.log_history if "loss" in row)
    assert row["throughput/pairs_per_second"] == pytest.approx(8 / 0.5)


def read(store):
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), reduce=lambda tensor, reduction: tensor
    )
    return store.read(accelerator)


BATCH = {"row_ids": torch.arange(2), "packs": []}


def test_a_micro_batch_counts_as_one_whatever_its_packs():
    store = MetricStore()
    for batch in ([(2.0, 1.0), (4.0, 2.0)], [(10.0, 1.0)]):
        store.begin_batch()
        for total, count in batch:
            store.add(Sums(("a",), torch.tensor([total]), (count,)))
        store.end_batch(BATCH)
    assert read(store)["a"] == (6 / 3 + 10) / 2
    assert read(store) == {}


def test_nothing_is_left_out_but_shows_what_is_not_a_number():
    store = MetricStore()
    for a, b in ((1.0, 0.0), (math.nan, 0.0), (3.0, 2.0)):
        store.begin_batch()
        store.add(Sums(("a", "b", "c"), torch.tensor([a, b, 0.0]), (1.0, b, 0.0)))
        store.end_batch(BATCH)
    values = read(store)
    assert math.isnan(values["a"])
    assert values["b"] == 1.0
    assert math.isnan(values["c"])


def test_a_batch_that_failed_leaves_nothing():
    store = MetricStore()
    store.begin_batch()
    store.add(Sums(("a",), torch.tensor([100.0]), (1.0,)))
    store.begin_batch()
    store.add(Sums(("a",), torch.tensor([1.0]), (1.0,)))
    store.end_batch(BATCH)
    assert read(store)["a"] == 1.0


def test_the_clock_starts_with_the_first_batch():
    throughput = Throughput()
    throughput.leave_out(5.0)
    assert throughput.since is None
    throughput.begin()
    since = throughput.since
    throughput.begin()
    assert throughput.since == since
    throughput.restart()
    assert throughput.since is None


def test_the_row_of_a_short_run_has_the_exact_kl(make_trainer):
    trainer = make_trainer(max_steps=2, logging_steps=10)
    trainer.train()
    (row,) = (row for row in trainer.state.log_history if "loss" in row)
    assert row["step"] == 2 and row["kl/token"] > 0


def test_time_that_training_did_not_take(make_trainer):
    """What callbacks do between two steps, such as sampling, is no part of the rates."""
    trainer = make_trainer()
    throughput = trainer._stores["train"].throughput
    trainer.leave_out(2.0)
    assert throughput.since is None
    throughput.begin()
    began = throughput.since
    trainer.leave_out(2.0)
    assert throughput.since == began + 2.0


@pytest.mark.parametrize(
    ("names", "per_token"),
    [("simpo", True), ("orpo", True), (["simpo", "sft"], True), ("cpo", False), ("dpo", False),
     (["simpo", "dpo"], False)],
    ids=str,
)  # fmt: skip
def test_rewards_are_of_what_the_loss_compares(names, per_token):
    """The longer completion has the larger sum and the smaller mean."""
    counts = (2, 8)
    sums, lengths = torch.tensor([-4.0, -8.0]), torch.tensor(counts)
    policy = pair_logps(sums, lengths)
    output = PairLossOutput(torch.zeros(()), torch.zeros(1), policy, torch.zeros(10), None)
    objective = Objective.parse(names)
    ref = ReferenceScores(torch.tensor([-3.0, -7.5]), None) if objective.needs_ref else None
    pack = {"counts": counts, "lengths": lengths, "completion_lengths": lengths}
    (metrics,) = pack_metrics(pack, PackResult(output.loss, output, None, None), ref, objective)
    found = dict(zip(metrics.names, metrics.totals.tolist(), strict=True))
    chosen, rejected = (-2.0, -1.0) if per_token else (-4.0, -8.0)
    assert (found["logps/chosen"], found["logps/rejected"]) == (chosen, rejected)
    if ref is not None:
        chosen, rejected = chosen + 3.0, rejected + 7.5
    margin = objective.beta * (chosen - rejected)
    assert found["rewards/margins"] == pytest.approx(margin)
    assert found["rewards/accuracies"] == float(chosen > rejected)
