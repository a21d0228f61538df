"""Options that would be passed over in silence: other tasks, adapters without an adapter."""

from __future__ import annotations

import pytest

from fastdaa.cli.arguments import parse
from fastdaa.cli.online_arguments import parse as parse_online

NEEDED = ["--model", "m", "--dataset", "d/d", "--use_cpu"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--do_train false", "do_train: expected true, since this command trains, got false"),
        ("--do_train false --do_eval --test_size 8", "do_train: expected true"),
        ("--do_predict", "do_predict: expected false"),
        ("--do_eval", "do_eval: expected eval_dataset, eval_split or test_size beside it"),
    ],
)
def test_other_tasks(given, message):
    with pytest.raises(ValueError, match=message):
        parse([*NEEDED, *given.split()])


def test_settings_of_fsdp_alone():
    given = ["--fsdp_config", '{"version": 2}']
    with pytest.raises(ValueError, match=r"fsdp_config: expected fsdp beside it, .*; add --fsdp"):
        parse([*NEEDED, *given])
    for switch in (["--fsdp"], ["--fsdp", "true"]):
        _, config = parse([*NEEDED, *given, *switch])
        assert config.fsdp is True
    _, config = parse([*NEEDED, "--fsdp", "false"])
    assert not config.fsdp


def test_training_may_be_asked_for():
    _, config = parse([*NEEDED, "--do_train", "--do_eval", "--test_size", "8"])
    assert config.do_train and config.eval_strategy == "epoch"


@pytest.mark.parametrize("given", ["none", "azure_ml kubeflow", "kubeflow"])
def test_several_trackers(given, monkeypatch):
    """As in a YAML file."""
    monkeypatch.setattr("fastdaa.train.trainer_options._check_trackers", lambda names: None)
    _, config = parse([*NEEDED, "--report_to", *given.split()])
    assert config.report_to == [name for name in given.split() if name != "none"]


@pytest.mark.parametrize(
    ("given", "strategy"),
    [
        ("", "no"),
        ("--eval_steps 5", "no"),
        ("--test_size 8", "epoch"),
        ("--test_size 8 --eval_steps 5", "steps"),
        ("--test_size 8 --eval_steps 5 --eval_strategy epoch", "epoch"),
        ("--test_size 8 --eval_strategy no", "no"),
    ],
)
def test_when_evaluations_are_made(given, strategy):
    """``no`` is obeyed, and ``eval_steps`` need no second option."""
    _, config = parse([*NEEDED, *given.split()])
    assert config.eval_strategy == strategy


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--lora_r 8", "lora_r: expected use_peft beside it, .*, got 8; add --use_peft"),
        ("--lora_alpha 8", "lora_alpha: expected use_peft beside it"),
        ("--lora_dropout 0.1", "lora_dropout: expected use_peft beside it"),
        ("--lora_target_modules q_proj", r"lora_target_modules: .* got \['q_proj'\]"),
    ],
)
@pytest.mark.parametrize("read", [parse, parse_online], ids=["train", "online"])
def test_adapter_options_alone(given, message, read):
    more = ["--reward", "r", "--use_cpu"] if read is parse_online else []
    with pytest.raises(ValueError, match=message):
        read([*NEEDED, *more, *given.split()])
    arguments, _ = read([*NEEDED, *more, *given.split(), "--use_peft"])
    assert arguments.use_peft


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--lora_alpha 0", "lora_alpha: expected an integer above 0, got 0"),
        ("--lora_dropout 2", "lora_dropout: expected a probability from 0 to below 1, got 2.0"),
    ],
)
def test_adapters_that_could_not_learn(given, message):
    with pytest.raises(ValueError, match=message):
        parse([*NEEDED, "--use_peft", *given.split()])
