"""Metrics file, interruption, progress: what a run leaves and shows."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from fastdaa.train.callbacks import Interrupt, MetricsWriter, Progress, default_callbacks
from fastdaa.train.curves import Curves
from fastdaa.train.interrupt import was_interrupted
from fastdaa.train.metrics_writer import read_metrics
from fastdaa.train.progress import fitting, format_row, use_progress
from fastdaa.train.shown import shown_text


@pytest.fixture
def args(tmp_path: Path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True)


def state_at(step: int = 0, *, max_steps: int = 10, main: bool = True) -> TrainerState:
    return TrainerState(
        global_step=step, max_steps=max_steps, is_world_process_zero=main, logging_steps=1
    )


def log(writer: MetricsWriter, args: TrainingArguments, step: int, **values: Any) -> None:
    writer.on_log(args, state_at(step), TrainerControl(), logs=values)


def metrics_file(args: TrainingArguments) -> Path:
    return Path(str(args.output_dir)) / "metrics.jsonl"


def test_rows_are_written_at_once(args: TrainingArguments) -> None:
    writer = MetricsWriter()
    writer.on_train_begin(args, state_at(), TrainerControl())
    log(writer, args, 1, loss=0.5, grad_norm=torch.tensor(2.0), epoch=0.1)
    row = json.loads(metrics_file(args).read_text())
    assert row["time"] > 1e9
    assert (row["step"], row["loss"], row["grad_norm"]) == (1, 0.5, 2.0)


def test_rows_are_json_whatever_is_logged(args: TrainingArguments) -> None:
    log(MetricsWriter(), args, 1, loss=float("nan"), x=float("inf"), y="text", z=None, path=Path())
    row = json.loads(metrics_file(args).read_text(), parse_constant=pytest.fail)
    assert (row["loss"], row["x"], row["y"], row["z"], row["path"]) == (
        None,
        None,
        "text",
        None,
        ".",
    )


def test_resume_removes_what_comes_again(args: TrainingArguments) -> None:
    writer = MetricsWriter()
    for step in (1, 2, 3, 4):
        log(writer, args, step, loss=float(step))
        log(writer, args, step, eval_loss=float(step))
    log(writer, args, 2, train_runtime=1.0)
    with metrics_file(args).open("a") as file:
        file.write('{"step": 5, "lo')
    writer.on_train_begin(args, state_at(2), TrainerControl())
    log(writer, args, 3, loss=30.0)
    rows = read_metrics(metrics_file(args))
    assert [row["step"] for row in rows] == [1, 1, 2, 2, 3]
    assert rows[-1]["loss"] == 30.0


def test_resume_elsewhere_needs_no_file(args: TrainingArguments) -> None:
    MetricsWriter().on_train_begin(args, state_at(2), TrainerControl())
    assert read_metrics(metrics_file(args)) == []


def test_fresh_run_keeps_the_old_file(args: TrainingArguments) -> None:
    writer = MetricsWriter()
    for run in (1.0, 2.0, 3.0):
        writer.on_train_begin(args, state_at(), TrainerControl())
        log(writer, args, 1, loss=run)
    folder = metrics_file(args).parent
    kept = [read_metrics(folder / f"metrics{n}.jsonl")[0]["loss"] for n in (".1", ".2", "")]
    assert kept == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("earlier", [False, True], ids=["empty folder", "after another run"])
def test_an_evaluation_before_training_belongs_to_the_run(
    args: TrainingArguments, earlier: bool
) -> None:
    """The usual baseline: evaluate(), then train()."""
    if earlier:
        log(MetricsWriter(), args, 5, loss=9.0)
    writer, path = MetricsWriter(), metrics_file(args)
    log(writer, args, 0, eval_loss=0.75)
    writer.on_train_begin(args, state_at(), TrainerControl())
    log(writer, args, 1, loss=0.5)
    assert [(row["step"], row.get("eval_loss")) for row in read_metrics(path)] == [
        (0, 0.75),
        (1, None),
    ]
    aside = path.with_name("metrics.1.jsonl")
    assert [row["step"] for row in read_metrics(aside)] == [5] * earlier
    # The next training of the process is another run, and takes nothing of this one.
    log(writer, args, 1, eval_loss=0.5)
    writer.on_train_begin(args, state_at(), TrainerControl())
    log(writer, args, 1, loss=0.25)
    assert [row["loss"] for row in read_metrics(path)] == [0.25]


def test_an_evaluation_before_resuming_loses_nothing(args: TrainingArguments) -> None:
    first, writer = MetricsWriter(), MetricsWriter()
    for step in (1, 2, 3):
        log(first, args, step, loss=float(step))
    log(writer, args, 0, eval_loss=0.75)
    writer.on_train_begin(args, state_at(2), TrainerControl())
    assert [row["step"] for row in read_metrics(metrics_file(args))] == [1, 2, 0]


def test_the_picture_keeps_the_number_of_its_rows(args: TrainingArguments) -> None:
    writer, folder = MetricsWriter(), metrics_file(args).parent
    for run in range(3):
        writer.on_train_begin(args, state_at(), TrainerControl())
        log(writer, args, 1, loss=float(run))
        if run != 0:  # killed before it was drawn
            (folder / "curves.png").write_text(str(run))
    writer.on_train_begin(args, state_at(1), TrainerControl())  # goes on with the last
    writer.on_train_begin(args, state_at(), TrainerControl())
    found = {path.name: path.read_text() for path in folder.glob("curves*")}
    assert found == {"curves.2.png": "1", "curves.3.png": "2"}
    assert [read_metrics(folder / f"metrics.{n}.jsonl")[0]["loss"] for n in (1, 2, 3)] == [0, 1, 2]


def test_other_processes_write_nothing(args: TrainingArguments) -> None:
    writer, state = MetricsWriter(), state_at(1, main=False)
    writer.on_train_begin(args, state, TrainerControl())
    writer.on_log(args, state, TrainerControl(), logs={"loss": 1.0})
    assert not metrics_file(args).exists()


@pytest.fixture
def interrupt(args: TrainingArguments) -> Any:
    # Under nohup the tests would inherit that it is ignored.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    callback = Interrupt()
    callback.on_train_begin(args, state_at(), TrainerControl())
    yield callback
    callback.restore()
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_first_signal_saves_and_stops(
    interrupt: Interrupt, args: TrainingArguments, number: int, capfd: pytest.CaptureFixture[str]
) -> None:
    control = TrainerControl(should_evaluate=True)
    interrupt.on_step_end(args, state_at(1), control)
    assert not control.should_training_stop
    os.kill(os.getpid(), number)
    assert "stopping after this step" in capfd.readouterr().err
    interrupt.on_step_end(args, state_at(2), control)
    assert control.should_training_stop and control.should_save and control.should_log
    assert not control.should_evaluate
    assert interrupt.interrupted
    control.should_evaluate = True
    interrupt.on_epoch_end(args, state_at(2), control)
    assert not control.should_evaluate


def test_a_closed_terminal_ends_no_run(interrupt: Interrupt) -> None:
    """Writing to it would be an error, before the checkpoint is saved."""
    kept, (terminal, standard_error) = os.dup(2), os.openpty()
    os.dup2(standard_error, 2)
    os.close(standard_error)
    os.close(terminal)
    try:
        with pytest.raises(OSError):
            os.write(2, b"lost")
        os.kill(os.getpid(), signal.SIGHUP)
        os.write(2, b"nowhere")
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def test_nohup_is_respected(args: TrainingArguments) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    callback = Interrupt()
    try:
        callback.on_train_begin(args, state_at(0), TrainerControl())
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        callback.restore()
        signal.signal(signal.SIGHUP, before)


def test_second_signal_stops_at_once(interrupt: Interrupt, monkeypatch: pytest.MonkeyPatch) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)  # within a second: the same request, passed on
    monkeypatch.setattr("fastdaa.train.interrupt._SAME_REQUEST_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_handlers_come_back(args: TrainingArguments) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    callback = Interrupt()
    callback.on_train_begin(args, state_at(), TrainerControl())
    assert signal.getsignal(signal.SIGINT) != before[0]
    callback.on_train_end(args, state_at(10), TrainerControl())
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_last_step_is_no_interruption(interrupt: Interrupt, args: TrainingArguments) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    interrupt.on_step_end(args, state_at(10), TrainerControl())
    assert not interrupt.interrupted


def test_in_a_thread_no_handler_is_set(args: TrainingArguments) -> None:
    before = signal.getsignal(signal.SIGINT)
    begin = Interrupt().on_train_begin
    thread = threading.Thread(target=begin, args=(args, state_at(), TrainerControl()))
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) == before


ROW = {
    "loss": 0.6931,
    "rewards/margins": 0.01,
    "rewards/accuracies": 0.5,
    "kl/token": 1e-4,
    "throughput/tokens_per_second": 12345.6,
    "epoch": 0.5,
}


def test_lines() -> None:
    line = format_row(ROW, 5, 10)
    assert line.startswith("step 5/10  epoch 0.50  loss 0.6931  margin 0.0100  accuracy 0.500")
    assert "tokens/s 12,346" in line and "{" not in line
    evaluation = {f"eval_{key}": value for key, value in ROW.items() if key != "epoch"}
    assert format_row(evaluation, 5, 10).startswith("step 5/10  evaluation  loss 0.6931")
    assert format_row({"train_runtime": 61.25, "train_loss": 1.0}, 10, 10).endswith("61.2 s")
    assert format_row({"epoch": 1.0}, 5, 10) == ""


def test_progress(args: TrainingArguments, capsys: pytest.CaptureFixture[str]) -> None:
    args.disable_tqdm = False
    progress, control = Progress(), TrainerControl()
    progress.on_train_begin(args, state_at(3), control)
    progress.on_step_end(args, state_at(5), control)
    progress.on_log(args, state_at(5), control, logs=ROW)
    progress.on_prediction_step(args, state_at(5), control, eval_dataloader=[1, 2])
    progress.on_evaluate(args, state_at(5), control)
    progress.on_train_end(args, state_at(5), control)
    captured = capsys.readouterr()
    assert captured.out == format_row(ROW, 5, 10) + "\n"
    # No bar in a log file.
    assert captured.err == ""


CELLS = {"loss": "0.6931", "margin": "0.0000", "accuracy": "0.500", "tokens/s": "12,346"}


@pytest.mark.parametrize(
    ("columns", "names"),
    [(80, []), (100, ["loss"]), (120, ["loss", "margin", "accuracy"]), (200, [*CELLS])],
)
def test_the_bar_keeps_its_room(columns: int, names: list[str]) -> None:
    """What does not fit behind the bar as a whole is left to the lines above it."""
    assert list(fitting(CELLS, columns)) == names


def test_the_finished_bar_is_drawn_once(
    args: TrainingArguments, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    events: list[str] = []

    class Bar:
        n = 10

        def __getattr__(self, name: str) -> Any:
            return lambda *_, **__: events.append(name)

    monkeypatch.setattr("fastdaa.train.progress._bar", lambda *_, **__: Bar())
    monkeypatch.setattr("fastdaa.train.progress.tqdm.write", lambda *_, **__: events.append("line"))
    progress, control = Progress(), TrainerControl()
    progress.on_train_begin(args, state_at(), control)
    progress.on_log(args, state_at(10), control, logs={"train_runtime": 1.0})
    progress.on_train_end(args, state_at(10), control)
    assert events == ["update", "close", "line"]


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("kl/token", -4.88e-9, "0"),
        ("eval_kl/sequence", -1e-9, "0"),
        ("kl/token", 2.5e-6, "2.5e-06"),
        ("kl/k1", -0.25, "-0.25"),  # of the data, which may be negative
        ("tokens", 7487.2, "7,487"),
        ("tokens", 12711.6, "12,712"),
        ("loss", 0.693147, "0.6931"),
        ("rewards/margins", -0.0, "0"),
        ("eval_rewards/rejected", math.nan, "-"),  # there was none
        ("loss", math.nan, "nan"),
    ],
)
def test_numbers_as_they_are_shown(key: str, value: float, text: str) -> None:
    assert shown_text(key, value) == text


def test_lines_show_no_negative_kl() -> None:
    assert "kl/token 0.00e+00" in format_row({**ROW, "kl/token": -4.88e-9}, 5, 10)


@pytest.mark.parametrize(
    ("margin", "text"),
    [(-4e-5, "0.0000"), (-6e-5, "-0.0001"), (-0.0, "0.0000"), (float("-inf"), "-inf")],
)
def test_lines_show_no_negative_zero(margin: float, text: str) -> None:
    assert f"margin {text} " in format_row({**ROW, "rewards/margins": margin}, 5, 10)


def test_progress_of_other_processes(
    args: TrainingArguments, capsys: pytest.CaptureFixture[str]
) -> None:
    progress, state = Progress(), state_at(5, main=False)
    progress.on_train_begin(args, state, TrainerControl())
    progress.on_step_end(args, state, TrainerControl())
    progress.on_log(args, state, TrainerControl(), logs=ROW)
    progress.on_prediction_step(args, state, TrainerControl(), eval_dataloader=[1])
    progress.on_train_end(args, state, TrainerControl())
    assert capsys.readouterr().out == ""


def small_trainer(args: TrainingArguments, **options: Any) -> Any:
    from transformers import Trainer

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": ((self.weight - x) ** 2).mean()}

    data = [{"x": torch.tensor([float(n)])} for n in range(8)]
    return Trainer(Model(), args, train_dataset=data, callbacks=default_callbacks(), **options)


def trainer_arguments(folder: Path, **changed: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder), "use_cpu": True, "per_device_train_batch_size": 1,
        "logging_steps": 1, "max_steps": 6, "save_steps": 100, "report_to": "none",
        "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(**{**settings, **changed})


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        pytest.param({"max_steps": 2, "logging_steps": 10}, [2], id="shorter than an interval"),
        pytest.param({"max_steps": 5, "logging_steps": 3}, [3, 5], id="no multiple"),
        pytest.param({"max_steps": 4, "logging_steps": 2}, [2, 4], id="multiple"),
        pytest.param({"max_steps": 2, "logging_strategy": "no"}, [], id="none wanted"),
        pytest.param({"max_steps": 3, "logging_strategy": "epoch"}, [3], id="epochs"),
    ],
)
def test_the_last_step_is_logged(tmp_path: Path, settings: dict[str, Any], rows: list[int]) -> None:
    trainer = small_trainer(trainer_arguments(tmp_path, **settings))
    trainer.remove_callback(Curves)
    trainer.train()
    logged = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in logged] == rows


class Signal(MetricsWriter):
    """Sends SIGINT in the third step; a subclass of a callback, so nothing else is needed."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        return

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        return


