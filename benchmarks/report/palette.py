"""Colours of pictures and page. A picture is drawn once, in the light ones; the page swaps them."""

from __future__ import annotations

# name: (on a light page, on a dark one). All light ones differ, so they can be found again.
COLOURS = {
    "ink": ("#1f2933", "#e6e9ed"),
    "muted": ("#5f6b7a", "#9aa5b4"),
    "grid": ("#dfe3e8", "#343c48"),
    "paper": ("#ffffff", "#14181f"),
    "panel": ("#f6f7f9", "#1c222b"),
    "fastdaa": ("#0b7a75", "#35c4b5"),
    "pytorch": ("#6b7b93", "#93a4bd"),
    "trl": ("#b4660a", "#f0a23c"),
    "liger": ("#7a4fc4", "#b095ee"),
    "cce": ("#b83275", "#ee7fb5"),
    "quack": ("#2860c4", "#78a6f5"),
    "floor": ("#a3abb8", "#5e6978"),
    "wrong": ("#c8232c", "#ff7b7b"),
    "good": ("#1b7f3b", "#5fd087"),
}


def light(name: str) -> str:
    """The colour on a light page; families of contenders are names, too."""
    return COLOURS.get(name, COLOURS["pytorch"])[0]


def themed(svg: str) -> str:
    """A drawing whose colours follow the page's theme."""
    for name, (colour, _) in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def style_sheet() -> str:
    """The colours as CSS variables, for both themes."""
    day, night = (
        "".join(f"--{name}:{pair[place]};" for name, pair in COLOURS.items()) for place in (0, 1)
    )
    return (
        f":root{{color-scheme:light dark;{day}}}"
        f"@media (prefers-color-scheme: dark){{:root:not([data-theme=light]){{{night}}}}}"
        f":root[data-theme=dark]{{{night}}}"
    )
