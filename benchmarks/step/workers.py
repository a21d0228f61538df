"""Processes that train, one a contender, and the conversation with them.

A fresh process keeps what a library patches, caches or allocates away from the others. On CPU all
contenders of a case are alive and take turns, step by step, so that they meet the same machine; on
CUDA, where their models would not fit side by side, they run one after another.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from fastdaa.benchmarks.step.contenders import Contender
from fastdaa.benchmarks.step.plan import Plan

# Imported once by the server that the processes of a CPU run are forked from.
_PRELOAD = [
    "torch", "datasets", "accelerate", "peft", "transformers.trainer",
    "transformers.models.llama.modeling_llama", "trl.trainer.dpo_trainer", "fastdaa.train.trainer",
]  # fmt: skip
_SECONDS_TO_END = 10.0


class WorkerFailed(Exception):
    """A contender raised an error or its process ended; the message says which."""


class Worker:
    """A process that runs ``function(*args, leave)`` and stops at every call of ``leave``.

    It imports the libraries at once, but computes nothing until :meth:`begin`: on CUDA the next
    process is loaded while this one builds its model.
    """

    def __init__(self, name: str, function: Callable[..., Any], *args: Any, device: str):
        context = _context(device)
        self.name = name
        self.pipe, theirs = context.Pipe()
        self.process: Any = context.Process(
            target=_work, args=(function, args, theirs), daemon=True
        )
        self.process.start()
        theirs.close()
        self._loaded = False

    def load(self) -> None:
        """Wait until its imports are done.

        Raises:
            WorkerFailed: it ended before.
        """
        if not self._loaded:
            self._receive()
            self._loaded = True

    def begin(self) -> Any:
        """Let it build what it needs; its first report.

        Raises:
            WorkerFailed: it could not.
        """
        self.load()
        return self.step()

    def step(self) -> Any:
        """One more step; its report, or the function's result if it ended.

        Raises:
            WorkerFailed: the contender failed.
        """
        with contextlib.suppress(BrokenPipeError):
            self.pipe.send("go")
        return self._receive()

    def _receive(self) -> Any:
        try:
            kind, value = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join(_SECONDS_TO_END)
            raise WorkerFailed(
                f"expected a report, but the process ended with {_ending(self.process.exitcode)}"
            ) from None
        if kind == "failed":
            raise WorkerFailed(value)
        return value

    def stop(self) -> None:
        """End it at once: it has nothing to save, and what it does at the end takes seconds."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _ending(code: int | None) -> str:
    return f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"


def _context(device: str) -> Any:
    """Forked from a server that has imported everything; CUDA does not survive a fork."""
    # Read by the libraries when they are imported: nothing is downloaded or reported.
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if device == "cuda" or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def _work(function: Callable[..., Any], args: tuple[Any, ...], pipe: Connection) -> None:
    _ignore_interrupts()
    warnings.simplefilter("ignore")  # what the libraries deprecate in each other
    os.environ["TQDM_DISABLE"] = "1"
    for module in _PRELOAD:
        with contextlib.suppress(ImportError):
            __import__(module)
    with contextlib.suppress(ImportError):
        import datasets
        import tqdm

        datasets.disable_progress_bars()
        # Its own lock is a semaphore of the system, which a process that is killed leaves behind.
        tqdm.tqdm.set_lock(threading.RLock())
    pipe.send(("report", "loaded"))

    def told_to_go() -> bool:
        try:
            return pipe.recv() == "go"
        except (OSError, EOFError):  # the parent is gone
            return False

    def leave(report: Any) -> bool:
        _ignore_interrupts()  # fastdaa's trainer answers Ctrl-C with a checkpoint
        with contextlib.suppress(OSError):
            pipe.send(("report", report))
        return told_to_go()

    if not told_to_go():
        return
    try:
        result = function(*args, leave)
    except Exception as error:
        traceback.print_exc()
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        with contextlib.suppress(OSError):
            pipe.send(("failed", message[:500]))
        return
    with contextlib.suppress(OSError):
        pipe.send(("result", result))


def _ignore_interrupts() -> None:
    """Ctrl-C reaches every process of a terminal; here the parent says when to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def trainer_worker(contender: Contender, plan: Plan) -> Worker:
    """A process that trains this contender."""
    from fastdaa.benchmarks.step.training import train

    return Worker(contender.name, train, contender, plan, device=plan.device)


def run_oracle(plan: Plan, orders: Sequence[str]) -> Any:
    """:func:`fastdaa.benchmarks.step.oracle.expected` in a process of its own."""
    worker = Worker("oracle", _oracle, plan, orders, device=plan.device)
    try:
        return worker.begin()
    finally:
        worker.stop()


def _oracle(plan: Plan, orders: Sequence[str], leave: Callable[[Any], bool]) -> Any:
    from fastdaa.benchmarks.step.oracle import expected

    return expected(plan, orders)
