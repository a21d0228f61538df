"""One of several processes of a command, such as ``fastdaa evaluate``.

Run with the global ``OPTIONS``: ``argv`` of the command, ``env``, ``log`` (the file for all that it
says), and ``end`` (what happens in the second batch of this process).
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from typing import Any

OPTIONS: dict[str, Any] = globals()["OPTIONS"]
os.environ.update(OPTIONS["env"])
# Before anything keeps the old ones.
said = os.open(OPTIONS["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
os.dup2(said, 1)
os.dup2(said, 2)

import torch  # noqa: E402

from fastdaa.cli import main  # noqa: E402
from fastdaa.train.trainer import PreferenceTrainer  # noqa: E402

torch.set_num_threads(1)
gc.freeze()  # the imports are no garbage, and the Trainer would look through all of them
signal.signal(signal.SIGINT, signal.default_int_handler)


compute_loss, batches = PreferenceTrainer.compute_loss, iter(range(100))


def ending(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Fails, or is interrupted, in the second batch."""
    second = next(batches) == 1
    if second and OPTIONS["end"] == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory.")
    if second:
        os.kill(os.getpid(), signal.SIGINT)
    return compute_loss(self, *args, **kwargs)


if OPTIONS["end"]:
    PreferenceTrainer.compute_loss = ending  # type: ignore[method-assign]
sys.exit(main(OPTIONS["argv"]))