def test_interrupted_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = small_trainer(trainer_arguments(tmp_path))
    use_progress(trainer)
    trainer.add_callback(Signal)
    trainer.train()
    assert was_interrupted(trainer)
    assert (tmp_path / "checkpoint-3" / "trainer_state.json").is_file()
    assert (tmp_path / "curves.png").is_file()
    resumed = small_trainer(trainer_arguments(tmp_path))
    use_progress(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert not was_interrupted(resumed)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [place for place, row in enumerate(rows) if "train_runtime" in row] == [len(rows) - 1]
    out = capsys.readouterr().out
    assert "{'loss'" not in out and "step 4/6" in out


@pytest.mark.parametrize("disable_tqdm", [True, False], ids=["printer", "bar"])
def test_use_progress(tmp_path: Path, disable_tqdm: bool) -> None:
    trainer = small_trainer(trainer_arguments(tmp_path, disable_tqdm=disable_tqdm))
    use_progress(trainer)
    names = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    assert names.count("Progress") == 1
    assert not {"PrinterCallback", "ProgressCallback"} & set(names)


def test_a_bad_picture_does_not_stop_a_run(
    args: TrainingArguments, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr("fastdaa.train.curves.draw_curves", fail)
    Curves().on_train_end(args, state_at(1), TrainerControl())
    assert "no fonts" in caplog.text
