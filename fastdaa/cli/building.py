"""What the training commands build from their options, each with errors that name the option."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastdaa.cli.arguments import AdapterArguments, ModelArguments
from fastdaa.cli.paths import check_paths
from fastdaa.cli.runs import hold_folder
from fastdaa.train.quantization import QuantizationOptions

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fastdaa.data.kinds import RecordKind
    from fastdaa.train.adapter_files import Adapter
    from fastdaa.train.packed_config import PackedConfig

logger = logging.getLogger(__name__)
# Of a module; other words are a pattern, as for PEFT and TRL.
_NAME = re.compile(r"[\w.]+")


class Start(NamedTuple):
    """What the stages before alignment begin with."""

    checkpoint: str | None
    """To resume from."""
    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    evaluation: Dataset | None


def start_stage(arguments: ModelArguments, config: PackedConfig, kind: RecordKind) -> Start:
    """Checks paths, sets the seed, and reads tokenizer and data, which have to fit."""
    from transformers import set_seed

    from fastdaa.cli.load_data import load_splits

    checkpoint = check_paths(arguments, str(config.output_dir), config.resume_from_checkpoint)
    set_seed(config.seed)
    tokenizer = load_tokenizer(arguments)
    seed = config.sampling_seed
    data = load_splits(arguments, kind, on_bad_row=config.on_bad_row, seed=seed)
    check_template(tokenizer, data[0])
    return Start(checkpoint, tokenizer, *data)


def load_tokenizer(arguments: ModelArguments) -> PreTrainedTokenizerBase:
    """The tokenizer of ``--model`` or of its base, with ``--chat_template`` if there is one."""
    from fastdaa.train import tokenizers

    tokenizer = tokenizers.load_tokenizer(
        arguments.model, "model", trust_remote_code=arguments.trust_remote_code,
        **model_revision(arguments),
    )  # fmt: skip
    if arguments.chat_template is not None:
        tokenizer.chat_template = _read_template(arguments.chat_template)
    return tokenizer


def check_template(tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> None:
    """Raises ``ValueError`` where conversations meet a tokenizer without a chat template."""
    conversations = isinstance(rows[0]["prompt"], list)
    brings_template = "chat_template_kwargs" in rows.column_names
    if conversations and tokenizer.chat_template is None and not brings_template:
        raise ValueError(
            "chat_template: the data are conversations and the tokenizer has no chat template; "
            "expected --chat_template with a Jinja file, or a model that was trained for chats"
        )


def load_model(
    source: str,
    arguments: ModelArguments,
    name: str = "model",
    *,
    device: Any = None,
    revision: Mapping[str, str] | None = None,
) -> Any:
    """A causal language model in ``--dtype``, perhaps quantised; of an adapter its base with it.

    Args:
        name: of the option that names it.
        device: of this process, where quantised weights go at once.
        revision: further options of ``from_pretrained``.

    Raises:
        OSError, ValueError: there is none, or it cannot be read.
    """
    from fastdaa.train.adapter_files import load_causal_lm

    try:
        quantized = quantized_options(source, arguments, device, revision) or {}
        options = {**model_options(arguments), **(revision or {}), **quantized}
        return load_causal_lm(source, **options)
    except (OSError, ValueError) as error:
        expected = f"{name}: expected a causal language model, got {source!r}"
        raise type(error)(f"{expected}: {error}") from error


def load_policy(
    arguments: AdapterArguments,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: str,
    checkpoint: str | None,
    *,
    main_process: bool = True,
    device: Any = None,
) -> Any:
    """The model that is trained, before ``--use_peft`` puts a new adapter on it.

    An adapter is trained further; with ``--use_peft`` it is merged into its base, which is saved
    beside the new one (:mod:`fastdaa.train.merged_base`).

    Args:
        tokenizer: is saved with a merged base, and has to belong to the model.
        output_dir: of the run.
        checkpoint: that it continues from.
        main_process: this process writes files.
        device: of this process, where quantised weights go at once.

    Raises:
        OSError, ValueError: there is no such model, or it cannot be read or merged.
    """
    from fastdaa.cli.paths import adapter_of
    from fastdaa.train.merged_base import merged_base

    adapter = adapter_of("model", arguments.model)
    if adapter is None or not arguments.use_peft:
        revision = model_revision(arguments)
        model = load_model(arguments.model, arguments, device=device, revision=revision)
        if adapter is not None:
            logger.info("model: trains the %s further", adapter)
    else:
        options = {"tokenizer": tokenizer, "write": main_process, **model_options(arguments)}
        options["quantized"] = quantized_options(adapter.base, arguments, device)
        hold_folder(output_dir)
        model = merged_base(adapter, output_dir, checkpoint, **options)
        logger.info(
            "model: a new LoRA starts on the base with the %s merged into it, which is in %s",
            adapter, model.name_or_path,
        )  # fmt: skip
    check_vocabulary(model, tokenizer)
    _say_quantization(model, adapter, merged=arguments.use_peft)
    return model


def model_options(arguments: ModelArguments) -> dict[str, Any]:
    """How models are loaded: ``--dtype``, ``--attn_implementation``, ``--trust_remote_code``."""
    options: dict[str, Any] = {
        "dtype": arguments.dtype, "trust_remote_code": arguments.trust_remote_code
    }  # fmt: skip
    if arguments.attn_implementation is not None:
        options["attn_implementation"] = arguments.attn_implementation
    return options


def model_revision(arguments: ModelArguments, name: str = "model") -> dict[str, str]:
    """What ``from_pretrained`` of ``--model`` needs beside :func:`model_options`.

    Args:
        name: of the option that names the model: ``model`` or ``ref_model``.
    """
    revision = getattr(arguments, f"{name}_revision", None)
    if revision is None or Path(getattr(arguments, name)).expanduser().is_dir():
        return {}
    return {"revision": revision}


def quantized_options(
    source: str,
    arguments: ModelArguments,
    device: Any = None,
    revision: Mapping[str, str] | None = None,
) -> dict[str, Any] | None:
    """What ``--load_in_4bit`` and its like add to :func:`model_options`; None without them.

    Args:
        source: what is loaded: ``--dtype auto`` asks it for the dtype of products.
        device: of this process.
        revision: of ``source``, as ``from_pretrained`` takes it.
    """
    if not isinstance(arguments, QuantizationOptions) or arguments.quantizes is None:
        return None
    import torch

    from fastdaa.train.adapter_files import find_adapter

    dtype = getattr(torch, arguments.dtype, None)
    if dtype is None:
        from transformers import AutoConfig

        adapter = find_adapter(source)
        base = source if adapter is None else adapter.base
        found = {} if adapter is None else adapter.base_options
        options = {"trust_remote_code": arguments.trust_remote_code, **(revision or {}), **found}
        config = AutoConfig.from_pretrained(base, **options)
        dtype = config.get_text_config().dtype or torch.float32
    wanted: dict[str, Any] = {"quantization_config": arguments.quantization_config(dtype)}
    if device is not None:
        # Each process of several quantises onto its own device.
        wanted["device_map"] = {"": device}
    return wanted


def _say_quantization(model: PreTrainedModel, adapter: Adapter | None, *, merged: bool) -> None:
    from fastdaa.train.quantization import quantization_of
    from fastdaa.train.run_record import read_record

    quantization = quantization_of(model)
    if quantization is not None:
        logger.info("model: the base is quantised, %s", quantization)
    run = None if adapter is None else read_record(adapter.source)
    if adapter is None or run is None:
        return
    before, now = run.facts.get("quantization"), None if merged else quantization
    if before != now:
        logger.warning(
            "model: the adapter %s was trained on a base that was %s, %s", adapter.source,
            f"quantised, {before}" if before else "not quantised",
            "and was merged into the whole one" if merged else "and goes on with another one",
        )  # fmt: skip


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ``ValueError`` where the tokenizer has ids that the model has no embedding for."""
    embedding: Any = model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= rows:
        raise ValueError(
            f"model: expected a tokenizer with ids below {rows}, the rows of the embedding, got "
            f"the id {highest}; model and tokenizer do not belong together"
        )


def lora_config(arguments: AdapterArguments, task: str = "CAUSAL_LM") -> Any | None:
    """The PEFT configuration that the ``lora_*`` options describe, or None without ``use_peft``.

    Args:
        task: what PEFT calls the kind of the model; of ``"SEQ_CLS"`` the output is trained whole.

    Raises:
        ImportError: PEFT is not installed.
    """
    if not arguments.use_peft:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("use_peft: expected peft; pip install 'fastdaa[peft]'") from error
    targets: Any = arguments.lora_target_modules or "all-linear"
    if targets == ["all-linear"] or (len(targets) == 1 and not _NAME.fullmatch(targets[0])):
        targets = targets[0]
    return LoraConfig(
        task_type=task,
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=targets,
        modules_to_save=arguments.lora_modules_to_save,
        use_rslora=arguments.use_rslora,
        use_dora=arguments.use_dora,
        # Or those who load the adapter would put it onto another base.
        revision=model_revision(arguments).get("revision"),
    )


def _read_template(given: str) -> str:
    if "{" in given:
        return given
    path = Path(given).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"chat_template: expected a Jinja file or a template, there is no file {given}"
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"chat_template: expected a Jinja file in UTF-8, got {given}: {error}"
        ) from error
