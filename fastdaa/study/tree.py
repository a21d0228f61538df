"""The tree problem: one preference pair, and where its loss sends the mass.

Three actions, three deep, so 27 leaves whose probabilities are exact. A small GRU policy is
fine-tuned on the chosen leaf until that has most of the mass, and then trained on a single pair
with the project's own objectives and head (after section 4 of arXiv 2406.02900). "Outside" is
every leaf but the two of the pair.

``tree.json`` is one object::

    {"settings": {every field of TreeSettings},
     "null_space": {see fastdaa.study.null_space.null_space},
     "oracles": [{see fastdaa.study.oracles.run_oracles}],
     "pairs": {"near_duplicate": {"chosen": "aab", "rejected": "aaa"}, ...},
     "runs": [{"pair", "loss", "beta", "seed",
               "start": {"outside", "chosen", "rejected", "kl", "margin", "largest_outside",
                         "largest_leaf"},
               "end": {the same},
               "steps": [0, 20, ..., 160], "outside": [mass outside at those steps]}],
     "table": [{"pair", "loss", "beta", "seeds",
                "start": {"outside", "chosen", "rejected"},   # means over seeds
                "end": {"outside", "chosen", "rejected", "kl", "margin", "largest_outside"},
                "outside_range": [least, greatest]}],         # at the end, over seeds
     "checks": [{"name", "claim", "holds": true, "detail"}],
     "summary": ["plain sentences"], "seconds": 30.0}

Masses are probabilities, KL and margin are in nats; the margin is the log-ratio of the chosen leaf
minus that of the rejected.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdaa.head import LmHead
from fastdaa.logps import sequence_logps, token_logps
from fastdaa.losses import Objective
from fastdaa.outputs import TokenSelection
from fastdaa.pair_loss import pair_loss
from fastdaa.study.pool import outcomes
from fastdaa.study.tree_table import check_cells, describe_cells, summarise

ACTIONS = "abc"
DEPTH = 3
LEAVES = ["".join(leaf) for leaf in itertools.product(ACTIONS, repeat=DEPTH)]
PAIRS = {
    "near_duplicate": ("aab", "aaa"),
    "different_start": ("aba", "bab"),
}
"""(chosen, rejected). The first pair shares its first two actions, and lowering the rejected leaf
lowers what the two share; the second differs from the first action on."""
_EVERY = 20


@dataclass(frozen=True)
class TreeSettings:
    """What is run. Raises ``ValueError`` for values out of range."""

    pairs: tuple[str, ...] = tuple(PAIRS)
    losses: tuple[str, ...] = ("dpo", "ipo", "slic")
    betas: tuple[float, ...] = (0.01, 0.1, 0.5)
    seeds: int = 6
    hidden: int = 32
    sft_mass: float = 0.6
    """Fine-tuning stops when the chosen leaf has this much."""
    sft_learning_rate: float = 5e-3
    sft_steps: int = 2000
    """At most."""
    learning_rate: float = 1e-3
    steps: int = 160

    def __post_init__(self) -> None:
        unknown = [pair for pair in self.pairs if pair not in PAIRS]
        if unknown or not self.pairs:
            raise ValueError(f"pairs: expected some of {', '.join(PAIRS)}, got {unknown or 'none'}")
        if not self.losses or not self.betas:
            raise ValueError("tree: expected at least one loss and one beta, got none")
        if self.seeds < 1 or self.steps < 1 or self.hidden < 1:
            raise ValueError("tree: expected seeds, steps and hidden of at least 1")
        if not 0 < self.sft_mass < 1:
            raise ValueError(f"sft_mass: expected a mass between 0 and 1, got {self.sft_mass}")
        for loss, beta in itertools.product(self.losses, self.betas):
            Objective.parse(loss, beta=beta)  # an unknown loss is told before anything runs

    @property
    def runs(self) -> int:
        """Number of trainings."""
        return len(self.pairs) * len(self.losses) * len(self.betas) * self.seeds


class TreePolicy(nn.Module):
    """A GRU over the actions so far, and a linear head over the next one; fp64."""

    def __init__(self, hidden: int, seed: int):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            # One embedding more than actions: the root.
            self.embedding = nn.Embedding(len(ACTIONS) + 1, hidden)
            self.gru = nn.GRU(hidden, hidden, batch_first=True)
            self.head = nn.Linear(hidden, len(ACTIONS))
        self.double()

    def forward(self, leaves: Tensor) -> Tensor:
        """Hidden states ``[n, DEPTH, hidden]`` that predict the actions of ``[n, DEPTH]``."""
        root = torch.full_like(leaves[:, :1], len(ACTIONS))
        return self.gru(self.embedding(torch.cat([root, leaves[:, :-1]], dim=1)))[0]

    @property
    def lm_head(self) -> LmHead:
        """The head as the library takes it."""
        return LmHead(self.head.weight, self.head.bias)

    def leaf_logps(self, leaves: Tensor) -> Tensor:
        """Log-probabilities ``[n]`` of leaves ``[n, DEPTH]``, in nats."""
        rows = self(leaves).flatten(0, 1)
        logps = token_logps(rows, self.head.weight, leaves.flatten(), bias=self.head.bias)
        return sequence_logps(logps, torch.full((len(leaves),), DEPTH))


def run_tree(
    settings: TreeSettings | None = None,
    progress: Callable[[int, int], None] | None = None,
    workers: int = 1,
) -> dict[str, Any]:
    """Train every cell; ``tree.json`` without ``null_space`` and ``oracles``.

    Args:
        progress: called with (trainings done, all trainings) after each seed of a pair.
        workers: processes, one thread each. About 50 s of one core in all.

    Raises:
        RuntimeError: a training that failed.
    """
    settings = settings or TreeSettings()
    started, runs = time.perf_counter(), []
    tasks = list(itertools.product(settings.pairs, range(settings.seeds), (settings,)))
    for (pair, seed, _), (result, error) in outcomes(_run_seed, tasks, workers):
        if error is not None:
            raise RuntimeError(f"tree: pair {pair}, seed {seed}: {error}")
        runs += result
        if progress is not None:
            progress(len(runs), settings.runs)
    runs.sort(
        key=lambda run: (
            settings.pairs.index(run["pair"]),
            settings.losses.index(run["loss"]),
            settings.betas.index(run["beta"]),
            run["seed"],
        )
    )
    table = summarise(runs)
    checks = check_cells(table)
    return {
        "settings": asdict(settings),
        "pairs": {
            name: dict(zip(("chosen", "rejected"), PAIRS[name], strict=True))
            for name in settings.pairs
        },
        "runs": runs,
        "table": table,
        "checks": checks,
        "summary": describe_cells(table),
        "seconds": time.perf_counter() - started,
    }


def _run_seed(task: tuple[str, int, TreeSettings]) -> list[dict[str, Any]]:
    pair, seed, settings = task
    reference = fine_tune(TreePolicy(settings.hidden, seed), pair, settings)
    return [
        {"pair": pair, "loss": loss, "beta": beta, "seed": seed}
        | train_on_pair(reference, pair, Objective.parse(loss, beta=beta), settings)
        for loss, beta in itertools.product(settings.losses, settings.betas)
    ]


def fine_tune(policy: TreePolicy, pair: str, settings: TreeSettings) -> TreePolicy:
    """Raise the chosen leaf to ``sft_mass``, in place.

    Raises:
        RuntimeError: it does not get there in ``sft_steps``.
    """
    chosen = encode(PAIRS[pair][0])
    optimizer = torch.optim.Adam(policy.parameters(), lr=settings.sft_learning_rate)
    for _ in range(settings.sft_steps):
        logps = policy.leaf_logps(chosen)
        if float(logps.detach().exp()) >= settings.sft_mass:
            return policy
        optimizer.zero_grad()
        (-logps.sum() / DEPTH).backward()
        optimizer.step()
    raise RuntimeError(f"tree: expected a mass of {settings.sft_mass} on {PAIRS[pair][0]} by SFT")


def train_on_pair(
    reference: TreePolicy, pair: str, objective: Objective, settings: TreeSettings
) -> dict[str, Any]:
    """Train a copy of the reference: ``start``, ``end``, ``steps`` and ``outside`` of a run."""
    policy = copy.deepcopy(reference)
    sides = encode(*PAIRS[pair])
    lengths = torch.full((2,), DEPTH)
    selection = TokenSelection(
        torch.arange(2 * DEPTH), sides.flatten(), lengths, tuple(lengths.tolist())
    )
    with torch.no_grad():
        ref_leaves = reference.leaf_logps(encode(*LEAVES))
        ref_logps = reference.leaf_logps(sides)
    optimizer = torch.optim.Adam(policy.parameters(), lr=settings.learning_rate)
    start = measure(policy, ref_leaves, pair)
    steps, outside, end = [0], [start["outside"]], start
    for step in range(1, settings.steps + 1):
        loss = pair_loss(
            policy(sides), policy.lm_head, selection, objective, ref_logps=ref_logps
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % _EVERY == 0 or step == settings.steps:
            end = measure(policy, ref_leaves, pair)
            steps.append(step)
            outside.append(end["outside"])
    return {"start": start, "end": end, "steps": steps, "outside": outside}


@torch.no_grad()
def measure(policy: TreePolicy, ref_leaves: Tensor, pair: str) -> dict[str, Any]:
    """Exact masses, KL(policy || reference) and margin, by enumeration."""
    logps = policy.leaf_logps(encode(*LEAVES))
    ratios, probabilities = logps - ref_leaves, logps.exp()
    chosen, rejected = (LEAVES.index(leaf) for leaf in PAIRS[pair])
    others = probabilities.clone()
    others[[chosen, rejected]] = 0
    return {
        "outside": float(others.sum()),
        "chosen": float(probabilities[chosen]),
        "rejected": float(probabilities[rejected]),
        "kl": float((probabilities * ratios).sum()),
        "margin": float(ratios[chosen] - ratios[rejected]),
        "largest_outside": float(others.max()),
        "largest_leaf": LEAVES[int(others.argmax())],
    }


def encode(*leaves: str) -> Tensor:
    """Leaves as ``[n, DEPTH]`` int64."""
    return torch.tensor([[ACTIONS.index(action) for action in leaf] for leaf in leaves])
