"""What the trainer checks and sets up before the first step: models, layout and datasets."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from fastdaa.data import tokenize_pairs
from fastdaa.data.fields import TOKEN_FIELDS
from fastdaa.head import LmHead
from fastdaa.train.adapter_files import load_causal_lm
from fastdaa.train.attention import enable_segments
from fastdaa.train.backbone import backbone_of, causal_lm, install_head_task
from fastdaa.train.eval_mode import in_eval_mode
from fastdaa.train.quantization import compute_as_in_training, is_quantized
from fastdaa.train.support import supports_segments
from fastdaa.train.zero3 import check_whole

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from fastdaa.train.packed_config import PackedConfig

logger = logging.getLogger(__name__)
_PROBE_TOKENS = 5
_ROWS_AT_ONCE = 4096
# Change of hidden states by a later token, of the largest one, that rounding explains: in fp32, and
# in half precision or quantised. Later tokens change how the rows of an expert or the columns of
# LLM.int8() are rounded, and with that a close choice of experts; who sees them is far above.
_SEEN = (3e-2, 0.2)


def load_model(model: str | nn.Module, name: str = "model") -> nn.Module:
    """A causal LM or its adapter from a path or hub id (in fp32), or the model as it is.

    Raises:
        TypeError: neither a name nor a model of transformers.
        ValueError: a quantised model that can no longer be trained, or one that was cut by
            DeepSpeed as it was loaded.
    """
    if isinstance(model, nn.Module):
        try:
            causal_lm(model)
        except TypeError as error:
            raise TypeError(f"{name}: {error}") from None
        check_whole(model, name)
        compute_as_in_training(model)
        return model
    if not isinstance(model, str):
        raise TypeError(
            f"{name}: expected a path, hub id or torch module, got {type(model).__name__}"
        )
    return load_causal_lm(model, dtype=torch.float32)


def prepare_model(model: nn.Module, layout: str) -> None:
    """Teach a policy or reference the head task and the layout's attention."""
    install_head_task(model)
    if layout != "padded":
        enable_segments(causal_lm(model))


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability that a module holds to 0; the configuration stays."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            holds = "drop" in name or (name == "p" and isinstance(module, _DropoutNd))
            if holds and isinstance(value, float):
                setattr(module, name, 0.0)


def dropout_values(config: PretrainedConfig) -> dict[str, float]:
    """Dropout probabilities of a configuration; some families read them in every forward."""
    text = config.get_text_config()
    return {k: v for k, v in vars(text).items() if "drop" in k and isinstance(v, float)}


