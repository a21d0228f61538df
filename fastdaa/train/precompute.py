"""Reference log-probs of whole datasets before training, taken from the cache on disk if there."""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from tqdm.auto import tqdm

from fastdaa.counted import counted
from fastdaa.data import PairCollator, PairRows
from fastdaa.data.fields import (
    MISMATCHED_FIELD,
    REF_FIELDS,
    REF_MISMATCHED_FIELD,
    REF_SEQUENCE_FIELD,
    REF_TOKEN_FIELDS,
    SEQUENCE_FIELDS,
    TOKEN_FIELDS,
)
from fastdaa.data.mismatched import crossed_pairs
from fastdaa.train.adapters import REF_ADAPTER
from fastdaa.train.backbone import causal_lm
from fastdaa.train.full_disk import full_cache_named
from fastdaa.train.reference_cache import ReferenceCache, hash_rows, hash_weights, store_key
from fastdaa.train.references import AdapterReference, ModelReference, reference_for_cache
from fastdaa.train.sharding import forwards_meet, is_sharded, zero_stage
from fastdaa.train.zero3 import let_go

if TYPE_CHECKING:
    from datasets import Dataset

    from fastdaa.train.trainer import PreferenceTrainer

logger = logging.getLogger(__name__)
# What is computed is on disk after at most this long.
_SECONDS_A_PART = 20.0
# Fields of a model's configuration that do not change its log-probs.
_IRRELEVANT = {
    "_name_or_path", "transformers_version", "dtype", "use_cache", "architectures",
    "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip


class Precompute:
    """Adds reference log-probs to tokenised datasets.

    The reference is made when something is missing in the cache; :meth:`close` lets it go.

    Args:
        trainer: whose policy, collator, accelerator and settings are used.
        given: the reference model; None for the policy as it is now.
    """

    def __init__(self, trainer: PreferenceTrainer, given: nn.Module | None):
        self.trainer, self.given = trainer, given
        self.tokens = trainer.objective.needs_ref_tokens
        self.collate: Any = trainer.data_collator
        root = trainer.args.ref_cache_root()
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"ref_cache_dir: expected a folder to write to, {root} cannot be written or "
                f"created ({error.strerror})"
            ) from error
        # Before the model is cut into pieces.
        self.cache = ReferenceCache(root, _model_key(trainer, given))

    @functools.cached_property
    def reference(self) -> ModelReference | AdapterReference:
        """What scores the pairs that the cache does not have."""
        return reference_for_cache(self.trainer, self.given)

    def close(self) -> None:
        """Keep no reference in memory."""
        made = vars(self).pop("reference", None)
        if made is not None and zero_stage(self.trainer) == 3:
            let_go(made.model)

    def __call__(self, dataset: Dataset | None, name: str) -> Dataset | None:
        """The dataset with the columns of reference log-probs; other columns stay."""
        if dataset is None:
            return None
        keys = hash_rows(dataset)
        accelerator = self.trainer.accelerator
        missing = self.cache.missing(keys, tokens=self.tokens)
        if accelerator.is_main_process:
            rows = counted(len(keys), self.trainer.unit.removesuffix("s"))
            logger.info(
                "%s: reference log-probs of %d of %s are in %s",
                name, len(keys) - len(missing), rows, self.cache.folder,
            )  # fmt: skip
        # By place, not by rank in the list: another rank may already have stored some of them.
        ranks, rank = accelerator.num_processes, accelerator.process_index
        self._fill(dataset, keys, [place for place in missing if place % ranks == rank], name)
        accelerator.wait_for_everyone()
        # Nothing, unless the ranks do not see each other's files.
        self._fill(dataset, keys, self.cache.missing(keys, tokens=self.tokens), name)
        return self._with_columns(dataset, keys)

    def _fill(self, dataset: Dataset, keys: list[bytes], places: list[int], name: str) -> None:
        """Compute and store what is missing; whatever happens, finished batches are kept."""
        pending: list[tuple[bytes, Tensor, Sequence[Tensor]]] = []
        since = time.monotonic()
        try:
            for batch in self._batches(dataset, places, name):
                pending += [(keys[place], *scores) for place, scores in self._score(batch)]
                if time.monotonic() - since > _SECONDS_A_PART:
                    pending, since = self._store(pending), time.monotonic()
        finally:
            self._store(pending)

    def _store(self, pending: list[tuple[bytes, Tensor, Sequence[Tensor]]]) -> list[Any]:
        if pending:
            keys, sums, sides = zip(*pending, strict=True)
            tokens = [side for pair in sides for side in pair] if self.tokens else None
            with full_cache_named(self.cache.folder):
                self.cache.append(list(keys), torch.stack(sums), tokens)
        return []

    def _batches(
        self, dataset: Dataset, places: list[int], name: str
    ) -> Iterator[Mapping[str, Any]]:
        """Batches of pairs of similar length, the longest first: the largest need shows at once.

        Where forwards are collectives, every process gets as many; those that it has too few of
        are repeated with ``"counted": 0``.
        """
        args, rows = self.trainer.args, PairRows(dataset)
        size = args.precompute_ref_batch_size or args.per_device_eval_batch_size
        lengths = sum(rows.lengths().values())
        order = sorted(places, key=lambda place: -int(lengths[place]))  # type: ignore[index]
        members = [order[start : start + size] for start in range(0, len(order), size)]
        steps = len(members)
        if is_sharded(self.trainer):
            most = self._most(steps)
            if most:
                _ = self.reference  # whose placing is a collective, too
            if forwards_meet(self.trainer):
                steps = most
        quiet = args.disable_tqdm or not self.trainer.is_world_process_zero() or not order
        unit = self.trainer.unit.removesuffix("s")
        with tqdm(total=len(order), desc=f"reference, {name}", unit=unit, disable=quiet) as bar:
            for step in range(steps):
                if step < len(members):
                    yield self.collate(rows.__getitems__(members[step]))
                    bar.update(len(members[step]))
                else:
                    last = members[-1] if members else [0]
                    yield {**self.collate(rows.__getitems__(last)), "counted": 0}

    def _most(self, number: int) -> int:
        """The largest number of all processes."""
        mine = torch.tensor(number, device=self.trainer.args.device)
        return int(self.trainer.accelerator.gather(mine).max())

    def _score(self, batch: Mapping[str, Any]) -> Iterator[tuple[int, tuple[Tensor, list[Tensor]]]]:
        """Row number, sums ``[2]`` and token log-probs of both sides of every pair of a batch."""
        moved = self.trainer._prepare_inputs(dict(batch))
        packs = moved["packs"]
        counting = batch.get("counted", len(packs))
        if forwards_meet(self.trainer):
            packs = packs + packs[-1:] * (self._most(len(packs)) - len(packs))
        for index, pack in enumerate(packs):
            with self.trainer.accelerator.autocast():
                scores = self.reference.score(pack)
            if index >= counting:
                continue
            sums = scores.sequence_logps.view(-1, 2).cpu()
            assert scores.token_logps is not None
            sides = scores.token_logps.cpu().split(pack["counts"])
            for pair, place in enumerate(pack["pair_index"].tolist()):
                row = int(batch["row_ids"][place])
                yield row, (sums[pair], list(sides[2 * pair : 2 * pair + 2]))

    def _with_columns(self, dataset: Dataset, keys: list[bytes]) -> Dataset:
        sums = self.cache.lookup(keys)
        columns: dict[str, list[Any]] = {
            field: sums[:, side].tolist() for side, field in enumerate(REF_FIELDS)
        }
        if self.tokens:
            sides = self.cache.lookup_tokens(keys)
            for side, field in enumerate(REF_TOKEN_FIELDS):
                columns[field] = [values.tolist() for values in sides[side::2]]
        dataset = dataset.remove_columns([c for c in columns if c in dataset.column_names])
        for field, values in columns.items():
            dataset = dataset.add_column(field, values)
        return dataset


