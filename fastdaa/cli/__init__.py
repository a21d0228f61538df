"""The command ``fastdaa``: one sub-command a module of this package, found by its name."""

from __future__ import annotations

import atexit
import difflib
import importlib
import importlib.util
import io
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence

from fastdaa.cli.runs import INTERRUPTED

_COMMANDS = {
    "train": "train a policy on preference pairs, or on labelled completions",
    "sft": "fine-tune a model on the completions of a dataset",
    "reward": "train a reward model on preference pairs",
    "online": "improve a policy on its own completions: APA, PPO, AWR",
    "evaluate": "measure a model on preferences: accuracy, margins, KL",
    "doctor": "show versions, devices, and how a model would be trained",
    "demo": "over-optimise a known reward on the CPU: a small sweep and its page",
    "bench": "measure speed and memory against other implementations",
    "study": "measure over-optimisation: quality against KL, scaling laws, a page",
}
_USAGE_ERROR = 2
_READER_GONE = 141  # what a shell says of a process that SIGPIPE has ended
# What a user can cause: wrong values, missing files, an unreachable hub, a missing extra, weights
# that a learning rate has blown up.
_USER_ERRORS = (ValueError, TypeError, OSError, ImportError, FloatingPointError)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line ``argv`` (by default the process's) and returns its exit code.

    0 for success, 2 for an error that the user can mend, 130 after an interruption, 1 where a
    command found something wrong. A bare ``--debug`` shows tracebacks.
    """
    _print_any_character()
    arguments, debug = _take_debug(list(sys.argv[1:] if argv is None else argv))
    if not arguments or arguments[0] in ("-h", "--help", "--help-all", "help"):
        print(_help())
        return 0 if arguments else _USAGE_ERROR
    command, *rest = arguments
    if command in ("-V", "--version"):
        from fastdaa import __version__

        print(f"fastdaa {__version__}")
        return 0
    if command not in available():
        return _fail("fastdaa", f"expected a command, got {command!r}{_nearest(command)}")
    from fastdaa.cli.missing_package import check_packages, missing_package

    # bitsandbytes, if it is imported, warns about a CPU kernel that quantised training never uses.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        check_packages(command)
        code = int(importlib.import_module(f"{__name__}.{command}").run(rest))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _READER_GONE
    except KeyboardInterrupt:
        return _fail(f"fastdaa {command}", "interrupted", INTERRUPTED)
    except _USER_ERRORS as error:
        if debug:
            traceback.print_exc()
        return _fail(f"fastdaa {command}", f"error: {missing_package(error) or one_line(error)}")
    finally:
        _end_silently()


def available() -> dict[str, str]:
    """The commands whose module exists, each with one line of help."""
    return {
        name: text
        for name, text in _COMMANDS.items()
        if importlib.util.find_spec(f"{__name__}.{name}") is not None
    }


def one_line(error: BaseException) -> str:
    """The message of an exception without line breaks, for one line of output."""
    # A KeyError or an assertion may come without words.
    return " ".join(str(error).split()) or type(error).__name__


def _print_any_character() -> None:
    """Has stdout escape what its encoding lacks, as stderr does: a ± is to end no training."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _end_silently() -> None:
    """Has Ctrl-C end the process at once, without a traceback, while it is ending anyway.

    What libraries do at the exit of a process takes a while.
    """
    atexit.unregister(_take_ctrl_c_as_the_system)
    atexit.register(_take_ctrl_c_as_the_system)  # the last to be registered is called first


def _take_ctrl_c_as_the_system() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _take_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """Takes a bare ``--debug`` out; one with a value belongs to ``TrainingArguments``."""
    kept = []
    for place, argument in enumerate(arguments):
        following = arguments[place + 1 : place + 2]
        bare = argument == "--debug" and (not following or following[0].startswith("-"))
        # `fastdaa --debug train`: the word behind it is the command.
        if not bare and not (argument == "--debug" and place == 0):
            kept.append(argument)
    return kept, len(kept) < len(arguments)


def _help() -> str:
    lines = ["usage: fastdaa COMMAND [options]", "", "commands:"]
    lines += [f"  {name:<8}  {text}" for name, text in available().items()]
    lines += [
        "",
        "options:",
        "  -h, --help     this text; `fastdaa COMMAND --help` shows a command's options",
        "  --help-all     behind train, sft, reward, online, evaluate: every option",
        "  -V, --version  the version of fastdaa",
        "  --debug        show tracebacks of errors",
    ]
    return "\n".join(lines)


def _nearest(command: str) -> str:
    near = difflib.get_close_matches(command, available(), n=1)
    listed = ", ".join(available())
    return f" (did you mean {near[0]!r}?)" if near else f"; commands: {listed}"


def _fail(who: str, what: str, code: int = _USAGE_ERROR) -> int:
    print(f"{who}: {what}", file=sys.stderr)
    return code
