"""Which models can attend over the segments of a packed row: cheap checks, and a numerical one."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastdaa.data.collate import PairCollator
from fastdaa.data.fields import TOKEN_FIELDS
from fastdaa.train.attention import ATTENTION_NAME, enable_segments, placeholder_mask
from fastdaa.train.backbone import backbone_of
from fastdaa.train.eval_mode import in_eval_mode

_LAYER_KINDS = {"full_attention", "sliding_attention"}
_REGISTRY = "ALL_ATTENTION_FUNCTIONS"
# Relative error of the hidden states that rounding explains; a wrong mask is far above.
_TOLERANCES = {
    torch.float64: 1e-9,
    torch.float32: 1e-3,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}
# Prompt, chosen and rejected tokens of the two pairs of the numerical check.
_PROBE = ((6, 5, 4), (3, 2, 7))
_PROBE_WINDOW = 4


class Support(NamedTuple):
    """Whether a model can do something, and why (not)."""

    ok: bool
    reason: str


class LayoutCheck(NamedTuple):
    """Result of comparing a prefix-shared row with separate forwards."""

    ok: bool
    error: float
    """Largest relative error of a token's hidden state."""
    reason: str


def supports_segments(model: PreTrainedModel, probe: bool = False) -> Support:
    """Whether ``model`` can run the layouts ``packed`` and ``prefix_shared``, and why (not).

    Looks at the configuration and the classes. Some models pass these checks and still drop the
    segments on the way down; with ``probe``, ``check_layout`` then looks at the numbers.
    """
    support = _judge_by_code(model)
    if support.ok and probe:
        check = check_layout(model)
        return Support(check.ok, check.reason)
    return support


def _judge_by_code(model: PreTrainedModel) -> Support:
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder:
        return Support(False, "it is an encoder-decoder model")
    if getattr(model, "_is_stateful", False):
        return Support(False, "it is recurrent: its state runs on from one sequence to the next")
    other = sorted(set(getattr(config, "layer_types", None) or ()) - _LAYER_KINDS)
    if other:
        return Support(False, f"it has layers of the kind {', '.join(other)}")
    if not getattr(config, "is_causal", True) or getattr(
        config, "use_bidirectional_attention", False
    ):
        return Support(False, "its attention is not causal")
    adapters = getattr(model, "peft_config", None) or {}
    if any(
        getattr(adapters.get(name), "alora_invocation_tokens", None)
        for name in _active_adapters(model)
    ):
        return Support(False, "its adapter (aLoRA) starts at a place that it looks for once a row")
    if getattr(config, "alibi", False) or _is_true(getattr(config, "attn_config", None), "alibi"):
        return Support(False, "it has ALiBi position biases, which depend on the place in the row")
    try:
        backbone = backbone_of(model)
    except TypeError as error:
        return Support(False, str(error))
    sinks = [name for name, _ in backbone.named_parameters() if "sink" in name]
    if sinks:
        return Support(False, f"it has attention sinks ({sinks[0]})")
    return _uses_registry(backbone)


def check_layout(model: PreTrainedModel) -> LayoutCheck:
    """Run two tiny pairs in one prefix-shared row, and each sequence alone; compare.

    Takes five forwards of a few tokens without gradient, in eval mode, on the model's device; the
    weights have to be there. A model with sliding windows takes as many again with windows so
    short that they count: some put their window into the mask alone, which a packed row does not
    have. The model's attention, its windows and its mode are as before afterwards.
    """
    before = model.config._attn_implementation
    try:
        with in_eval_mode(model):
            error = _probe_error(model)
            if getattr(model.config.get_text_config(), "sliding_window", None) is not None:
                with _short_windows(model):
                    error = max(error, _probe_error(model))
    except ValueError as refusal:
        return LayoutCheck(False, float("inf"), str(refusal))
    finally:
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)
    tolerance = _TOLERANCES.get(model.dtype, _TOLERANCES[torch.bfloat16])
    if getattr(model, "is_loaded_in_8bit", False):
        # LLM.int8() rounds activations, by what is in the same batch.
        tolerance = max(tolerance, _TOLERANCES[torch.bfloat16])
    ok = error <= tolerance
    reason = f"hidden states differ by {error:.1e}, {'within' if ok else 'above'} {tolerance:.0e}"
    return LayoutCheck(ok, error, reason)