class UnpairedPrecompute(Precompute):
    """The same for labelled completions: in the cache, each is a pair whose other side is empty.

    Where the loss compares with mismatched completions, each prompt gets one that is fixed by the
    dataset (:mod:`fastdaa.data.mismatched`), and its log-probs, too.
    """

    def __init__(self, trainer: PreferenceTrainer, given: nn.Module | None):
        super().__init__(trainer, given)
        own: Any = trainer.data_collator
        self.cross = own.cross if own.mismatched else None
        layout: Any = "padded" if own.layout == "padded" else "prefix_shared"
        self.collate = PairCollator(layout, own.pad_token_id, own.tokens_per_pack)

    def __call__(self, dataset: Dataset | None, name: str) -> Dataset | None:
        """The dataset with columns of reference log-probs; other columns stay."""
        if dataset is None:
            return None
        fields = dict(zip(SEQUENCE_FIELDS, TOKEN_FIELDS, strict=False))
        pairs = dataset.select_columns(list(fields)).rename_columns(fields)
        pairs = pairs.add_column(TOKEN_FIELDS[2], [[]] * len(dataset))
        dataset = _with_column(dataset, REF_SEQUENCE_FIELD, self._sums(pairs, name))
        if self.cross is None:
            return dataset
        pairs = crossed_pairs(dataset, self.cross)
        sums = self._sums(pairs, f"{name}, mismatched")
        completions = pairs.data.column(TOKEN_FIELDS[1])
        dataset = _with_column(dataset, MISMATCHED_FIELD, completions)
        return _with_column(dataset, REF_MISMATCHED_FIELD, sums)

    def _sums(self, pairs: Dataset, name: str) -> list[float]:
        """Log-probs of the chosen completions of ``pairs``."""
        scored = super().__call__(pairs, name)
        assert scored is not None
        return [*scored.with_format(None)[REF_FIELDS[0]]]


