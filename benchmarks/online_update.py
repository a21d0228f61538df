"""``python -m fastdaa.benchmarks.online_update``: the optimiser step of on-policy training.

One step (policy and critic, forward, backward, clipping, Adam) on one minibatch of rollouts, by
``packed``, which is :class:`fastdaa.online.update.Updater`, and by two ways that pad and keep
logits, as on-policy trainers do: prompts padded on the left, completions on the right.

- ``padded``: logits of every position of the rectangle, as published on-policy code has them;
- ``padded-sliced``: logits of the completion positions only.

All start from the same weights and are timed in turns, in one process, on the same minibatches.
Nothing is timed before losses and gradient norms of the first step agree.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from fastdaa.benchmarks.step.cases import Case
    from fastdaa.online.config import OnlineConfig
    from fastdaa.online.types import Experience

_TOLERANCE = 2e-3
"""Relative, between the first steps' losses and gradient norms; fp32 sums in another order."""


class Minibatches(NamedTuple):
    """What every contender is given."""

    experience: Experience
    batches: list[Tensor]
    """Numbers of the sequences of each step, ``[s]`` int64."""
    lengths: list[tuple[int, int]]
    """Tokens of prompt and completion, by sequence."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags."""
    parser.add_argument("--data", metavar="FILE", help="real pairs; chosen answers are rollouts")
    parser.add_argument("--workload", default="short-chat", help="lengths where there is no file")
    parser.add_argument("--model", default="llama-13m", help="as in `fastdaa bench step`")
    parser.add_argument("--algorithm", default="apa", choices=("apa", "ppo", "awr"))
    parser.add_argument(
        "--against", nargs="+", default=["padded", "padded-sliced"],
        choices=("padded", "padded-sliced"), help="what packed is compared with; default: both",
    )  # fmt: skip
    parser.add_argument("--minibatch", type=int, default=8, help="rollouts a step; default: 8")
    parser.add_argument("--max_length", type=int, help="longest sequence; default: the workload's")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps each; default: 5")
    parser.add_argument("--budget", type=float, help="seconds after which no round begins")
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", metavar="FILE", help="append a line of JSON to this file")
    parser.add_argument("--least", type=float, metavar="X", help="fail if faster by less than X")


def run(options: argparse.Namespace) -> int:
    """0; 1 if contenders disagree or ``--least`` is missed; 130 after Ctrl-C."""
    import torch
    from rich.console import Console

    from fastdaa.benchmarks.measure import interleave
    from fastdaa.benchmarks.online_contenders import contenders, disagreement

    torch.set_num_threads(options.threads)
    console = Console()
    case, config = _case(options), _config(options)
    given = minibatches(case, options.rounds + 1, options.seed)
    steps = contenders(case, config, given.experience, given.batches, options.seed, options.against)
    # Also the warm-up.
    first = {name: step() for name, step in steps.items()}
    wrong = disagreement(first, _TOLERANCE)
    if wrong:
        console.print(f"wrong, so nothing is timed: {wrong}", highlight=False)
        return 1
    console.print(f"{_in_words(case, given)}; losses agree within {_TOLERANCE:g}", highlight=False)
    try:
        seconds = interleave(
            steps, "cpu", repeats=options.rounds, budget=options.budget, warmup=0,
            seed=options.seed,
            on_round=lambda done: print(f"round {done}", file=sys.stderr),
        )  # fmt: skip
    except KeyboardInterrupt:
        console.print("interrupted; a run this short starts anew")
        return 130
    row = _row(options, case, given, first, seconds)
    _print(console, row)
    if options.output:
        _append(Path(options.output), row)
    least = min(ratio["value"] for ratio in row["speedup"].values())
    if options.least and least < options.least:
        console.print(f"expected packed to be at least {options.least:g} times as fast")
        return 1
    return 0


