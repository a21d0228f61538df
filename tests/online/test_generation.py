"""Rollouts: drawn from the policy itself, cut at their ends, repeatable, and unnoticed."""

from __future__ import annotations

import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastdaa.online.generation import (
    Sampling,
    TransformersRollouts,
    cut,
    end_tokens,
    sample_batch,
    undisturbed,
)
from fastdaa.online.vllm_rollouts import VllmRollouts
from fastdaa.train.attention import enable_segments
from fastdaa.train.backbone import install_head_task

VOCAB, END = 11, 2


def tiny_config(vocab_size=VOCAB):
    return LlamaConfig(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        initializer_range=0.5, eos_token_id=END, pad_token_id=0,
    )  # fmt: skip


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config())


@pytest.fixture
def prompts():
    generator = torch.Generator().manual_seed(1)
    sizes = [3, 1, 5, 2, 3, 4]
    return [torch.randint(3, VOCAB, (size,), generator=generator) for size in sizes]


def source(batch_size=64, **sampling):
    return TransformersRollouts(Sampling((END,), 0, **{"max_new_tokens": 8, **sampling}),
                                batch_size=batch_size)  # fmt: skip


def test_completions_end_at_the_end_or_are_cut(model, prompts):
    completions = source().sample(model, prompts * 8, seed=3)
    ends = [bool(ids[-1] == END) for ids in completions.completion_ids]
    assert completions.finished.tolist() == ends and 0 < sum(ends) < len(ends)
    for ids, finished in zip(completions.completion_ids, ends, strict=True):
        assert ids.dtype == torch.int64 and not bool((ids[:-1] == END).any())
        assert 1 <= len(ids) <= 8 and (finished or len(ids) == 8)


def test_samples_follow_the_distribution_of_the_policy(model):
    """The first tokens of many completions, whatever the padding before the prompt."""
    prompt, longer = torch.tensor([5, 7]), torch.tensor([4, 8, 3, 9, 6])
    for temperature in (1.0, 0.5):
        rollouts = source(4096, max_new_tokens=1, temperature=temperature)
        drawn = rollouts.sample(model, [prompt, longer] * 2000, seed=0).completion_ids[::2]
        counts = torch.bincount(torch.cat(drawn), minlength=VOCAB).double()
        with torch.no_grad():
            logits = model(input_ids=prompt[None]).logits[0, -1].double()
        expected = 2000 * (logits / temperature).softmax(-1)
        # 11 cells: above 29.6 in one of a thousand runs (10 degrees of freedom).
        assert float(((counts - expected).square() / expected).sum()) < 29.6


def test_the_same_seed_gives_the_same_completions(model, prompts):
    rollouts = source(batch_size=4)
    first = rollouts.sample(model, prompts, seed=5)
    torch.rand(3)
    again = rollouts.sample(model, prompts, seed=5)
    other = rollouts.sample(model, prompts, seed=6)
    same = [torch.equal(a, b) for a, b in zip(first[0], again[0], strict=True)]
    assert all(same) and torch.equal(first.finished, again.finished)
    assert not all(torch.equal(a, b) for a, b in zip(first[0], other[0], strict=True))


def test_a_policy_without_probabilities_is_named(model, prompts):
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="policy: expected finite probabilities"):
        source().sample(model, prompts, seed=0)


def sample(model, prompts, batch=0, seed=0, **sampling):
    sampling = Sampling(**{"end_ids": (END,), "pad_id": 0, "max_new_tokens": 8, **sampling})
    drawn = sample_batch(model, prompts, sampling, seed=seed, batch=batch)
    return [(ids.tolist(), finished) for ids, finished in drawn]


def test_improbable_tokens_are_sampled_too():
    """transformers samples from the 50 most probable ones by default."""
    model = LlamaForCausalLM(tiny_config(vocab_size=90))
    drawn = sample(model, [torch.tensor([3, 5])] * 600, max_new_tokens=1, temperature=1e3)
    assert len({ids[0] for ids, _ in drawn}) > 80


def test_padding_on_the_left_changes_nothing(model, prompts):
    # So cold that it is greedy: a batch and single prompts draw other random numbers.
    together = sample(model, prompts, temperature=1e-3)
    assert together == [sample(model, [p], batch=1, temperature=1e-3)[0] for p in prompts]


def test_the_same_batch_gets_the_same_answers_at_any_time(model, prompts):
    first = sample(model, prompts, batch=3)
    torch.rand(7)
    assert sample(model, prompts, batch=3) == first
    assert sample(model, prompts, batch=4) != first != sample(model, prompts, batch=3, seed=1)


