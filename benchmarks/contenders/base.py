"""What a contender is: a name, a version, and a way to do a case's work once per call."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastdaa.benchmarks.cases import Case
from fastdaa.benchmarks.cost_model import Cost
from fastdaa.benchmarks.inputs import HeadInputs
from fastdaa.benchmarks.pair_objectives import pair_objective


class Absent(Exception):
    """A contender that cannot run here: not installed, or no device for it. Says why."""


class Outputs(NamedTuple):
    """What one run returned. A contender leaves None what it does not compute."""

    loss: Tensor | None
    """Scalar: the loss, or the mean cross-entropy."""
    logps: Tensor | None
    """``[N]`` token log-probs."""
    dh: Tensor | None
    """``[N, D]``."""
    dw: Tensor | None
    """``[V, D]``."""

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the returned gradients."""
        return sum(g.numel() * g.element_size() for g in (self.dh, self.dw) if g is not None)


class Contender:
    """One candidate. Subclasses say how; state that a case needs lives in ``prepare``'s closure."""

    name: str
    family: str
    """``"pytorch"``, ``"trl"``, ``"liger"``, ``"cce"``, ``"quack"``, ``"fastdaa"`` or
    ``"floor"``."""
    kinds: tuple[str, ...] = ("head", "loss", "memory", "accuracy")
    """The benchmarks that it is in without being named."""

    def version(self) -> str:
        """Version of what is measured. Raises :class:`Absent` if it is not here."""
        raise NotImplementedError

    def check_device(self, device: str) -> None:
        """Raise :class:`Absent` if it has no code for ``"cpu"`` or ``"cuda"``."""

    def applies(self, case: Case) -> bool:
        """Whether the case asks something that this contender is an answer to.

        False leaves no row: the frozen path has nothing to say about a trained head. What a peer
        lacks is a matter of :meth:`supports`.
        """
        return True

    def supports(self, case: Case) -> str | None:
        """None, or why it cannot do the case."""
        return None

    def gemms(self, case: Case) -> int:
        """Products of the size of the head that it makes, in ``U``."""
        raise NotImplementedError

    def cost(self, case: Case, device: str) -> Cost | None:
        """FLOP and bytes that it should take, or None where no model was made."""
        return None

    def detail(self, inputs: HeadInputs) -> str | None:
        """One line about how the case is done (a plan, a chunk size), for the row."""
        return None

    def prepare(self, inputs: HeadInputs) -> Callable[[], Outputs]:
        """A callable that does the whole work of the case, forward and backward."""
        raise NotImplementedError


class TokenScorer(Contender):
    """A contender with differentiable token log-probs: every kind of work follows from them."""

    def score_tokens(self, hidden: Tensor, weight: Tensor, inputs: HeadInputs) -> Tensor:
        """Log-probs ``[N]`` of ``inputs.targets``; for ``"ce"`` their mean is enough."""
        raise NotImplementedError

    def scorer(self, inputs: HeadInputs) -> Callable[[Tensor, Tensor], Tensor]:
        """``(hidden, weight)`` to log-probs; a place for what is made once a case."""
        return lambda hidden, weight: self.score_tokens(hidden, weight, inputs)

    def prepare(self, inputs: HeadInputs) -> Callable[[], Outputs]:
        """See :class:`Contender`."""
        score = self.scorer(inputs)
        case, hidden, weight, leaves = inputs.case, inputs.hidden, inputs.weight, inputs.leaves

        def run() -> Outputs:
            if not case.wants_grad:
                with torch.no_grad():
                    return Outputs(None, score(hidden, weight), None, None)
            logps = score(hidden, weight)
            if case.work == "logps":
                cotangent = inputs.cotangent.to(logps.dtype)
                return with_gradients(None, logps, torch.autograd.grad(logps, leaves, cotangent))
            loss = _objective(logps, score, inputs)
            if not logps.ndim:  # the mean is all that some contenders give
                return with_gradients(loss, None, torch.autograd.grad(loss, leaves))
            return with_gradients(loss, logps, torch.autograd.grad(loss, leaves))

        return run


def _objective(
    logps: Tensor, score: Callable[[Tensor, Tensor], Tensor], inputs: HeadInputs
) -> Tensor:
    """Scalar loss of ``"ce"`` and of losses, in fp32, from log-probs."""
    if inputs.case.work == "ce":
        return -logps.float().mean()
    ref_logps = inputs.ref_logps
    if inputs.ref_hidden is not None:
        with torch.no_grad():
            ref_logps = score(inputs.ref_hidden, inputs.weight.detach()).float()
    assert ref_logps is not None
    return pair_objective(inputs.case.work, logps.float(), ref_logps, inputs.lengths)


def with_gradients(loss: Tensor | None, logps: Tensor | None, grads: tuple[Tensor, ...]) -> Outputs:
    """Outputs with the gradients of the leaves, in their order."""
    return Outputs(
        None if loss is None else loss.detach(),
        None if logps is None else logps.detach(),
        grads[0],
        grads[1] if len(grads) > 1 else None,
    )


def installed(package: str, hint: str) -> str:
    """Version of a distribution. Raises :class:`Absent` with ``hint`` if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise Absent(f"{package} is not installed ({hint})") from None


def needs_cuda(name: str, device: str) -> None:
    """Raise :class:`Absent` on anything but CUDA."""
    if device != "cuda":
        raise Absent(f"{name} has kernels for CUDA devices only")
