"""Several processes of one run: each does a share of the work, and all of them know everything.

Every process has all models, or pieces of them. It answers some of the prompts, scores some of the
completions, and computes the gradients of some sequences of a minibatch. What they find is put
together, so that all take the same decisions and the same steps. A single process does all of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from fastdaa.train.processes import meet


def processes() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def number() -> int:
    """Which of them this is."""
    return dist.get_rank() if processes() > 1 else 0


def share(sizes: Sequence[int]) -> list[int]:
    """Which of some pieces of work are this process's, ascending.

    The longest are dealt first, so that all get about as much.

    Args:
        sizes: of the pieces, in any unit.
    """
    order = sorted(range(len(sizes)), key=lambda index: (-sizes[index], index))
    return sorted(order[number() :: processes()])


def add_up(values: Tensor, device: torch.device) -> Tensor:
    """The sum over all processes of values that are 0 where another one has found them.

    Args:
        values: on the CPU, of the same shape in all processes.
        device: of the models, which the processes can talk over.
    """
    if processes() == 1:
        return values
    total = values.to(device)
    dist.all_reduce(total)
    return total.cpu()


def add_up_by_name(
    values: Mapping[str, Tensor], names: Sequence[str], device: torch.device
) -> dict[str, Tensor]:
    """The sums over all processes of scalars on ``device``, 0 where a process has none."""
    if processes() == 1:
        return dict(values)
    zero = torch.zeros((), device=device)
    total = torch.stack([values.get(name, zero).float() for name in names])
    dist.all_reduce(total)
    return dict(zip(names, total.unbind(), strict=True))


def any_of(mine: bool, device: torch.device) -> bool:
    """Whether something is so in any of the processes."""
    return bool(add_up(torch.tensor(float(mine)), device))


def most(mine: int, device: torch.device) -> int:
    """The largest number that a process has."""
    if processes() == 1:
        return mine
    number_of = torch.tensor(mine, device=device)
    dist.all_reduce(number_of, dist.ReduceOp.MAX)
    return int(number_of)


def collect_objects(mine: Any) -> list[Any]:
    """What each process has found, in the order of their numbers."""
    if processes() == 1:
        return [mine]
    found = [None] * processes()
    dist.all_gather_object(found, mine)
    return found


def of_the_first(found: Any) -> Any:
    """What the first process has found, where others might have found something else."""
    if processes() == 1:
        return found
    box = [found]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def add_gradients(parameters: Iterable[nn.Parameter], device: torch.device) -> None:
    """Gradients become the sums over all processes; a weight that none of them used keeps none."""
    if processes() == 1:
        return
    parameters = list(parameters)
    used = torch.tensor([weight.grad is not None for weight in parameters], device=device).int()
    dist.all_reduce(used)
    sums = []
    for weight, count in zip(parameters, used.tolist(), strict=True):
        if count:
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            sums.append(dist.all_reduce(weight.grad, async_op=True))
    for waiting in sums:
        waiting.wait()


def part() -> None:
    """All are here, and none ends while another one still asks for that."""
    if processes() > 1:
        meet()  # has no timeout
        dist.barrier()


@torch.no_grad()
def begin_alike(*models: nn.Module) -> None:
    """Every process takes the first one's weights that are trained."""
    if processes() == 1:
        return
    for model in models:
        for weight in model.parameters():
            if weight.requires_grad:
                dist.broadcast(weight.data, src=0)