def _with_column(dataset: Dataset, field: str, values: Any) -> Dataset:
    if field in dataset.column_names:
        dataset = dataset.remove_columns(field)
    return dataset.add_column(field, values)


def _model_key(trainer: PreferenceTrainer, given: nn.Module | None) -> str:
    """Everything of the reference that log-probs depend on, as the first process has it.

    Under FSDP others may wait for its weights.
    """
    key = [_own_key(trainer, given) if trainer.is_world_process_zero() else ""]
    return str(broadcast_object_list(key)[0])


def _own_key(trainer: PreferenceTrainer, given: nn.Module | None) -> str:
    model = trainer.model if given is None else given
    core = causal_lm(model)
    # The policy's own adapter is off while it is the reference; only a copy of its start counts.
    adapters: dict[str, Any] = getattr(model, "peft_config", None) or {}
    if given is None:
        adapters = {name: one for name, one in adapters.items() if name == REF_ADAPTER}
    config = {k: v for k, v in core.config.to_dict().items() if k not in _IRRELEVANT}
    precision = str(trainer.accelerator.mixed_precision)
    others: dict[str, str] = {}
    if trainer.args.head_engine == "triton":
        others["engine"] = "triton"  # other kernels round the last bits otherwise
    if is_sharded(trainer) and precision != "no":
        # They compute with rounded weights, where autocast rounds factors.
        others["sharding"] = str(trainer.accelerator.distributed_type.value)
    return store_key(
        hash_weights(_weights(core, adapters)),
        config=json.dumps(config, sort_keys=True, default=str),
        # Its scaling is not among the weights.
        adapter="".join(
            json.dumps(one.to_dict(), sort_keys=True, default=str) for one in adapters.values()
        ),
        mixed_precision=precision,
        reduction="sum",
        **others,
    )


def _weights(core: nn.Module, adapters: Iterable[str]) -> list[tuple[str, Tensor]]:
    """Weights in force while the reference scores, under the names of the plain model.

    Args:
        adapters: the names of those that count.
    """
    marks = tuple(f".{name}" for name in adapters)
    weights = []
    for name, tensor in core.state_dict().items():
        adapter = "lora_" in name or "modules_to_save" in name
        if not adapter or any(mark in name for mark in marks):
            weights.append(
                (name.replace(".base_layer", "").replace(".original_module", ""), tensor)
            )
    return weights
