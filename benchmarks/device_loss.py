"""Errors that take the device with them: after one, no process can use its CUDA context again."""

from __future__ import annotations

import torch


def device_is_lost(device: str) -> bool:
    """Whether the work of this process on the device is over.

    An illegal address or a failed assertion inside a kernel ends the context: every later call
    raises the same error, whoever makes it. Out of memory does not.
    """
    if device != "cuda":
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
