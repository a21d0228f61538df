"""One side of a comparison: a process that imports one version of fastdaa and measures on demand.

    python -m fastdaa.benchmarks.compare.worker MODULE

Started by turns.py in the folder of its version. It reads one JSON object a line from standard
input and answers each with one line on standard output:

    {"open": job}   -> {"file": where fastdaa lies} | {"absent": reason} | {"failed": reason}
    {"calls": n}    -> {"seconds": mean of n calls, "peak_bytes": .., "status": .., "reason": ..}
    {"close": true} -> {}

Whatever libraries print goes to standard error. The worker ends with its standard input.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO


def serve(jobs: str, requests: TextIO, replies: TextIO) -> None:
    """Answers requests for the jobs of a module until there are no more."""
    call: Callable[[], dict[str, Any]] | None = None
    for line in requests:
        request = json.loads(line)
        reply: dict[str, Any] = {}
        try:
            if "open" in request:
                call = importlib.import_module(jobs).open_job(request["open"])
                reply = {"file": str(sys.modules["fastdaa"].__file__)}
            elif "calls" in request:
                assert call is not None
                reply = _mean([call() for _ in range(request["calls"])])
            else:
                call = None
                gc.collect()
        # A version that cannot do a job must not take the others' measurements with it.
        except Exception as error:
            call = None
            # A version without the names that today's benchmarks import lacks the contender.
            # Absent goes by its name: this version's class need not be the parent's.
            lacks = isinstance(error, ImportError) or type(error).__name__ == "Absent"
            word = "absent" if lacks else "failed"
            reply = {word: f"{type(error).__name__}: {' '.join(str(error).split())}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _mean(measured: list[dict[str, Any]]) -> dict[str, Any]:
    peaks = [reply["peak_bytes"] for reply in measured if reply.get("peak_bytes") is not None]
    wrong = next((reply for reply in measured if reply.get("status", "ok") != "ok"), measured[0])
    return {
        "seconds": sum(reply["seconds"] for reply in measured) / len(measured),
        "peak_bytes": max(peaks, default=None),
        "status": wrong.get("status", "ok"),
        "reason": wrong.get("reason"),
    }


def main() -> None:
    """Keeps the pipe to the parent for itself and serves it."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.argv[1], sys.stdin, replies)


if __name__ == "__main__":
    main()
