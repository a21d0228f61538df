"""Help: short pages of common options, long ones of all, both for terminals of 80 columns."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import TrainingArguments

from fastdaa.cli import evaluate, main, online_arguments, stage
from fastdaa.cli.arguments import build_parser
from fastdaa.cli.common_options import COMMON, EXAMPLES, TRAINERS_HELP, WORDS
from fastdaa.cli.help_format import HelpFormatter, OptionFormatter, fill_usage
from fastdaa.cli.options import OptionParser
from fastdaa.losses import LOSSES

OWN = {
    "train": ("preference training", "--loss_type"),
    "sft": ("fine-tuning", "--layout"),
    "reward": ("reward model", "--center_rewards_coefficient"),
    "online": ("on-policy training", "--output_dir"),
    "evaluate": ("pairs and their loss", "--loss_type"),
}
TRAINERS = ("train", "sft", "reward")
LONGEST = {"train": 120, "sft": 95, "reward": 100, "online": 110, "evaluate": 80}
PLAIN = [
    ["study"], *(["study", name] for name in ("full", "sweep", "online", "fit", "track")),
    ["demo"], ["doctor"], ["bench"], ["bench", "head"],
]  # fmt: skip


class Parsed(Exception):
    """Carries the parser that a command would have read its options with."""


@pytest.fixture
def page(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """``page(*argv, columns=80)``: what ``fastdaa *argv`` prints before it exits with 0."""

    def read(*argv: str, columns: int = 80) -> str:
        monkeypatch.setenv("COLUMNS", str(columns))
        try:
            code = main(list(argv))
        except SystemExit as end:
            code = end.code
        assert not code
        return capsys.readouterr().out

    return read


@pytest.fixture
def parser_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], OptionParser]:
    """``parser_of(command)``: the parser of its options."""

    def caught(parser: OptionParser, *_: object) -> None:
        raise Parsed(parser)

    def read(command: str) -> OptionParser:
        for module in (stage, online_arguments, evaluate):
            monkeypatch.setattr(module, "read_options", caught)
        monkeypatch.setattr("fastdaa.cli.arguments.read_options", caught)
        with pytest.raises(Parsed) as found:
            main([command])
        return found.value.args[0]

    return read


def sections(text: str) -> dict[str, str]:
    """Titles of a page in their order, each with the text below."""
    parts = re.split(r"^(\w.*):\n(?=  -)", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def options(text: str) -> list[str]:
    return re.findall(r"^  (?:-h, )?(--[\w-]+)", text, flags=re.MULTILINE)


@pytest.mark.parametrize("command", OWN)
def test_common_options_exist_and_have_words(
    command: str, parser_of: Callable[[str], OptionParser]
) -> None:
    known = {action.dest: action for action in parser_of(command)._actions}
    names = [name for group in COMMON[command].values() for name in group]
    assert len(names) == len(set(names)) and 15 <= len(names) <= 40
    for name in names:
        assert len(known[name].help or "") > 10, name
        assert "\n" not in (known[name].help or "")


@pytest.mark.parametrize("command", OWN)
def test_the_short_page_shows_the_common_options_in_order(
    command: str, page: Callable[..., str]
) -> None:
    shown = sections(page(command, "--help"))
    assert options(shown.pop("options")) == ["--help", "--help-all", "--config"]
    assert list(shown) == list(COMMON[command])
    for title, names in COMMON[command].items():
        assert options(shown[title]) == [f"--{name}" for name in names]


@pytest.mark.parametrize("command", OWN)
def test_the_short_page_is_short_and_counts_the_rest(
    command: str, page: Callable[..., str]
) -> None:
    short, whole = page(command, "--help"), page(command, "--help-all")
    assert short == page(command, "-h") and whole == page(command, "--help_all")
    assert len(short.splitlines()) <= LONGEST[command]
    # Two show help; a --no_... turns its option off.
    first, every = (
        len([name for name in options(text) if not name.startswith("--no_")]) - 2
        for text in (short, whole)
    )
    line = f"These are {first} of {every} options; `fastdaa {command} --help-all` lists all."
    assert short.splitlines()[-1] == line and "These are" not in whole
    for text in (short, whole):
        assert re.search(rf"^  --help-all +show all {every} options", text, re.MULTILINE)


@pytest.mark.parametrize("command", OWN)
def test_examples_can_be_read(
    command: str, page: Callable[..., str], parser_of: Callable[[str], OptionParser]
) -> None:
    text = page(command, "--help")
    parser = parser_of(command)
    for line in EXAMPLES[command].values():
        assert f"\n  {line}\n" in text
        words = shlex.split(line)
        behind = words[words.index(command) + 1 :]
        # Those of the example with a file of options are in that.
        needed = ["--model", "M", "--dataset", "D"] if "--config" in behind else []
        _, rest = parser.parse_known_args([*needed, *behind])
        assert rest == [], line


@pytest.mark.parametrize("command", OWN)
def test_own_options_are_in_front_of_the_trainers(command: str, page: Callable[..., str]) -> None:
    shown = sections(page(command, "--help-all"))
    titles = list(shown)
    own, first = OWN[command]
    assert options(shown[titles[1]])[:2] == ["--model", "--dataset"]
    assert titles[0] == "options" and titles[2] == own and options(shown[own])[0] == first
    if command in TRAINERS:
        trainer = "training (transformers.TrainingArguments)"
        assert titles[-1] == trainer
        known = {f"--{entry.name}" for entry in fields(TrainingArguments)}
        assert not known & {name for title in titles[:-1] for name in options(shown[title])}
        assert known <= {*options(shown[trainer])}


@pytest.mark.parametrize("command", OWN)
def test_every_option_is_shown_once_and_explained(
    command: str, page: Callable[..., str], parser_of: Callable[[str], OptionParser]
) -> None:
    listed = options(page(command, "--help-all"))
    assert len(listed) == len(set(listed))
    parser = parser_of(command)
    spelled = {name for name in parser._option_string_actions if "-" not in name[2:]}
    assert set(listed) - {"--help-all"} <= spelled
    for action in parser._actions:
        assert action.help, action.dest
        assert any(name in listed for name in action.option_strings) or (
            action.help == argparse.SUPPRESS
        )


def test_words_are_in_place_of_transformers_texts() -> None:
    for action in build_parser()._actions:
        if action.dest in WORDS and action.dest != "gradient_checkpointing":
            assert action.help != TRAINERS_HELP[action.dest], action.dest
    # One that fastdaa has words for itself keeps them.
    rate = build_parser()._option_string_actions["--learning_rate"]
    assert rate.help == "Peak learning rate."


def test_losses_are_listed(page: Callable[..., str]) -> None:
    for flag, title in (("--help", "objective"), ("--help-all", "preference training")):
        text = " ".join(sections(page("train", flag))[title].split())
        assert f"{', '.join(LOSSES)} (docs/objectives.md" in text


def test_what_turns_an_option_off_says_so(page: Callable[..., str]) -> None:
    text = sections(page("train", "--help-all"))["preference training"]
    assert re.search(r"--no_disable_dropout\s+Turn --disable_dropout off\.\n", text)
    assert "Default" not in text.split("--no_log_exact_kl")[1].split("--log_token_stats")[0]


def test_long_lists_of_choices_are_on_the_long_page(page: Callable[..., str]) -> None:
    short, whole = page("train", "--help"), page("train", "--help-all")
    for name in ("paged_lion_8bit", "cosine_with_restarts"):
        assert name in whole and name not in short


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize(
    "argv",
    [*([command, flag] for command in OWN for flag in ("--help", "--help-all")),
     *([*words, "--help"] for words in PLAIN)],
    ids=" ".join,
)  # fmt: skip
def test_no_line_is_too_long_for_a_terminal(
    argv: list[str], columns: int, page: Callable[..., str]
) -> None:
    lines = page(*argv, columns=columns).splitlines()
    assert max(map(len, lines)) <= columns
    assert all(line == line.rstrip() for line in lines)


@pytest.mark.parametrize("action", ["full", "track"])
def test_help_of_the_study_has_words_for_everything(action: str, page: Callable[..., str]) -> None:
    text = page("study", action, "--help")
    assert not re.search(r"\bE\d\b", text)
    assert not re.search(r"^  --\w+ \w+ +\([\d.]+\)$", text, re.MULTILINE)


def test_the_overview_names_the_long_page(page: Callable[..., str]) -> None:
    text = page("--help")
    assert "--help-all" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("made", "shown"),
    [
        ({"type": int}, "--a_b N"),
        ({"type": float, "nargs": "+"}, "--a_b X ..."),
        ({"type": str}, "--a_b B"),
        ({"nargs": "+"}, "--a_b B ..."),
        ({"nargs": "?"}, "--a_b [B]"),
        ({"metavar": "FILE"}, "--a_b FILE"),
        ({"choices": ["x", "y"]}, "--a_b {x,y}"),
        ({"choices": [f"word{n}" for n in range(20)]}, "--a_b NAME"),
        ({"action": "store_true"}, "--a_b"),
    ],
)
def test_metavars(made: dict[str, object], shown: str) -> None:
    parser = argparse.ArgumentParser(formatter_class=HelpFormatter)
    parser.add_argument("--a_b", "--a-b", help="words", **made)
    assert f"  {shown} " in parser.format_help().split("options:")[1].replace("\n", " ")


@pytest.mark.parametrize(
    ("default", "text", "expected"),
    [
        (1e-6, "Rate.", "Rate. Default: 1e-6."),
        (3.0, "Epochs.", "Epochs. Default: 3."),
        (["dpo", "ipo"], "Losses.", "Losses. Default: dpo ipo."),
        (False, "Switch.", "Switch. Default: false."),
        (0, "Steps.", "Steps. Default: 0."),
        (None, "Split.", "Split."),
        (2, "Steps. Default: the others'.", "Steps. Default: the others'."),
        (2, "Saves 20% or so.", "Saves 20% or so. Default: 2."),
    ],
)
def test_defaults(default: object, text: str, expected: str) -> None:
    parser = argparse.ArgumentParser(formatter_class=OptionFormatter)
    # Newer releases of Python refuse a bare % here, but not in fields of transformers.
    action = parser.add_argument("--x", default=default)
    action.help = text
    assert f" {expected}\n" in parser.format_help()


def test_usage_breaks_between_options() -> None:
    usage = "fastdaa c --model M --dataset D [--ref_model R] [options]"
    assert fill_usage(usage, 80) == usage
    lines = fill_usage(usage, 50).splitlines()
    assert lines[0] == "fastdaa c --model M --dataset D" and lines[1].endswith("R] [options]")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--lr", "1"], "unknown option '--lr' (did you mean '--learning_rate'?)"),
        (["train", "--batch_size", "1"], "'--per_device_train_batch_size'"),
        (["train", "--epochs", "1"], "'--num_train_epochs'"),
        (["evaluate", "--batch_size", "1"], "'--per_device_eval_batch_size'"),
        (["train", "--base_model", "m", "--xyz"], "'--base_model' (did you mean '--model'?), '--x"),
        (["train", "--no_gradient_checkpointing"], "'--gradient_checkpointing false'?)"),
        (["train", "--sync_ref_model"], "(none here; fastdaa.drop_in.trl has it)"),
        (["train", "--simpo_gamma", "1"], "(instead: --loss simpo --loss_kwargs '{"),
        (["reward", "--rpo_alpha", "1"], "unknown option '--rpo_alpha'"),
        (["train", "--optim", "adamw"], "names such as adamw_torch, "),
        (["train", "--dtype", "bf16"], "one of float32, bfloat16, float16, auto, got 'bf16'"),
        (["train", "--help_al"], "did you mean '--help_all'"),
        (["sft", "--quxly"], "'--quxly'; `fastdaa sft --help-all` lists all options"),
        (["train", "--max_steps"], "error: argument --max_steps: expected one argument"),
        (["train", "--beta", "x"], "error: argument --beta: invalid float value: 'x'"),
        (["doctor", "--modl", "x"], "unknown option '--modl' (did you mean '--model'?)"),
        (["demo", "--fats"], "option '--fats' (did you mean '--fast'?)"),
        (["demo", "extra"], "unrecognized arguments: extra"),
        (["demo", "--seeds", "x"], "argument --seeds: invalid int value: 'x'"),
        (["study", "sweeep"], "expected an action, got 'sweeep' (did you mean 'sweep'?)"),
        (["study", "xyzzy"], "'xyzzy'; one of full, world"),
        (["study", "sweep", "--los"], "option '--los' (did you mean '--losses'?)"),
        (["study", "track", "--modle", "m"], "unknown option '--modle' (did you mean '--model'?)"),
        (["demo", "--xyzzy"], "unknown option '--xyzzy'; `fastdaa demo --help` lists all options"),
        (["study", "fit"], "arguments are required: TABLE"),
        (["bench", "head", "--devce"], "option '--devce' (did you mean '--device'?)"),
    ],
)
def test_wrong_options_get_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and error.startswith(f"fastdaa {argv[0]}: error: ")
    assert message in error and len(error) < 400


def test_help_is_no_key_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for key in ("help_all", "help-all", "help", "config"):
        (tmp_path / "run.yaml").write_text(f"{key}: x\n")
        assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 2
        assert f"unknown key {key!r}" in capsys.readouterr().err


def test_bare_study_shows_its_actions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study"]) == 2
    assert "correlate" in capsys.readouterr().out


def test_pages_of_few_options_need_nothing_heavy() -> None:
    code = f"""if True:
        import sys, fastdaa.cli
        for argv in {[[], *PLAIN]!r}:
            try:
                fastdaa.cli.main([*argv, "--help"])
            except SystemExit as stop:
                assert not stop.code
            assert not {{"torch", "transformers", "datasets"}} & set(sys.modules), argv
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
