"""What the training commands build from their options, each with errors that name the option."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastdaa.cli.arguments import AdapterArguments, ModelArguments
from fastdaa.cli.paths import check_paths

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fastdaa.train.packed_config import PackedConfig

logger = logging.getLogger(__name__)


class Start(NamedTuple):
    """What the stages before alignment begin with."""

    checkpoint: str | None
    """To resume from."""
    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    evaluation: Dataset | None


def start_stage(
    arguments: ModelArguments, config: PackedConfig, load: Callable[..., Dataset]
) -> Start:
    """Checks paths, sets the seed, and reads tokenizer and data."""
    from transformers import set_seed

    checkpoint = check_paths(arguments, str(config.output_dir), config.resume_from_checkpoint)
    set_seed(config.seed)
    tokenizer = load_tokenizer(arguments)
    seed = config.sampling_seed
    data = load_splits(arguments, load, on_bad_row=config.on_bad_row, seed=seed)
    return Start(checkpoint, tokenizer, *data)


def load_tokenizer(arguments: ModelArguments) -> PreTrainedTokenizerBase:
    """The tokenizer of ``--model`` or of its base, with ``--chat_template`` if there is one."""
    from transformers import AutoTokenizer

    from fastdaa.train.adapter_files import tokenizer_source

    source = arguments.model
    try:
        source = tokenizer_source(source)
        tokenizer = AutoTokenizer.from_pretrained(
            source, trust_remote_code=arguments.trust_remote_code
        )
    except Exception as error:
        raise OSError(f"model: expected a tokenizer in {source!r}, got: {error}") from error
    if arguments.chat_template is not None:
        tokenizer.chat_template = _read_template(arguments.chat_template)
    return tokenizer


def load_splits(
    arguments: ModelArguments, load: Callable[..., Dataset], *, on_bad_row: str, seed: int
) -> tuple[Dataset, Dataset | None]:
    """Data to train on, and to evaluate on if the options name any.

    Args:
        load: reads one of them, as :func:`fastdaa.data.load_pairs` does.
        seed: decides which rows ``test_size`` takes.

    Raises:
        DataError: data that cannot be used.
    """
    train = load(
        arguments.dataset, split=arguments.dataset_split, name=arguments.dataset_name,
        limit=arguments.max_train_samples, on_bad_row=on_bad_row,
    )  # fmt: skip
    if arguments.test_size is not None:
        return _split(train, arguments.test_size, seed)
    if not arguments.evaluates:
        return train, None
    evaluation = load(
        arguments.eval_dataset or arguments.dataset, split=arguments.eval_split,
        name=None if arguments.eval_dataset else arguments.dataset_name, on_bad_row=on_bad_row,
    )  # fmt: skip
    return train, evaluation


def check_template(tokenizer: PreTrainedTokenizerBase, pairs: Dataset) -> None:
    """Raises ``ValueError`` where conversations meet a tokenizer without a chat template."""
    conversations = isinstance(pairs[0]["chosen"], list)
    brings_template = "chat_template_kwargs" in pairs.column_names
    if conversations and tokenizer.chat_template is None and not brings_template:
        raise ValueError(
            "chat_template: the pairs are conversations and the tokenizer has no chat template; "
            "expected --chat_template with a Jinja file, or a model that was trained for chats"
        )


def load_model(source: str, arguments: ModelArguments, name: str = "model") -> Any:
    """A causal language model in ``--dtype``; of an adapter its base with it.

    Args:
        name: of the option that names it.

    Raises:
        OSError, ValueError: there is none, or it cannot be read.
    """
    from fastdaa.train.adapter_files import load_causal_lm

    try:
        return load_causal_lm(source, **model_options(arguments))
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
) -> Any:
    """The model that is trained, before ``--use_peft`` puts a new adapter on it.

    An adapter is trained further; with ``--use_peft`` it is merged into its base, which is saved
    beside the new one (:mod:`fastdaa.train.merged_base`).

    Args:
        tokenizer: is saved with a merged base, and has to belong to the model.
        output_dir: of the run.
        checkpoint: that it continues from.
        main_process: this process writes files.

    Raises:
        OSError, ValueError: there is no such model, or it cannot be read or merged.
    """
    from fastdaa.cli.paths import adapter_of
    from fastdaa.train.merged_base import merged_base

    adapter = adapter_of("model", arguments.model)
    if adapter is None or not arguments.use_peft:
        model = load_model(arguments.model, arguments)
        if adapter is not None:
            logger.info("model: trains the %s further", adapter)
    else:
        options = {"tokenizer": tokenizer, "write": main_process, **model_options(arguments)}
        model = merged_base(adapter, output_dir, checkpoint, **options)
        logger.info(
            "model: a new LoRA starts on the base with the %s merged into it, which is in %s",
            adapter, model.name_or_path,
        )  # fmt: skip
    check_vocabulary(model, tokenizer)
    return model


def model_options(arguments: ModelArguments) -> dict[str, Any]:
    """How models are loaded: ``--dtype``, ``--attn_implementation``, ``--trust_remote_code``."""
    options: dict[str, Any] = {
        "dtype": arguments.dtype, "trust_remote_code": arguments.trust_remote_code
    }  # fmt: skip
    if arguments.attn_implementation is not None:
        options["attn_implementation"] = arguments.attn_implementation
    return options


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


def lora_config(arguments: AdapterArguments) -> Any | None:
    """The PEFT configuration that the ``lora_*`` options describe, or None without ``use_peft``.

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
    if targets == ["all-linear"]:
        targets = "all-linear"
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=targets,
    )


def _read_template(given: str) -> str:
    if "{" in given:
        return given
    path = Path(given).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"chat_template: expected a Jinja file or a template, there is no file {given}"
        )
    return path.read_text(encoding="utf-8")


def _split(rows: Dataset, test_size: float, seed: int) -> tuple[Dataset, Dataset | None]:
    size = test_size if test_size < 1 else int(test_size)
    if (size * len(rows) if size < 1 else size) >= len(rows):
        raise ValueError(f"test_size: expected less than all {len(rows)} pairs, got {size}")
    parts = rows.train_test_split(size, seed=seed)
    return parts["train"], parts["test"]
