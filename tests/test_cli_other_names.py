"""Command lines and files of TRL: what is read as ours, what is passed over, what is refused."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from fastdaa.cli import reward, sft, train
from fastdaa.cli.arguments import TrackArguments, TrainArguments, build_parser, parse
from fastdaa.cli.building import lora_config
from fastdaa.cli.options import option_parser
from fastdaa.cli.other_names import (
    FOREIGN,
    RELEASES,
    SAME,
    SIMILAR,
    is_idle,
    own_name,
    own_names,
    what_instead,
)
from fastdaa.train.config import PreferenceConfig
from fastdaa.train.stage_config import RewardConfig, SftConfig

NEEDED = "--model m --dataset d --use_cpu"


def read(line: str) -> tuple[Any, Any]:
    return parse(shlex.split(line))


def test_a_command_line_of_trl() -> None:
    arguments, config = read(
        "--model_name_or_path m --dataset_name a/b --dataset-config=c --dataset_train_split train "
        "--dataset_test_split test --torch_dtype bfloat16 --model_revision v1 --warmup_ratio 0.1 "
        "--preprocessing_num_workers 2 --evaluation_strategy steps --eval_steps 5 --use_cpu "
        "--max_seq_length 99 --padding_free --sync_ref_model false --f_divergence_type reverse_kl "
        "--dataset_streaming=False --desirable_weight 1.0"
    )
    assert (arguments.model, arguments.dataset, arguments.dataset_config) == ("m", ["a/b"], "c")
    assert (arguments.dataset_split, arguments.eval_split) == ("train", "test")
    assert (arguments.dtype, arguments.model_revision) == ("bfloat16", "v1")
    assert (config.warmup_steps, config.dataset_num_proc, config.max_length) == (0.1, 2, 99)
    assert config.eval_strategy == "steps" and config.eval_steps == 5


def test_a_file_of_trl(tmp_path: Path) -> None:
    path = tmp_path / "dpo.yaml"
    path.write_text(
        "model_name_or_path: m\ndataset_name: a/b\ndtype: float32\nloss_type: [sigmoid]\n"
        "dataset_test_split: test\neval_strategy: 'no'\nwarmup_ratio: 0.25\nuse_cpu: true\n"
        "sync_ref_model: false\npad_to_multiple_of: auto\nmodel_init_kwargs: null\ndebug: ''\n"
    )
    arguments, config = read(f"--config {path}")
    assert (arguments.model, arguments.dataset, arguments.eval_split) == ("m", ["a/b"], "test")
    assert config.warmup_steps == 0.25 and config.loss_type == ["sigmoid"]
    assert read(f"--config {path} --model_name_or_path n")[0].model == "n"
    path.write_text(f"{path.read_text()}warmup_steps: 0\n")
    assert read(f"--config {path}")[1].warmup_steps == 0.25
    path.write_text(path.read_text().replace("warmup_steps: 0\n", "warmup_steps: 5\n"))
    with pytest.raises(ValueError, match="an option once, got 'warmup_ratio' and 'warmup_steps'"):
        read(f"--config {path}")
    path.write_text("model: m\nmodel_name_or_path: n\n")
    with pytest.raises(ValueError, match="an option once, got 'model' and 'model_name_or_path'"):
        read(f"--config {path}")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--dataset_name e", "expected one of --dataset and --dataset_name"),
        ("--warmup_ratio 1.0", "(instead: --warmup_steps, which below 1 is a share of all steps)"),
        ("--sync_ref_model", "(none here; fastdaa.drop_in.trl has it)"),
        ("--packing x --foo 1", "'--packing' (leave it out: examples are packed anyway"),
        ("--desirable_weight 2", "--loss_kwargs '{\"desirable_weight\": 1.5}'"),
        ("--env x", "(set variables in the shell)"),
    ],
)
def test_what_is_refused(given: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read(f"{NEEDED} {given}")


def test_losses_that_are_others_in_trl_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "fastdaa"):
        for line in ("--loss ipo_norm", "--loss sigmoid", "--loss dpo --label_smoothing 0.1"):
            train._say_what_trl_does(read(f"{NEEDED} {line}")[1])
        assert not caplog.text
        train._say_what_trl_does(read(f"{NEEDED} --loss ipo sigmoid --label_smoothing 0.1")[1])
    assert "TRL's is ipo_norm here" in caplog.text and "sigmoid is smoothed by" in caplog.text


def test_every_unknown_option_is_named() -> None:
    with pytest.raises(ValueError, match=r"options '--rpo_alpha' .*, '--quxly'; `fastdaa train -"):
        read(f"{NEEDED} --rpo_alpha 1 --quxly 1")


def test_plain_text_of_another_column() -> None:
    line = "--model m --dataset d --use_cpu --completion_only_loss true --packing false"
    argv = shlex.split(f"{line} --loss_type nll")
    assert sft.parse([*argv, "--assistant_only_loss"])[1].every_answer
    assert not sft.parse([*argv, "--assistant_only_loss", "false"])[1].every_answer
    assert sft.parse([*argv, "--dataset_text_field", "story"])[0].columns == {"text": "story"}
    # TRL's default, also where there is no such column.
    assert sft.parse([*argv, "--dataset_text_field", "text"])[0].columns == {}
    with pytest.raises(ValueError, match=r"'--loss_type' \(leave it out .* has dft"):
        sft.parse(shlex.split(f"{line} --loss_type dft"))


def test_options_of_lora() -> None:
    pytest.importorskip("peft")
    given = "--use_peft --use_rslora --use_dora --lora_modules_to_save lm_head --model_revision v1"
    config = lora_config(read(f"{NEEDED} {given} --lora_target_modules '.*(q|v)_proj'")[0])
    assert config is not None and config.use_rslora and config.use_dora
    assert (config.target_modules, config.revision) == (".*(q|v)_proj", "v1")
    assert config.modules_to_save == ["lm_head"]
    for targets, expected in (("all-linear", "all-linear"), ("q_proj", {"q_proj"})):
        config = lora_config(read(f"{NEEDED} --use_peft --lora_target_modules {targets}")[0])
        assert config is not None and config.target_modules == expected
    for wrong in ("q_proj,v_proj", "all"):
        with pytest.raises(ValueError, match=rf"lora_target_modules: .* all-linear, got '{wrong}'"):
            read(f"{NEEDED} --use_peft --lora_target_modules {wrong}")
    with pytest.raises(ValueError, match="use_dora: expected use_peft beside it"):
        read(f"{NEEDED} --use_dora")


def test_no_coefficient_of_rewards() -> None:
    given = f"{NEEDED} --center_rewards_coefficient none"
    assert reward.parse(shlex.split(given))[1].center_rewards_coefficient == 0


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        pytest.param(
            "dataset_mixture",
            {"datasets": [{"id": "a/b", "config": "c", "split": "s", "weight": 0.5}, {"id": "d"}]},
            "dataset: [a/b:c:s, d], dataset_weights: [0.5, 1]", id="handbook",
        ),
        pytest.param("dataset_mixer", {"a/b": 1.0}, "dataset: [a/b];", id="older handbook"),
        pytest.param("datasets", [{"path": "a/b", "split": "s"}], "[a/b::s]", id="TRL"),
        pytest.param("datasets", [{"data_files": "x"}], "--dataset, with", id="of files"),
        pytest.param("datasets", None, "--dataset, with", id="nothing"),
    ],
)  # fmt: skip
def test_mixtures_are_written_out(name: str, value: Any, shown: str) -> None:
    assert shown in str(what_instead(name, value))


def test_names_do_not_hide_ours() -> None:
    known = build_parser()._option_string_actions
    for name in (*SIMILAR, *SAME):
        assert f"--{name}" not in known, name
    # One is of `sft` alone.
    for ours in {*SAME.values(), *SIMILAR.values()} - {"every_answer"}:
        assert f"--{ours}" in known, ours
    for name, foreign in FOREIGN.items():
        # It is one of `train`, and none of `sft`.
        assert f"--{name}" not in known or name == "loss_type"
        assert all(value == value.lower() for value in foreign.idle)
        words = [f"--{word}" for word in re.findall(r"--(\w+)", foreign.instead)]
        others = ("--every_answer", *(f"--{other}" for other in RELEASES))
        assert all(word in {*known, *others} for word in words), name


def test_ours_are_left_as_they_are() -> None:
    argv = ["--model", "m", "--loss", "dpo", "sft", "--beta=-1", "--quxly", "x"]
    assert own_names(argv, {"--model", "--loss", "--beta"}) == argv


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs TRL")
@pytest.mark.parametrize(
    ("command", "kind"),
    [
        *(("train", kind) for kind in ("DPOConfig", "KTOConfig", "ModelConfig", "ScriptArguments")),
        ("sft", "SFTConfig"),
        ("reward", "RewardConfig"),
    ],
)
def test_defaults_of_trl_are_never_in_the_way(command: str, kind: str) -> None:
    """Every option of TRL's commands is known, and one that is spelled out at its default runs."""
    import trl

    kinds = {
        "train": (TrainArguments, TrackArguments, PreferenceConfig),
        "sft": (sft.SftArguments, SftConfig),
        "reward": (reward.RewardArguments, RewardConfig),
    }[command]
    known = option_parser(command, kinds, "", title="")._option_string_actions
    for entry in dataclasses.fields(getattr(trl, kind)):
        if f"--{entry.name}" not in known and entry.name not in SAME:
            assert is_idle(entry.name, entry.default), entry.name


