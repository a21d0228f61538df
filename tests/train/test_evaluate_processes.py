"""``fastdaa evaluate`` over several processes: what one process finds, and how commands end."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from word_files import word_tokenizer, write_pairs

from fastdaa.cli import main

SCRIPT = Path(__file__).with_name("evaluated.py")
# Numbers of time and memory, which no two runs share.
RATES = ("throughput/", "memory/", "runtime", "samples_per_second", "steps_per_second")


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_model, shifted):
    """The models ``start`` and ``end``, and pairs of many lengths in ``1.jsonl`` to ``9.jsonl``."""
    folder = tmp_path_factory.mktemp("files")
    for name, model in (("start", tiny_model()), ("end", shifted)):
        model.save_pretrained(folder / name)
        word_tokenizer().save_pretrained(folder / name)
    for count in range(1, 10):
        write_pairs(folder / f"{count}.jsonl", count)
    return folder


def argv(files, pairs, output, **options):
    given = {
        "model": files / "end", "ref_model": files / "start", "dataset": files / f"{pairs}.jsonl",
        "output": output, "use_cpu": True, "per_device_eval_batch_size": 2, **options,
    }  # fmt: skip
    return ["evaluate", *(f"--{k}={v}" for k, v in given.items() if v is not None)]


@pytest.fixture
def together(tmp_path):
    """``together(argv, processes=2, end=None)``: exit codes, and what each process has said."""

    def run(arguments, processes=2, end=None):
        # The launcher keeps the store by which they meet, as torchrun does.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        env = {
            "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
        }  # fmt: skip
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["fastdaa.train.trainer", "peft", "datasets"])
        logs = [tmp_path / f"log{rank}.txt" for rank in range(processes)]
        started = []
        for rank in range(processes):
            options = {
                "argv": arguments, "log": str(logs[rank]), "end": (end or {}).get(rank),
                "env": {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            }  # fmt: skip
            started.append(
                context.Process(
                    target=runpy.run_path, args=(str(SCRIPT),),
                    kwargs={"init_globals": {"OPTIONS": options}},
                )
            )  # fmt: skip
            started[-1].start()
        for process in started:
            process.join(60)
        codes = [process.exitcode for process in started]
        for process in started:
            process.kill()
        return codes, [log.read_text() for log in logs]

    return run


def facts(path):
    return json.loads(path.read_text())


def assert_same(got, expected):
    """To 1e-6 of values above 1, as numbers of fp32 are."""
    assert list(got["metrics"]) == list(expected["metrics"])
    for name, value in expected["metrics"].items():
        if not name.startswith(RATES):
            assert got["metrics"][name] == pytest.approx(value, rel=1e-6, abs=1e-6), name
    assert {**got, "metrics": 0, "processes": 1} == {**expected, "metrics": 0}


NO_GPU = pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
CASES = [
    pytest.param(5, 2, {"use_cpu": None}, id="nothing said on a CPU", marks=NO_GPU),
    pytest.param(7, 2, {}, id="the last batch is half of one"),
    pytest.param(9, 2, {"per_device_eval_batch_size": 3}, id="one process has a batch more"),
    pytest.param(
        2,
        3,
        {"loss": "simpo", "ref_model": None, "per_device_eval_batch_size": 1},
        id="fewer pairs than processes",
    ),
    pytest.param(7, 3, {"loss": "aot"}, id="pairs of a batch are coupled"),
    pytest.param(7, 2, {"tokens_per_pack": 20}, id="other numbers of packs"),
]


@pytest.mark.parametrize(("pairs", "processes", "options"), CASES)
def test_one_process_finds_the_same(files, together, tmp_path, pairs, processes, options):
    one, several = tmp_path / "one.json", tmp_path / "several.json"
    assert main(argv(files, pairs, one, **options)) == 0
    codes, said = together(argv(files, pairs, several, **options), processes)
    assert codes == [0] * processes, said
    found = facts(several)
    assert (found["pairs"], found["processes"]) == (pairs, processes)
    assert_same(found, facts(one))
    assert f"{found['metrics']['loss']:,.6g}" in said[0] and f"{pairs} pairs" in said[0]
    assert said[1:] == [""] * (processes - 1)


def test_an_error_of_one_ends_all(files, together, tmp_path):
    codes, said = together(argv(files, 9, tmp_path / "x.json"), end={1: "memory"})
    assert codes == [2, 2], said
    assert "".join(said).count("error:") == said[1].count("the memory of the device is full") == 1
    assert "Traceback" not in "".join(said) and not (tmp_path / "x.json").exists()


@pytest.mark.parametrize("ranks", [[1], [0, 1]], ids=["one", "both"])
def test_interrupted(files, together, tmp_path, ranks):
    end = dict.fromkeys(ranks, "interrupt")
    codes, said = together(argv(files, 9, tmp_path / "x.json"), end=end)
    assert codes == [130, 130], said
    assert "".join(said).count("fastdaa evaluate: interrupted") == 1
    assert "Traceback" not in "".join(said) and not (tmp_path / "x.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 1}, "unknown option '--learning_rate'"),
        ({"ref_model": None}, "expected --ref_model"),
        ({"max_length": 1}, "expected at least one pair"),
        ({"output": "/nowhere/x.json"}, "output: expected a JSON file in a folder"),
    ],
    ids=["options", "before loading", "while the trainer is made", "of the first process alone"],
)
def test_an_error_of_all_is_said_once(files, together, tmp_path, options, message):
    codes, said = together(argv(files, 9, **{"output": tmp_path / "x.json", **options}))
    assert codes == [2, 2], said
    assert "".join(said).count("error:") == "".join(said).count(message) == 1


def training(files, folder, command="train", **options):
    given = {"model": files / "start", "dataset": files / "9.jsonl", "report_to": "none"}
    given |= {"per_device_train_batch_size": 2, "output_dir": folder, **options}
    return [command, "--use_cpu", *(f"--{k}={v}" for k, v in given.items())]


def test_an_error_of_one_ends_a_training(files, together, tmp_path):
    """The other one only notices that somebody has gone."""
    codes, said = together(training(files, tmp_path / "out"), end={1: "memory"})
    assert codes == [2, 2], said
    assert "".join(said).count("error:") == said[1].count("the memory of the device is full") == 1
    assert "Traceback" not in "".join(said)


@pytest.mark.parametrize("command", ["train", "sft"])
def test_an_error_of_all_in_training_is_said_once(files, together, tmp_path, command):
    arguments = training(files, tmp_path / "out", command, dataset=tmp_path / "none.jsonl")
    codes, said = together(arguments)
    assert codes == [2, 2], said
    assert "".join(said).count("error:") == "".join(said).count("none.jsonl") == 1


def test_sharded_models_are_refused(files, together, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr("fastdaa.train.config.PreferenceConfig.world_size", 2)
    assert main(argv(files, 9, tmp_path / "x.json")) == 2


@pytest.mark.slow
def test_torchrun(files, tmp_path):
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    assert main(argv(files, 7, one)) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command = [*launcher, "--standalone", "-m", "fastdaa.cli", *argv(files, 7, two)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ)
    assert ended.returncode == 0, ended.stderr
    assert_same(facts(two), facts(one))
    assert ended.stdout.count("7 pairs") == 1 and ended.stderr.count("of 7 pairs kept") == 1
