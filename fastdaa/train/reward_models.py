"""Sequence classifiers with one output: loading them, checking them, where they are read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastdaa.train.adapter_files import find_adapter, load_merged
from fastdaa.train.backbone import backbone_of, causal_lm
from fastdaa.train.eval_mode import in_eval_mode
from fastdaa.train.quantization import compute_as_in_training

PAD_TOKEN = "<|pad|>"
_PROBE_TOKENS = 5


def load_reward_model(
    source: str,
    tokenizer: Any = None,
    *,
    dtype: Any = torch.float32,
    resize: bool = True,
    **options: Any,
) -> PreTrainedModel:
    """A sequence classifier with one output, from a causal language model or from such a one.

    Of a causal language model the backbone is taken, and a new linear ``score`` put on it. An
    adapter of either kind is merged into its base first. The
    model gets the tokenizer's padding token where that is one that ends nothing; else
    ``tokenizer`` and model get a new one: transformers reads the score at the last token that is
    not padding, so where padding is EOS it would pass by every EOS.

    Args:
        source: a folder or hub id, of a whole model or an adapter.
        tokenizer: is changed where it has no padding token of its own.
        dtype: of the weights.
        resize: the embedding may get a row for a new padding token; under LoRA it must not.
        options: passed on to ``from_pretrained``.

    Raises:
        OSError: there is none, or it cannot be read.
        ValueError: weights of the backbone are missing, or it has another number of outputs.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    adapter = find_adapter(source)
    if adapter is not None and adapter.config.get("task_type") == "SEQ_CLS":
        model = load_classifier(source, dtype=dtype, **options)
        if tokenizer is not None:
            give_padding(model, tokenizer, resize=resize)
        return model
    folder = Path(source).expanduser()
    # Adapters that are trained on it note the path, and may be loaded from anywhere.
    whole = str(folder.absolute()) if folder.is_dir() else source
    with _quiet_about_missing_weights():
        model, report = AutoModelForSequenceClassification.from_pretrained(
            whole if adapter is None else adapter.base,
            num_labels=1, dtype=dtype, output_loading_info=True,
            **{**options, **({} if adapter is None else adapter.base_options)},
        )  # fmt: skip
    missing = [name for name in report["missing_keys"] if not name.startswith("score.")]
    if missing or report.get("mismatched_keys"):
        raise ValueError(
            f"model: expected {source} to have all weights of {type(model).__name__} with one "
            f"output, got none for {', '.join(missing[:3]) or 'its own number of outputs'}"
        )
    if adapter is not None:
        merged = load_merged(adapter, AutoModelForCausalLM, dtype=dtype, **options)
        backbone_of(model).load_state_dict(backbone_of(merged).state_dict())
    compute_as_in_training(model)
    if tokenizer is not None:
        give_padding(model, tokenizer, resize=resize)
    return model


