"""Preference trainers that only evaluate: every row once, shared by all processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from fastdaa.train.backbone import causal_lm
from fastdaa.train.callbacks import Curves, MetricsWriter
from fastdaa.train.config import PreferenceConfig
from fastdaa.train.evaluation_models import check_same_tokens, tokens_in
from fastdaa.train.pooled_metrics import PooledStore
from fastdaa.train.processes import check_others, meet
from fastdaa.train.trainer import PreferenceTrainer
from fastdaa.train.unpaired import UnpairedTrainer

if TYPE_CHECKING:
    from accelerate import Accelerator


class EvaluationStore(PooledStore):
    """Sums of an evaluation whose processes wait for each other by ways of their own."""

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """The averages over all pairs of all processes; starts a new evaluation."""
        meet()
        return super().read(accelerator)


class EvaluationTrainer(PreferenceTrainer):
    """Measures a model on pairs, each process its share of the batches, the last one as it is.

    The batches are those of one process with the same ``per_device_eval_batch_size``, dealt out in
    turn, so that even objectives that couple the pairs of a batch have the same loss on any number
    of processes. Nothing waits for other processes before all batches are done.

    Args:
        model, ref_model, args, eval_dataset, processing_class: as of :class:`PreferenceTrainer`.
        ref_tokenizer: of the reference, to be compared with that of the model.

    Raises:
        ValueError, TypeError: as of :class:`PreferenceTrainer`, and for a reference that would read
            other tokens in the pairs.
    """

    store_type = EvaluationStore

    def __init__(
        self,
        model: str | nn.Module,
        ref_model: str | nn.Module | None,
        args: PreferenceConfig,
        eval_dataset: Any,
        processing_class: Any = None,
        ref_tokenizer: Any = None,
    ):
        self._ref_tokenizer = ref_tokenizer
        self._ref_rows: int | None = None
        super().__init__(
            model, ref_model, args, eval_dataset=eval_dataset, processing_class=processing_class
        )
        for kind in (Curves, MetricsWriter):
            self.remove_callback(kind)

    def _prepare_models(self, ref_model: str | nn.Module | None) -> nn.Module | None:
        given = super()._prepare_models(ref_model)
        if given is not None:
            embedding: Any = causal_lm(given).get_input_embeddings()
            self._ref_rows = len(embedding.weight)
        return given

    def _tokenize(self, dataset: Any, name: str) -> Any:
        # There are no others, and the command has no option of that name.
        dataset = super()._tokenize(dataset, "dataset")
        if self._ref_rows is not None:
            found = tokens_in(dataset, self.rows_type.tokens)
            check_same_tokens(found, self.processing_class, self._ref_tokenizer, self._ref_rows)
        return dataset

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Nothing: there is one row, which :meth:`evaluate` returns."""

    def prediction_step(self, *args: Any, **kwargs: Any) -> tuple[None, None, None]:
        """Metrics of a batch, unless another process has failed."""
        check_others()
        return super().prediction_step(*args, **kwargs)


class UnpairedEvaluationTrainer(EvaluationTrainer, UnpairedTrainer):
    """The same on labelled completions."""
