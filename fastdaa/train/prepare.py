"""What the trainer sets up before the first step: model, layout, datasets, reference model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastdaa.data import PairRows, tokenize_pairs
from fastdaa.data.collate import TOKEN_FIELDS
from fastdaa.head import LmHead
from fastdaa.train.attention import enable_segments
from fastdaa.train.backbone import backbone_of, causal_lm, install_head_task
from fastdaa.train.support import Support, supports_segments

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fastdaa.train.config import PreferenceConfig

logger = logging.getLogger(__name__)
_PROBE_TOKENS = 5


def load_model(model: str | nn.Module, dtype: str = "float32") -> nn.Module:
    """A causal LM from a path or hub id (in ``dtype``), or the model as it is.

    Raises:
        TypeError: neither a name nor a module.
    """
    if isinstance(model, nn.Module):
        return model
    if not isinstance(model, str):
        raise TypeError(f"model: expected a path, hub id or torch module, got {type(model)}")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype)


def prepare_model(model: nn.Module, layout: str, *, disable_dropout: bool) -> None:
    """Teach a policy or reference the head task, the layout's attention, and no dropout."""
    install_head_task(model)
    if layout != "padded":
        enable_segments(causal_lm(model))
    if disable_dropout:
        _disable_dropout(model)


def _disable_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    config: Any = causal_lm(model).config.get_text_config()
    # Attention reads its dropout from a number, not from a module.
    for module in model.modules():
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]
    for name in ("attention_dropout", "attn_pdrop"):
        if isinstance(getattr(config, name, None), float):
            setattr(config, name, 0.0)


def choose_layout(model: PreTrainedModel, wanted: str) -> tuple[str, str]:
    """The layout that is used and the reason for it.

    Raises:
        ValueError: a packed layout was asked for, and the model cannot take it.
    """
    if wanted == "padded":
        return wanted, "asked for"
    # The probe needs the weights in place; sharded or not yet materialised ones cannot be run.
    probe = all(p.numel() > 0 and not p.is_meta for p in model.parameters())
    support: Support = supports_segments(model, probe=probe)
    if support.ok:
        reason = support.reason if wanted == "auto" else "asked for"
        return ("prefix_shared" if wanted == "auto" else wanted), reason
    if wanted == "auto":
        logger.warning("layout: padded, because %s: %s", type(model).__name__, support.reason)
        return "padded", support.reason
    raise ValueError(
        f"layout: expected 'padded' or 'auto' for {type(model).__name__}, got {wanted!r}: "
        f"{support.reason}"
    )


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Compare :class:`LmHead` with the model's own logits on a few tokens.

    A family that does something to its logits that this library does not know must not be
    trained on wrong log-probs.

    Raises:
        ValueError: they differ.
    """
    core = causal_lm(model)
    if any(p.numel() == 0 or p.is_meta for p in core.parameters()):
        return  # sharded at load time: nothing can be run yet
    training = core.training
    core.eval()
    try:
        size = core.get_output_embeddings().weight.shape[0]
        tokens = torch.arange(1, _PROBE_TOKENS + 1, device=core.device)[None] % size
        expected = core(input_ids=tokens, use_cache=False).logits.float()
        hidden = backbone_of(core)(input_ids=tokens, use_cache=False).last_hidden_state
        got = LmHead.from_model(core).logits(hidden).float()
    finally:
        core.train(training)
    scale = expected.abs().amax().clamp(min=1.0)
    error = float((got - expected).abs().amax() / scale)
    tolerance = 1e-4 if core.dtype == torch.float32 else 5e-2
    if not error <= tolerance:
        raise ValueError(
            f"{type(core).__name__}: expected head(hidden states) to be the model's logits, but "
            f"they differ by {error:.1e} of the largest one; this family does something to its "
            "logits that fastdaa does not know"
        )


def prepare_dataset(
    dataset: Any, tokenizer: PreTrainedTokenizerBase | None, args: PreferenceConfig, name: str
) -> Any:
    """A tokenised dataset; one with token columns is taken as it is.

    Raises:
        TypeError: a dataset without length, or not from the ``datasets`` library.
        ValueError: text without a tokenizer.
    """
    if not hasattr(dataset, "column_names") or not hasattr(dataset, "__len__"):
        raise TypeError(
            f"{name}: expected a datasets.Dataset of pairs with a length, got "
            f"{type(dataset).__name__}"
        )
    if all(field in dataset.column_names for field in TOKEN_FIELDS):
        return dataset
    if tokenizer is None:
        raise ValueError(f"{name}: expected processing_class, a tokenizer for its text, got None")
    tokenized, report = tokenize_pairs(
        dataset, tokenizer, max_length=args.max_length, truncation_mode=args.truncation_mode,
        num_proc=args.dataset_num_proc, on_bad_row=args.on_bad_row,
    )  # fmt: skip
    if args.should_log:
        logger.info("%s: %s", name, report)
    return tokenized


def rows_of(dataset: Any) -> Any:
    """Datasets as the data loader wants them; a dictionary keeps its names."""
    if isinstance(dataset, Mapping):
        return {name: PairRows(part) for name, part in dataset.items()}
    return None if dataset is None else PairRows(dataset)


def prepare_reference(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Place a frozen model: on the device, or sharded as the policy is."""
    from accelerate.utils import DistributedType

    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return _deepspeed_inference(model, accelerator)
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and getattr(plugin, "fsdp_version", 1) == 2:
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        return fsdp2_prepare_model(accelerator, model)
    return accelerator.prepare_model(model, evaluation_mode=True)


def _deepspeed_inference(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The reference under DeepSpeed: replicated, without optimizer and scheduler."""
    import copy

    import deepspeed

    config = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
    for block in ("optimizer", "scheduler"):
        config.pop(block, None)
    config["zero_optimization"] = {"stage": 0}
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return engine.eval()
