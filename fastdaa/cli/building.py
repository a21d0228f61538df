"""What ``fastdaa train`` builds from its options, each with errors that name the option."""

from __future__ import annotations

import difflib
import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdaa.cli.arguments import TrainArguments
from fastdaa.data import load_pairs
from fastdaa.train.checkpoints import is_complete, last_complete
from fastdaa.train.config import PreferenceConfig

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".gz")
# What the Trainer itself understands as "the last checkpoint".
_TRUE_WORDS = ("true", "yes", "1", "last")


def check_paths(arguments: TrainArguments, config: PreferenceConfig) -> str | None:
    """Checks every local path before anything slow, and finds the checkpoint to resume from.

    Raises:
        FileNotFoundError: a path that is neither there nor can be a hub id.
        ValueError: a folder without a model, or an incomplete checkpoint.
        PermissionError: ``output_dir`` cannot be written.
    """
    for name in ("model", "ref_model"):
        value = getattr(arguments, name)
        if value is not None:
            _check_model_path(name, value)
    for name in ("dataset", "eval_dataset"):
        value = getattr(arguments, name)
        if value is not None:
            _check_exists(name, value, _DATA_SUFFIXES)
    _check_writable(Path(str(config.output_dir)))
    return _find_checkpoint(config)


def load_tokenizer(arguments: TrainArguments) -> PreTrainedTokenizerBase:
    """The tokenizer of ``--model``, with ``--chat_template`` if there is one."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            arguments.model, trust_remote_code=arguments.trust_remote_code
        )
    except Exception as error:
        raise OSError(f"model: no tokenizer in {arguments.model}: {error}") from error
    if arguments.chat_template is not None:
        tokenizer.chat_template = _read_template(arguments.chat_template)
    return tokenizer


def load_datasets(
    arguments: TrainArguments, config: PreferenceConfig
) -> tuple[Dataset, Dataset | None]:
    """Checked pairs to train on, and to evaluate on if the options name any.

    Raises:
        DataError: data that cannot be used.
        ValueError: ``eval_strategy`` without pairs to evaluate on.
    """
    strategy: Any = config.eval_strategy
    if strategy != "no" and not arguments.evaluates:
        raise ValueError(
            f"eval_strategy: got {strategy.value!r}, but no pairs to evaluate on; "
            "expected eval_dataset, eval_split or test_size as well"
        )
    train = load_pairs(
        arguments.dataset,
        split=arguments.dataset_split,
        name=arguments.dataset_name,
        limit=arguments.max_train_samples,
        on_bad_row=config.on_bad_row,
    )
    if arguments.test_size is not None:
        return _split(train, arguments.test_size, config)
    if not arguments.evaluates:
        return train, None
    evaluation = load_pairs(
        arguments.eval_dataset or arguments.dataset,
        split=arguments.eval_split,
        name=None if arguments.eval_dataset else arguments.dataset_name,
        on_bad_row=config.on_bad_row,
    )
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


def load_model(source: str, arguments: TrainArguments) -> PreTrainedModel:
    """A causal language model in ``--dtype``.

    Raises:
        OSError: there is none, or it cannot be read.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"trust_remote_code": arguments.trust_remote_code}
    if arguments.attn_implementation is not None:
        options["attn_implementation"] = arguments.attn_implementation
    return AutoModelForCausalLM.from_pretrained(source, dtype=arguments.dtype, **options)


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


def lora_config(arguments: TrainArguments) -> Any | None:
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


def _split(
    pairs: Dataset, test_size: float, config: PreferenceConfig
) -> tuple[Dataset, Dataset | None]:
    size = test_size if test_size < 1 else int(test_size)
    if (size * len(pairs) if size < 1 else size) >= len(pairs):
        raise ValueError(f"test_size: expected less than all {len(pairs)} pairs, got {size}")
    seed = config.seed if config.data_seed is None else config.data_seed
    parts = pairs.train_test_split(size, seed=seed)
    return parts["train"], parts["test"]


def _check_model_path(name: str, value: str) -> None:
    _check_exists(name, value, ())
    folder = Path(value).expanduser()
    names = ("config.json", "adapter_config.json")
    if folder.is_dir() and not any((folder / file).is_file() for file in names):
        raise ValueError(f"{name}: expected a folder with config.json, {value} has none")


def _check_exists(name: str, value: str, suffixes: tuple[str, ...]) -> None:
    path = Path(value).expanduser()
    if path.exists():
        return
    if _HUB_ID.fullmatch(value) and not value.lower().endswith(suffixes or ("/",)):
        return
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    hint = f" (did you mean {str(path.parent / near[0])!r}?)" if near else ""
    raise FileNotFoundError(f"{name}: expected a path or a hub id, there is no {value!r}{hint}")


def _check_writable(folder: Path) -> None:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"output_dir: expected a folder, {existing} is a file")
    if not os.access(existing, os.W_OK):
        raise PermissionError(f"output_dir: expected a folder to write to, {existing} is not")


def _find_checkpoint(config: PreferenceConfig) -> str | None:
    given, output_dir = config.resume_from_checkpoint, str(config.output_dir)
    last = last_complete(output_dir)
    if given is None or given.lower() in ("false", "no", "0"):
        if last is not None:
            logger.warning(
                "%s holds %s of an earlier run; --resume_from_checkpoint would continue it",
                output_dir,
                Path(last).name,
            )
        return None
    if given.lower() in _TRUE_WORDS:
        found = f"resuming from {last}" if last else f"no complete checkpoint in {output_dir}"
        logger.info("%s%s", found, "" if last else ": starting from the beginning")
        return last
    if not Path(given).is_dir():
        raise FileNotFoundError(f"resume_from_checkpoint: there is no folder {given}")
    if not is_complete(given):
        raise ValueError(
            f"resume_from_checkpoint: expected a complete checkpoint, {given} has no readable "
            "trainer_state.json, which is written last"
        )
    return given