def load_classifier(source: str, **options: Any) -> PreTrainedModel:
    """A sequence classifier as it is; an adapter of one (``SEQ_CLS``) is merged into its base.

    Args:
        source: a folder or hub id.
        options: passed on to ``from_pretrained``.

    Raises:
        OSError, ValueError: there is none, or it cannot be read, or is an adapter of another model.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    adapter = find_adapter(source)
    if adapter is None:
        remote = {"trust_remote_code": options.get("trust_remote_code")}
        names = AutoConfig.from_pretrained(source, **remote).architectures or ()
        if names and all(name.endswith("ForCausalLM") for name in names):
            # It would be read with a random output.
            raise ValueError(f"expected a sequence classifier, {source} is a {names[0]}")
        return AutoModelForSequenceClassification.from_pretrained(source, **options)
    with _quiet_about_missing_weights():
        # The base may be a causal language model, which does not say how many outputs there are.
        return load_merged(adapter, AutoModelForSequenceClassification, num_labels=1, **options)


def give_padding(model: PreTrainedModel, tokenizer: Any, *, resize: bool = True) -> None:
    """A padding token that ends nothing, the same in model and tokenizer.

    Args:
        resize: the embedding may get a row for a new one.

    Raises:
        ValueError: there is none, and it may not.
    """
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is None or pad == eos:
        there = [tokenizer.unk_token, *([] if resize else [tokenizer.bos_token])]
        ends_nothing = [t for t in there if t is not None and t != tokenizer.eos_token]
        if ends_nothing:
            tokenizer.pad_token = ends_nothing[0]
        elif not resize:
            raise ValueError(
                "model: expected a tokenizer with a token for padding that ends nothing, got "
                f"{tokenizer.pad_token!r}; under LoRA the embedding cannot get a new one"
            )
        else:
            tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
        pad = tokenizer.pad_token_id
        embedding: Any = model.get_input_embeddings()
        if pad >= embedding.weight.shape[0]:
            model.resize_token_embeddings(pad + 1, mean_resizing=False)
    model.config.pad_token_id = pad
    model.config.get_text_config().pad_token_id = pad


@torch.no_grad()
def check_reward_model(model: nn.Module) -> None:
    """Compare ``score(hidden state of the last token)`` with the model's own output.

    Raises:
        TypeError: no model of transformers.
        ValueError: it has no linear ``score`` with one output, or its own output is something else.
    """
    core: Any = causal_lm(model)
    name, score = type(core).__name__, getattr(core, "score", None)
    # Under PEFT, which trains a copy of it.
    score = getattr(score, "original_module", score)
    if not isinstance(score, nn.Linear) or score.out_features != 1:
        raise ValueError(
            f"model: expected a sequence classifier with a linear `score` of 1 output, got {name}"
            + (f" with {score.out_features}" if isinstance(score, nn.Linear) else "")
        )
    pad = core.config.get_text_config().pad_token_id
    if any(parameter.is_meta for parameter in core.parameters()):
        return
    rows = core.get_input_embeddings().weight.shape[0]
    ids = [token for token in range(min(rows, _PROBE_TOKENS + 1)) if token != pad]
    tokens = torch.tensor([ids[:_PROBE_TOKENS]], device=core.device)
    with in_eval_mode(core):
        expected = core(input_ids=tokens, use_cache=False).logits[0, 0].float()
        backbone = backbone_of(core)
        got = core.score(backbone(input_ids=tokens, use_cache=False).last_hidden_state[0, -1])
    tolerance = 1e-4 if core.dtype == torch.float32 else 5e-2
    if not bool((got[0].float() - expected).abs() <= tolerance * expected.abs().clamp(min=1.0)):
        raise ValueError(
            f"{name}: expected score(hidden state of the last token) to be its output, but they "
            f"are {float(got[0]):.4g} and {float(expected):.4g}"
        )


def check_padding(model: nn.Module, tokenizer: Any = None) -> None:
    """Raise ``ValueError`` for a model that could not score a batch, or would pass by every EOS."""
    pad = causal_lm(model).config.get_text_config().pad_token_id
    if pad is None or pad == getattr(tokenizer, "eos_token_id", None):
        got = "None" if pad is None else f"{pad}, which is EOS"
        raise ValueError(
            f"model: expected a pad_token_id in the configuration that ends nothing, got {got}; "
            "fastdaa.train.reward_models.give_padding adds one"
        )


def last_tokens(pack: Mapping[str, Any]) -> Tensor:
    """``[S]`` int64: the last token of every sequence of a pack, in the flattened row."""
    if "segments" in pack:
        return pack["segments"]["cu_q"][1:].long() - 1
    mask: Tensor = pack["attention_mask"]
    starts = torch.arange(len(mask), device=mask.device) * mask.shape[1]
    return starts + mask.sum(dim=1) - 1


@contextlib.contextmanager
def _quiet_about_missing_weights() -> Iterator[None]:
    # That `score` is new and the LM head is left out is the point, not worth a table of warnings.
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
