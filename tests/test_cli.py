"""The command line: options, YAML, errors in one line, and what reaches the trainer."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from word_files import write_checkpoint

from fastdaa.cli import doctor, main
from fastdaa.cli import train as train_command
from fastdaa.cli.arguments import build_parser, parse
from fastdaa.cli.runs import continuation, log_lines, print_continuation
from fastdaa.cli.summary import ALIGNMENT, STAGE, last_values, print_summary
from fastdaa.train.checkpoints import last_complete
from fastdaa.train.run_record import new_record, write_record

NEEDED = ["--model", "m/m", "--dataset", "d/d", "--use_cpu"]
WORDS = ["<eos>", "good", "bad", "question", "answer", "why"]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, "<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def data_path(tmp_path: Path) -> Path:
    pair = {"prompt": "question", "chosen": " good", "rejected": " bad"}
    path = tmp_path / "pairs.jsonl"
    path.write_text((json.dumps(pair) + "\n") * 8)
    return path


class FakeTrainer:
    """Takes what the command builds, and pretends to train."""

    calls: list[dict[str, Any]]
    outcome: BaseException | None = None

    def __init__(self, **options: Any) -> None:
        self.options, self.args, self.saved = options, options["args"], False
        self.callback_handler = type("Handler", (), {"callbacks": []})()
        self.state = type("State", (), {"log_history": HISTORY, "global_step": 3})()

    def train(self, resume_from_checkpoint: str | None) -> None:
        known = {"checkpoint": resume_from_checkpoint, "card_dataset": self.card_dataset}
        FakeTrainer.calls.append({**self.options, **known})
        if FakeTrainer.outcome is not None:
            raise FakeTrainer.outcome

    def save_model(self) -> None:
        folder = Path(self.options["args"].output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "saved").touch()

    def create_model_card(self, **facts: Any) -> None:
        (Path(self.options["args"].output_dir) / "README.md").touch()

    def is_world_process_zero(self) -> bool:
        return True


HISTORY = [{"loss": 0.5, "step": 3}, {"eval_loss": 0.25, "step": 3}, {"train_runtime": 2.0}]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    FakeTrainer.calls, FakeTrainer.outcome = [], None
    monkeypatch.setattr(train_command, "_trainer_class", lambda: FakeTrainer)
    return FakeTrainer.calls


def train(model: Path, data: Path, out: Path, *options: str) -> int:
    required = ["--model", str(model), "--dataset", str(data), "--output_dir", str(out)]
    return main(["train", *required, "--use_cpu", *options])


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and "Traceback" not in error
    return error


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    from fastdaa import __version__

    assert main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "train" in text and "doctor" in text
    assert main([]) == 2


def test_commands_without_a_module_are_not_offered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fastdaa.cli._COMMANDS", {"train": "t", "nothing_there": "n"})
    main(["--help"])
    assert "nothing_there" not in capsys.readouterr().out
    assert main(["nothing_there"]) == 2


def test_misspelt_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "did you mean 'train'" in one_error(capsys)


def test_train_help_shows_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["train", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for option in ("--loss", "--beta", "--per_device_train_batch_size", "--lora_r", "--config"):
        assert option in text


def test_options() -> None:
    arguments, config = parse(
        [*NEEDED, "--loss", "ipo", "sft", "--loss_weights", "1", "0.5", "--beta", "0.2",
         "--max_length", "none", "--loss-kwargs", '{"target": "unified"}', "--learning_rate=3e-6",
         "--per_device_train_batch_size", "2", "--no_log_exact_kl", "--dtype", "bfloat16"]
    )  # fmt: skip
    assert (arguments.model, arguments.dtype) == ("m/m", "bfloat16")
    assert config.loss_type == ["ipo", "sft"] and config.loss_weights == [1.0, 0.5]
    assert config.max_length is None and config.learning_rate == 3e-6
    assert config.per_device_train_batch_size == 2 and not config.log_exact_kl
    assert "target=unified" in str(config.objective())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param([], None, id="absent"),
        pytest.param(["--resume_from_checkpoint"], "true", id="bare"),
        pytest.param(["--resume_from_checkpoint", "x/y"], "x/y", id="path"),
    ],
)
def test_resume_option(given: list[str], expected: str | None) -> None:
    assert parse([*NEEDED, *given])[1].resume_from_checkpoint == expected


def test_every_training_argument_is_an_option() -> None:
    from dataclasses import fields

    from transformers import TrainingArguments

    options = build_parser()._option_string_actions
    missing = [f.name for f in fields(TrainingArguments) if f.init and f"--{f.name}" not in options]
    assert missing == []


def test_a_switch_that_is_a_choice_now() -> None:
    message = r"unknown option '--group_by_length' .*'--train_sampling_strategy group_by_length'"
    with pytest.raises(ValueError, match=message):
        parse([*NEEDED, "--group_by_length"])


def test_mappings_and_words_of_the_trainer() -> None:
    given = ["--liger_kernel_config", '{"rope": false}', "--include_num_input_tokens_seen"]
    assert parse([*NEEDED, *given])[1].liger_kernel_config == {"rope": False}
    assert parse([*NEEDED, *given])[1].include_num_input_tokens_seen == "all"
    config = parse([*NEEDED, "--include_num_input_tokens_seen", "non_padding"])[1]
    assert config.include_num_input_tokens_seen == "non_padding"
    with pytest.raises(ValueError, match=r"liger_kernel_config.*JSON object, got '\[1\]'"):
        parse([*NEEDED, "--liger_kernel_config", "[1]"])


def test_bf16_alone_means_true() -> None:
    assert parse([*NEEDED, "--bf16"])[1].bf16 is True


def test_every_switch_may_stand_alone() -> None:
    config = parse([*NEEDED, "--disable_tqdm", "--greater_is_better", "--use_cpu"])[1]
    assert (config.disable_tqdm, config.greater_is_better) == (True, True)
    assert parse([*NEEDED, "--greater_is_better", "no"])[1].greater_is_better is False
    assert parse(NEEDED)[1].greater_is_better is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(["--modle", "x"], "'--modle' (did you mean '--model'?)", id="unknown"),
        pytest.param(["--model", "x"], "--dataset", id="required"),
        pytest.param([*NEEDED, "--loss", "dppo"], "did you mean 'dpo'", id="loss"),
        pytest.param([*NEEDED, "--max_length", "x"], "invalid int value: 'x'", id="number"),
        pytest.param([*NEEDED, "--layout", "flat"], "prefix_shared", id="choice"),
        pytest.param(["extra", *NEEDED], "expected options such as", id="positional"),
        pytest.param([*NEEDED, "--learning"], "unknown option '--learning'", id="abbreviation"),
        pytest.param([*NEEDED, "--test_size", "1.5"], "test_size: expected a share", id="share"),
        pytest.param([*NEEDED, "--test_size", "0.1", "--eval_split", "x"], "one place", id="both"),
        pytest.param([*NEEDED, "--config", "no.yaml"], "there is no no.yaml", id="no yaml"),
    ],
)  # fmt: skip
def test_bad_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *options]) == 2
    error = one_error(capsys)
    assert error.startswith("fastdaa train: error: ") and message in error


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    for line in (["train", "--debug"], ["--debug", "train"], ["train", "--debug", "--model", "x"]):
        assert main(line) == 2
        assert "Traceback" in capsys.readouterr().err
    assert parse([*NEEDED, "--debug", "underflow_overflow"])[1].debug


YAML = """
model: from/yaml
dataset: d/d
use_cpu: true
loss: ipo
learning_rate: 5e-6
eval_strategy: no
max_length: null
loss_weights: [2]
loss_kwargs: {target: unified}
use_peft: true
lora_target_modules: [q_proj, v_proj]
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr: 1e-7}
"""


def test_yaml_is_below_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(YAML)
    arguments, config = parse(["--config", str(path), "--model", "from/line", "--beta", "0.3"])
    assert arguments.model == "from/line" and arguments.dataset == ["d/d"]
    assert config.loss_type == ["ipo"] and config.loss_weights == [2.0]
    assert config.learning_rate == 5e-6 and config.beta == 0.3
    assert config.max_length is None and config.eval_strategy == "no"
    assert config.loss_kwargs == {"target": "unified"}
    assert config.lr_scheduler_kwargs == {"min_lr": 1e-7}
    assert arguments.lora_target_modules == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("learning_rte: 1", "'learning_rte' (did you mean 'learning_rate'?)", id="key"),
        pytest.param(
            "base_model: m\nrank: 1\nrpo_alpha: 1",
            "unknown keys 'base_model' (did you mean 'model'?), 'rank', "
            "'rpo_alpha' (instead: loss dpo sft loss_weights 1 ALPHA)",
            id="keys of others",
        ),
        pytest.param("optim: adamw", "names such as adamw_torch, ", id="long choice"),
        pytest.param("max_steps: many", "max_steps: got 'many'", id="value"),
        pytest.param("layout: flat", "layout: got 'flat'", id="choice"),
        pytest.param("- a\n- b", "expected 'option: value' lines, got list", id="list"),
        pytest.param("# later", "expected 'option: value' lines, got an empty file", id="empty"),
        pytest.param(
            "beta: 0.1\nbeta: 0.2",
            "run.yaml: expected a key once, got 'beta' again in line 2",
            id="twice",
        ),
        pytest.param("loss: ipo\nloss_type: dpo", "got 'loss' and 'loss_type'", id="alias"),
        pytest.param("loss_kwargs: {a: 1, a: 2}", "got 'a' again in line 1", id="twice inside"),
        pytest.param("a: [", "expected YAML", id="syntax"),
    ],
)
def test_bad_yaml(
    tmp_path: Path, content: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    assert main(["train", *NEEDED, "--config", str(path)]) == 2
    assert message in one_error(capsys)
    assert main(["train", *NEEDED, "--config", str(tmp_path)]) == 2
    assert f"config: expected a YAML file, {tmp_path} is a folder" in one_error(capsys)


def test_what_reaches_the_trainer(
    model_path: Path, data_path: Path, tmp_path: Path, trained: list[Any],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    assert train(model_path, data_path, out, "--test_size", "2", "--beta", "0.3") == 0
    (call,) = trained
    assert isinstance(call["model"], LlamaForCausalLM)
    assert call["model"].dtype == torch.float32
    assert call["ref_model"] is None and call["peft_config"] is None
    assert (len(call["train_dataset"]), len(call["eval_dataset"])) == (6, 2)
    assert call["processing_class"].eos_token == "<eos>"
    assert call["args"].beta == 0.3 and call["args"].eval_strategy == "epoch"
    assert call["checkpoint"] is None
    assert (out / "saved").exists()
    text = capsys.readouterr().out
    assert "0.5" in text and "0.25" in text and str(out) in text.replace("\n", "")


def test_reference_peft_and_limits(
    model_path: Path, data_path: Path, tmp_path: Path, trained: list[Any]
) -> None:
    options = ["--ref_model", str(model_path), "--use_peft", "--lora_r", "4",
               "--max_train_samples", "3", "--dtype", "bfloat16"]  # fmt: skip
    assert train(model_path, data_path, tmp_path / "out", *options) == 0
    (call,) = trained
    assert call["ref_model"] is not call["model"]
    assert call["model"].dtype == torch.bfloat16
    assert call["peft_config"].r == 4 and call["peft_config"].target_modules == "all-linear"
    assert len(call["train_dataset"]) == 3 and call["eval_dataset"] is None


def test_chat_template_from_a_file(
    model_path: Path, tmp_path: Path, trained: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    sides = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    pair = {"prompt": [{"role": "user", "content": "why"}], **sides}
    data = tmp_path / "chats.jsonl"
    data.write_text(json.dumps(pair) + "\n")
    assert train(model_path, data, tmp_path / "out") == 2
    assert "--chat_template" in one_error(capsys)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    assert train(model_path, data, tmp_path / "out", "--chat_template", f"{tmp_path}/bytes") == 2
    assert "chat_template: expected a Jinja file in UTF-8, got" in one_error(capsys)
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")
    assert train(model_path, data, tmp_path / "out", "--chat_template", str(template)) == 0
    assert trained[0]["processing_class"].chat_template == "{{ messages }}"
    assert trained[0]["card_dataset"] == [str(data)]  # before the first push to the hub


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"model": "/no/such/model"}, "model: expected a path or a hub id", id="model"),
        pytest.param({"dataset": "{tmp}/pair.jsonl"}, "pairs.jsonl'?)", id="data, near"),
        pytest.param({"model": "{tmp}"}, "folder with config.json", id="no model in it"),
        pytest.param({"chat_template": "no.jinja"}, "no file no.jinja", id="template"),
        pytest.param({"resume_from_checkpoint": "/no/folder"}, "no folder /no/folder", id="resume"),
        pytest.param({"resume_from_checkpoint": "{tmp}"}, "complete checkpoint", id="half"),
        pytest.param({"eval_strategy": "steps"}, "nothing to evaluate on", id="no eval data"),
        pytest.param({"output_dir": "{tmp}/pairs.jsonl"}, "is a file", id="output is a file"),
        pytest.param({"test_size": "8"}, "fewer than all rows (8), got 8", id="all for the test"),
        pytest.param({"test_size": "0.95"}, "fewer than all rows (8), got 0.95", id="rounded up"),
        pytest.param({"dataset_split": "tset"}, "split: expected one of train", id="split"),
    ],
)  # fmt: skip
def test_errors_before_training(
    model_path: Path, data_path: Path, tmp_path: Path, trained: list[Any],
    capsys: pytest.CaptureFixture[str], options: dict[str, str], message: str,
) -> None:  # fmt: skip
    line = {"model": str(model_path), "dataset": str(data_path), "output_dir": str(tmp_path / "o")}
    line |= {name: value.format(tmp=tmp_path) for name, value in options.items()}
    argv = [word for name, value in line.items() for word in (f"--{name}", value)]
    assert main(["train", "--use_cpu", *argv]) == 2
    assert message in one_error(capsys)
    assert trained == []


def checkpoint(out: Path, step: int, state: str) -> Path:
    return write_checkpoint(out / f"checkpoint-{step}", state)


def test_last_complete(tmp_path: Path) -> None:
    assert last_complete(tmp_path / "none") is None
    checkpoint(tmp_path, 9, '{"global_step": 9}')
    expected = checkpoint(tmp_path, 10, '{"global_step": 10}')
    checkpoint(tmp_path, 11, '{"global_st')
    (tmp_path / "checkpoint-12").mkdir()
    assert last_complete(tmp_path) == str(expected)


def test_resume(
    model_path: Path, data_path: Path, tmp_path: Path, trained: list[Any],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    assert train(model_path, data_path, out, "--resume_from_checkpoint") == 0
    assert "starting from the beginning" in capsys.readouterr().err
    last = checkpoint(out, 2, '{"global_step": 2}')
    assert train(model_path, data_path, out, "--resume_from_checkpoint", "true") == 0
    assert train(model_path, data_path, out, "--resume_from_checkpoint", str(last)) == 0
    capsys.readouterr()
    assert train(model_path, data_path, out) == 2
    assert "add --resume_from_checkpoint to continue that" in one_error(capsys)
    assert [call["checkpoint"] for call in trained] == [None, str(last), str(last)]


def test_another_runs_checkpoint_is_not_resumed(
    model_path: Path, data_path: Path, tmp_path: Path, trained: list[Any],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    last = checkpoint(out, 9, '{"global_step": 9}')
    write_record(out, new_record({}))
    assert train(model_path, data_path, out, "--resume_from_checkpoint") == 2
    assert "which has none, got checkpoint-9 of another run" in one_error(capsys)
    assert trained == []
    assert train(model_path, data_path, out, "--resume_from_checkpoint", str(last)) == 0
    assert trained[0]["checkpoint"] == str(last)


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError])
def test_a_full_memory_is_one_line(
    model_path: Path, data_path: Path, tmp_path: Path, trained: list[Any],
    capsys: pytest.CaptureFixture[str], kind: type[Exception],
) -> None:  # fmt: skip
    FakeTrainer.outcome = kind("CUDA out of memory. Tried to allocate 1 GiB.")
    assert train(model_path, data_path, tmp_path / "out", "--tokens_per_pack", "4096") == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the memory of the device is full after step 3: expected a --tokens_per_pack" in line
    assert "(now 4096)" in line and line.endswith("Tried to allocate 1 GiB.")


def test_interrupted(
    model_path: Path, data_path: Path, tmp_path: Path, trained: list[Any],
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    out = tmp_path / "out dir"
    FakeTrainer.outcome = KeyboardInterrupt()
    assert train(model_path, data_path, out) == 130
    assert "before any checkpoint" in capsys.readouterr().out
    checkpoint(out, 3, '{"global_step": 3}')
    assert train(model_path, data_path, out, "--resume_from_checkpoint", "true") == 130
    last_line = capsys.readouterr().out.rstrip().splitlines()[-1]
    assert last_line.startswith("  fastdaa train --model ")
    assert last_line.endswith(f"--output_dir '{out}' --use_cpu --resume_from_checkpoint")
    assert not (out / "saved").exists()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        pytest.param(["--a", "1"], "fastdaa train --a 1 --resume_from_checkpoint", id="added"),
        pytest.param(
            ["--resume-from-checkpoint=x", "--a"], "fastdaa train --a --resume_from_checkpoint",
            id="equals sign",
        ),
        pytest.param(
            ["--resume_from_checkpoint", "--a"], "fastdaa train --a --resume_from_checkpoint",
            id="bare",
        ),
    ],
)  # fmt: skip
def test_continuation(monkeypatch: pytest.MonkeyPatch, argv: list[str], expected: str) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert continuation("train", argv, "out/checkpoint-1") == expected


def test_last_values() -> None:
    assert last_values(HISTORY)["loss"] == 0.5
    assert last_values(HISTORY, "eval_") == {"loss": 0.25}


def test_summary_without_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "[bold]run"
    print_summary([{"train_runtime": 2.0, "step": 3}], folder, ALIGNMENT, heading="dpo()")
    assert capsys.readouterr().out.splitlines() == [
        "dpo()", "2.0 s of training", f"model and tokenizer: {folder}"
    ]  # fmt: skip


@pytest.mark.parametrize("shown", [STAGE, ALIGNMENT], ids=["stage", "train"])
def test_summary_names_our_model_card_alone(tmp_path, capsys, shown) -> None:
    (tmp_path / "README.md").write_text("PEFT writes one beside an adapter", encoding="utf-8")
    print_summary([], tmp_path, shown)
    assert ("model card" in capsys.readouterr().out) == (shown is ALIGNMENT)


def test_doctor(model_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--model", str(model_path)]) == 0
    text = capsys.readouterr().out
    for expected in ("torch", "transformers", "cpu", "V = 8", "not tied", "prefix_shared",
                     "single_pass", "frozen"):  # fmt: skip
        assert expected in text, expected


def test_doctor_reads_no_weights(model_path: Path) -> None:
    assert all(parameter.is_meta for parameter in doctor.empty_model(str(model_path)).parameters())


@pytest.mark.parametrize(
    ("threads", "cuda", "expected"),
    [
        pytest.param(1, None, ("1 thread used", "no device (this torch is the CPU build)"), id="1"),
        pytest.param(
            3, "13.0", ("3 threads used", "no device (this torch was built for CUDA 13.0)"), id="3"
        ),
    ],
)
def test_doctor_on_a_machine_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, threads: int, cuda: str | None, expected: tuple[str, str]
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    processor, device = doctor.device_rows()
    assert expected[0] in processor.value and device.value == expected[1]


def test_doctor_without_triton(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("fastdaa.kernels")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert main(["doctor", "--kernels"]) == 1
    assert "not installed: pip install 'fastdaa[triton]'" in capsys.readouterr().out


def test_doctor_names_what_is_too_old(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from packaging.specifiers import SpecifierSet

    monkeypatch.setattr(doctor, "_floors", lambda: {"torch": SpecifierSet(">=99")})
    assert main(["doctor"]) == 1
    assert "expected torch>=99" in capsys.readouterr().out


def test_bars_of_transformers_stay_out_of_files(capsys: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging as bars

    before = bars.is_progress_bar_enabled()
    with log_lines():
        assert not bars.is_progress_bar_enabled()
    assert bars.is_progress_bar_enabled() == before


def test_every_line_of_the_log_says_who_speaks(capsys: pytest.CaptureFixture[str]) -> None:
    with log_lines(main_process=True):
        logging.getLogger("fastdaa.data").info("first\nsecond")
    assert capsys.readouterr().err == "[fastdaa] first\n[fastdaa] second\n"


def test_what_an_encoding_lacks_ends_no_command() -> None:
    code = (
        "import sys\nfrom fastdaa.cli import main, bench\n"
        "bench.run = lambda argv: print('KL 1 \\xb1 2') or 0\n"
        "sys.exit(main(['bench', 'head']))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (0, "KL 1 \\xb1 2\n"), ended.stderr


def test_a_reader_that_has_seen_enough_ends_the_command_quietly():
    command = [sys.executable, "-m", "fastdaa.cli", "bench", "head", "--list"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == ("", 141)


def test_a_second_ctrl_c_while_the_process_ends_leaves_no_traceback():
    code = (
        "import atexit, os, signal, sys\n"
        "from fastdaa.cli import main\n"
        "atexit.register(os.kill, os.getpid(), signal.SIGINT)\n"
        "sys.exit(main(['study', 'nonsense']))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGINT
    assert "Traceback" not in ended.stderr


def test_a_checkpoint_of_the_model_alone_is_not_said_to_continue(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = checkpoint(tmp_path, 3, '{"global_step": 3}')
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (last / name).unlink()
    print_continuation("train", ["--save_only_model"], str(tmp_path), "step 3")
    said = capsys.readouterr().out
    assert f"saved: {last}, which holds the model alone, as --save_only_model saves it" in said
    assert "To continue" not in said