@contextlib.contextmanager
def config_values(config: PretrainedConfig, values: Mapping[str, Any]) -> Iterator[None]:
    """The text configuration has other values here."""
    text = config.get_text_config()
    before = {name: getattr(text, name) for name in values}
    try:
        for name, value in values.items():
            setattr(text, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(text, name, value)


def choose_layout(
    models: Sequence[nn.Module], wanted: str, layouts: Sequence[str]
) -> tuple[str, str]:
    """The layout that all ``models`` can take, and the reason for it.

    Args:
        wanted: a layout, or ``"auto"`` for the first of ``layouts``, else ``"padded"``.

    Raises:
        ValueError: a packed layout was asked for, and a model cannot take it.
    """
    if wanted == "padded":
        return wanted, "asked for"
    reason = ""
    for model in map(causal_lm, models):
        # The probe needs the weights in place; not yet materialised ones cannot be run.
        support = supports_segments(model, probe=_has_weights(model))
        if support.ok:
            reason = reason or support.reason
            continue
        reason = f"{type(model).__name__}: {support.reason}"
        if wanted == "auto":
            return "padded", reason
        raise ValueError(f"layout: expected 'padded' or 'auto', got {wanted!r} for {reason}")
    return (layouts[0], reason) if wanted == "auto" else (wanted, "asked for")


def load_policy(model: str | nn.Module, peft_config: Any = None) -> nn.Module:
    """:func:`load_model`, wrapped in a new adapter where ``peft_config`` describes one.

    Raises:
        ValueError: it has an adapter already, whose place the new one would take.
    """
    policy = load_model(model)
    if peft_config is None:
        return policy
    from peft import get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = any(isinstance(module, BaseTunerLayer) for module in policy.modules())
    if adapted or hasattr(policy, "disable_adapter"):
        names = getattr(causal_lm(policy), "peft_config", None) or ["adapters"]
        raise ValueError(
            "model: expected a model without adapters beside a new one (peft_config), got one with "
            f"{', '.join(map(repr, names))}; leave peft_config out to train that one further, or "
            "merge it first (merge_and_unload)"
        )
    # The hints of PEFT ask for a model of transformers; it takes any module.
    core: Any = policy
    return get_peft_model(core, peft_config)


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Compare :class:`LmHead` with the model's own logits on a few tokens.

    A family that does something to its logits that this library does not know must not be
    trained on wrong log-probs, nor one that sees the token that it predicts.

    Raises:
        ValueError: there is no head, the logits differ, or the model is not causal.
    """
    core = causal_lm(model)
    if not _has_weights(core):
        return  # nothing can be run yet
    vocabulary = LmHead.from_model(core).vocab_size
    with in_eval_mode(core):
        tokens = torch.arange(1, _PROBE_TOKENS + 1, device=core.device)[None] % vocabulary
        expected = core(input_ids=tokens, use_cache=False).logits.float()
        hidden = backbone_of(core)(input_ids=tokens, use_cache=False).last_hidden_state
        got = LmHead.from_model(core).logits(hidden).float()
        tokens[0, -1] = (tokens[0, -1] + 1) % vocabulary  # what came before it must not notice
        moved = backbone_of(core)(input_ids=tokens, use_cache=False).last_hidden_state - hidden
    scale = expected.abs().amax().clamp(min=1.0)
    error = float((got - expected).abs().amax() / scale)
    tolerance = 1e-4 if core.dtype == torch.float32 else 5e-2
    if not error <= tolerance:
        raise ValueError(
            f"{type(core).__name__}: expected head(hidden states) to be the model's logits, but "
            f"they differ by {error:.1e} of the largest one; this family does something to its "
            "logits that fastdaa does not know"
        )
    seen = float(moved[:, :-1].abs().amax() / hidden.abs().amax().clamp(min=1e-6))
    if not seen <= _SEEN[is_quantized(core) or torch.finfo(core.dtype).bits < 32]:
        raise ValueError(
            f"{type(core).__name__}: expected a causal model, got hidden states that change by "
            f"{seen:.1e} with a token behind them; log-probs of completions would mean nothing"
        )


def check_config(args: Any, kind: type) -> None:
    """Raise ``TypeError`` for settings of another trainer, such as TRL's ``DPOConfig``."""
    objectives = [getattr(settings, "objective_type", None) for settings in (args, kind)]
    if not isinstance(args, kind) or objectives[0] is not objectives[1]:
        raise TypeError(
            f"args: expected a {kind.__name__}, got {type(args).__name__}; what both have has the "
            f"same name, so give its options to {kind.__module__}.{kind.__name__}"
        )


def check_dataset(dataset: Any, name: str) -> None:
    """Raise ``TypeError`` for anything but a dataset of the ``datasets`` library with a length."""
    whole = hasattr(dataset, "column_names") and hasattr(dataset, "__len__")
    if isinstance(dataset, Mapping) or not whole:
        raise TypeError(
            f"{name}: expected a datasets.Dataset of pairs with a length, got "
            f"{type(dataset).__name__}"
        )


def check_datasets(train_dataset: Any, eval_dataset: Any) -> None:
    """:func:`check_dataset` of those that there are; cheap, so before models are loaded."""
    if train_dataset is not None:
        check_dataset(train_dataset, "train_dataset")
    each(eval_dataset, check_dataset, "eval_dataset")


def each(dataset: Any, function: Callable[[Any, str], Any], name: str) -> Any:
    """``function(dataset, name)``, of every part of a dictionary; None stays."""
    if isinstance(dataset, Mapping):
        return {key: function(part, f"{name} {key}") for key, part in dataset.items()}
    return None if dataset is None else function(dataset, name)


def tokenize_dataset(
    dataset: Any, tokenizer: PreTrainedTokenizerBase | None, args: PackedConfig, name: str
) -> Any:
    """A tokenised dataset; one with token columns is taken as it is.

    Raises:
        ValueError: text without a tokenizer, or no pair (left).
    """
    if all(field in dataset.column_names for field in TOKEN_FIELDS):
        if not len(dataset):
            raise ValueError(f"{name}: expected at least one pair, got none")
        return dataset
    if tokenizer is None:
        raise ValueError(f"{name}: expected processing_class, a tokenizer for its text, got None")
    tokenized, report = tokenize_pairs(
        dataset, tokenizer, max_length=args.max_length, truncation_mode=args.truncation_mode,
        num_proc=args.dataset_num_proc, on_bad_row=args.on_bad_row,
    )  # fmt: skip
    if args.should_log:
        report.log(logger, name)
    return tokenized


def check_tokens(
    dataset: Any, vocabulary: int, name: str, fields: Sequence[str] = TOKEN_FIELDS
) -> None:
    """Raise ``ValueError`` for token ids that a model of that vocabulary does not have.

    On a GPU they would end the process in the middle of training, without a word about data.
    """
    import pyarrow.compute

    columns = dataset.with_format("arrow", columns=list(fields))
    for table in columns.iter(_ROWS_AT_ONCE):
        for field in fields:
            tokens = _ids_of(table[field], f"{name}: column {field}")
            ends = pyarrow.compute.min_max(tokens).as_py()
            for token in ends.values():
                if token is not None and not 0 <= token < vocabulary:
                    raise ValueError(
                        f"{name}: expected token ids below {vocabulary}, the vocabulary of the "
                        f"model, got {token} in {field}; the tokenizer belongs to another model"
                    )


def _ids_of(column: Any, what: str) -> Any:
    """All ids of an Arrow column of lists; ``ValueError`` where they are none."""
    from pyarrow import types
    from pyarrow.compute import list_flatten

    kind = column.type
    lists = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    # Where all lists are empty, nothing says of what they are.
    if not lists or not (types.is_integer(kind.value_type) or types.is_null(kind.value_type)):
        raise ValueError(f"{what}: expected a list of integers in every row, got {kind}")
    tokens = list_flatten(column)
    if column.null_count or tokens.null_count:
        raise ValueError(f"{what}: expected a list of integers in every row, got null in some")
    return tokens


def padding_token(tokenizer: Any) -> int:
    """Padding for the layout ``padded``: masked, so any valid id does."""
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(tokenizer, name, None)
        if isinstance(value, int):
            return value
    return 0


def _has_weights(model: nn.Module) -> bool:
    return all(p.numel() > 0 and not p.is_meta for p in model.parameters())
