"""Worker processes of a sweep: results, failures, death, and Ctrl-C in a real terminal session."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from concurrent import futures

import pytest
import torch

from fastdaa.counted import counted
from fastdaa.study.pool import Outcome, cores, outcomes
from fastdaa.study.table import read_table

pytestmark = pytest.mark.slow  # fresh processes import torch


def test_one_worker_runs_here_on_one_thread():
    torch.set_num_threads(2)
    tasks = ["__import__('torch').get_num_threads()"]
    assert [outcome.result for _, outcome in outcomes(eval, tasks, 1)] == [1]
    assert torch.get_num_threads() == 2


def test_what_fails_here_is_told():
    done = dict(outcomes(eval, ["1 + 1", "[][0]", "__import__('os').getpid()"], 1))
    assert done["1 + 1"] == Outcome(2, None)
    assert done["[][0]"] == Outcome(None, "IndexError: list index out of range")
    assert done["__import__('os').getpid()"].result == os.getpid()


def test_tasks_run_in_other_processes_of_one_thread():
    task = "(__import__('os').getpid(), __import__('torch').get_num_threads(), {number})"
    tasks = [task.format(number=number) for number in range(4)]
    results = [outcome.result for _, outcome in outcomes(eval, tasks, 2)]
    assert sorted(number for *_, number in results) == [0, 1, 2, 3]
    assert {threads for _, threads, _ in results} == {1}
    pids = {pid for pid, *_ in results}
    assert os.getpid() not in pids and 1 <= len(pids) <= 2


def test_a_worker_that_dies_takes_only_its_own_task():
    death = "__import__('os')._exit(3)"
    tasks = ["1 + 1", death, "2 + 2", "3 + 3"]
    done = dict(outcomes(eval, tasks, 2))
    assert {task: done[task].result for task in tasks if task != death} == {
        "1 + 1": 2,
        "2 + 2": 4,
        "3 + 3": 6,
    }
    assert "its worker process died" in done[death].error


def test_leaving_early_ends_the_workers():
    tasks = ["__import__('os').getpid()"] + ["__import__('time').sleep(60)"] * 3
    running = outcomes(eval, tasks, 2)
    _, first = next(running)
    began = time.monotonic()
    running.close()
    assert time.monotonic() - began < 20
    with pytest.raises(ProcessLookupError):
        os.kill(first.result, 0)  # joined, so no zombie is left


@pytest.mark.parametrize("tasks", ["[BAR] * 2", "[BAR, WAIT]"], ids=["at the end", "left early"])
def test_workers_leave_no_semaphores(tasks):
    """tqdm makes one in every process; the tracker says at exit which nobody has removed."""
    script = f"""
from fastdaa.study.pool import outcomes
BAR, WAIT = "len(list(__import__('tqdm').tqdm([1])))", "__import__('time').sleep(60)"
if __name__ == "__main__":
    for task, outcome in outcomes(eval, {tasks}, 2):
        print(outcome.result)
        if WAIT in {tasks}:
            break
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["1"] * (1 if "WAIT" in tasks else 2), done.stderr
    assert "leaked" not in done.stderr


class _WatchedLock:
    """The lock of a future, which notes where the main thread takes it while Ctrl-C can come."""

    def __init__(self, future, found):
        self._lock, self._future, self._found = threading.RLock(), future, found

    def __getattr__(self, name):
        return getattr(self._lock, name)

    def acquire(self, *args):
        taken = self._lock.acquire(*args)
        here = threading.current_thread() is threading.main_thread()
        deaf = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        if here and not deaf and self._future._state != "FINISHED":
            self._found.append("".join(traceback.format_stack(limit=4)))
        return taken

    __enter__ = acquire

    def __exit__(self, *_):
        self._lock.release()


def test_ctrl_c_cannot_come_while_the_lock_of_a_running_task_is_taken(monkeypatch):
    """Ctrl-C between taking such a lock and the block that gives it back leaves it taken, and the
    pool waits for it for ever. Locks of finished tasks are of no use to the pool."""
    found = []

    class Watched(futures.Future):
        def __init__(self):
            super().__init__()
            self._condition = threading.Condition(_WatchedLock(self, found))

    monkeypatch.setattr(futures.process._base, "Future", Watched)
    tasks = ["1 + 1", "__import__('time').sleep(0.5)", "2 + 2", "3 + 3"]
    results = [outcome.result for _, outcome in outcomes(eval, tasks, 2)]
    assert sorted(filter(None, results)) == [2, 4, 6]
    assert not found, found[0]


def test_cores():
    assert 1 <= cores() <= (os.cpu_count() or 1)


def test_ctrl_c_and_going_on(tmp_path):
    """The whole process group gets the signal, as from a terminal; then the same command again."""
    command = [
        *(sys.executable, "-m", "fastdaa.cli", "demo", "--fast", "--losses", "dpo", "ipo"),
        *("--workers", "2", "--output_dir", str(tmp_path / "out")),
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("runs 2/6"):
            os.killpg(process.pid, signal.SIGINT)
            break
    rest, _ = process.communicate(timeout=300)
    text = "".join(lines) + rest
    assert process.returncode == 130, text
    assert "Traceback" not in text and "leaked" not in text
    assert "To continue:" in rest and f"--output_dir {tmp_path / 'out'}" in rest
    kept = len({row["run"] for row in read_table(tmp_path / "out" / "points.jsonl")})
    assert 2 <= kept < 6
    assert _ended(process.pid), "workers outlive the command"
    again = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert f"{counted(6 - kept, 'run')}, {kept} done before" in again.stdout, (
        again.stdout + again.stderr
    )
    assert len(read_table(tmp_path / "out" / "points.jsonl")) == 18


def _ended(group: int, patience: float = 10.0) -> bool:
    """Whether no process of the group is left; a few take a moment to end."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False