@pytest.mark.parametrize("other", ["activation", "gradient"])
def test_names_of_another_release(other):
    name = {"activation": "gradient", "gradient": "activation"}[other]
    known = {f"--{name}_checkpointing"}
    assert own_name(f"{other}_checkpointing", True, known) == f"{name}_checkpointing"
    both = {*known, f"--{other}_checkpointing"}
    assert own_name(f"{other}_checkpointing", True, both) == f"{other}_checkpointing"


def test_the_command_line_takes_back_what_a_file_says(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("assistant_only_loss: true\n")
    words = f"{NEEDED} --output_dir o --config {file}".split()
    for given, every in (([], True), (["--assistant_only_loss", "false"], False)):
        assert sft.parse([*words, *given])[1].every_answer is every


def test_values_that_ask_for_something_are_not_passed_over() -> None:
    known = build_parser()._option_string_actions
    for argv in (["--cpo_alpha", "0.0"], ["--loss", "f_dpo", "--f_divergence_type", "reverse_kl"]):
        assert own_names(argv, known) == argv
    assert own_names(["--f_divergence_type", "reverse_kl"], known) == []
    with pytest.raises(ValueError, match="expected one of --max_length and --max_seq_length"):
        own_names(["--max_seq_length", "5", "--max-length", "6"], known)


def test_a_share_of_all_steps_is_no_number_of_steps() -> None:
    from fastdaa.cli.online_arguments import parse as parse_online

    with pytest.raises(ValueError, match="warmup_ratio"):
        parse_online(
            ["--model", "m", "--dataset", "d", "--output_dir", "o", "--warmup_ratio", "0.1"]
        )
