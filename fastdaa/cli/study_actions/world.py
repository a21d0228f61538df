"""``fastdaa study world``: the small world, its reference, and over-optimisation in closed form.

Shows the language, the gold reward and the fine-tuned reference of a preset and a seed, then trains
reward models on preference pairs and follows them, exactly, by exponential tilting and best-of-n
(tilt.jsonl, which `fastdaa study fit` reads). Curves that are there already are kept.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import TYPE_CHECKING

from fastdaa.cli.runs import INTERRUPTED
from fastdaa.cli.study_actions.output_folder import add_output_dir

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from fastdaa.study.sft import Reference
    from fastdaa.study.world import World

HELP = "show the small world; exact tilting and best-of-n of a reward model (tilt.jsonl)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the action."""
    add_output_dir(parser)
    parser.add_argument(
        "--preset",
        help="world: H (harsh) or M (mild), and curves of that one alone; default: H is shown, and "
        "curves are those of every world",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the world; default: 0")
    parser.add_argument("--size", default="d32", help="model size: d12, d32 or d64; default: d32")
    parser.add_argument(
        "--no_curves", action="store_true", help="only show the world and its reference"
    )


def run(options: argparse.Namespace) -> int:
    """0; 130 after Ctrl-C."""
    import torch
    from rich.console import Console

    from fastdaa.study.tilt import TILT_FILE, presets, run_tilt
    from fastdaa.writable import check_writable

    # Matrices this small are slower with more threads.
    torch.set_num_threads(1)
    check_writable(options.output_dir)
    console = Console()
    shown = options.preset or "H"
    wanted = [preset for preset in presets() if options.preset in (None, preset.name)]
    try:
        show(console, shown, options.seed, options.size, f"{options.output_dir}/world")
        if options.no_curves:
            return 0
        console.print("\nOver-optimisation of reward models, in closed form", style="bold")
        run_tilt(
            options.output_dir,
            [options.seed],
            lambda text: console.print(f"  {text}", highlight=False, soft_wrap=True),
            size=options.size,
            settings=wanted,
        )
        console.print(f"{options.output_dir}/{TILT_FILE}", highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        command = shlex.join(["fastdaa", *sys.argv[1:]])
        print(f"\nInterrupted. Finished curves are kept. To continue:\n  {command}")
        return INTERRUPTED
    return 0


def show(console: Console, preset: str, seed: int, size: str, references: str) -> None:
    """Prints a world and its reference, which is made if ``references`` does not have it."""
    from fastdaa.study.measures import measure
    from fastdaa.study.sft import excess_loss, make_reference
    from fastdaa.study.world import make_world

    world = make_world(preset, seed)
    language = world.language
    console.print(
        f"World {preset}, seed {seed}: {language.prompts} prompts, {language.tokens} tokens in "
        f"{language.classes} classes, {language.responses:,} responses a prompt",
        highlight=False,
    )
    console.print(_weights(world))
    with console.status(f"fine-tuning the reference ({size})"):
        reference = make_reference(world, size, seed, references)
    console.print(_responses(world, reference))
    measures = measure(world, reference.logps, reference.logps, reference.gold)
    console.print(
        f"Reference: entropy {measures.entropy:.3f} nats, length {measures.length:.2f} tokens, "
        f"{measures.violations:.3f} violations a response; its loss exceeds the source's entropy "
        f"by {excess_loss(world, reference.logps):.4f} nats a token",
        highlight=False,
    )


def _weights(world: World) -> Table:
    from rich.table import Table

    language = world.language
    table = Table(title="Gold reward of each token, unscaled")
    table.add_column("prompt", justify="right")
    for token in range(language.tokens):
        table.add_column(token_name(world, token), justify="right")
    for prompt, row in enumerate(world.weights.tolist()):
        table.add_row(str(prompt), *(f"{value:+.2f}" for value in row))
    return table


def _responses(world: World, reference: Reference) -> Table:
    from rich.table import Table

    table = Table(title="Responses to prompt 0")
    for name in ("", "response", "gold", "probability"):
        table.add_column(name, justify="left" if name in ("", "response") else "right")
    gold, logps = reference.gold[0], reference.logps[0]
    kinds = (("likeliest", logps), ("best", gold), ("worst", -gold))
    for kind, values in kinds:
        for rank, number in enumerate(values.topk(3).indices.tolist()):
            table.add_row(
                "" if rank else kind,
                response_name(world, number),
                f"{float(gold[number]):+.2f}",
                f"{float(logps[number].exp()):.2g}",
            )
    return table


def token_name(world: World, token: int) -> str:
    """``A1`` to ``B3``: class and number of a token."""
    kind, number = divmod(token, world.language.class_size)
    return f"{chr(ord('A') + kind)}{number + 1}"


def response_name(world: World, number: int) -> str:
    """The names of its tokens; ``(empty)`` where there are none."""
    tokens = [token for token in world.language.table[number].tolist() if token >= 0]
    return " ".join(token_name(world, token) for token in tokens) or "(empty)"
