"""Several processes of one command: they wait for each other, and one speaks for all.

What one of them has to say to the others goes through the key-value store by which their launcher
brought them together: unlike a collective, waiting there can be interrupted, has no timeout, and
ends when one of the others fails.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import logging
import os
import signal
import time
from collections.abc import Callable

from torch import distributed as dist

INTERRUPTED = 130
_FAILED = 2
_ANSWER = datetime.timedelta(seconds=20)
_POLL_SECONDS = 0.05
# Longer than it takes to print a line.
_SPEAKING_SECONDS = 0.5
_TOLD = "_fastdaa_told"
_meetings = itertools.count()


class OtherProcessFailed(RuntimeError):
    """Another process has failed and says why; this one ends with the same exit code."""

    def __init__(self, code: int):
        super().__init__("another process of this command has failed")
        self.code = code


def be_quiet() -> None:
    """Show nothing that the first process shows as well: remarks on data and models, bars."""
    from datasets.utils.logging import disable_progress_bar
    from transformers.utils import logging as transformers_logging

    logging.getLogger("fastdaa").setLevel(logging.ERROR)
    disable_progress_bar()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def meet() -> None:
    """Wait until every process is here, without a timeout.

    Raises:
        OtherProcessFailed: one of them will not come.
    """
    if not _several():
        return
    store, place = _store(), next(_meetings)
    store.set(f"{place}/{dist.get_rank()}", "here")
    everybody = [f"{place}/{rank}" for rank in range(dist.get_world_size())]
    while not store.check(everybody):
        check_others()
        time.sleep(_POLL_SECONDS)


def check_others() -> None:
    """Raise :class:`OtherProcessFailed` where one has."""
    if _several() and _store().check(["code"]):
        raise OtherProcessFailed(int(_store().get("code")))


def run_together(work: Callable[[], int]) -> int:
    """The exit code of ``work``, or of the process that failed first.

    Of the errors of all processes only the first is raised; the others, which often only say that
    somebody has gone, are dropped for an exit code.
    """
    try:
        return work()
    except OtherProcessFailed as error:
        code = error.code
    except (Exception, KeyboardInterrupt) as error:
        by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if not (by_agent or _several()):
            raise  # alone, or there is nobody to ask yet
        stopped = isinstance(error, KeyboardInterrupt)
        if stopped:
            # A launcher passes on the Ctrl-C that its workers got from the terminal, too.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        code = INTERRUPTED if stopped else _FAILED
        if _is_told(error) or _first_to_fail(code):
            with contextlib.suppress(AttributeError):
                error.__dict__[_TOLD] = True
            raise
    # The launcher stops all processes when the first one ends.
    time.sleep(_SPEAKING_SECONDS)
    return code


def _several() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def _is_told(error: BaseException) -> bool:
    """Whether an error, or its cause, has come out of :func:`run_together` before: that of a stage
    of a command is raised once more by the command."""
    cause: BaseException | None = error
    while cause is not None and not getattr(cause, _TOLD, False):
        cause = cause.__cause__
    return cause is not None


def _first_to_fail(code: int) -> bool:
    with contextlib.suppress(RuntimeError):
        first = _store().add("failures", 1) == 1
        if first:
            _store().set("code", str(code))
        return first
    # The process that kept the store has ended, and has said why.
    return False


@functools.cache
def _store() -> dist.Store:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.TCPStore(host, port, is_master=False, timeout=_ANSWER)
    return dist.PrefixStore(f"fastdaa/{attempt}", store)
