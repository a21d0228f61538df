"""Reward functions and reward models."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from fastdaa.study.track.reward_function import RewardFunction, reward_scorer
from fastdaa.study.track.reward_model import RewardModel
from fastdaa.study.track.scoring import ScorerError
from fastdaa.train.run_record import new_record, write_record

REWARD = """
from dataclasses import dataclass

@dataclass
class Weight:
    value: float = 2.0

def score(prompts, completions):
    return [Weight().value * len(p) + len(c) for p, c in zip(prompts, completions)]

def broken(prompts, completions):
    raise KeyError("reward")

constant = 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(REWARD)
    return path


@pytest.fixture
def samples(make_sample):
    return [make_sample("abc", prompt="p"), make_sample("", prompt="pp")]


def test_a_function_of_a_file(file, samples):
    scores = reward_scorer(f"{file}:score", device="cpu", batch_size=1)(samples)
    assert scores.values == [5.0, 4.0]


def test_a_function_of_a_module(file, samples, monkeypatch):
    monkeypatch.syspath_prepend(str(file.parent))
    scorer = RewardFunction("my_rewards:score")
    assert scorer.label == "my_rewards:score" and scorer(samples).values == [5.0, 4.0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{file}:missing", "expected a function 'missing'"),
        ("{file}:constant", "expected a function 'constant'"),
        ("{file}x.py:score", "there is no .*x.py"),
        ("no.such.module:score", "no.such.module cannot be imported"),
        (":score", "expected module:function"),
        ("module:", "expected module:function"),
    ],
)
def test_functions_that_are_not_there(file, given, message):
    with pytest.raises(ScorerError, match=message):
        RewardFunction(given.format(file=file))


def test_a_function_that_raises(file, samples):
    with pytest.raises(ScorerError, match="failed: KeyError: 'reward'"):
        RewardFunction(f"{file}:broken")(samples)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0], r"expected 2 numbers, got the shape \[1\]"),
        ([1.0, float("nan")], "expected finite numbers, got nan at place 1"),
        ([1.0, None], r"expected a list of 2 numbers, got \[1.0, None\]"),
        (None, "expected a list of 2 numbers, got None"),
        ("12", "expected a list of 2 numbers, got '12'"),
        (np.array([1.0, np.inf]), "expected finite numbers, got inf"),
        (torch.zeros(2, 1).tolist(), r"expected 2 numbers, got the shape \[2, 1\]"),
    ],
)
def test_answers_that_are_no_scores(samples, answer, message):
    with pytest.raises(ScorerError, match=message):
        RewardFunction(lambda prompts, completions: answer)(samples)


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor], ids=["list", "numpy", "torch"])
def test_numbers_of_any_kind(samples, kind):
    assert RewardFunction(lambda p, c: kind([1.5, 2.0]))(samples).values == [1.5, 2.0]


@pytest.fixture
def classifier(tiny, tokenizer, tmp_path):
    """``classifier(labels, template)``: a saved reward model; its folder."""

    def save(labels=1, template=None):
        config = tiny().config
        config.num_labels = labels
        torch.manual_seed(0)
        LlamaForSequenceClassification(config).save_pretrained(tmp_path / "rm")
        tokenizer.save_pretrained(tmp_path / "rm")
        if template is not None:
            (tmp_path / "rm" / "chat_template.jinja").write_text(template)
        return str(tmp_path / "rm")

    return save


def alone(folder, tokenizer, text, *, ended=True):
    model = LlamaForSequenceClassification.from_pretrained(folder)
    ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] * ended
    with torch.no_grad():
        return float(model(torch.tensor([ids])).logits[0, 0])


def test_a_reward_model_scores_prompt_and_answer(classifier, tokenizer, make_sample):
    folder = classifier()
    texts = [("w1 w2", " w3"), ("w4", " w5 w6 w7 w8"), ("w9 w1", " w2")]
    scorer = reward_scorer(folder, device="cpu", batch_size=2)
    values = scorer([make_sample(answer, prompt=prompt) for prompt, answer in texts]).values
    expected = [alone(folder, tokenizer, prompt + answer) for prompt, answer in texts]
    assert values == pytest.approx(expected, abs=1e-5)
    assert len(set(values)) == 3


