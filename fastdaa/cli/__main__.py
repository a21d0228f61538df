"""``python -m fastdaa.cli``, which launchers such as torchrun and accelerate can start."""

from __future__ import annotations

import sys

from fastdaa.cli import main

if __name__ == "__main__":
    sys.exit(main())
