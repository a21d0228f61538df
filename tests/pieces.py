"""A small model that ZeRO-3 has cut into pieces, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from meeting import meeting

ON_CPU = {"DS_ACCELERATOR": "cpu"}
"""The environment in which DeepSpeed takes the CPU."""


class Cut(NamedTuple):
    """What :func:`cut` gives."""

    core: Any
    """The model, whose parameters are empty but around their use."""
    whole: Any
    """The weight of its head before that, ``[V, D]``."""
    engine: Any
    """DeepSpeed's engine of it, with SGD at rate 1."""

    def watch(self) -> tuple[list[int], Callable[..., None]]:
        """Entries that the head's weight holds, noted behind the forward of the last norm and the
        backward of the layer; and a function that notes them at once."""
        sizes: list[int] = []
        head = self.core.lm_head.weight  # asked for inside a forward, it would be gathered

        def note(*_: Any) -> None:
            sizes.append(head.numel())

        self.core.model.norm.register_forward_hook(note)
        self.core.model.layers[0].register_full_backward_hook(note)
        return sizes, note


def cut(prepare: Callable[[Any], object], **settings: Any) -> Cut:
    """A Llama of one layer, 31 tokens and width 8; ``prepare`` is called before it is cut."""
    import deepspeed
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "hidden_size": 8, "intermediate_size": 8}
    config = transformers.LlamaConfig(
        **sizes, num_hidden_layers=1, num_attention_heads=2, **settings
    )
    core = transformers.LlamaForCausalLM(config)
    whole = core.lm_head.weight.detach().clone()
    prepare(core)
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "overlap_comm": False,
            "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}  # fmt: skip
    engine, *_ = deepspeed.initialize(
        model=core,
        optimizer=torch.optim.SGD(core.parameters(), lr=1.0),
        config={
            "train_micro_batch_size_per_gpu": 1, "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True,
        },
    )  # fmt: skip
    return Cut(core, whole, engine)


def run_alone(script: str) -> None:
    """Runs a Python script in a process that meets itself, and can import what tests share."""
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, **meeting(1), **ON_CPU, "RANK": "0", "LOCAL_RANK": "0"}
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120,
        env={**env, "PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