@torch.no_grad()
def _probe_error(model: PreTrainedModel) -> float:
    """Largest relative difference of a token's hidden state between the two ways."""
    vocabulary = model.config.get_text_config().vocab_size
    row, sequences = _probe_row(vocabulary, next(model.parameters()).device)
    before = enable_segments(model)
    shared = _hidden(model, **row)[0].double()
    model.set_attn_implementation("sdpa" if before == ATTENTION_NAME else before)
    errors = []
    for ids, places in sequences:
        alone = _hidden(model, input_ids=ids[None])[0].double()
        errors.append((shared[places] - alone).norm(dim=-1) / alone.norm(dim=-1).clamp_min(1e-12))
    return float(torch.cat(errors).max())


@contextlib.contextmanager
def _short_windows(model: PreTrainedModel) -> Iterator[None]:
    """The windows of the model, in its configuration and its layers, are ``_PROBE_WINDOW``."""
    holders: list[Any] = [model.config.get_text_config(), *model.modules()]
    windows = [(one, one.sliding_window) for one in holders if _has_window(one)]
    try:
        for holder, _ in windows:
            holder.sliding_window = _PROBE_WINDOW
        yield
    finally:
        for holder, window in windows:
            holder.sliding_window = window


def _has_window(holder: Any) -> bool:
    return isinstance(getattr(holder, "sliding_window", None), int)


def _active_adapters(model: nn.Module) -> set[str]:
    """Names of the adapters that are in force in any layer of PEFT's."""
    # Of transformers' models `active_adapters` is a method.
    of_layers = (getattr(module, "active_adapters", None) for module in model.modules())
    return {name for names in of_layers if isinstance(names, list) for name in names}


def _is_true(config: Any, name: str) -> bool:
    value = config.get(name) if isinstance(config, dict) else getattr(config, name, False)
    return bool(value)


def _uses_registry(backbone: nn.Module) -> Support:
    """Whether every attention layer asks transformers' registry, and is handed the segments."""
    modules = dict(backbone.named_modules())
    found = False
    for path, module in modules.items():
        name = type(module).__name__
        if not name.endswith("Attention"):
            continue
        asks = _asks_registry(module)
        if not asks and not any(_asks_registry(child) for child in module.modules()):
            return Support(False, f"{name} does not use transformers' attention registry")
        found |= asks
        parts = path.split(".")
        for depth in range(len(parts) + 1):
            above = modules[".".join(parts[:depth])]
            if not isinstance(above, nn.ModuleList) and not _takes_keywords(above):
                owner = type(above).__name__
                return Support(False, f"{owner} does not take keyword arguments for attention")
    if not found:
        return Support(False, "it has no attention layer that uses transformers' registry")
    return Support(True, "every attention layer uses transformers' attention registry")


def _takes_keywords(module: nn.Module) -> bool:
    parameters = inspect.signature(module.forward).parameters.values()
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def _asks_registry(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and _REGISTRY in code.co_names


def _hidden(model: PreTrainedModel, **inputs: Any) -> Tensor:
    return backbone_of(model)(**inputs, use_cache=False).last_hidden_state


def _probe_row(
    vocabulary: int, device: torch.device
) -> tuple[dict[str, Any], list[tuple[Tensor, Tensor]]]:
    """A prefix-shared row, and for each of its sequences the tokens and their places in the row."""
    ids = iter((torch.arange(sum(map(sum, _PROBE))) * 7919 + 13).remainder(vocabulary).tolist())
    pairs = [
        {
            "row_id": index,
            **{field: list(islice(ids, n)) for field, n in zip(TOKEN_FIELDS, lengths, strict=True)},
        }
        for index, lengths in enumerate(_PROBE)
    ]
    pack = PairCollator("prefix_shared")(pairs)["packs"][0]
    segments = pack["segments"]
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in segments.items()}
    row = {name: pack[name].to(device) for name in ("input_ids", "position_ids")}
    places = moved["kv_index"].split(segments["k_lens"])
    sequences = [(row["input_ids"][0, place], place) for place in places]
    row |= {"attention_mask": placeholder_mask(row["input_ids"]), "segments": moved}
    return row, sequences