def test_a_text_is_read_at_its_end_as_in_the_training_of_reward_models(
    classifier, tokenizer, make_sample
):
    folder, sample = classifier(), make_sample(" w3", prompt="w1")
    ended, cut_off, with_its_own = (
        RewardModel(folder)([one]).values[0]
        for one in (sample, sample._replace(finished=False), sample._replace(answer=" w3 </s>"))
    )
    assert ended == pytest.approx(alone(folder, tokenizer, "w1 w3"), abs=1e-5)
    assert with_its_own == ended
    assert cut_off == pytest.approx(alone(folder, tokenizer, "w1 w3", ended=False), abs=1e-5)
    assert abs(ended - cut_off) > 1e-3


def test_a_reward_model_renders_conversations_itself(classifier, tokenizer, make_sample):
    folder = classifier(template="{% for m in messages %}{{ m['content'] }} w19 {% endfor %}")
    prompt = [{"role": "user", "content": "w1"}]
    for given in (prompt, "w1"):
        (value,) = RewardModel(folder)([make_sample("w2", prompt=given)]).values
        assert value == pytest.approx(
            alone(folder, tokenizer, "w1 w19 w2 w19", ended=False), abs=1e-5
        )


def test_a_cut_answer_of_a_conversation_is_not_closed(classifier, tokenizer, make_sample):
    folder = classifier(
        template="{% for m in messages %}{{ m['content'] | trim }} w19 {% endfor %}"
    )
    sample = make_sample("w2 w1 ", prompt=[{"role": "user", "content": "w1"}])
    (value,) = RewardModel(folder)([sample._replace(finished=False)]).values
    assert value == pytest.approx(alone(folder, tokenizer, "w1 w19 w2 w1", ended=False), abs=1e-5)


def test_our_reward_models_have_seen_text_without_a_template(classifier, tokenizer, make_sample):
    folder = classifier(template="{% for m in messages %}{{ m['content'] }} w19 {% endfor %}")
    write_record(folder, new_record({}))
    (value,) = RewardModel(folder)([make_sample(" w2", prompt="w1")]).values
    assert value == pytest.approx(alone(folder, tokenizer, "w1 w2"), abs=1e-5)


@pytest.mark.parametrize(
    ("given", "of_model"),
    [(None, None), (None, 0), ("<unk>", 0)],
    ids=["neither", "the model alone", "another one"],
)
def test_padding_is_what_the_model_recognises(classifier, tokenizer, make_sample, given, of_model):
    folder = classifier()
    padding = copy.deepcopy(tokenizer)
    padding.pad_token = given
    padding.save_pretrained(folder)
    config = LlamaConfig.from_pretrained(folder)
    config.pad_token_id = of_model
    config.save_pretrained(folder)
    texts = ["w1 w2 w3 w4", "w5", "w6 w7"]
    values = RewardModel(folder)([make_sample(text, prompt="") for text in texts]).values
    assert values == pytest.approx([alone(folder, tokenizer, text) for text in texts], abs=1e-5)


def test_a_template_that_fails_is_told(classifier, make_sample):
    scorer = RewardModel(classifier(template="{{ raise_exception('no!') }}"))
    with pytest.raises(ScorerError, match="its chat template failed: no!"):
        scorer([make_sample("w2", prompt="w1")])


def test_conversations_need_the_models_template(classifier, make_sample):
    with pytest.raises(ScorerError, match="expected a chat template"):
        RewardModel(classifier())([make_sample("w2", prompt=[{"role": "user", "content": "w1"}])])


def test_longer_inputs_are_cut(classifier, tokenizer, make_sample, caplog):
    folder = classifier()
    text = " ".join(["w1"] * 80)
    (value,) = RewardModel(folder)([make_sample(text, prompt="")]).values
    cut = " ".join(["w1"] * 64)
    assert value == pytest.approx(alone(folder, tokenizer, cut, ended=False), abs=1e-5)
    assert "cutting inputs to 64 tokens" in caplog.text


def test_models_that_are_no_reward_models(classifier, tmp_path):
    with pytest.raises(ScorerError, match=r"expected a model with 1 output, .* has 2"):
        RewardModel(classifier(labels=2))
    with pytest.raises(ScorerError, match="cannot be loaded"):
        RewardModel(str(tmp_path / "nothing"))
