"""Sampling in the middle of something else, and which prompts are asked."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from datasets import Dataset

from fastdaa.study.track.prompts import held_out_prompts
from fastdaa.study.track.room import end_ids_of, longest_prompt
from fastdaa.study.track.sampling import sample, undisturbed
from fastdaa.study.track.settings import TrackSettings

PROMPTS = [[4, 5, 6, 7], [8], [9, 10]]


def test_random_numbers_and_modes_are_as_before(tiny):
    model = tiny()
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
        sample(model, PROMPTS, TrackSettings(max_new_tokens=3), end_ids=[2], pad_id=0, batch=0)
        draws()
    assert draws() == expected
    assert [module.training for module in model.modules()] == before


def test_modes_are_restored_after_an_error(tiny):
    model = tiny().train()
    with pytest.raises(KeyboardInterrupt), undisturbed(model):
        raise KeyboardInterrupt
    assert all(module.training for module in model.modules())


def test_padding_on_the_left_changes_nothing(tiny):
    model = tiny()
    # So cold that it is greedy: a batch and single prompts draw other random numbers.
    cold = TrackSettings(max_new_tokens=6, temperature=1e-3)
    together = sample(model, PROMPTS, cold, end_ids=[2], pad_id=0, batch=0)
    alone = [sample(model, [p], cold, end_ids=[2], pad_id=0, batch=1)[0] for p in PROMPTS]
    assert together == alone


def test_the_same_batch_gets_the_same_answers_at_any_time(tiny):
    model, settings = tiny(), TrackSettings(max_new_tokens=8)

    def answers(batch, seed=0):
        own = TrackSettings(max_new_tokens=8, seed=seed)
        return sample(model, PROMPTS, own, end_ids=[2], pad_id=0, batch=batch)

    first = sample(model, PROMPTS, settings, end_ids=[2], pad_id=0, batch=3)
    torch.rand(7)
    assert answers(3) == first
    assert answers(4) != first and answers(3, seed=1) != first


def test_an_answer_ends_with_its_first_end_token(tiny):
    model, settings = tiny(), TrackSettings(max_new_tokens=6, temperature=5.0)
    ends = [2, 4, 5, 6]
    answers = sample(model, [[7]] * 40, settings, end_ids=ends, pad_id=0, batch=0)
    assert {answer.finished for answer in answers} == {True, False}
    for answer in answers:
        assert not set(answer.ids[:-1]) & set(ends)
        assert (answer.ids[-1] in ends) == answer.finished
        assert answer.finished or len(answer.ids) == 6


def test_prompts_are_different_short_enough_and_chosen_by_the_seed(text_pairs, tokenizer):
    rows = text_pairs(10).to_list()
    twice = Dataset.from_list(rows + rows)
    wanted = TrackSettings(prompts=8)
    found = held_out_prompts(twice, tokenizer, wanted).prompts
    assert len({tuple(prompt.ids) for prompt in found}) == len(found) == 8
    assert [prompt.number for prompt in found] == list(range(8))
    chosen = {row["prompt"]: row["chosen"] for row in rows}
    assert all(prompt.reference == chosen[prompt.text] for prompt in found)
    assert all(tokenizer(prompt.text)["input_ids"] == prompt.ids for prompt in found)
    other = held_out_prompts(twice, tokenizer, TrackSettings(prompts=8, seed=1)).prompts
    assert [p.ids for p in other] != [p.ids for p in found]
    short = held_out_prompts(twice, tokenizer, wanted, longest=3).prompts
    assert 0 < len(short) < 8 and max(len(prompt.ids) for prompt in short) <= 3
    with pytest.raises(ValueError, match="expected a prompt of at most 1 tokens"):
        held_out_prompts(twice, tokenizer, wanted, longest=1)


def test_a_chat_template_closes_a_turn_with_its_own_token(tokenizer):
    import copy

    chat = copy.deepcopy(tokenizer)
    chat.add_tokens(["<|end|>"], special_tokens=True)
    chat.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}<|end|> "
        "{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
    )
    rows = [
        {
            "prompt": [{"role": "user", "content": f"w{i}"}],
            "chosen": [{"role": "assistant", "content": f"w{i} w1"}],
            "rejected": [{"role": "assistant", "content": "w9"}],
        }
        for i in range(2, 5)
    ]
    found = held_out_prompts(Dataset.from_list(rows), chat, TrackSettings(prompts=3))
    closing = chat.convert_tokens_to_ids("<|end|>")
    assert found.end_ids == [chat.eos_token_id, closing]
    assert {prompt.reference for prompt in found.prompts} == {"w2 w1", "w3 w1", "w4 w1"}
    assert all(isinstance(prompt.text, list) for prompt in found.prompts)


def test_token_pairs_are_decoded(tokenizer):
    rows = [{"prompt_ids": [4, 5], "chosen_ids": [6, 2], "rejected_ids": [7, 2]}]
    (prompt,) = held_out_prompts(
        Dataset.from_list(rows), tokenizer, TrackSettings(prompts=1)
    ).prompts
    assert (prompt.ids, prompt.text, prompt.reference) == ([4, 5], "w0 w1", "w2")


def test_room_for_an_answer(tiny):
    model = tiny()  # 64 positions
    assert longest_prompt(model, TrackSettings(max_new_tokens=24)) == 40
    assert longest_prompt(model, TrackSettings(max_new_tokens=24), max_length=10) == 9
    with pytest.raises(ValueError, match="expected max_new_tokens below 64"):
        longest_prompt(model, TrackSettings(max_new_tokens=64))
    model.generation_config.eos_token_id = [2, 7]
    assert end_ids_of(model) == [2, 7]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompts", 0),
        ("temperature", 0.0),
        ("max_new_tokens", 1.5),
        ("seed", -1),
    ],
)
def test_settings_out_of_range(name, value):
    with pytest.raises(ValueError, match=name):
        TrackSettings(**{name: value})
