"""Adapters in folders and on the hub: which base models they belong to, loading and merging them.

transformers alone would put such an adapter inside its base model, where a second one takes its
place without a word.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdaa.counted import counted
from fastdaa.train.adapters import check_prompt_learning
from fastdaa.train.backbone import causal_lm
from fastdaa.train.quantization import compute_as_in_training, is_quantized, quantization_of

MERGED_BASE = "base_model"
"""Folder of a merged base, in the output folder of the run that trains an adapter on it."""

MERGED_RECORD = "fastdaa_merged.json"
"""File in it that says what was merged."""

_CONFIG, _WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
# Of a repository on the hub, which may also hold checkpoints or a whole model.
_PATTERNS = ("adapter_*", "*token*", "vocab*", "merges.txt", "*.model", "*.jinja")
_PROBE_TOKENS = 5


class Adapter(NamedTuple):
    """An adapter as PEFT saves it."""

    source: str
    """Folder or hub id."""
    base: str
    """Absolute folder or hub id of the model that it belongs to."""
    config: dict[str, Any]
    """The content of ``adapter_config.json``."""

    @property
    def base_options(self) -> dict[str, str]:
        """What ``from_pretrained`` of the base needs: its revision, where one is named."""
        revision = self.config.get("revision")
        return {"revision": revision} if revision and not Path(self.base).is_dir() else {}

    def __str__(self) -> str:
        kind = str(self.config.get("peft_type", "adapter"))
        rank = f" r={self.config['r']}" if "r" in self.config else ""
        return f"{kind}{rank} adapter {self.source} on {self.base}"


def find_adapter(source: str) -> Adapter | None:
    """The adapter in a folder or on the hub, with its base; None for a whole model.

    A base that is a relative path counts from the working directory, as for PEFT. One that a run
    has merged lies beside its adapter as ``base_model``, and is found there when the folder moves.

    Raises:
        FileNotFoundError: there is no such base.
        ValueError: the adapter is not whole, or names no base or an adapter as its base.
    """
    from transformers.utils import find_adapter_config_file

    folder = Path(source).expanduser()
    found = find_adapter_config_file(str(folder) if folder.is_dir() else source)
    if found is None:
        return None
    try:
        config = json.loads(Path(found).read_text(encoding="utf-8"))
        base = config.get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"expected {found} to be an adapter's configuration: {error}") from error
    if not base or not isinstance(base, str):
        raise ValueError(f"expected {found} to name base_model_name_or_path, got {base!r}")
    if not folder.is_dir():
        return Adapter(source, _find_base(base, Path(found).parent, source), config)
    _check_weights(folder)
    return Adapter(str(folder.absolute()), _find_base(base, folder, source), config)


def tokenizer_source(source: str) -> str:
    """Where the tokenizer of a model is: the base's, for an adapter that has none of its own."""
    adapter = find_adapter(source)
    if adapter is None:
        return str(Path(source).expanduser()) if Path(source).expanduser().is_dir() else source
    folder = _local(adapter)
    return str(folder) if (folder / "tokenizer_config.json").is_file() else adapter.base


def load_causal_lm(source: str, *, trainable: bool = True, **options: Any) -> Any:
    """A causal language model; of an adapter its base with it, as a ``peft.PeftModel``.

    Args:
        source: folder or hub id of a whole model or an adapter.
        trainable: an adapter can be trained further.
        options: passed on to ``from_pretrained`` of the whole model.

    Raises:
        OSError, ValueError: there is none, or it cannot be read or does not fit its base.
        ImportError: an adapter, and PEFT is not installed.
    """
    from transformers import AutoModelForCausalLM

    adapter = find_adapter(source)
    if adapter is None:
        folder = Path(source).expanduser()
        # Adapters that are trained on it note the path, and may be loaded from anywhere.
        whole = str(folder.absolute()) if folder.is_dir() else source
        model = AutoModelForCausalLM.from_pretrained(whole, **options)
        compute_as_in_training(model)
        return model
    return load_adapter(adapter, AutoModelForCausalLM, trainable=trainable, **options)


def load_adapter(adapter: Adapter, kind: Any, *, trainable: bool = False, **options: Any) -> Any:
    """The base of an adapter with it, as a ``peft.PeftModel``.

    Args:
        adapter: what is loaded.
        kind: auto class of the base: ``AutoModelForCausalLM``, or that for sequence classification.
        trainable: it can be trained further.
        options: passed on to ``from_pretrained`` of the base.

    Raises:
        OSError, ValueError: base or adapter cannot be read or do not fit together.
        ImportError: PEFT is not installed.
    """
    peft = _import_peft(adapter.source)
    wanted = "CAUSAL_LM" if kind.__name__ == "AutoModelForCausalLM" else "SEQ_CLS"
    task = adapter.config.get("task_type")
    if task not in (wanted, None):
        raise ValueError(f"expected an adapter for {wanted}, got one for {task} ({adapter.source})")
    if task is None and wanted == "SEQ_CLS":
        raise ValueError(f"expected an adapter for SEQ_CLS, {adapter.source} names no task_type")
    folder = str(_local(adapter))
    config = peft.PeftConfig.from_pretrained(folder)
    check_prompt_learning(config)
    try:
        model = kind.from_pretrained(adapter.base, **{**options, **adapter.base_options})
    except (OSError, ValueError) as error:
        raise type(error)(
            f"expected the base model {adapter.base} of the adapter {adapter.source}: {error}"
        ) from error
    compute_as_in_training(model)
    try:
        adapted = peft.PeftModel.from_pretrained(model, folder, is_trainable=trainable)
        # Again, for what it returns: tensors that have no place would be left out in silence.
        report = adapted.load_adapter(folder, adapted.active_adapter, is_trainable=trainable)
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(
            f"expected the adapter {adapter.source} to fit its base model {adapter.base}: {error}"
        ) from error
    wrong = [*report.missing_keys, *report.unexpected_keys]
    if wrong:
        raise ValueError(
            f"expected the adapter {adapter.source} to fit its base model {adapter.base}, but "
            f"only one of them has {counted(len(wrong), 'tensor')}, such as {wrong[0]}"
        )
    # What is saved notes where the base was found.
    adapted.peft_config[adapted.active_adapter].base_model_name_or_path = adapter.base
    return adapted