def test_an_answer_ends_with_its_first_end_token(model):
    ends = (END, 4, 5, 6)
    drawn = sample(model, [torch.tensor([7])] * 40, end_ids=ends, max_new_tokens=4, temperature=5.0)
    assert {finished for _, finished in drawn} == {True, False}
    for ids, finished in drawn:
        assert not set(ids[:-1]) & set(ends)
        assert (ids[-1] in ends) == finished and (finished or len(ids) == 4)


def test_random_numbers_and_modes_are_as_before(model, prompts):
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]

    def draws():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = draws()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    with undisturbed(model):
        assert not any(module.training for module in model.modules())
        sample(model, prompts)
        draws()
    assert draws() == expected
    assert [module.training for module in model.modules()] == before


def test_modes_are_restored_after_an_error(model):
    model.train()
    with pytest.raises(KeyboardInterrupt), undisturbed(model):
        raise KeyboardInterrupt
    assert all(module.training for module in model.modules())


def test_nobody_notices(model, prompts):
    enable_segments(install_head_task(model))
    model.train()
    model.model.layers[0].eval()
    model.generation_config.repetition_penalty = 1.7
    modes = [module.training for module in model.modules()]
    torch.manual_seed(4)
    expected = torch.rand(2)
    torch.manual_seed(4)
    source().sample(model, prompts, seed=0)
    assert torch.equal(torch.rand(2), expected)
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config.repetition_penalty == 1.7
    assert model.config._attn_implementation == "fastdaa_segments"


def test_cut_and_ends(model):
    assert cut(torch.tensor([4, END, 0]), (END,))[0].tolist() == [4, END]
    assert cut(torch.tensor([4, 5]), (END,))[1] is False
    model.generation_config.eos_token_id = [END, 9]
    assert end_tokens(model, SimpleNamespace(eos_token_id=3)) == (END, 3, 9)


@pytest.mark.parametrize("name", ["max_new_tokens", "temperature", "batch_size"])
def test_numbers_out_of_range(name):
    with pytest.raises(ValueError, match=name):
        source(**{name: 0})


class Engine:
    """What is used of ``vllm.LLM``."""

    def __init__(self, **options):
        self.loaded = {}
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=self.load))
        worker = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        self.llm_engine = SimpleNamespace(model_executor=worker)

    def load(self, weights):
        self.loaded = {name: value.clone() for name, value in weights}

    def generate(self, asked, settings, use_tqdm):
        self.seeds = [each.seed for each in settings]
        tokens = [[*prompt["prompt_token_ids"][:1], END] for prompt in asked]
        tokens[-1] = tokens[-1][:1]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=row)]) for row in tokens]


@pytest.fixture
def vllm_rollouts(monkeypatch):
    fake = SimpleNamespace(LLM=Engine, SamplingParams=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    return VllmRollouts("policy", Sampling((END,), 0))


def test_vllm_gets_the_weights_and_gives_completions(model, prompts, vllm_rollouts):
    completions = vllm_rollouts.sample(model, prompts, seed=0)
    assert vllm_rollouts._engine.loaded.keys() == model.state_dict().keys()
    assert completions.finished.tolist() == [True] * 5 + [False]
    assert completions.completion_ids[0].tolist() == [int(prompts[0][0]), END]


def test_vllm_draws_with_other_numbers_in_every_iteration(model, prompts, vllm_rollouts):
    found = []
    for seed in (1, 5, 5):  # those of two iterations are a few apart
        vllm_rollouts.sample(model, prompts, seed=seed)
        found.append(vllm_rollouts._engine.seeds)
    assert found[1] == found[2] and len({*found[0], *found[1]}) == 2 * len(prompts)


def test_vllm_gets_weights_with_adapters_in_them(model, prompts, vllm_rollouts):
    peft = pytest.importorskip("peft")
    name = "model.layers.0.self_attn.q_proj.weight"
    before = {key: value.clone() for key, value in model.state_dict().items()}
    options = {"target_modules": ["q_proj"], "init_lora_weights": False}
    policy = peft.get_peft_model(model, peft.LoraConfig(**options))
    vllm_rollouts.sample(policy, prompts, seed=0)
    loaded = vllm_rollouts._engine.loaded
    assert loaded.keys() == before.keys()
    adapted = model.model.layers[0].self_attn.q_proj
    torch.testing.assert_close(loaded[name], before[name] + adapted.get_delta_weight("default"))
    assert all(torch.equal(loaded[key], before[key]) for key in before if key != name)
    # The policy is trained on as it was.
    torch.testing.assert_close(adapted.base_layer.weight, before[name])


def test_without_vllm_the_error_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    with pytest.raises(ImportError, match="expected vllm, which is not installed"):
        VllmRollouts("policy", Sampling((END,), 0))
