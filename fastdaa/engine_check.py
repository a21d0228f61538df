"""Whether the Triton kernels work on the GPU at hand, before ``engine="auto"`` takes them.

The kernels are held to fp64 on a small tile once for every device and process. What they are worth
elsewhere (another driver, compiler, or architecture) is nothing to assume.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from fastdaa.engines import TorchTile, TritonTile, logits_memory
from fastdaa.head import LmHead
from fastdaa.losses import Objective
from fastdaa.outputs import BatchTotals
from fastdaa.scaled_rows import scaled_rows
from fastdaa.slices import least_columns
from fastdaa.target_rows import TargetRows, add_target_rows, finish_hidden

# Of the second of two splits of the vocabulary, narrow. Where they are a multiple of 16 rows are
# read 16 bytes at a time: other machine code than that of odd ones, and models have either.
_MORE_COLUMNS = (64, 53)
_ROWS = 4
# Multiples of 16 like those of models, as Triton compiles other code for others. The hidden states
# take more than one program.
_WEIGHT_ROWS, _HIDDEN = 16, 1040
LEAST_CAPABILITY = (8, 0)


def triton_obstacle(device: torch.device) -> str:
    """Why the Triton kernels cannot serve a CUDA device, one clause; empty if they can.

    A plan for a GPU may be made where there is none: then nothing is known against them.
    """
    if detect_fake_mode() is not None:
        return "tensors without values"
    if device.index in _OBSTACLES:
        return _OBSTACLES[device.index]
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if torch.version.hip is not None:
        return "the Triton kernels are made for NVIDIA GPUs"
    if not torch.cuda.is_available():
        return ""
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return f"the Triton kernels need compute capability 8.0, this GPU has {capability}"
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _OBSTACLES:
        if torch.cuda.is_current_stream_capturing():
            obstacle = "a CUDA graph is captured before the Triton kernels were tried"
            _warn(f"{obstacle}. The graph will hold plain torch: slower, the same results. Make "
                  "one call before.")  # fmt: skip
            return f"{obstacle}: call once before"
        _OBSTACLES[index] = _try_kernels(torch.device("cuda", index))
    return _OBSTACLES[index]


_OBSTACLES: dict[int, str] = {}
"""What came of it, by the index of the device."""


def _try_kernels(device: torch.device) -> str:
    try:
        # In a thread of its own: inference mode, checkpoints that record operators, transforms of
        # torch.func and autocast belong to the caller's.
        with free_to_wait(), ThreadPoolExecutor(max_workers=1) as thread:
            wrong = thread.submit(wrong_results, device).result()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        obstacle = f"the Triton kernels do not run on this machine: {cause}"
    else:
        obstacle = f"the Triton kernels give wrong {', '.join(wrong)} here" if wrong else ""
    if obstacle:
        _warn(f"{obstacle}. Plain torch takes their place: slower, the same results. `fastdaa "
              "doctor --kernels` compiles them one by one; please report it.")  # fmt: skip
    return obstacle


def _warn(message: str) -> None:
    warnings.warn(f"fastdaa: {message}", stacklevel=4)


@contextmanager
def free_to_wait() -> Iterator[None]:
    """The check waits for its results, which ``torch.cuda.set_sync_debug_mode`` may forbid."""
    if not torch.cuda.is_initialized():
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def wrong_results(device: torch.device) -> list[str]:
    """Names of what the kernels compute wrongly on a device: nothing, where they work.

    Statistics and gradients of tiles of logits against fp64, with a nearly certain target and a
    nearly impossible one; the same log-probs to the last bit beside a gradient and with other
    statistics, and the same gradients over the logits as beside them; rows that join those of their
    targets, in either gradient, or are a factor; the objective kernel's DPO against its formula.
    """
    generator = torch.Generator(device).manual_seed(0)
    found: list[tuple[str, Tensor]] = []
    for more in _MORE_COLUMNS:
        columns = least_columns() + more
        z = logits_memory(_ROWS, columns, device, torch.float32)
        z.normal_(0.0, 4.0, generator=generator)
        targets = torch.randint(columns, (_ROWS,), generator=generator, device=device)
        if not found:
            found += _objective_differences(z[0, :16]).items()
            found += (_target_differences(z) | _hidden_differences(z)).items()
        z[:2].scatter_(1, targets[:2, None], z.new_tensor([[45.0], [-45.0]]))
        found += _tile_differences(z, targets).items()  # spoils z
    largest = torch.stack([value.double() for _, value in found]).tolist()
    limits = zip(found, largest, strict=True)
    wrong = [name for (name, _), difference in limits if not difference <= _LIMITS[name]]
    return list(dict.fromkeys(wrong))


# Log-probs are some -20 and entropies some 3 nats; bf16 entries have 8 bits. In place, none may be
# off by more than its last one: a compiler may round either variant in its own way.
_LIMITS = {
    "log-probs": 1e-4, "log-probs beside gradients": 0.0, "entropies": 1e-4, "gradients": 1e-2,
    "gradients in place": 2.0**-7, "gradients of frozen heads": 1e-2, "column sums": 1e-5,
    "rows of targets": 1e-2, "rows of hidden states": 1e-2, "factors": 0.0,
    "losses": 1e-5, "coefficients": 1e-5,
}  # fmt: skip


def _tile_differences(z: Tensor, targets: Tensor) -> dict[str, Tensor]:
    head = LmHead(z.new_empty((z.shape[1], 1), dtype=torch.bfloat16))
    everything, coefficients = slice(0, z.shape[1]), torch.ones_like(z[:, 0])
    plain = TorchTile(head, z.double(), everything, torch.float64)
    ours = TritonTile(head, z, everything, torch.bfloat16)
    state, _ = ours.statistics(targets)
    with_stats, stats = ours.statistics(targets, stats=True)
    frozen = ours.slopes(targets)
    others = torch.stack([frozen.state.logps, with_stats.logps])
    beside = torch.empty_like(z, dtype=torch.bfloat16)
    ours.gradient(state, targets, coefficients, out=beside)
    sums, true_sums = ours.column_sums(beside), beside.double().sum(dim=0)
    in_place = ours.gradient(state, targets, coefficients)
    true_state, true_stats = plain.statistics(targets, stats=True, keep=True)
    assert stats is not None and true_stats is not None
    truth = plain.gradient(true_state, targets, coefficients.double())
    by_frozen = frozen.factors[:, None] * frozen.slopes.double()
    by_frozen.scatter_(1, targets[:, None], frozen.own.double()[:, None])
    return {
        "log-probs": (state.logps - true_state.logps).abs().amax(),
        "log-probs beside gradients": (others - state.logps).abs().amax(),
        "entropies": (stats.entropy - true_stats.entropy).abs().amax(),
        "gradients": _relative(beside, truth),
        "gradients in place": _largest_ratio(in_place.double() - beside.double(), beside),
        "gradients of frozen heads": _relative(by_frozen, truth),
        "column sums": _relative(sums[None], true_sums[None]),
    }


def _target_differences(z: Tensor) -> dict[str, Tensor]:
    """Of the hidden states that join the weight's rows of three targets, without and with what is
    subtracted from them."""
    hidden, own, targets = _hidden_rows(z)
    entries, factor = own.roll(1), hidden.roll(1, dims=1)
    truth, found = z.new_ones((_WEIGHT_ROWS, _HIDDEN), dtype=torch.float64), []
    truth.index_add_(0, targets, own.double()[:, None] * hidden.double())
    for less in (None, factor):
        if less is not None:
            truth.index_add_(0, targets, -entries.double()[:, None] * less.double())
        got = torch.ones_like(truth, dtype=hidden.dtype)
        rows = TargetRows(targets, own, own, None if less is None else entries)
        add_target_rows(got, hidden, rows, engine="triton", factor=less)
        found.append(_relative(got, truth))
    return {"rows of targets": torch.stack(found).amax()}


def _hidden_differences(z: Tensor) -> dict[str, Tensor]:
    """Of the weight's rows of three targets that join rows of a product, rounded or in place; of
    rows times numbers, from the same in plain torch."""
    rounded, own, targets = _hidden_rows(z)
    product, weight = z[:, -_HIDDEN:].contiguous(), rounded.repeat(_WEIGHT_ROWS // _ROWS, 1)
    rows = TargetRows(targets, own.roll(1), own)
    truth = rows.coefficients.double()[:, None] * product.double()
    truth += own.double()[:, None] * weight[targets].double()
    finish_hidden(product, rows, weight, rounded, engine="triton")
    finish_hidden(product, rows, weight, engine="triton")
    found = torch.stack([_relative(rounded, truth), _relative(product, truth)])
    factor, by_torch = (
        scaled_rows(weight, own.repeat(_WEIGHT_ROWS // _ROWS), weight.dtype, engine=engine)
        for engine in ("triton", "torch")
    )
    return {
        "rows of hidden states": found.amax(),
        "factors": (factor.double() - by_torch.double()).abs().amax(),
    }


def _hidden_rows(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows ``[r, D]`` of some numbers, one for each, and which of three targets they have."""
    return z[:, :_HIDDEN].bfloat16(), z[:, -1], torch.arange(z.shape[0], device=z.device) % 3


