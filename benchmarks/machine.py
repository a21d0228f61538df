"""What a number was measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any


def machine(device: str) -> dict[str, Any]:
    """Device, commit and versions, for every row."""
    names = ("torch", "transformers", "accelerate", "trl", "fastdaa")
    return {
        "device": device_name(device),
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def device_name(device: str) -> str:
    """What the numbers were measured on."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPU cores, {_cpu_name()}"


def _commit() -> str:
    """The commit of this checkout, with a plus sign if it was changed since."""
    run = partial(subprocess.run, cwd=Path(__file__).resolve().parent, capture_output=True)
    head = run(["git", "rev-parse", "--short", "HEAD"], text=True)
    if head.returncode:
        return "no checkout"
    changed = run(["git", "status", "--porcelain", "--untracked-files=no"], text=True)
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")
