"""Which prompts are asked, and how."""

from __future__ import annotations

import pytest
from datasets import Dataset

from fastdaa.study.track.prompts import held_out_prompts, longest_prompt
from fastdaa.study.track.settings import TrackSettings


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
    with pytest.raises(ValueError, match="prompts: expected some of at most 1 tokens"):
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
    with pytest.raises(ValueError, match="max_new_tokens: expected less than 64"):
        longest_prompt(model, TrackSettings(max_new_tokens=64))


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
