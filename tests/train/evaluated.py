"""One of several processes of ``fastdaa evaluate``.

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
from fastdaa.train.evaluation import EvaluationTrainer  # noqa: E402

torch.set_num_threads(1)
gc.freeze()  # the imports are no garbage, and the Trainer would look through all of them
signal.signal(signal.SIGINT, signal.default_int_handler)


class Ending(EvaluationTrainer):
    """Fails, or is interrupted, in its second batch."""

    batches = 0

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.batches += 1
        if self.batches == 2 and OPTIONS["end"] == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if self.batches == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return super().compute_loss(*args, **kwargs)


if OPTIONS["end"]:
    import fastdaa.train.evaluation

    fastdaa.train.evaluation.EvaluationTrainer = Ending  # type: ignore[misc]
sys.exit(main(OPTIONS["argv"]))
