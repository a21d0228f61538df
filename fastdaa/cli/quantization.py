"""Whether ``--load_in_4bit`` and its like can be followed: asked before anything is loaded."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fastdaa.cli.missing_package import how_to_install
from fastdaa.train.quantization import QuantizationOptions, stored_quantization

if TYPE_CHECKING:
    from fastdaa.cli.arguments import ModelArguments


def check_quantized(arguments: ModelArguments) -> None:
    """Compares the options with what the models hold, of which only configurations are read.

    Raises:
        ImportError: bitsandbytes is missing.
        ValueError: a quantised base without LoRA, one that is to be quantised twice, or one that an
            adapter would have to be merged into.
    """
    asked = arguments.quantizes if isinstance(arguments, QuantizationOptions) else None
    for name in ("model", "ref_model"):
        source = getattr(arguments, name, None)
        if source is not None:
            _check_model(name, source, arguments, asked)
    if asked is not None and find_spec("bitsandbytes") is None:
        raise ImportError(f"{asked}: {how_to_install('bitsandbytes')}")


def _check_model(name: str, source: str, arguments: ModelArguments, asked: str | None) -> None:
    from fastdaa.cli.building import model_revision
    from fastdaa.cli.paths import adapter_of

    adapter = adapter_of(name, source)
    folder = Path(source).expanduser()
    whole = str(folder) if folder.is_dir() else source
    base = whole if adapter is None else adapter.base
    revision = model_revision(arguments, name) if adapter is None else adapter.base_options
    stored = stored_quantization(base, **revision)
    if asked is not None and stored is not None:
        raise ValueError(
            f"{asked}: expected a model that is not quantised yet, {base} is ({stored}); leave the "
            "option out"
        )
    if stored is not None and stored.startswith("bitsandbytes") and not find_spec("bitsandbytes"):
        needed = how_to_install("bitsandbytes")
        raise ImportError(f"{name}: {base} is quantised ({stored}): {needed}")
    if name != "model" or (asked or stored) is None:
        return
    new = getattr(arguments, "use_peft", False)
    continues = getattr(arguments, "continues_adapters", False)
    if adapter is not None and stored is not None and (new or not continues):
        hint = "; leave --use_peft out to train it further" if continues else ""
        raise ValueError(
            f"{name}: expected an adapter that can be merged, the base {base} of {source} is "
            f"quantised ({stored}){hint}"
        )
    if not new and (adapter is None or not continues):
        what = asked or f"{name}: {base} is quantised ({stored})"
        raise ValueError(
            f"{what}: expected LoRA, since weights of a few bits cannot be trained themselves; add "
            "--use_peft, or train a model that is not quantised"
        )