def _relative(got: Tensor, truth: Tensor) -> Tensor:
    """The largest error of a row, relative to it: that of a confident token is tiny."""
    return ((got - truth).norm(dim=1) / truth.norm(dim=1)).amax()


def _largest_ratio(error: Tensor, size: Tensor) -> Tensor:
    """The largest error of an entry, relative to it: a race would spoil a few of many."""
    return (error.abs() / size.double().abs().clamp(min=torch.finfo(torch.float32).tiny)).amax()


def _objective_differences(logps: Tensor) -> dict[str, Tensor]:
    from fastdaa.objective_kernel import evaluate_objective

    beta, lengths = 0.5, logps.new_tensor([3, 5, 6, 2], dtype=torch.int64)
    ref = logps.new_tensor([1.0, -2.0, 0.5, 3.0])
    values = evaluate_objective(
        Objective.parse("dpo", beta=beta), logps, lengths, totals=BatchTotals(2, 9), ref_logps=ref
    )
    parts = torch.stack([part.sum() for part in logps.double().split([3, 5, 6, 2])]) - ref
    margins = beta * (parts[0::2] - parts[1::2])
    losses, slopes = -torch.nn.functional.logsigmoid(margins), -beta * torch.sigmoid(-margins)
    assert values.coefficients is not None
    return {
        "losses": (values.losses - losses).abs().amax(),
        "coefficients": (values.coefficients.view(2, 2)[:, 0] - slopes).abs().amax(),
    }