def load_merged(adapter: Adapter, kind: Any, **options: Any) -> Any:
    """The base of an adapter with the adapter's changes in its own weights.

    Args:
        adapter: what is loaded.
        kind: auto class of the base, see :func:`load_adapter`.
        options: passed on to ``from_pretrained`` of the base.

    Raises:
        OSError, ValueError: see :func:`load_adapter`; or merging would make another model.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = load_adapter(adapter, kind, **options).eval()
    core: Any = causal_lm(model)
    if is_quantized(core):
        raise ValueError(
            f"expected an adapter that can be merged, the base {adapter.base} of {adapter.source} "
            f"is quantised ({quantization_of(core)}), and merging would round its weights anew; "
            f"name the unquantised base in its {_CONFIG}"
        )
    ends = (core.get_input_embeddings(), core.get_output_embeddings())
    tied = getattr(core.config.get_text_config(), "tie_word_embeddings", False)
    if tied and any(isinstance(end, BaseTunerLayer) for end in ends):
        raise ValueError(
            f"expected an adapter that can be merged, {adapter.source} changes one of two tied "
            "embeddings, and merging would change both; it can only be trained further as it is"
        )
    before = _probe(model)
    merged = model.merge_and_unload().requires_grad_(True)
    # Older releases of PEFT leave it there.
    vars(merged).pop("peft_config", None)
    error = float((_probe(merged) - before).abs().amax() / before.abs().amax().clamp(min=1.0))
    tolerance = 1e-3 if merged.dtype == torch.float32 else 5e-2
    if not error <= tolerance:
        raise ValueError(
            f"expected the merged adapter {adapter.source} to give the same logits as before, but "
            f"they differ by {error:.1e} of the largest one"
        )
    return merged


def adapter_digest(adapter: Adapter) -> str:
    """A digest of all weights of an adapter, by which it is recognised when it has moved."""
    weights = _import_peft(adapter.source).load_peft_weights(str(_local(adapter)), device="cpu")
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _local(adapter: Adapter) -> Path:
    """The folder of an adapter; one on the hub is downloaded, with its tokenizer."""
    folder = Path(adapter.source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(adapter.source, allow_patterns=list(_PATTERNS)))
        _check_weights(folder)
    return folder


def _check_weights(folder: Path) -> None:
    if not any((folder / name).is_file() for name in _WEIGHTS):
        raise ValueError(f"expected {_WEIGHTS[0]} beside {folder / _CONFIG}, there is none")


def _find_base(base: str, folder: Path, source: str) -> str:
    """The base of an adapter: an absolute path, or a hub id."""
    path = Path(base).expanduser()
    if path.name == MERGED_BASE:
        path = _find_merged(path, folder, source)
    if path.is_dir():
        if (path / _CONFIG).is_file():
            raise ValueError(
                f"expected the base model of the adapter {source} to be a whole model, got the "
                f"adapter {path}"
            )
        return str(path.absolute())
    if path.is_absolute() or base.startswith((".", "~")) or base.count("/") > 1:
        where = "" if path.is_absolute() else f", which counts from {Path.cwd()}"
        raise FileNotFoundError(
            f"expected the base model of the adapter {source} at {base}{where}; there is none. "
            f"Write its place into base_model_name_or_path of {folder / _CONFIG}"
        )
    return base


def _find_merged(path: Path, folder: Path, source: str) -> Path:
    """The merged base beside an adapter or one of its checkpoints, if there is one; else ``path``.

    Another run may have taken the name that its folder had.
    """
    places = [place / MERGED_BASE for place in (folder, folder.absolute().parent)]
    near = next((place for place in places if (place / MERGED_RECORD).is_file()), None)
    if near is None:
        return path
    records = [merged_record(place) for place in (near, path) if place.is_dir()]
    if any(record != records[0] for record in records):
        raise ValueError(
            f"expected one base model of the adapter {source}, got {path}, which its "
            f"configuration names, and {near}, which is beside it and of another run; write the "
            f"right one into base_model_name_or_path of {folder / _CONFIG}, or move the other away"
        )
    return near


def merged_record(folder: Path) -> dict[str, str] | None:
    """What was merged into a base that a run has left; None for any other model."""
    try:
        read = json.loads((folder / MERGED_RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return read if isinstance(read, dict) else None


def _import_peft(source: str) -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            f"{source} is an adapter: expected peft; pip install 'fastdaa[peft]'"
        ) from error
    return peft


@torch.no_grad()
def _probe(model: nn.Module) -> Tensor:
    """Output for a few tokens, fp32."""
    core: Any = causal_lm(model)
    rows = core.get_input_embeddings().weight.shape[0]
    tokens = torch.arange(1, _PROBE_TOKENS + 1, device=core.device)[None] % rows
    return core(input_ids=tokens, use_cache=False).logits.float()
