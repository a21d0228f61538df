"""Commands in processes of their own, forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

_IMPORTS = ("fastdaa.cli.online", "fastdaa.online.loop", "fastdaa.online.reward_sources", "peft")


def start_command(argv: Sequence[str], env: Mapping[str, str], said: Path) -> BaseProcess:
    """A started process of ``fastdaa ARGV``; what it prints goes to the file ``said``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_IMPORTS])
    process = context.Process(target=_run, args=(list(argv), dict(env), str(said)))
    process.start()
    return process


def _run(argv: list[str], env: dict[str, str], said: str) -> None:
    os.environ.update(env)
    file = os.open(said, os.O_WRONLY | os.O_CREAT)
    for number in (1, 2):
        os.dup2(file, number)

    from fastdaa.cli import main

    sys.exit(main(argv))
