"""The whole training step against TRL's DPOTrainer: same model, same pairs, same order.

    python -m fastdaa.benchmarks.step_vs_trl --data pairs.jsonl.gz --steps 12 --threads 2
    python -m fastdaa.benchmarks.step_vs_trl --device cuda --hidden 2048 --layers 16 --vocab 128256

Every contender is a process of its own that runs the ordinary ``trainer.train()``. A callback holds
it at the end of each step until the parent lets it go on, so the steps of all contenders alternate
and meet the same machine. A step is everything from one optimizer step to the next: data, reference
forward, policy forward and backward, clipping, optimizer, metrics.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import multiprocessing
import statistics
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fastdaa.benchmarks.machine import machine
from fastdaa.benchmarks.step_data import prepare
from fastdaa.benchmarks.step_worker import CONTENDERS, LOSSES, work

DEFAULT = ("trl", "trl, sorted", "fastdaa", "fastdaa, sorted")


def main(argv: list[str] | None = None) -> int:
    """Run the contenders and print one table; ``--output`` adds JSON lines."""
    args = _parse(argv)
    rows = run(args)
    _print_table(rows, args)
    if args.output:
        with Path(args.output).open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="preference pairs, JSONL or JSONL.gz (default: generated)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: in bf16")
    parser.add_argument("--steps", type=int, default=10, help="timed steps (default: 10)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them (default: 2)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    parser.add_argument("--batch", type=int, default=8, help="pairs of a batch (default: 8)")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=16000, help="vocabulary of the model")
    parser.add_argument("--loss", choices=LOSSES, default="sigmoid")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(DEFAULT))
    parser.add_argument("--output", help="JSON lines file to append to")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a contender, with every loss and every step time."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        prepare(args, folder)
        workers: dict[str, tuple[Any, Connection]] = {}
        for name in args.contenders:
            ours, theirs = context.Pipe()
            process = context.Process(
                target=work, args=(name, vars(args), folder, theirs), daemon=True
            )
            process.start()
            workers[name] = (process, ours)
            _receive(name, process, ours)  # one at a time: building models is noise, too
        empty: dict[str, list[float]] = {"seconds": [], "losses": [], "cpu_seconds": []}
        rows: dict[str, Any] = {name: copy.deepcopy(empty) for name in workers}
        try:
            for step in range(args.warmup + args.steps):
                for name, (process, pipe) in workers.items():
                    pipe.send("go")
                    _note(rows[name], _receive(name, process, pipe), timed=step >= args.warmup)
                print(f"step {step + 1} of {args.warmup + args.steps}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            print("interrupted: what is finished is reported", file=sys.stderr)
        for process, pipe in workers.values():
            with contextlib.suppress(BrokenPipeError):
                pipe.send("stop")
            process.join()
    rows = {name: values for name, values in rows.items() if values["seconds"]}
    return [_row(name, values, args) for name, values in rows.items()]


def _note(row: dict[str, Any], report: dict[str, float], *, timed: bool) -> None:
    row["losses"].append(report["loss"])
    row["peak_mib"] = report["peak_mib"]
    if timed:
        row["seconds"].append(report["seconds"])
        row["cpu_seconds"].append(report["cpu_seconds"])


def _receive(name: str, process: Any, pipe: Connection) -> Any:
    """What a worker says; its death is an error, not a wait without end."""
    while not pipe.poll(1.0):
        if not process.is_alive():
            raise RuntimeError(f"{name}: expected a step, but the process ended")
    return pipe.recv()


def _row(name: str, values: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    median = statistics.median(values["seconds"])
    return {
        "contender": name,
        "case": {k: v for k, v in vars(args).items() if k not in ("output", "contenders", "data")},
        "median_seconds": median,
        "pairs_per_second": args.batch / median,
        **values,
        "machine": machine(args.device),
    }


def _print_table(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    kind = "CUDA, bf16" if args.device == "cuda" else f"{args.threads} threads, fp32"
    title = f"batches of {args.batch} pairs, {kind}, loss {args.loss}"
    table = Table(title=f"Whole training step, median of up to {args.steps}: {title}")
    columns = ("contender", "s / step", "CPU s", "pairs / s", "peak MiB")
    baselines = [row for row in rows if row["contender"].startswith("trl")]
    for column in (*columns, *(f"x {row['contender']}" for row in baselines)):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for row in rows:
        ratios = (f"{b['median_seconds'] / row['median_seconds']:.2f}" for b in baselines)
        table.add_row(
            row["contender"], f"{row['median_seconds']:.2f}",
            f"{statistics.median(row['cpu_seconds']):.2f}", f"{row['pairs_per_second']:.2f}",
            f"{row['peak_mib']:.0f}", *ratios,
        )  # fmt: skip
    console = Console(width=max(Console().width, 120))
    console.print(table)
    console.print("Losses of the first five steps; equal batches have to agree:")
    for row in rows:
        losses = "  ".join(f"{loss:.6f}" for loss in row["losses"][:5])
        console.print(f"  {row['contender']:<30} {losses}", highlight=False)


if __name__ == "__main__":
    raise SystemExit(main())
