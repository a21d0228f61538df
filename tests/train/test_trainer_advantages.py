"""Offline APA and AWR read the advantages that the dataset brings."""

from __future__ import annotations

import copy

import pytest
import torch

from fastdaa.losses import Objective


def with_advantages(pairs, count=8):
    data = pairs(count)
    chosen = [0.5 * i - 1.0 for i in range(count)]
    rejected = [0.3 - 0.2 * i for i in range(count)]
    data = data.add_column("chosen_advantage", chosen)
    return data.add_column("rejected_advantage", rejected)


@pytest.mark.parametrize("loss", ["apa", "awr"])
@pytest.mark.parametrize("layout", ["prefix_shared", "padded"])
def test_the_loss_is_that_of_the_advantages(make_trainer, pairs, losses_of, loss, layout):
    data = with_advantages(pairs)
    options = {"loss_type": [loss], "layout": layout, "per_device_train_batch_size": 8}
    trainer = make_trainer(data=data, **options)
    model = copy.deepcopy(trainer.model)
    trainer.train()
    total, tokens = 0.0, 0
    for row in data:
        for side in ("chosen", "rejected"):
            ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
            with torch.no_grad():
                logits = model(ids).logits[0, :-1].double()
            logps = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            logps = logps[len(row["prompt_ids"]) - 1 :]
            advantage = row[f"{side}_advantage"]
            # lambda is 1 for both; policy and reference are equal in the first step.
            if loss == "apa":
                total += advantage**2 * len(logps)
            else:
                total -= float(torch.exp(torch.tensor(advantage))) * float(logps.sum())
            tokens += len(logps)
    assert losses_of(trainer)[0] == pytest.approx(total / tokens, rel=1e-4)
    assert Objective.parse(loss).has_token_level


def test_losses_on_pairs_train_on_data_with_advantages(make_trainer, pairs, losses_of):
    found = []
    for data in (pairs(4), with_advantages(pairs, 4)):
        trainer = make_trainer(data=data, loss_type=["dpo"], per_device_train_batch_size=4)
        trainer.train()
        found.append(losses_of(trainer))
    assert found[0] == found[1]
