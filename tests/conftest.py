"""What every test stands on: one thread, fixed seeds, no network, no trace outside its folder."""

from __future__ import annotations

import os
import random
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

# Hugging Face libraries read these when they are imported, so they are set before that.
_SCRATCH = tempfile.TemporaryDirectory(prefix="fastdaa-tests-")
os.environ.update(
    HF_HOME=_SCRATCH.name,
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
    # Deterministic algorithms, which fixtures ask for, refuse cuBLAS without it.
    CUBLAS_WORKSPACE_CONFIG=":4096:8",
    # For the processes that tests start; this one is set below.
    OMP_NUM_THREADS="1",
)

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    # Read when a kernel is defined: without a GPU, kernels run in Triton's interpreter.
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).resolve().parents[1]
SHARED_PAIRS = ROOT.parent / "shared" / "data" / "pairs_en_300.jsonl.gz"

torch.set_num_threads(1)

# A shell starts background jobs with Ctrl-C ignored, and children inherit that: those of tests
# are sent it and must hear it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure() -> None:
    _SCRATCH.cleanup()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        marker, reason = "interpreter", "needs Triton's interpreter, which is off beside a GPU"
    else:
        marker, reason = "gpu", "needs a CUDA device"
    for item in items:
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    """The same random numbers for a test whichever tests ran before it."""
    random.seed(0)
    torch.manual_seed(0)
    try:
        import numpy
    except ModuleNotFoundError:
        return
    numpy.random.seed(0)


@pytest.fixture(autouse=True)
def _torch_settings_restored() -> Iterator[None]:
    """A test that changes a global setting of torch does not change the next test."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that leave this machine fail at once, with the address in the message."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: object) -> None:
        internet = self.family in (socket.AF_INET, socket.AF_INET6)
        host = address[0] if internet and isinstance(address, tuple) else "localhost"
        if host not in ("localhost", "127.0.0.1", "::1", "0.0.0.0"):
            raise OSError(f"tests use no network: expected a local address, got {address!r}")
        return connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", local_only)


@pytest.fixture(scope="session")
def repository_root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def shared_pairs_path() -> Path:
    """300 real preference pairs that lie beside the repository on some machines."""
    if not SHARED_PAIRS.is_file():
        pytest.skip(f"no {SHARED_PAIRS.name} in ../shared/data beside the repository")
    return SHARED_PAIRS


@pytest.fixture
def half_factors(monkeypatch: pytest.MonkeyPatch) -> Callable[[torch.dtype], set[torch.dtype]]:
    """``half_factors(dtype)``: see :func:`half_products.take_half_factors`."""
    from half_products import take_half_factors

    return partial(take_half_factors, monkeypatch)


@pytest.fixture
def fused_variants(monkeypatch: pytest.MonkeyPatch) -> set[Any]:
    """Has fused kernels be checked on a CPU, too; the variants that were."""
    from fastdaa import fused_check

    seen: set[Any] = set()
    monkeypatch.setattr(fused_check, "_SEEN", seen)
    monkeypatch.setattr(fused_check, "is_due", lambda *variant: variant not in seen)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    return seen


@pytest.fixture
def same_compiled() -> Iterator[Callable[..., None]]:
    """``check(compiled, eager, leaves)``: values and gradients of both calls, bit for bit."""

    def outcome(call: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> list[torch.Tensor]:
        value = call()
        return [value.detach(), *torch.autograd.grad(value, leaves)] if leaves else [value]

    def check(
        compiled: Callable[[], torch.Tensor],
        eager: Callable[[], torch.Tensor],
        tensors: list[torch.Tensor | None],
    ) -> None:
        leaves = [t for t in tensors if t is not None and t.requires_grad]
        for got, want in zip(outcome(compiled, leaves), outcome(eager, leaves), strict=True):
            assert got.dtype == want.dtype and got.shape == want.shape
            assert torch.equal(got, want)

    torch._dynamo.reset()
    yield check
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def within_budget() -> Callable[..., None]:
    """The one tolerance rule: no more than twice the error of plain torch in the same dtypes.

    ``check(name, got, eager, truth, length)`` compares both with the fp64 truth, by their largest
    and by their mean error. What plain torch computes without any error is allowed a few roundings
    of a sum of ``length`` terms, in fp32 at best (fp64 for an fp64 result).
    """

    def check(
        name: str, got: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor, length: int
    ) -> None:
        assert got.dtype == eager.dtype and got.shape == eager.shape, name
        if not truth.numel():
            return
        computed = got.dtype if got.dtype == torch.float64 else torch.float32
        slack = torch.finfo(computed).eps * length**0.5 * truth.abs().max().item()
        ours, theirs = (got.double() - truth).abs(), (eager.double() - truth).abs()
        for size in (torch.max, torch.mean):
            error, allowed = size(ours).item(), 2 * size(theirs).item() + slack
            assert error <= allowed, f"{name}: {size.__name__} error {error:.3g} > {allowed:.3g}"

    return check
