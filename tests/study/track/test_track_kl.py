"""The estimates of the KL: against whole logits, and against enumeration."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fastdaa.study.track.answers import Subject, answer, share_of_rank
from fastdaa.study.track.prompts import Prompt, PromptSet
from fastdaa.study.track.sequence_kl import answer_pack, answer_statistics
from fastdaa.study.track.settings import TrackSettings
from fastdaa.study.track.summary import mean_and_error
from fastdaa.train.backbone import install_head_task
from fastdaa.train.references import ModelReference

PROMPTS = [[3, 4, 5], [6], [7, 8]]
ANSWERS = [[9, 2], [10, 11, 12, 13, 2], [5]]


def statistics(policy, ref, prompts, answers, temperature=1.0):
    for model in (policy, ref):
        install_head_task(model)
    pack = answer_pack(prompts, answers, 0, torch.device("cpu"))
    reference = ModelReference(ref)
    return answer_statistics(
        policy, lambda pack: reference.score(pack, keep_rows=True), pack, temperature=temperature
    )


def by_hand(policy, ref, prompt, answer, temperature):
    """k1, the exact divergences and the entropies of one answer, from all logits."""
    ids = torch.tensor([prompt + answer])
    p, q = (
        (model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / temperature).log_softmax(-1)
        for model in (policy, ref)
    )
    chosen = torch.tensor(answer)[:, None]
    k1 = (p - q).gather(1, chosen).sum()
    return k1, (p.exp() * (p - q)).sum(), -(p.exp() * p).sum()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@torch.no_grad()
def test_estimates_are_those_of_the_whole_logits(tiny, temperature):
    policy, ref = tiny(seed=0).double(), tiny(seed=1).double()
    got = statistics(policy, ref, PROMPTS, ANSWERS, temperature)
    expected = torch.tensor(
        [by_hand(policy, ref, p, a, temperature) for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    )
    assert got.k1.dtype == torch.float64
    assert torch.allclose(torch.stack(got, dim=1), expected.double(), rtol=1e-6, atol=1e-6)
    assert expected[:, 1].min() > 0.1


def test_means_and_their_errors():
    assert mean_and_error([1.0, 3.0]) == (2.0, pytest.approx(1.0))
    assert mean_and_error([1.0]) == (1.0, None)
    assert mean_and_error([1.0, math.inf]) == mean_and_error([]) == (None, None)


def test_equal_models_have_no_divergence(tiny):
    got = statistics(tiny(), tiny(), PROMPTS, ANSWERS)
    assert got.k1.abs().max() == 0 and got.rb.abs().max() < 1e-5


@torch.no_grad()
def exact_kl(policy, ref, prompt, vocabulary, end, longest):
    """KL(policy || ref) of answers of at most ``longest`` tokens, by enumeration."""
    total = 0.0
    for length in range(1, longest + 1):
        for tail in itertools.product(range(vocabulary), repeat=length):
            whole = length == longest or tail[-1] == end
            if end in tail[:-1] or not whole:
                continue
            ids = torch.tensor([[*prompt, *tail]])
            p, q = (
                m(input_ids=ids).logits[0].double().log_softmax(-1)[len(prompt) - 1 : -1]
                for m in (policy, ref)
            )
            picked = torch.tensor(tail)[:, None]
            logp, logq = (x.gather(1, picked).sum() for x in (p, q))
            total += float(logp.exp() * (logp - logq))
    return total


def test_samples_are_the_policys_and_both_estimates_agree_with_enumeration(tiny, tokenizer):
    policy, ref = tiny(vocabulary=7, seed=3), tiny(vocabulary=7, seed=4)
    for model in (policy, ref):
        install_head_task(model)
    # What a model asks for in its own generation must not shape the samples.
    policy.generation_config.update(top_k=1, temperature=0.1, repetition_penalty=9.0)
    prompt = [3, 5]
    exact = exact_kl(policy, ref, prompt, 7, 2, 2)
    count = 600
    prompts = PromptSet([Prompt(i, prompt, "", "") for i in range(count)], [2])
    subject = Subject(policy, ModelReference(ref), tokenizer)
    settings = TrackSettings(prompts=count, max_new_tokens=2, batch_size=count)
    samples = answer(subject, prompts, settings)
    k1 = torch.tensor([sample.k1 for sample in samples], dtype=torch.float64)
    rb = torch.tensor([sample.rb for sample in samples], dtype=torch.float64)
    for values in (k1, rb):
        error = float(values.std() / count**0.5)
        assert abs(float(values.mean()) - exact) < 3 * error
        assert error < 0.1 * exact
    assert rb.var() < 0.5 * k1.var()


@pytest.mark.parametrize("count", [1, 2, 5, 6])
@pytest.mark.parametrize("equally_many", [False, True])
def test_every_batch_is_computed_once(count, equally_many):
    shares = [share_of_rank(count, rank, 3, equally_many=equally_many) for rank in range(3)]
    used = sorted(batch for share in shares for batch, counts in share if counts)
    assert used == list(range(count))
    if equally_many:
        assert len({len(share) for share in shares}) == 1
