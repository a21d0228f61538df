"""Tasks over worker processes that start once and stay warm; a task that fails fails alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import resource_tracker
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar

Task = TypeVar("Task")
MOST_WORKERS = 16
"""A worker needs about 0.7 GB of memory, so more are started only if asked for."""


class Outcome(NamedTuple):
    """What became of a task: its result, or what went wrong in one line."""

    result: Any
    error: str | None


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_count(asked: int | None) -> int:
    """What was asked for, or one a core, at most ``MOST_WORKERS``.

    Raises:
        ValueError: a number below 1.
    """
    if asked is None:
        return min(cores(), MOST_WORKERS)
    if asked < 1:
        raise ValueError(f"workers: expected at least 1, got {asked}")
    return asked


def outcomes(
    function: Callable[[Task], Any], tasks: Sequence[Task], workers: int
) -> Iterator[tuple[Task, Outcome]]:
    """``function`` of every task, in the order in which they finish.

    With one worker the tasks run in this process, on one thread of torch. Otherwise each worker is
    a fresh process with one thread, ``function`` and tasks are pickled, and no task is handed out
    before a worker is free. A worker that dies takes its task with it; the others are run by new
    workers. Ctrl-C, or leaving the loop early, ends all workers at once.
    """
    if workers == 1 or len(tasks) <= 1:
        for task in tasks:
            with _one_torch_thread():
                outcome = _attempt(function, task)
            yield task, outcome
        return
    waiting = list(reversed(tasks))
    while waiting:
        suspects = yield from _run(function, waiting, workers)
        for task in suspects:
            # Alone, so that it is known whose worker dies.
            if (yield from _run(function, [task], 1)):
                yield task, Outcome(None, "its worker process died, twice (out of memory?)")


def _run(
    function: Callable[[Task], Any], waiting: list[Task], workers: int
) -> Generator[tuple[Task, Outcome], None, list[Task]]:
    """Runs what ``waiting`` holds, last first, and takes it out, until a worker dies.

    Returns:
        The tasks that were running then.
    """
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(waiting)), spawn, _start_worker)
    others = set(multiprocessing.active_children())
    running: dict[Future[Outcome], Task] = {}
    # Ctrl-C inside `concurrent.futures.wait` may leave the lock of a future taken, for which the
    # pool then waits for ever; inside this queue's `get` it leaves nothing.
    ended: SimpleQueue[Future[Outcome]] = SimpleQueue()
    suspects: list[Task] = []
    try:
        while running or (waiting and not suspects):
            while waiting and not suspects and len(running) < workers:
                with _one_thread_and_deaf_to_ctrl_c():
                    future = pool.submit(_attempt, function, waiting[-1])
                    running[future] = waiting.pop()
                    future.add_done_callback(ended.put)
            future = ended.get()
            task = running.pop(future)
            if isinstance(future.exception(), BrokenProcessPool):
                suspects.append(task)
            else:
                yield task, future.result()
        return suspects
    except BrokenProcessPool:  # noticed while handing out the next task
        return [*suspects, *running.values()]
    finally:
        if running:  # left early; idle workers end by themselves and leave nothing behind
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
        pool.shutdown(wait=True, cancel_futures=True)


def _attempt(function: Callable[[Task], Any], task: Task) -> Outcome:
    try:
        return Outcome(function(task), None)
    except Exception as error:
        text = " ".join(str(error).split())
        return Outcome(None, f"{type(error).__name__}: {text}" if text else type(error).__name__)


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _start_worker() -> None:
    import torch
    from tqdm import tqdm

    torch.set_num_threads(1)
    # By default a lock between processes, which would outlive a worker that is ended at once.
    tqdm.set_lock(threading.RLock())
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def _one_thread_and_deaf_to_ctrl_c() -> Iterator[None]:
    """Processes started here have one thread each, and leave Ctrl-C to this one."""
    threads = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    os.environ.update(dict.fromkeys(threads, "1"))
    mask = None
    if hasattr(signal, "pthread_sigmask"):
        # A blocked signal stays blocked in a process that is started meanwhile; here it only waits.
        # The tracker unblocks it when it starts, so it has to be there already.
        resource_tracker.ensure_running()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        for name, value in threads.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
