"""What the demo shows at its end: a table of the policies, and answers before and after."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

Row = Mapping[str, Any]
COLUMNS = (
    ("gold", "gold\nscore", "{:.3f}"),
    ("good", "good\nanswers", "{:.0%}"),
    ("win_rate", "wins\nvs SFT", "{:.0%}"),
    ("kl", "KL\n(nats)", "{:.2f}"),
    ("reward_accuracy", "reward\naccuracy", "{:.0%}"),
    ("length", "answer\n(tokens)", "{:.1f}"),
    ("seconds", "train\n(s)", "{:.0f}"),
)
"""Keys of a policy's results, how the table heads them, and how it prints them."""
LEGEND = (
    "Answers are sampled at temperature 1, to held-out questions. Gold score: 0.5 correct + 0.25 "
    "tone + 0.25 brevity; good: full score. Wins: better than the SFT model's answer, ties half. "
    "KL to the SFT model: per answer. Reward accuracy: held-out pairs whose better answer has the "
    "higher implicit reward."
)


def results_table(policies: Sequence[Row], environment: Mapping[str, str]) -> Table:
    """One row a policy, the SFT model first.

    Args:
        policies: each with ``name`` and any of the keys of ``COLUMNS``; a missing value is a dash.
        environment: what it ran on, see :func:`describe_environment`.
    """
    from rich import box
    from rich.table import Table

    where = ", ".join(f"{name} {value}" for name, value in environment.items())
    table = Table(
        title="One SFT model, aligned in several ways",
        caption=f"{LEGEND}\n{where}",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("\npolicy", no_wrap=True)
    for _, heading, _ in COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    best = max((policy.get("gold") or 0.0 for policy in policies), default=0.0)
    for policy in policies:
        cells = [_cell(policy.get(key), form) for key, _, form in COLUMNS]
        style = "bold" if policy.get("gold") == best else ""
        table.add_row(str(policy["name"]), *cells, style=style)
    return table


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)  # noqa: RUF001


def examples(
    prompts: Sequence[str],
    before: Mapping[str, Sequence[Any]],
    after: Mapping[str, Sequence[Any]],
    name: str,
    count: int = 2,
) -> RenderableType:
    """Answers of the SFT model and of an aligned one to the questions with the most to gain.

    Args:
        prompts, before, after: the questions, and ``answers`` and ``scores`` of both models to
            them, as :func:`fastdaa.demo.evaluation.evaluate` returns them.
        name: of the aligned policy.
    """
    from rich.table import Table
    from rich.text import Text

    gains = [new - old for old, new in zip(before["scores"], after["scores"], strict=True)]
    ranked = sorted(range(len(prompts)), key=lambda i: (-gains[i], i))
    table = Table.grid(padding=(0, 2))
    for index in ranked[:count]:
        table.add_row("", Text(prompts[index], style="bold"))
        for who, model, style in (("SFT", before, "red"), (name, after, "green")):
            score = model["scores"][index]
            table.add_row(Text(f"{who}, gold {score:.2f}", style=style), model["answers"][index])
        table.add_row()
    return table


def over_optimisation(best: Row, last: Row) -> str:
    """A sentence on a policy that ranks pairs well and answers badly; empty if it does not."""
    if last["gold"] > best["gold"] - 0.02:
        return ""
    return (
        f"Over-optimisation: {last['name']} moved {last['kl']:.1f} nats away from the SFT model. "
        f"It still ranks {last['reward_accuracy']:.0%} of the held-out pairs right, but its "
        f"answers score {last['gold']:.3f}. {best['name']} moved {best['kl']:.1f} nats and scores "
        f"{best['gold']:.3f}."
    )


def describe_environment() -> dict[str, str]:
    """Device, threads and versions, as the table's last line shows them."""
    import torch

    from fastdaa import __version__

    return {
        "device": "cpu",
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
        "fastdaa": __version__,
        **{name: version(name) for name in ("torch", "transformers")},
        "Python": platform.python_version(),
    }


def write_table(path: Path, table: Table) -> None:
    """Writes a table as plain text, 80 columns wide."""
    from rich.console import Console

    with path.open("w", encoding="utf-8") as file:
        Console(file=file, width=80, color_system=None).print(table)