def minibatches(case: Case, steps: int, seed: int) -> Minibatches:
    """Rollouts of the case's lengths, with log-probs and advantages drawn at random.

    Their values do not matter to the time, but for PPO's clipped tokens: those near the model's own
    log-probs are few, as in the first pass over rollouts.
    """
    import torch
    from datasets import load_from_disk

    from fastdaa.benchmarks.step.pairs import prepare
    from fastdaa.online.types import Experience, Rollouts

    # Half as many pairs would do if both answers were used: these are rollouts, one a prompt.
    count = case.batch * steps
    with tempfile.TemporaryDirectory(prefix="fastdaa-online-") as folder:
        prepare(case, folder, seed)
        rows = load_from_disk(f"{folder}/given").to_list()[:count]
    prompts = [torch.tensor(row["prompt_ids"]) for row in rows]
    completions = [torch.tensor(row["chosen_ids"]) for row in rows]
    lengths = [(len(p), len(c)) for p, c in zip(prompts, completions, strict=True)]
    tokens = sum(length for _, length in lengths)
    generator = torch.Generator().manual_seed(seed)
    noise, ref, values, advantages = torch.randn(4, tokens, generator=generator)
    at_random = -torch.log(torch.tensor(float(case.model.vocab)))
    scores = torch.zeros(count)
    rollouts = Rollouts(prompts, completions, torch.ones(count, dtype=torch.bool), scores, scores)
    experience = Experience(
        rollouts, at_random + 0.3 * noise, at_random + 0.3 * ref, 0.1 * values, advantages,
        advantages + 0.1 * values,
    )  # fmt: skip
    batches = list(torch.arange(count).split(case.batch))
    return Minibatches(experience, batches, lengths)


def padding_share(given: Minibatches) -> float:
    """Of the padded rectangles, mean over all tokens of all steps."""
    stored = rectangle = 0
    for batch in given.batches:
        lengths = [given.lengths[i] for i in batch.tolist()]
        width = max(p for p, _ in lengths) + max(c for _, c in lengths)
        stored += sum(p + c for p, c in lengths)
        rectangle += width * len(lengths)
    return 1 - stored / rectangle


def _case(options: argparse.Namespace) -> Case:
    import dataclasses

    from fastdaa.benchmarks.step import cases
    from fastdaa.validation import check_choice

    check_choice("--model", options.model, tuple(cases.MODELS))
    if options.data is None:
        check_choice("--workload", options.workload, tuple(cases.WORKLOADS))
        workload = cases.WORKLOADS[options.workload]
    else:
        workload = cases.Workload("data", max_length=1024, data=options.data)
    if options.max_length is not None:
        workload = dataclasses.replace(workload, max_length=options.max_length)
    return cases.Case(
        workload, cases.MODELS[options.model], batch=options.minibatch,
        steps=options.rounds + 1, warmup=1,
    )  # fmt: skip


def _config(options: argparse.Namespace) -> OnlineConfig:
    from fastdaa.online.config import OnlineConfig

    return OnlineConfig(
        output_dir=None, algorithm=options.algorithm, minibatch=options.minibatch,
        rollouts_per_iteration=max(128, options.minibatch), learning_rate=1e-6, kl_lambda=1.0,
    )  # fmt: skip


def _row(
    options: argparse.Namespace,
    case: Case,
    given: Minibatches,
    first: Mapping[str, Mapping[str, float]],
    seconds: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    import statistics

    from fastdaa.benchmarks.compare.ratio import ratio_of
    from fastdaa.benchmarks.machine import machine

    speedup = {}
    for name, times in seconds.items():
        if name != "packed":
            ratio = ratio_of([seconds["packed"]], [times])
            speedup[name] = {"value": ratio.value, "low": ratio.low, "high": ratio.high}
    return {
        "kind": "online_update",
        "case": f"{case.workload.name}/{case.model.name}/{options.algorithm}",
        "lengths": case.workload.distribution,
        "minibatch": case.batch,
        "padding_share": padding_share(given),
        "first_step": {name: dict(values) for name, values in first.items()},
        "median_seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "seconds": {name: list(times) for name, times in seconds.items()},
        "speedup": speedup,
        "threads": options.threads,
        "seed": options.seed,
        "machine": machine("cpu"),
    }


def _in_words(case: Case, given: Minibatches) -> str:
    import statistics

    prompts, completions = zip(*given.lengths, strict=True)
    return (
        f"{case.workload.name} on {case.model.name}, {case.batch} rollouts a step: prompt median "
        f"{statistics.median(prompts):.0f}, completion median {statistics.median(completions):.0f} "
        f"tokens, {padding_share(given):.0%} of the padded rectangles is padding"
    )


def _print(console: Any, row: Mapping[str, Any]) -> None:
    from rich.table import Table

    table = Table()
    for title in ("contender", "seconds a step", "packed is faster by", "99 % interval"):
        table.add_column(title, justify="left" if title == "contender" else "right")
    for name, seconds in row["median_seconds"].items():
        ratio = row["speedup"].get(name)
        cells = ["", ""]
        if ratio is not None:
            cells = [f"{ratio['value']:.2f} x", f"{ratio['low']:.2f} to {ratio['high']:.2f}"]
        table.add_row(name, f"{seconds:.3f}", *cells)
    console.print(table)


def _append(path: Path, row: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, (json.dumps(row) + "\n").encode())
    finally:
        os.close(descriptor)


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m fastdaa.benchmarks.online_update",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
