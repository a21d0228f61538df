"""The data of a training command: one source as it is, or several as a mixture."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

    from fastdaa.cli.arguments import ModelArguments
    from fastdaa.data.kinds import RecordKind

logger = logging.getLogger(__name__)


def load_splits(
    arguments: ModelArguments, kind: RecordKind, *, on_bad_row: Any, seed: int
) -> tuple[Dataset, Dataset | None]:
    """Data to train on, and to evaluate on if the options name any.

    Args:
        kind: of the records.
        seed: decides which rows ``test_size`` and ``dataset_weights`` take.

    Raises:
        DataError: data that cannot be used.
        ValueError: options that leave nothing to train on.
    """
    train, held_out = _load_train(arguments, kind, on_bad_row, seed)
    if arguments.test_size is not None or not arguments.evaluates:
        return train, held_out
    return train, _load_evaluation(arguments, kind, on_bad_row)


def _load_train(
    arguments: ModelArguments, kind: RecordKind, on_bad_row: Any, seed: int
) -> tuple[Dataset, Dataset | None]:
    from fastdaa.data.mixture import load_mixture
    from fastdaa.data.named_columns import NamedColumns
    from fastdaa.data.sources import has_configurations

    name = arguments.dataset_config
    if name is not None and not any(map(has_configurations, arguments.dataset)):
        raise ValueError(
            "dataset_config: expected a dataset of the hub, which has configurations, got "
            f"{name!r} for {', '.join(arguments.dataset)}"
        )
    options: dict[str, Any] = {
        "split": arguments.dataset_split, "name": name,
        "limit": arguments.max_train_samples, "on_bad_row": on_bad_row,
    }  # fmt: skip
    if len(arguments.dataset) == 1 and arguments.dataset_weights is None:
        named = NamedColumns(arguments.columns)
        train = kind.load(arguments.dataset[0], columns=named, **options)
        return _split(train, arguments.test_size, seed)
    mixture = load_mixture(
        arguments.dataset, weights=arguments.dataset_weights, seed=seed,
        test_size=arguments.test_size, columns=arguments.columns, kind=kind, **options,
    )  # fmt: skip
    logger.info("dataset: %s", mixture.report)
    return mixture.train, mixture.evaluation


def _load_evaluation(arguments: ModelArguments, kind: RecordKind, on_bad_row: Any) -> Dataset:
    from fastdaa.data.mixture import load_mixture
    from fastdaa.data.named_columns import NamedColumns
    from fastdaa.data.sources import without_split

    sources = arguments.eval_dataset
    options: dict[str, Any] = {"split": arguments.eval_split, "on_bad_row": on_bad_row}
    # Its columns may have other names than those of the training data.
    options["columns"] = NamedColumns(arguments.columns, "nowhere")
    if sources is None:
        sources = [without_split(source) for source in arguments.dataset]
        options["name"] = arguments.dataset_config
    if len(sources) == 1:
        return kind.load(sources[0], **options)
    mixture = load_mixture(sources, kind=kind, **options)
    logger.info("eval_dataset: %s", mixture.report)
    return mixture.train


def _split(rows: Dataset, test_size: float | None, seed: int) -> tuple[Dataset, Dataset | None]:
    if test_size is None:
        return rows, None
    size = test_size if test_size < 1 else int(test_size)
    # `train_test_split` rounds a share up.
    if (math.ceil(size * len(rows)) if size < 1 else size) >= len(rows):
        raise ValueError(f"test_size: expected fewer than all rows ({len(rows)}), got {size}")
    parts = rows.train_test_split(size, seed=seed)
    return parts["train"], parts["test"]
