"""The critic: values of states, by a copy of the policy's backbone or by the policy's own."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastdaa.selection import select_rows
from fastdaa.train.attention import enable_segments, placeholder_mask
from fastdaa.train.backbone import backbone_of, causal_lm


class ValueHead(nn.Module):
    """Hidden states ``[n, D]`` to values ``[n]`` fp32.

    Args:
        width: ``D``.
        kind: ``"mlp"``, D -> 2D -> 1 with ReLU as in the code of arXiv 2306.02231, or ``"linear"``.

    The last layer starts at zero, so that the first values are 0 and the first advantages are sums
    of rewards.
    """

    def __init__(self, width: int, kind: str = "mlp") -> None:
        super().__init__()
        last = nn.Linear(width if kind == "linear" else 2 * width, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        first = () if kind == "linear" else (nn.Linear(width, 2 * width), nn.ReLU())
        self.layers = nn.Sequential(*first, last)

    def forward(self, rows: Tensor) -> Tensor:
        """Values of the states that the rows stand for."""
        dtype = next(self.parameters()).dtype
        return self.layers(rows.to(dtype)).sum(-1).float()  # of one; FSDP2 warns of a view


def copy_of(model: nn.Module) -> nn.Module:
    """A copy with trained weights of its own; those that are frozen are in memory once."""
    frozen = {id(weight): weight for weight in model.parameters() if not weight.requires_grad}
    return copy.deepcopy(model, frozen)


class Critic(nn.Module):
    """A value head, on a backbone of its own or on the hidden states of the policy.

    Args:
        model: the policy, before it is trained; any wrapping of a model of transformers. Where the
            policy trains adapters, the copy trains its own, on the same base.
        kind: of the head, see :class:`ValueHead`.
        shared: no copy; gradients of the values then reach the policy's backbone.
        seed: of the head's first layer.
    """

    def __init__(
        self, model: nn.Module, kind: str = "mlp", *, shared: bool = False, seed: int = 0
    ) -> None:
        super().__init__()
        core = causal_lm(model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = ValueHead(core.config.get_text_config().hidden_size, kind)
        self.head = head.to(core.device)
        self.backbone: nn.Module | None = None
        if not shared:
            self.backbone = copy_of(backbone_of(core))
            enable_segments(self.backbone)  # type: ignore[arg-type]

    @property
    def shared(self) -> bool:
        """Whether it reads the policy's hidden states."""
        return self.backbone is None

    def forward(self, pack: Mapping[str, Any]) -> Tensor:
        """Values ``[n]`` fp32 before each scored token of a pack, by the backbone of its own.

        Raises:
            RuntimeError: it has none.
        """
        if self.backbone is None:
            raise RuntimeError("expected a critic with a backbone of its own, got a shared one")
        hidden = self.backbone(
            input_ids=pack["input_ids"],
            position_ids=pack["position_ids"],
            segments=pack["segments"],
            attention_mask=placeholder_mask(pack["input_ids"]),
            use_cache=False,
        ).last_hidden_state
        return self.head(select_rows(hidden[0], pack["rows"]))
