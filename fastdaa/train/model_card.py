"""``README.md`` of a trained model: what it is, how it was made, how it did."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from fastdaa import __version__
from fastdaa.losses.objective import Objective
from fastdaa.losses.weights import LD_DPO, WPO
from fastdaa.train.best_model import BestModel
from fastdaa.train.shown import shown_text

_ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PACKAGES = ("torch", "transformers", "accelerate", "datasets")
_SHOWN = (
    ("loss", "loss"),
    ("rewards/accuracies", "accuracy"),
    ("rewards/margins", "reward margin"),
    ("rewards/chosen", "reward of chosen"),
    ("rewards/rejected", "reward of rejected"),
    ("kl", "KL baseline z0 (nats)"),
    ("delta", "reward shift delta"),
    ("kl/token", "KL to the reference per token (nats)"),
    ("displacement/chosen", "log-ratio of chosen (nats)"),
    ("displacement/fraction", "share of pairs with a less likely chosen completion"),
    ("weights/mean", "mean weight of a pair"),
)
_SETTINGS = (
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "lr_scheduler_type",
    "weight_decay",
    "max_length",
    "truncation_mode",
    "seed",
    "bf16",
    "fp16",
)


def write_model_card(output_dir: str | Path, **facts: Any) -> Path:
    """Writes :func:`model_card` to ``<output_dir>/README.md``, and returns that path."""
    path = Path(output_dir) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(model_card(**facts), encoding="utf-8")
    return path


def model_card(
    objective: Objective,
    *,
    name: str,
    rows: Sequence[Mapping[str, Any]] = (),
    base_model: str | None = None,
    dataset: str | Sequence[str] | None = None,
    data_kind: str = "preference pairs",
    reference: str | None = None,
    dtype: str | None = None,
    adapter: str | None = None,
    quantization: str | None = None,
    layout: str | None = None,
    settings: Mapping[str, Any] | None = None,
    peft: bool = False,
    best: BestModel | None = None,
) -> str:
    """The text of a model card, with front matter that the hub understands.

    Args:
        objective: what was minimised.
        name: title of the model.
        rows: logged rows; the last value of each metric is shown.
        base_model: hub id or path that training started from.
        dataset: hub id or path of the pairs, or several of a mixture.
        data_kind: what the data are.
        reference: hub id or path of the reference model; empty where that is the starting point,
            None without one.
        dtype: of the weights.
        adapter: what kind of adapter the model is, such as ``LoRA of rank 8``.
        quantization: of the base under the adapter, None for a base as it is.
        layout: the batch layout that was used.
        settings: fields of the configuration, by name; the usual ones are shown.
        peft: the model is an adapter.
        best: the checkpoint that it is, where that was chosen; ``rows`` end there.
    """
    datasets = [dataset] if isinstance(dataset, str) else list(dataset or ())
    facts = {"weights": dtype, "base": quantization, "adapter": adapter}
    if reference is not None:
        facts["reference"] = _link(reference) if reference else "the model that training began with"
    losses = list(dict.fromkeys(term.loss.name for term in objective.terms))
    sections = [
        _front_matter(name, losses, base_model, datasets, peft),
        f"# {name}\n",
        _opening(base_model, datasets, data_kind),
        f"## Objective\n\n`{objective}`\n\n{_papers(objective)}",
        _results(rows, best),
        _training({**facts, "layout": layout}, settings or {}),
        _versions((*_PACKAGES, "peft") if peft else _PACKAGES),
        _citation(),
    ]
    return "\n".join(section for section in sections if section)


def _front_matter(
    name: str, losses: list[str], base_model: str | None, datasets: Sequence[str], peft: bool
) -> str:
    from huggingface_hub import ModelCardData

    # The hub refuses local paths here.
    data = ModelCardData(
        model_name=name,
        base_model=base_model if _is_hub_id(base_model) else None,
        datasets=[dataset for dataset in datasets if _is_hub_id(dataset)] or None,
        library_name="peft" if peft else "transformers",
        pipeline_tag="text-generation",
        tags=["fastdaa", "preference-optimization", *losses],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _opening(base_model: str | None, datasets: Sequence[str], data_kind: str) -> str:
    base = f" from {_link(base_model)}" if base_model else ""
    sources = ", ".join(_link(dataset, "datasets/") for dataset in datasets)
    pairs = f" on the {data_kind} of {sources}" if sources else ""
    return f"Trained with fastdaa {__version__}{base}{pairs}.\n"


def _papers(objective: Objective) -> str:
    parts = [(term.loss.name, term.loss.summary, term.loss.paper) for term in objective.terms]
    if objective.ld_alpha is not None:
        parts.append(("ld_alpha", "less weight on what only the longer completion has", LD_DPO))
    if objective.use_weighting:
        parts.append(("use_weighting", "pairs weighted by their probability", WPO))
    lines = []
    for name, summary, paper in dict.fromkeys(parts):
        linked = _ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", paper)
        lines.append(f"- {name}: {summary}. {linked}")
    return "\n".join(lines) + "\n"


def _results(rows: Sequence[Mapping[str, Any]], best: BestModel | None) -> str:
    last: dict[str, float] = {}
    for row in rows:
        last |= {key: value for key, value in row.items() if isinstance(value, int | float)}
    sides = {
        side: prefix
        for side, prefix in (("training", ""), ("evaluation", "eval_"))
        if any(prefix + key in last for key, _ in _SHOWN)
    }
    if not sides:
        return ""
    lines = []
    for key, title in _SHOWN:
        values = [last.get(prefix + key) for prefix in sides.values()]
        if any(value is not None for value in values):
            cells = ("" if value is None else shown_text(key, value) for value in values)
            lines.append(f"| {' | '.join([title, *cells])} |")
    chosen, what = "", "last value of"
    if best is not None:
        chosen, what = f"The model is the checkpoint of {best}.\n\n", f"at step {best.step}"
    head = f"| {' | '.join([what, *sides])} |\n|{'---|' * (1 + len(sides))}\n"
    return f"## Results\n\n{chosen}{head}" + "\n".join(lines) + "\n"


def _training(facts: Mapping[str, str | None], settings: Mapping[str, Any]) -> str:
    lines = [f"- {name}: {value}" for name, value in facts.items() if value]
    lines += [f"- {name}: {settings[name]}" for name in _SETTINGS if name in settings]
    return "## Training\n\n" + "\n".join(lines) + "\n" if lines else ""


def _versions(packages: Sequence[str]) -> str:
    lines = [f"- fastdaa {__version__}", f"- Python {platform.python_version()}"]
    for package in packages:
        try:
            lines.append(f"- {package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return "## Versions\n\n" + "\n".join(lines) + "\n"


def _citation() -> str:
    return (
        "## Citation\n\n```bibtex\n@software{fastdaa,\n"
        "  title = {fastdaa: fused preference training without logits},\n"
        "  author = {{The fastdaa contributors}},\n"
        f"  version = {{{__version__}}},\n  license = {{Apache-2.0}}\n}}\n```\n"
    )


def _is_hub_id(source: str | None) -> bool:
    return bool(source and _HUB_ID.fullmatch(source) and not Path(source).exists())


def _link(source: str, room: str = "") -> str:
    if _is_hub_id(source):
        return f"[{source}](https://huggingface.co/{room}{source})"
    # Only the last part: a local path says something about somebody's machine.
    return f"`{Path(source).name or source}`"
