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


@pytest.mark.parametrize("command", OWN)
def test_no_line_is_too_long_for_a_terminal(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    if command == "train":
        # Names that have left the option's own line are in its help.
        assert "adamw_torch_fused" in text and "cosine_with_restarts" in text


@pytest.mark.parametrize("action", ["full", "track"])
def test_help_of_the_study_has_words_for_everything(
    action: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["study", action, "--help"])
    text = capsys.readouterr().out
    assert not re.search(r"\bE\d\b", text)
    assert not re.search(r"^  --\w+ \w+ +\([\d.]+\)$", text, re.MULTILINE)
