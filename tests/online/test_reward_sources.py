"""Rewards by functions and by sequence classifiers."""

from __future__ import annotations

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from fastdaa.online.prompts import Ending
from fastdaa.online.reward_functions import FunctionReward, as_rewards, load_function
from fastdaa.online.reward_sources import ModelReward, load_reward, same_tokenizer
from fastdaa.train.run_record import new_record, write_record

WORDS = ["<pad>", "</s>", "why", "good", "bad", "so", "very", "<user>", "<assistant>"]
CHAT = "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' </s> ' }}{% endfor %}"
PROMPTS = [torch.tensor([2, 5]), torch.tensor([2]), torch.tensor([5, 5, 2])]
ANSWERS = [torch.tensor([3, 1]), torch.tensor([6, 6, 4, 1]), torch.tensor([4])]
TEXTS = [("why so", "good"), ("why", "very very bad"), ("so so why", "bad")]


def make_tokenizer(words=WORDS, template=None):
    tokens = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, words[0]))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokens, eos_token="</s>", pad_token="<pad>", padding_side="right"
    )
    fast.chat_template = template
    return fast


def classifier(**options):
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3, pad_token_id=0,
        num_labels=1, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForSequenceClassification(config).eval()


def scores(model, rows):
    """By the model's own forward, one row at a time."""
    with torch.no_grad():
        return torch.stack([model(input_ids=torch.tensor([row])).logits[0, 0] for row in rows])


def test_the_policys_tokens_are_scored_at_the_last_one(tmp_path):
    model = classifier()
    expected = scores(
        model, [[*p.tolist(), *a.tolist()] for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    )
    model.save_pretrained(tmp_path / "reward")
    make_tokenizer().save_pretrained(tmp_path / "reward")
    source = load_reward(str(tmp_path / "reward"), make_tokenizer())
    torch.testing.assert_close(source.score(PROMPTS, ANSWERS), expected)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    small = ModelReward(loaded, tokens_per_pack=5)
    torch.testing.assert_close(small.score(PROMPTS, ANSWERS), expected)


def test_another_tokenizer_reads_text(tmp_path):
    model, words = classifier(), WORDS[:2] + WORDS[2:][::-1]
    other = make_tokenizer(words)
    rows = [[words.index(word) for word in f"{p} {a} </s>".split()] for p, a in TEXTS]
    expected = scores(model, rows)
    spaced = [(p, f" {a} ") for p, a in TEXTS]
    torch.testing.assert_close(ModelReward(model, other).score(PROMPTS, ANSWERS, spaced), expected)
    with pytest.raises(ValueError, match="expected a tokenizer of the policy"):
        ModelReward(model, other).score(PROMPTS, ANSWERS)


@pytest.mark.parametrize("template", [None, CHAT])
def test_a_cut_answer_ends_with_its_own_text(template, tmp_path):
    """As one that is truncated in the training of reward models; the third is cut."""
    model, words = classifier(), WORDS[:2] + WORDS[2:][::-1]
    model.save_pretrained(tmp_path)
    make_tokenizer(words, template).save_pretrained(tmp_path)
    source = load_reward(str(tmp_path), make_tokenizer())
    form = "{} {} </s>" if template is None else "<user> {} </s> <assistant> {} </s>"
    texts = [form.format(*pair) for pair in TEXTS]
    texts[2] = texts[2].removesuffix(" </s>")
    expected = scores(model, [[words.index(word) for word in text.split()] for text in texts])
    spaced = [(p, f" {a} ") for p, a in TEXTS]
    torch.testing.assert_close(source.score(PROMPTS, ANSWERS, spaced), expected)


def test_an_answer_also_ends_with_a_special_token_that_has_no_name(tmp_path):
    """Such as the ``<|eot_id|>`` of Llama 3, which closes the answers of chats."""
    model, words = classifier(), WORDS[:2] + WORDS[2:][::-1]
    model.save_pretrained(tmp_path)
    make_tokenizer(words).save_pretrained(tmp_path)
    policy = make_tokenizer()
    policy.add_tokens(AddedToken("<end>", special=True), special_tokens=True)
    end = policy.convert_tokens_to_ids("<end>")
    assert end not in policy.all_special_ids
    source = load_reward(str(tmp_path), policy)
    found = source.score(PROMPTS[:1], [torch.tensor([3, end])], [("why so", " good ")])
    row = [words.index(word) for word in ["why", "so", "good", "</s>"]]
    torch.testing.assert_close(found, scores(model, [row]))


def test_text_has_no_template_where_it_had_none_in_training(tmp_path):
    """Tokenizers of base models often have one that no training has seen."""
    model, words = classifier(), WORDS[:2] + WORDS[2:][::-1]
    model.save_pretrained(tmp_path)
    make_tokenizer(words, CHAT).save_pretrained(tmp_path)
    write_record(tmp_path, new_record({}))
    source = load_reward(str(tmp_path), make_tokenizer())
    rows = [[words.index(word) for word in f"{p} {a} </s>".split()] for p, a in TEXTS[:2]]
    found = source.score(PROMPTS[:2], ANSWERS[:2], [(p, f" {a} ") for p, a in TEXTS[:2]])
    torch.testing.assert_close(found, scores(model, rows))


def test_conversations_need_the_models_template():
    source = ModelReward(classifier(), make_tokenizer(), lambda ids: [{"role": "user"}])
    with pytest.raises(ValueError, match="expected a chat template in its tokenizer"):
        source.score(PROMPTS, ANSWERS, TEXTS)


def test_a_chat_template_gets_the_messages_of_the_data():
    model, tokenizer = classifier(), make_tokenizer(template=CHAT)
    chat = [{"role": "user", "content": "so"}, {"role": "assistant", "content": "good"},
            {"role": "user", "content": "why"}]  # fmt: skip
    source = ModelReward(model, tokenizer, lambda ids: chat if len(ids) == 1 else None)
    rendered = [
        "<user> why so </s> <assistant> good </s>",
        "<user> so </s> <assistant> good </s> <user> why </s> <assistant> very very bad </s>",
        "<user> so so why </s> <assistant> bad </s>",
    ]
    expected = scores(model, [[WORDS.index(word) for word in text.split()] for text in rendered])
    torch.testing.assert_close(source.score(PROMPTS, ANSWERS, TEXTS), expected)


def test_a_padding_token_of_its_own_makes_no_other_tokenizer():
    first, second = make_tokenizer(), make_tokenizer()
    second.add_special_tokens({"pad_token": "<|pad|>"})
    assert same_tokenizer(first, second)
    assert not same_tokenizer(first, make_tokenizer(WORDS[::-1]))


def test_a_function_gets_prompts_of_the_data_and_text(tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text(
        "def length(prompts, completions):\n"
        "    return [len(p) + len(c) for p, c in zip(prompts, completions)]\n"
    )
    source = load_reward(f"{path}:length", None)
    assert source.score(PROMPTS, ANSWERS, TEXTS).tolist() == [10, 16, 12]
    source = FunctionReward(lambda p, c: [len(x) for x in p], lambda ids: [0] * len(ids))
    assert source.score(PROMPTS, ANSWERS, TEXTS).tolist() == [2, 1, 3]
    assert load_function("math:sqrt")(4) == 2
    with pytest.raises(ValueError, match="expected a tokenizer, functions read text"):
        source.score(PROMPTS, ANSWERS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1.0], "expected 3 numbers"),
        ([1.0, float("nan"), 2.0], "expected finite numbers, got nan at place 1"),
        ("abc", "expected a list of 3 numbers"),
        (None, "expected a list of 3 numbers, got None"),
        (["a", "b", "c"], r"expected a list of 3 numbers, got \['a', 'b', 'c'\]"),
    ],
    ids=["too few", "nan", "text", "none", "texts"],
)
def test_nonsense_of_functions(given, message):
    with pytest.raises(ValueError, match=message):
        FunctionReward(lambda p, c: given).score(PROMPTS, ANSWERS, TEXTS)


