"""Operators that read values of tensors on the host: their tags, and sizes that depend on data."""

from __future__ import annotations

from typing import Any

import torch

# Nothing that waits for the device can be recorded (mode="reduce-overhead", "max-autotune").
HOST_READS = (torch.Tag.cudagraph_unsafe,)


def size_from_data() -> torch.SymInt:
    """A size of 0 or more that a graph of ``torch.compile`` learns when it runs.

    ``torch.library.get_ctx().new_dynamic_size()`` gives one only with ``fullgraph=True``, or where
    ``torch._dynamo.config.capture_dynamic_output_shape_ops`` is on; elsewhere it breaks the graph
    at the operator. The size itself needs neither, so it is made as that call makes it.
    """
    context: Any = torch.library.get_ctx()
    allocate = getattr(torch._library.fake_impl, "allocate_size", None)
    shapes = getattr(context, "_shape_env", None)
    if allocate is None or shapes is None:  # another PyTorch, or fake tensors without symbols
        return context.new_dynamic_size()
    return allocate(shapes)
