"""``--help`` of the training commands: what is fastdaa's own comes first, under a title."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest
from transformers import TrainingArguments

from fastdaa.cli import main
from fastdaa.losses import LOSSES

OWN = {
    "train": ("preference training", "--loss_type"),
    "sft": ("fine-tuning", "--layout"),
    "reward": ("reward model", "--center_rewards_coefficient"),
    "online": ("on-policy training", "--output_dir"),
}


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]):
    """``shown(command)``: titles of its help in their order, each with the text below."""

    def read(command: str) -> dict[str, str]:
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert end.value.code == 0
        parts = re.split(r"^(\w.*):\n(?=  -)", capsys.readouterr().out, flags=re.MULTILINE)
        return dict(zip(parts[1::2], parts[2::2], strict=True))

    return read


def options(text: str) -> list[str]:
    return re.findall(r"^  (?:-h, )?(--\w+)", text, flags=re.MULTILINE)


@pytest.mark.parametrize("command", OWN)
def test_own_options_are_in_front_of_the_trainers(shown, command: str) -> None:
    sections = shown(command)
    titles = list(sections)
    own, first = OWN[command]
    assert titles[0] == "options" and options(sections["options"]) == ["--help", "--config"]
    assert options(sections[titles[1]])[:2] == ["--model", "--dataset"]
    assert titles[2] == own and options(sections[own])[0] == first
    if command != "online":
        trainer = "training (transformers.TrainingArguments)"
        assert titles[-1] == trainer
        known = {f"--{entry.name}" for entry in fields(TrainingArguments)}
        assert not known & {name for title in titles[:-1] for name in options(sections[title])}
        assert known <= {*options(sections[trainer])}


def test_every_option_is_shown_once(shown) -> None:
    listed = [name for text in shown("train").values() for name in options(text)]
    assert len(listed) == len(set(listed)) > 150


def test_losses_are_listed(shown) -> None:
    text = " ".join(shown("train")["preference training"].split())
    assert f"several make a mixture: {', '.join(LOSSES)} (docs/objectives.md" in text


def test_what_turns_an_option_off_says_so(shown) -> None:
    text = shown("train")["preference training"]
    assert re.search(r"--no_disable_dropout\s+Turn --disable_dropout off\.\n", text)
    assert "default" not in text.split("--no_log_exact_kl")[1].split("--log_token_stats")[0]
