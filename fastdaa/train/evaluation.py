"""A preference trainer that only evaluates: every pair once, shared by all processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from torch import Tensor, nn

from fastdaa.train.backbone import causal_lm
from fastdaa.train.callbacks import Curves, MetricsWriter
from fastdaa.train.config import PreferenceConfig
from fastdaa.train.evaluation_models import check_same_tokens, tokens_in
from fastdaa.train.evaluation_processes import check_others, meet
from fastdaa.train.metrics import MetricStore, Sums, peak_gib
from fastdaa.train.trainer import PreferenceTrainer

if TYPE_CHECKING:
    from accelerate import Accelerator


class EvaluationStore(MetricStore):
    """Sums of a whole evaluation in fp64, in which every pair or token counts the same."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = MetricStore()

    def end_batch(self, batch: Mapping[str, Any]) -> None:
        """Close the micro-batch."""
        for sums in self.batch.values():
            self.pool.add(sums._replace(totals=sums.totals.double()))
        super().end_batch(batch)
        self.rows = []

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """The averages over all pairs of all processes; starts a new evaluation.

        Every process has to call it, and waits here for the others. One that had no batch does not
        know the names of the metrics, so sums are gathered by name.
        """
        rows, self.pool = [*self.pool.batch.values()], MetricStore()
        own = {
            name: (total, count)
            for sums in rows
            for name, total, count in zip(
                sums.names, sums.totals.tolist(), sums.counts, strict=True
            )
        }
        meet()
        parts = gather_object([(own, self.throughput.counts(), peak_gib())])
        found: dict[str, list[tuple[float, float]]] = {}
        for sums_of, _, _ in parts:
            for name, pair in sums_of.items():
                found.setdefault(name, []).append(pair)
        values = {name: _mean(pairs) for name, pairs in found.items()}
        counts = [sum(column) for column in zip(*(part[1] for part in parts), strict=True)]
        values |= self.throughput.read(*counts)
        return values | {"memory/peak_gib": max(peak for *_, peak in parts)}


def _mean(sums: list[tuple[float, float]]) -> float:
    total, count = (sum(column) for column in zip(*sums, strict=True))
    return total / count if count > 0 else float("nan")


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
        # Or pairs would be repeated until all processes have as many.
        args.accelerator_config.even_batches = False  # type: ignore[union-attr]
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
            check_same_tokens(
                tokens_in(dataset), self.processing_class, self._ref_tokenizer, self._ref_rows
            )
        return dataset

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Nothing: there is one row, which :meth:`evaluate` returns."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Mean loss of a batch, which is noted among its metrics, by its pairs."""
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss: Tensor = found[0] if return_outputs else found
        pairs = float(len(inputs["row_ids"]))
        self._stores["eval"].add(Sums(("loss",), loss.detach().double().view(1) * pairs, (pairs,)))
        return found

    def prediction_step(self, *args: Any, **kwargs: Any) -> tuple[None, None, None]:  # type: ignore[override]
        """Metrics of a batch; the Trainer would gather a loss, which not every process has."""
        check_others()
        super().prediction_step(*args, **kwargs)
        return None, None, None