def test_failures_of_functions(tmp_path):
    def fails(prompts, completions):
        raise KeyError("x")

    with pytest.raises(ValueError, match="fails failed: KeyError"):
        FunctionReward(fails).score(PROMPTS, ANSWERS, TEXTS)
    with pytest.raises(FileNotFoundError, match="there is no"):
        load_function(f"{tmp_path}/none.py:f")
    with pytest.raises(ValueError, match="expected a function 'none' in math"):
        load_function("math:none")
    with pytest.raises(ValueError, match="cannot be imported"):
        load_function("no_such_module_here:f")
    assert as_rewards([0.1, 2], 2, "x").tolist() == [0.1, 2.0]
    with pytest.raises(ValueError, match="expected finite numbers, got 1e\\+300 at place 1"):
        as_rewards([0.1, 1e300], 2, "x")  # infinite in fp32


def test_two_outputs_are_no_reward(tmp_path):
    config = classifier().config
    config.num_labels = 2
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^reward: expected a sequence classifier .* 1 output"):
        load_reward(str(tmp_path), make_tokenizer())


def test_a_causal_language_model_is_no_reward(tmp_path):
    config = classifier().config
    config.num_labels = 1
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"reward: expected a sequence classifier, .* LlamaForCau"):
        load_reward(str(tmp_path), make_tokenizer())


def test_what_a_template_writes_behind_an_end_is_scored_as_in_the_pairs():
    """Finished completions get the tail that the reward model saw behind every EOS."""
    model = classifier()
    source = ModelReward(model, ending=Ending(1, (5, 6)))
    tails = [[5, 6], [5, 6], []]
    expected = scores(
        model,
        [[*p.tolist(), *a.tolist(), *t] for p, a, t in zip(PROMPTS, ANSWERS, tails, strict=True)],
    )
    torch.testing.assert_close(source.score(PROMPTS, ANSWERS), expected)
